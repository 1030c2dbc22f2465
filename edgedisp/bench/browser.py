"""The device `browser`: bundles timed by the phone page in a headless Chromium on this machine.

The page is the one a phone gets, served on 127.0.0.1 under a token and opened with `?run=bench`, which starts
the benchmark without a touch. 127.0.0.1 counts as a secure context, so threads can be used and the clock has
steps of 5 microseconds. Chromium gets a profile of its own and no background work; its sandbox is on, except
for root. It reads the address with the token from a private file, as any user can read a command line.
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
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from edgedisp.bench.devices import BenchOptions, Device
from edgedisp.bench.interleaved_timing import MEMORY_SHARE, log_tail
from edgedisp.bench.page_protocol import PagePlan, Upload, page_result
from edgedisp.bench.page_server import PageServer
from edgedisp.bench.system import describe, runner
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress
from edgedisp.core.results import DeviceResult, Json

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = shlex.split(
    "--headless --no-first-run --no-default-browser-check --disable-background-networking "
    "--disable-component-update --disable-default-apps --disable-domain-reliability --disable-extensions "
    "--disable-sync --disable-breakpad --metrics-recording-only --no-pings --disable-gpu "
    "--disable-dev-shm-usage --disable-background-timer-throttling --disable-renderer-backgrounding "
    "--password-store=basic --use-mock-keychain --window-size=360,740"
)
EXIT_S = 5.0


class PageDevice(Device):
    """A browser that opens the phone page by itself; machine: what is known beside what the page says.

    Raises BadInput for bundles or options that a page cannot work with.
    """

    def __init__(self, name: str, bundles: Mapping[str, Path], options: BenchOptions, machine: Json) -> None:
        if options.threads == "sweep":
            raise BadInput(f"--threads sweep: {name} takes a number of threads; without one it is 1")
        available = machine["memory_available_bytes"]
        if options.memory_bytes is None and available is not None:
            options = replace(options, memory_bytes=int(MEMORY_SHARE * available))
        self.name, self.machine = name, machine
        # One thread by default: a second one made decoding slower in WebAssembly wherever it was tried.
        self.plan = PagePlan(bundles, replace(options, threads=options.threads or 1))
        self.notes: list[str] = []  # what the server refused

    @abstractmethod
    def open(self, server: PageServer) -> AbstractContextManager[None]:
        """Open the page, and close it with the block."""

    @abstractmethod
    def gone(self) -> str | None:
        """Why no more can come; None while it may."""

    @abstractmethod
    def hint(self) -> str:
        """What to add where nothing has been heard for too long."""

    @abstractmethod
    def state(self) -> Json | None:
        """The machine's `load_average_1m` and what else is read before and after; None: it is gone."""

    def sensors(self) -> Json:
        """The machine's sensors after a turn."""
        return {}

    def warnings(self, states: dict[str, Json | None]) -> Iterable[str]:
        """Warnings for figures that were measured between two states."""
        return ()

    def measure(self, progress: Progress) -> DeviceResult:
        """Serve the page, wait for the complete figures and all scores, and end the browser in every case."""
        plan, states = self.plan, {"before": self.state()}
        with PageServer(plan.resources, plan.read_upload, self.notes.append) as server, self.open(server):
            upload, sensors, lost = self._collect(server, progress)
        if upload is None or not upload.repetitions:
            raise BuildFailed(f"device {self.name}: {lost}")
        states["after"] = None if lost else self.state()
        result = page_result(plan, upload, self.name, sensors)
        known = {name: value for name, value in self.machine.items() if value is not None}
        return replace(
            result,
            machine={**result.machine, **known, "state": states},
            load_average={when: state and state["load_average_1m"] for when, state in states.items()},
            warnings=(*result.warnings, *self.warnings(states)),
            lost=lost,
        )

    def _collect(
        self, server: PageServer, progress: Progress
    ) -> tuple[Upload | None, dict[int, Json], str | None]:
        """The last upload, readings of sensors after each turn, and why the upload is not complete."""
        last: Upload | None = None
        sensors: dict[int, Json] = {}
        timeout_s, heard = self.plan.options.timeout_s, time.monotonic()
        while last is None or not last.complete:
            try:
                last, _ = server.received.get(timeout=0.5)
            except queue.Empty:
                if why := self.gone():
                    return last, sensors, why
                if time.monotonic() - heard > timeout_s:
                    return last, sensors, f"nothing heard for {timeout_s:g} s{self.hint()}"
                continue
            heard = time.monotonic()
            if last.trouble:
                return last, sensors, f"the page could not go on: {last.trouble}"
            progress(last.done, last.total, last.note)
            turn = len(last.repetitions) - 1
            if turn not in sensors:  # uploads between turns come while the page is timing
                sensors[turn] = self.sensors()
        return last, sensors, None


class BrowserPage(PageDevice):
    """A headless Chromium on this machine."""

    def __init__(self, bundles: Mapping[str, Path], options: BenchOptions) -> None:
        self.program = find_browser()
        super().__init__("browser", bundles, options, describe())

    @contextmanager
    def open(self, server: PageServer) -> Iterator[None]:
        # Chromium's helpers may write for a moment after they were ended.
        profile = tempfile.TemporaryDirectory(prefix="edgedisp-browser-", ignore_cleanup_errors=True)
        with tempfile.TemporaryFile() as self._log, profile as folder:
            start = Path(folder) / "start.html"  # the folder is this user's alone
            url = json.dumps(f"{server.url}?run=bench")
            start.write_text(f"<script>location.replace({url})</script>", encoding="utf-8")
            sandbox = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
            self._process = subprocess.Popen(
                [self.program, *FLAGS, f"--user-data-dir={folder}", *sandbox, start.as_uri()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # its helpers form one group, and Ctrl-C reaches this program alone
            )
            try:
                yield
            finally:
                for number in (signal.SIGTERM, signal.SIGKILL):
                    with suppress(ProcessLookupError, PermissionError):
                        os.killpg(self._process.pid, number)
                    with suppress(subprocess.TimeoutExpired):
                        self._process.wait(EXIT_S)

    def gone(self) -> str | None:
        code = self._process.poll()
        return None if code is None else f"the browser ended with code {code}{self.hint()}"

    def hint(self) -> str:
        return log_tail(self._log)

    def state(self) -> Json:
        return self.sensors()

    def sensors(self) -> Json:
        readings = runner().read_sensors()
        return {name: readings[name] for name in ("load_average_1m", "clock_mhz", "temperature_c")}


@contextmanager
def connect(name: str, bundles: Mapping[str, Path], options: BenchOptions) -> Iterator[BrowserPage]:
    """The browser as a device; see `devices.py`."""
    yield BrowserPage(bundles, options)


def find_browser() -> str:
    """The program named by $CHROME, else the first of PROGRAMS on the PATH. BadInput where there is none."""
    names = [os.environ["CHROME"]] if os.environ.get("CHROME") else PROGRAMS
    if program := next(filter(None, map(shutil.which, names)), None):
        return program
    raise BadInput(
        f"device browser: no Chromium found (looked for {', '.join(names)}); install one, such as "
        "`apt-get install chromium`, or name it with the environment variable CHROME"
    )
