"""The device `browser`: bundles timed by the phone page in a headless Chromium on this machine.

The page is the one a phone gets, served on 127.0.0.1 under a token and opened with `?run=bench`, which starts
the benchmark without a touch. 127.0.0.1 counts as a secure context, so threads can be asked for and the clock
has steps of 5 microseconds. Chromium gets a profile of its own and no background work; its sandbox is on,
except for root. The address with the token goes to it in a private file, as any user can read a command line.
"""

from __future__ import annotations

import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from edgedisp.bench.devices import Address, BenchOptions, Device, DeviceLost
from edgedisp.bench.interleaved_timing import MEMORY_SHARE
from edgedisp.bench.page_plan import PagePlan, page_result, read_bundle
from edgedisp.bench.page_protocol import Figures, PendingScores, Scores, Step, Trouble
from edgedisp.bench.page_server import PageServer, page_resources
from edgedisp.bench.system import describe, runner
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.paths import data_folder
from edgedisp.core.progress import Progress

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = shlex.split(
    "--headless --no-first-run --no-default-browser-check --disable-background-networking "
    "--disable-component-update --disable-default-apps --disable-domain-reliability --disable-extensions "
    "--disable-sync --disable-breakpad --metrics-recording-only --no-pings --disable-gpu "
    "--disable-dev-shm-usage --disable-background-timer-throttling --disable-renderer-backgrounding "
    "--password-store=basic --use-mock-keychain --window-size=360,740"
)
POLITE_S = 5.0


class Monitor:
    """What is known of the browser that has a page open, beside what the page sends."""

    def gone(self) -> str | None:
        """Why no more can come; None while it may. Asked about twice a second."""

    def hint(self) -> str:
        """What to add where nothing has been heard for too long."""
        return ""

    def turn_begins(self) -> None:
        """Called before a turn."""

    def turn_ends(self) -> dict[str, Any]:
        """What was seen of the machine during the turn that has ended; {} where nothing was."""
        return {}


@dataclass
class PageSession:
    """A page that was opened by us: its plan, where it sends to, and who watches its browser.

    machine: makes the whole description of what the page told. first_s: the longest wait for its first word.
    """

    plan: PagePlan
    server: PageServer
    monitor: Monitor
    device: str
    machine: Callable[[dict[str, Any]], dict[str, Any]]
    timeout_s: float
    first_s: float

    def __post_init__(self) -> None:
        self.scores = PendingScores(self.plan.options.requests)
        self.figures: Figures | None = None
        self.sensors: dict[int, dict[str, Any]] = {}

    def collect(self, progress: Progress) -> dict[str, Any]:
        """Wait for the complete figures and all scores; the device's result.

        Raises BuildFailed where the page says that it cannot go on, is gone, or silent for `timeout_s`:
        DeviceLost where something was timed until then.
        """
        heard, patience_s = time.monotonic(), self.first_s
        while self.figures is None or not (self.figures.complete and self.scores.complete):
            try:
                upload = self.server.received.get(timeout=0.5).upload
            except queue.Empty:
                if why := self.monitor.gone():
                    raise self._lost(why) from None
                if time.monotonic() - heard > patience_s:
                    raise self._lost(f"nothing heard for {patience_s:g} s{self.monitor.hint()}") from None
                continue
            heard, patience_s = time.monotonic(), self.timeout_s
            if isinstance(upload, Step):
                progress(upload.done, upload.total, upload.note)
                self.monitor.turn_begins()  # a turn begins after the step is told
            elif isinstance(upload, Trouble):
                raise self._lost(f"the page could not go on: {upload.message}")
            elif isinstance(upload, Scores):
                self.scores.add(upload)
            else:
                if upload.repetitions and upload.repetitions[-1].turn not in self.sensors:
                    self.sensors[upload.repetitions[-1].turn] = self.monitor.turn_ends()
                self.figures = upload
        return self._result()

    def _result(self) -> dict[str, Any]:
        if self.figures is None:
            return {}
        result = page_result(self.plan, self.figures, self.device, self.sensors)
        return {**result, **self.scores.result(), "machine": self.machine(result["machine"])}

    def _lost(self, why: str) -> BuildFailed:
        """The error, with the partial result if there is one."""
        message = f"device {self.device}: {why}"
        if self.figures is None or not self.figures.repetitions:
            return BuildFailed(message)
        return DeviceLost(message, {**self._result(), "lost": why})


