"""The device `browser`: bundles timed by the phone page in a headless Chromium on this machine.

The page is the one a phone gets, served on 127.0.0.1 under a token, opened with `?run=bench`, which starts
the benchmark without a touch. What it sends back becomes the rows of every other device (`page_plan.py`).
127.0.0.1 counts as a secure context, so the page is cross-origin isolated: threads can be asked for, and its
clock has steps of 5 microseconds.

Left out: Firefox and WebKit (their headless modes need drivers), and slowing the processor down to look like
a phone's: Chromium's throttle does not reach workers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgedisp.bench.chromium import Browser, find_browser, started
from edgedisp.bench.devices import Address, Wanted
from edgedisp.bench.machine import describe, readings
from edgedisp.bench.page_bundle import PageBundle, read_bundles
from edgedisp.bench.page_plan import PagePlan, measured
from edgedisp.bench.page_resources import page_resources
from edgedisp.bench.page_run import MEMORY_SHARE, Opened
from edgedisp.bench.page_scores import Requests
from edgedisp.bench.page_server import PageServer
from edgedisp.bench.timing import other_cpus
from edgedisp.core.errors import BadInput
from edgedisp.core.paths import data_folder
from edgedisp.core.progress import Progress, silent


def measure(
    bundles: Mapping[str, Path],
    *,
    prompt: int = 128,
    generate: int = 128,
    repetitions: int = 5,
    threads: int | None = None,
    seed: int = 0,
    pause_s: float = 0.0,
    warmup: int = 1,
    pairs: Sequence[tuple[str, str]] = (),
    memory_bytes: int | None = None,
    timeout_s: float = 900.0,
    progress: Progress = silent,
    web: Path | None = None,
    program: str | None = None,
    served: Sequence[PageBundle] | None = None,
    requests: Requests | None = None,
) -> dict[str, Any]:
    """Time every bundle `repetitions` times, in turns; the same dictionary as `timing.measure`.

    `threads` None is 1: a second thread made decoding slower in WebAssembly wherever it was tried. `web` is
    the page's folder (default: the packaged one), `program` the browser (default: `find_browser`), `served`
    what `read_bundle` gave of the bundles, where that is known already. `requests`: items to be scored when
    the timing is done (page_scores.py); the result then has `answers`.

    Raises BadInput for a bundle that the page cannot use or where no browser is found, BuildFailed where the
    page or the browser fails, or nothing is heard for `timeout_s`: DeviceLost where something was timed until
    then. The browser is ended in every case.
    """
    program = program or find_browser()
    served = read_bundles(bundles) if served is None else tuple(served)
    if not served:
        raise BadInput("no bundle to time; name at least one bundle folder")
    if missing := [label for one in pairs for label in one if label not in bundles]:
        raise BadInput(f"pairs: {', '.join(missing)}: not among the bundles")
    if memory_bytes is None and (available := describe()["memory_available_bytes"]) is not None:
        memory_bytes = int(MEMORY_SHARE * available)
    options = (prompt, generate, repetitions, threads or 1, seed, warmup, pause_s, memory_bytes)
    plan = PagePlan(served, *options, requests or {})
    resources = {**page_resources(web or data_folder("export") / "web"), **plan.resources()}
    before = readings()["load_average_1m"]
    with (
        PageServer(resources, host="127.0.0.1", port=0, accepts=plan.accepts, note=silent_note) as server,
        started(program, f"{server.address}?run=bench") as browser,
    ):
        page = Opened(plan, server, _Watch(browser), "browser", _machine, timeout_s)
        figures, seen = page.collect(progress)
        facts = browser.facts()
    found = measured(plan, figures, device="browser", pairs=pairs, readings=seen)
    machine = _machine(found["machine"])
    return {
        **found,
        **page.scores.result(),
        "machine": {**machine, "browser": {**machine["browser"], **facts}},
        "load_average": {"before": before, "after": readings()["load_average_1m"]},
    }


class Page:
    """The browser as a device."""

    def __init__(self, bundles: Mapping[str, Path], wanted: Wanted) -> None:
        self.bundles, self.wanted, self.program = bundles, wanted, find_browser()
        self.served = read_bundles(bundles)

    def measure(self, progress: Progress) -> dict[str, Any]:
        """See `devices.py`. Raises DeviceLost."""
        return measure(
            self.bundles,
            threads=self.wanted.threads,
            program=self.program,
            served=self.served,
            progress=progress,
            requests=self.wanted.requests,
            **self.wanted.timing(),
        )


@contextmanager
def opened(address: Address, bundles: Mapping[str, Path], wanted: Wanted) -> Iterator[Page]:
    """The browser as a device; see `devices.py`. Raises BadInput where there is none, or a sweep is asked."""
    if wanted.sweep:
        raise BadInput(f"--threads sweep: {address.name} takes a number of threads; without one it is 1")
    page_resources(data_folder("export") / "web")  # refused before anything is timed where they are missing
    yield Page(bundles, wanted)


def silent_note(line: str) -> None:
    """The page is ours: what it sends fits."""


def _machine(told: dict[str, Any]) -> dict[str, Any]:
    """This machine, with what the page told of its browser."""
    return {**describe(), "browser": told["browser"]}


class _Watch:
    """The browser's process, and this machine's counters during a turn; see `page_run.Watch`."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.begins()

    def gone(self) -> str | None:
        code = self.browser.process.poll()
        return None if code is None else f"the browser ended with code {code}{self.browser.tail()}"

    def hint(self) -> str:
        return self.browser.tail()

    def begins(self) -> None:
        self.counters, self.own_s, self.started = readings(), self.browser.cpu_s(), time.monotonic()

    def ended(self) -> dict[str, Any]:
        """Clock, temperature, load, and the CPUs that others kept busy since; None where it is not told."""
        after, wall_s = readings(), time.monotonic() - self.started
        own_s = self.browser.cpu_s() - self.own_s
        return {
            "cpu_s": own_s,
            "other_cpus": other_cpus(self.counters, after, own_s, wall_s),
            "load_average_1m": after["load_average_1m"],
            "clock_mhz": after["clock_mhz"],
            "temperature_c": after["temperature_c"],
        }
