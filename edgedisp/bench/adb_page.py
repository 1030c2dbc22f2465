"""The phone page in the browser of a phone that adb reaches, started from here.

The page is served on this machine's own 127.0.0.1. A port of the phone's 127.0.0.1 leads there through the
cable (`adb reverse`), so no network is needed, and the browser takes the page for a local one: isolated, with
threads and its finest clock. It is opened with `?run=bench`, which starts the benchmark without a touch.

Left out: unlocking the phone, and closing the browser's tab, which is the user's.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedisp.bench import android
from edgedisp.bench.adb_client import AdbFailed, Phone
from edgedisp.bench.devices import Wanted
from edgedisp.bench.hardware import readings
from edgedisp.bench.page_bundle import PAGE_BYTES, PageBundle, read_bundles
from edgedisp.bench.page_plan import PagePlan, measured
from edgedisp.bench.page_resources import page_resources
from edgedisp.bench.page_run import MEMORY_SHARE, Opened
from edgedisp.bench.page_server import PageServer
from edgedisp.bench.phone import PORT
from edgedisp.bench.remote import copied
from edgedisp.bench.uploads import printable
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.paths import data_folder
from edgedisp.core.progress import Progress

MIB = 1 << 20
FIRST_S = 120.0  # for the page to open: a browser that is new there may ask its user something first
LOOK_S = 5.0
QUIET_S = 0.5  # of pause between turns, in which the phone can be asked something
UNLOCK = "; unlock the phone, and leave the page in front"


class AdbPage:
    """Bundles that are timed by the phone's browser; `told` is its machine as adb tells it.

    Raises BadInput for a bundle that the page cannot use or that does not fit into the phone's memory.
    """

    def __init__(
        self,
        phone: Phone,
        bundles: Mapping[str, Path],
        wanted: Wanted,
        told: Mapping[str, Any],
        scratch: Path,
    ) -> None:
        if wanted.sweep:
            raise BadInput(
                f"--threads sweep: the browser of {phone.name} takes a number of threads; without one it is 1"
            )
        self.phone, self.wanted, self.told, self.scratch = phone, wanted, told, scratch
        self.page = page_resources(data_folder("export") / "web")
        available = told["memory_available_bytes"]
        self.plan = PagePlan(
            read_bundles(bundles),
            wanted.prompt,
            wanted.generate,
            wanted.repetitions,
            wanted.threads or 1,
            wanted.seed,
            wanted.warmup,
            wanted.pause_s,
            None if available is None else int(MEMORY_SHARE * available),
            wanted.requests,
        )
        self.warnings = tight(phone.name, self.plan.bundles, available)

    def measure(self, progress: Progress) -> dict[str, Any]:
        """See `devices.py`. Raises DeviceLost. The phone's port is given back in every case."""
        plan = self.plan
        resources = {**self.page, **plan.resources()}
        notes: list[str] = []
        with (
            PageServer(
                resources, host="127.0.0.1", port=0, accepts=plan.accepts, note=notes.append
            ) as server,
            self.phone.port_that_leads_here(server.port, PORT) as port,
        ):
            watch = _Watch(self.phone, port, self.wanted.pause_s, self.scratch, notes)
            name, wait_s = self.phone.name, self.wanted.timeout_s
            page = Opened(plan, server, watch, name, self._machine, wait_s, min(FIRST_S, wait_s))
            open_in_browser(self.phone, f"http://127.0.0.1:{port}/{server.token}/?run=bench")
            figures, seen = page.collect(progress)
        found = measured(plan, figures, device=name, pairs=self.wanted.pairs, readings=seen)
        warnings = [*found["warnings"], *self.warnings]
        machine = self._machine(found["machine"])
        return {**found, **page.scores.result(), "machine": machine, "warnings": warnings}

    def _machine(self, page: dict[str, Any]) -> dict[str, Any]:
        """What adb tells of the phone, and what the page tells where adb does not."""
        known = {name: value for name, value in self.told.items() if value is not None}
        return {**page, **known}


def open_in_browser(phone: Phone, address: str) -> None:
    """Wake the screen and open an address in the phone's browser. Raises BuildFailed where none opens it."""
    said = phone.shell(
        "input keyevent KEYCODE_WAKEUP >/dev/null 2>&1; "
        f"am start -a android.intent.action.VIEW -d {shlex.quote(address)} 2>&1"
    )
    errors = [line for line in said.splitlines() if line.startswith("Error")]
    if errors:
        why = printable(errors[0])[:200]
        raise BuildFailed(f"{phone.name}: no browser opens the page there; install or enable one: {why}")


def tight(name: str, bundles: Sequence[PageBundle], available: int | None) -> list[str]:
    """What to say where memory is short. Raises BadInput where the weights alone do not fit.

    `available`: bytes that the phone could give without ending apps that are in use; None: not told.
    """
    if available is None:
        return []
    heaviest = max(bundles, key=lambda bundle: bundle.weights_bytes)
    least = heaviest.weights_bytes + PAGE_BYTES
    if least > available:
        raise BadInput(
            f"{name}: {available / MIB:.0f} MiB of memory are free there, and {heaviest.label} takes at "
            f"least {least / MIB:.0f}; close apps, or take a bundle of fewer bits"
        )
    largest = max(bundles, key=lambda bundle: bundle.expected_memory_bytes)
    if largest.expected_memory_bytes <= available:
        return []
    return [
        f"{largest.label} needs about {largest.expected_memory_bytes / MIB:.0f} MiB and "
        f"{available / MIB:.0f} were free: Android ends other apps for it, or the page"
    ]


class _Watch:
    """The phone as adb sees it while its browser has the page open; see `page_run.Watch`."""

    def __init__(self, phone: Phone, port: int, pause_s: float, scratch: Path, notes: list[str]) -> None:
        self.phone, self.port, self.scratch, self.notes = phone, port, scratch, notes
        self.quiet = pause_s >= QUIET_S
        self.looked = time.monotonic()

    def gone(self) -> str | None:
        """Asked of adb every few seconds alone: each time costs the phone a little."""
        if time.monotonic() - self.looked < LOOK_S:
            return None
        self.looked = time.monotonic()
        if self.phone.leads_here(self.port):
            return None
        return "it is not attached any more, or its port no longer leads here"

    def hint(self) -> str:
        return UNLOCK + "".join(f"; {note}" for note in self.notes[:1])

    def begins(self) -> None:
        """The phone is left alone from here on."""

    def ended(self) -> dict[str, Any]:
        """Clock and load, read in the pause after a turn; nothing where there is none."""
        if not self.quiet:
            return {}
        try:
            told = android.sections(self.phone.shell(android.script(android.READINGS)))
        except AdbFailed:
            return {}  # it went away: `gone` says so
        files = android.files(told.get("files", ""))
        found = readings(copied(self.scratch / "readings", files, self.phone.name))
        return {name: found[name] for name in ("load_average_1m", "clock_mhz")}