class BrowserPage(Device):
    """The browser as a device. `program`: Chromium; None: the one that is found."""

    def __init__(
        self, bundles: Mapping[str, Path], options: BenchOptions, program: str | None = None
    ) -> None:
        self.program = program or find_browser()
        self.page = page_resources(data_folder("export") / "web")
        available = describe()["memory_available_bytes"]
        if options.memory_bytes is None and available is not None:
            options = replace(options, memory_bytes=int(MEMORY_SHARE * available))
        self.plan = page_plan(bundles, options)

    def measure(self, progress: Progress) -> dict[str, Any]:
        """See `devices.py`. Raises DeviceLost. The browser is ended in every case."""
        plan, before = self.plan, runner().read_sensors()
        resources = {**self.page, **plan.resources()}
        with (
            PageServer(
                resources, host="127.0.0.1", port=0, refusal=plan.refusal, note=lambda line: None
            ) as server,
            start_browser(self.program, f"{server.address}?run=bench") as browser,
        ):
            timeout_s = plan.options.timeout_s
            monitor = _ProcessMonitor(browser)
            session = PageSession(plan, server, monitor, "browser", browser.machine, timeout_s, timeout_s)
            result = session.collect(progress)
        loads = {
            "before": before["load_average_1m"],
            "after": runner().read_sensors()["load_average_1m"],
        }
        return {**result, "load_average": loads}


@contextmanager
def connect(address: Address, bundles: Mapping[str, Path], options: BenchOptions) -> Iterator[BrowserPage]:
    """The browser as a device; see `devices.py`."""
    refuse_sweep(address.name, options)
    yield BrowserPage(bundles, options)


def refuse_sweep(name: str, options: BenchOptions) -> None:
    """Raises BadInput where a sweep over thread counts is asked of a page."""
    if options.threads == "sweep":
        raise BadInput(f"--threads sweep: {name} takes a number of threads; without one it is 1")


def page_plan(bundles: Mapping[str, Path], options: BenchOptions) -> PagePlan:
    """The plan of a page that starts by itself. One thread unless told otherwise: a second one made decoding
    slower in WebAssembly wherever it was tried. Raises BadInput for bundles or pairs that cannot be."""
    if not bundles:
        raise BadInput("no bundle to time; name at least one bundle folder")
    if missing := [label for pair in options.pairs for label in pair if label not in bundles]:
        raise BadInput(f"pairs: {', '.join(missing)}: not among the bundles")
    served = tuple(read_bundle(label, folder) for label, folder in bundles.items())
    return PagePlan(served, replace(options, threads=options.threads or 1))


def find_browser() -> str:
    """The program named by $CHROME, else the first of PROGRAMS on the PATH. BadInput where there is none."""
    named = os.environ.get("CHROME")
    if named:
        program = shutil.which(named)
        if program is None:
            raise BadInput(f"$CHROME names {named}, which is no program; name a Chromium or Chrome")
        return program
    for name in PROGRAMS:
        if program := shutil.which(name):
            return program
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
        return f":\n{text[-2000:]}" if text else ""

    def processes(self) -> list[psutil.Process]:
        """Its processes; those that end meanwhile are left out."""
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.Error:
            return []

    def cpu_s(self) -> float:
        """Processor time of all its processes together."""
        total = 0.0
        for process in self.processes():
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def machine(self, told: dict[str, Any]) -> dict[str, Any]:
        """This machine, with what the page told of its browser, and the peak of the process that ran the
        page."""
        peaks = []
        for process in self.processes():
            with suppress(psutil.Error, OSError):
                if "--type=renderer" in process.cmdline():
                    lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
                    peaks += [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
        facts = {"program": Path(self.program).name, "renderer_peak_memory_bytes": max(peaks, default=None)}
        return {**describe(), "browser": {**told["browser"], **facts}}


@contextmanager
def start_browser(program: str, address: str) -> Iterator[Browser]:
    """A headless browser on `address`, ended with all its processes and its profile."""
    # Chromium's helpers may write for a moment after they were ended.
    profile = tempfile.TemporaryDirectory(prefix="edgedisp-browser-", ignore_cleanup_errors=True)
    with tempfile.TemporaryFile() as log, profile as folder:
        start = Path(folder) / "start.html"  # the folder is this user's alone
        start.write_text(f"<script>location.replace({json.dumps(address)})</script>", encoding="utf-8")
        command = [program, *FLAGS, f"--user-data-dir={folder}"]
        command += ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        process = subprocess.Popen(
            [*command, start.as_uri()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # its helpers form one group, and Ctrl-C reaches this program alone
        )
        try:
            yield Browser(process, program, log)
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(POLITE_S)


class _ProcessMonitor(Monitor):
    """The browser's process, and this machine's counters during a turn."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.turn_begins()

    def gone(self) -> str | None:
        code = self.browser.process.poll()
        return None if code is None else f"the browser ended with code {code}{self.browser.tail()}"

    def hint(self) -> str:
        return self.browser.tail()

    def turn_begins(self) -> None:
        self.before, self.cpu_s, self.started = (
            runner().read_sensors(),
            self.browser.cpu_s(),
            time.monotonic(),
        )

    def turn_ends(self) -> dict[str, Any]:
        after, wall_s = runner().read_sensors(), time.monotonic() - self.started
        cpu_s = self.browser.cpu_s() - self.cpu_s
        busy = (self.before["busy_cpu_s"], after["busy_cpu_s"])
        return {
            "cpu_s": cpu_s,
            "other_cpus": runner().other_cpus(*busy, cpu_s, wall_s),
            **{name: after[name] for name in ("load_average_1m", "clock_mhz", "temperature_c")},
        }
