"""The device `browser`: bundles timed by the phone page in a headless Chromium on this machine.

The page is the one a phone gets, served on 127.0.0.1 under a token, opened with `?run=bench`, which starts
the benchmark without a touch. What it sends back becomes the rows of every other device (`page_plan.py`).
127.0.0.1 counts as a secure context, so the page is cross-origin isolated: threads can be asked for, and its
clock has steps of 5 microseconds.

The browser gets a profile of its own in a temporary folder, no extensions, and no background work: nothing is
fetched but the page. Its sandbox is on, except for root, for whom Chromium refuses to start with it.

Left out: Firefox and WebKit (their headless modes need drivers), and slowing the processor down to look like
a phone's: Chromium's throttle does not reach workers.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgedisp import BadInput, BuildFailed, Progress, data_folder, silent
from edgedisp.bench.devices import Address, DeviceLost, Wanted
from edgedisp.bench.machine import describe, readings
from edgedisp.bench.page_bundle import read_bundle
from edgedisp.bench.page_plan import PagePlan, measured
from edgedisp.bench.page_server import PageServer, page_resources
from edgedisp.bench.uploads import Figures, Step, Trouble

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--disable-extensions",
    "--disable-sync",
    "--disable-breakpad",
    "--metrics-recording-only",
    "--no-pings",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers give /dev/shm 64 MB
    "--disable-background-timer-throttling",
    "--disable-renderer-backgrounding",
    "--password-store=basic",
    "--use-mock-keychain",
)
TAIL_CHARS = 2000
POLITE_S = 5.0
SHORTEST_TOLD_S = 0.5  # the kernel counts in ticks of 10 ms


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
    **others: Any,
) -> dict[str, Any]:
    """Time every bundle `repetitions` times, in turns; the same dictionary as `timing.measure`.

    `threads` None is 1: a second thread made decoding slower in WebAssembly wherever it was tried. `web` is
    the page's folder (default: the packaged one), `program` the browser (default: `find_browser`). `others`
    are options of other devices and not looked at.

    Raises BadInput for a bundle that the page cannot use or where no browser is found, BuildFailed where the
    page or the browser fails, or nothing is heard for `timeout_s`: DeviceLost where something was timed until
    then. The browser is ended in every case.
    """
    program = program or find_browser()
    served = tuple(read_bundle(label, folder) for label, folder in bundles.items())
    if not served:
        raise BadInput("no bundle to time; name at least one bundle folder")
    if missing := [label for one in pairs for label in one if label not in bundles]:
        raise BadInput(f"pairs: {', '.join(missing)}: not among the bundles")
    if memory_bytes is None and (available := describe()["memory_available_bytes"]) is not None:
        memory_bytes = int(0.8 * available)
    plan = PagePlan(served, prompt, generate, repetitions, threads or 1, seed, warmup, pause_s, memory_bytes)
    resources = {**page_resources(web or data_folder("export") / "web"), **plan.resources()}
    before = readings()["load_average_1m"]
    with (
        PageServer(resources, host="127.0.0.1", port=0, accepts=plan.accepts, note=silent_note) as server,
        started(program, f"{server.address}?run=bench") as browser,
    ):
        figures, seen = _collect(plan, server, browser, timeout_s, progress)
        facts = browser.facts()
    found = measured(plan, figures, device="browser", pairs=pairs, readings=seen)
    return {
        **found,
        "machine": {**describe(), "browser": {**found["machine"]["browser"], **facts}},
        "load_average": {"before": before, "after": readings()["load_average_1m"]},
    }


class Page:
    """The browser as a device."""

    def __init__(self, bundles: Mapping[str, Path], wanted: Wanted) -> None:
        self.bundles, self.wanted, self.program = bundles, wanted, find_browser()

    def measure(self, progress: Progress) -> dict[str, Any]:
        """See `devices.py`. Raises DeviceLost."""
        wanted = self.wanted
        return measure(
            self.bundles,
            prompt=wanted.prompt,
            generate=wanted.generate,
            repetitions=wanted.repetitions,
            threads=wanted.threads,
            seed=wanted.seed,
            pause_s=wanted.pause_s,
            warmup=wanted.warmup,
            pairs=wanted.pairs,
            timeout_s=wanted.timeout_s,
            program=self.program,
            progress=progress,
        )


@contextmanager
def opened(address: Address, bundles: Mapping[str, Path], wanted: Wanted) -> Iterator[Page]:
    """The browser as a device; see `devices.py`. Raises BadInput where there is none, or a sweep is asked."""
    if wanted.sweep:
        raise BadInput(f"--threads sweep: {address.name} takes a number of threads; without one it is 1")
    page_resources(data_folder("export") / "web")  # refused before anything is timed where they are missing
    for label, folder in bundles.items():
        read_bundle(label, folder)
    yield Page(bundles, wanted)


def silent_note(line: str) -> None:
    """The page is ours: what it sends fits."""


def find_browser() -> str:
    """The program named by $CHROME, else the first of PROGRAMS on the PATH. BadInput where there is none."""
    named = os.environ.get("CHROME")
    if named:
        found = shutil.which(named)
        if found is None:
            raise BadInput(f"$CHROME names {named}, which is no program; name a Chromium or Chrome")
        return found
    for name in PROGRAMS:
        if found := shutil.which(name):
            return found
    raise BadInput(
        "device browser: no Chromium found (looked for " + ", ".join(PROGRAMS) + "); install one, such as "
        "`apt-get install chromium`, or name it with the environment variable CHROME"
    )


class Browser:
    """A headless browser with one page open."""

    def __init__(self, process: subprocess.Popen[bytes], program: str, log: Any) -> None:
        self.process, self.program, self._log = process, program, log

    def tail(self) -> str:
        """The end of what it wrote to stderr."""
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace").strip()
        return f":\n{text[-TAIL_CHARS:]}" if text else ""

    def family(self) -> list[Any]:
        """Its processes, as psutil sees them; those that end meanwhile are left out."""
        import psutil

        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.Error:
            return []

    def cpu_s(self) -> float:
        """Processor time of all its processes together."""
        import psutil

        total = 0.0
        for process in self.family():
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def facts(self) -> dict[str, Any]:
        """Program, and the largest resident size of the process that runs the page (Linux; else None).

        All bundles of a page share that process; where one alone was timed, it is that bundle's.
        """
        import psutil

        peaks = []
        for process in self.family():
            with suppress(psutil.Error, OSError):
                if "--type=renderer" in process.cmdline():
                    lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
                    peaks += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        return {"program": Path(self.program).name, "renderer_peak_memory_bytes": max(peaks, default=None)}


@contextmanager
def started(program: str, address: str) -> Iterator[Browser]:
    """A headless browser on `address`, ended with all its processes and its profile."""
    with tempfile.TemporaryFile() as log, _profile() as profile:
        command = [program, *FLAGS, f"--user-data-dir={profile}", "--window-size=360,740"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--no-sandbox")
        process = subprocess.Popen(
            [*command, address],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # its helpers form one group, and Ctrl-C reaches this program alone
        )
        try:
            yield Browser(process, program, log)
        finally:
            _end(process)


@contextmanager
def _profile() -> Iterator[str]:
    """A folder for the browser's profile. Its helpers may write for a moment after they were ended."""
    with tempfile.TemporaryDirectory(prefix="edgedisp-browser-", ignore_cleanup_errors=True) as folder:
        yield folder


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end, then kill it."""
    for sign in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
        with suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, sign)
            else:
                process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLITE_S)
    process.wait()


def _collect(
    plan: PagePlan, server: PageServer, browser: Browser, timeout_s: float, progress: Progress
) -> tuple[Figures, list[dict[str, Any]]]:
    """Wait for the complete figures; with each turn that arrives, what the machine was doing meanwhile."""
    figures: Figures | None = None
    seen: list[dict[str, Any]] = []
    moment = _Moment(browser)
    heard = time.monotonic()
    while figures is None or not figures.complete:
        try:
            upload = server.received.get(timeout=0.5).upload
        except queue.Empty:
            if browser.process.poll() is not None:
                raise _failed(f"the browser ended with code {browser.process.returncode}{browser.tail()}",
                              plan, figures) from None  # fmt: skip
            if time.monotonic() - heard > timeout_s:
                raise _failed(f"nothing heard for {timeout_s:g} s{browser.tail()}", plan, figures) from None
            continue
        heard = time.monotonic()
        if isinstance(upload, Step):
            progress(upload.done, upload.total, upload.note)
            moment = _Moment(browser)  # a turn begins after the step is told
        elif isinstance(upload, Trouble):
            raise _failed(f"the page could not go on: {upload.message}", plan, figures)
        else:
            if len(upload.repetitions) > len(seen):
                seen.append(moment.until_now())
            figures = upload
    return figures, seen


def _failed(why: str, plan: PagePlan, figures: Figures | None) -> BuildFailed:
    """The error, with the partial result if there is one."""
    message = f"device browser: {why}"
    if figures is None or not figures.repetitions:
        return BuildFailed(message)
    partial = measured(plan, figures, device="browser")
    machine = {**describe(), "browser": partial["machine"]["browser"]}
    return DeviceLost(message, {**partial, "machine": machine, "lost": why})


class _Moment:
    """The machine's counters at the beginning of a turn."""

    def __init__(self, browser: Browser) -> None:
        self.browser, self.counters = browser, readings()
        self.own_s, self.started = browser.cpu_s(), time.monotonic()

    def until_now(self) -> dict[str, Any]:
        """Clock, temperature, load, and the CPUs that others kept busy since; None where it is not told."""
        after, wall_s = readings(), time.monotonic() - self.started
        own_s = self.browser.cpu_s() - self.own_s
        return {
            "cpu_s": own_s,
            "other_cpus": self._others(after, own_s, wall_s),
            "load_average_1m": after["load_average_1m"],
            "clock_mhz": after["clock_mhz"],
            "temperature_c": after["temperature_c"],
        }

    def _others(self, after: Mapping[str, float | None], own_s: float, wall_s: float) -> float | None:
        """CPUs that were busy with something else, on average."""
        if wall_s < SHORTEST_TOLD_S:
            return None
        taken = 0.0
        for name in ("busy_cpu_s", "stolen_cpu_s"):
            start, end = self.counters[name], after[name]
            if start is None or end is None:
                return None
            taken += end - start
        return max(0.0, taken - own_s) / wall_s
