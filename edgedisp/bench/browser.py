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

from edgedisp.bench.bundles import read_bundle
from edgedisp.bench.devices import Address, BenchOptions, Device
from edgedisp.bench.interleaved_timing import MEMORY_SHARE
from edgedisp.bench.page_protocol import Figures, PagePlan, PageRun, Scores, Step, Trouble
from edgedisp.bench.page_server import PageServer, page_resources
from edgedisp.bench.system import describe, runner
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import data_folder
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
    """A browser that opens the phone page by itself.

    available_bytes: memory for open bundles where the options do not say. Raises BadInput for bundles or
    options that a page cannot work with.
    """

    def __init__(
        self, name: str, bundles: Mapping[str, Path], options: BenchOptions, available_bytes: int | None
    ) -> None:
        if options.threads == "sweep":
            raise BadInput(f"--threads sweep: {name} takes a number of threads; without one it is 1")
        if not bundles:
            raise BadInput("no bundle to time; name at least one bundle folder")
        if options.memory_bytes is None and available_bytes is not None:
            options = replace(options, memory_bytes=int(MEMORY_SHARE * available_bytes))
        # One thread by default: a second one made decoding slower in WebAssembly wherever it was tried.
        options = replace(options, threads=options.threads or 1)
        self.name = name
        self.plan = PagePlan(tuple(read_bundle(label, path) for label, path in bundles.items()), options)
        self.page = page_resources(data_folder("export") / "web")
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
    def describe(self, page: Json) -> Json:
        """The machine; `page`: what the page says of it."""

    @abstractmethod
    def state(self) -> Json | None:
        """The machine's `load_average_1m` and what else is read before and after; None: it is gone."""

    def sensors(self) -> Json:
        """The machine's sensors after a turn."""
        return {}

    def measure(self, progress: Progress) -> DeviceResult:
        """Serve the page and wait for the complete figures and all scores; see `devices.py`.

        Where the page cannot go on, is gone, or is silent for `timeout_s`, the result has `lost`; BuildFailed
        where nothing was timed until then. The browser is ended in every case.
        """
        run, states = PageRun(self.plan), {"before": self.state()}
        resources = {**self.page, **self.plan.resources()}
        with (
            PageServer(resources, self.plan.read_upload, self.notes.append) as server,
            self.open(server),
        ):
            lost = self._collect(run, server, progress)
        if lost and not run.turns:
            raise BuildFailed(f"device {self.name}: {lost}")
        states["after"] = None if lost else self.state()
        loads = {when: state and state["load_average_1m"] for when, state in states.items()}
        result = run.result(self.name)
        machine = {**self.describe(result.machine), "state": states}
        warnings = (*result.warnings, *self.warnings(states))
        return replace(result, machine=machine, load_average=loads, warnings=warnings, lost=lost)

    def warnings(self, states: dict[str, Json | None]) -> Iterable[str]:
        """Warnings for figures that were measured between two states."""
        return ()

    def _collect(self, run: PageRun, server: PageServer, progress: Progress) -> str | None:
        """Wait until the run is complete, or return why it cannot be."""
        timeout_s = self.plan.options.timeout_s
        heard = time.monotonic()
        while not run.complete:
            try:
                upload, _ = server.received.get(timeout=0.5)
            except queue.Empty:
                if why := self.gone():
                    return why
                if time.monotonic() - heard > timeout_s:
                    return f"nothing heard for {timeout_s:g} s{self.hint()}"
                continue
            heard = time.monotonic()
            if isinstance(upload, Step):
                progress(upload.done, upload.total, upload.note)
            elif isinstance(upload, Trouble):
                return f"the page could not go on: {upload.message}"
            elif isinstance(upload, Scores | Figures):
                run.add(upload)
                if run.turns and run.turns - 1 not in run.sensors:
                    run.sensors[run.turns - 1] = self.sensors()
        return None


class BrowserPage(PageDevice):
    """A headless Chromium on this machine."""

    def __init__(self, bundles: Mapping[str, Path], options: BenchOptions) -> None:
        self.program = find_browser()
        super().__init__("browser", bundles, options, describe()["memory_available_bytes"])

    @contextmanager
    def open(self, server: PageServer) -> Iterator[None]:
        # Chromium's helpers may write for a moment after they were ended.
        profile = tempfile.TemporaryDirectory(prefix="edgedisp-browser-", ignore_cleanup_errors=True)
        with tempfile.TemporaryFile() as self._log, profile as folder:
            start = Path(folder) / "start.html"  # the folder is this user's alone
            address = json.dumps(f"{server.address}?run=bench")
            start.write_text(f"<script>location.replace({address})</script>", encoding="utf-8")
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
        """The end of what the browser wrote to stderr."""
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace").strip()
        return f":\n{text[-2000:]}" if text else ""

    def state(self) -> Json:
        return {"load_average_1m": runner().read_sensors()["load_average_1m"]}

    def sensors(self) -> Json:
        readings = runner().read_sensors()
        return {name: readings[name] for name in ("load_average_1m", "clock_mhz", "temperature_c")}

    def describe(self, page: Json) -> Json:
        return {**describe(), "browser": {**page["browser"], "program": Path(self.program).name}}


@contextmanager
def connect(address: Address, bundles: Mapping[str, Path], options: BenchOptions) -> Iterator[BrowserPage]:
    """The browser as a device; see `devices.py`."""
    yield BrowserPage(bundles, options)


def find_browser() -> str:
    """The program named by $CHROME, else the first of PROGRAMS on the PATH. BadInput where there is none."""
    chrome = os.environ.get("CHROME")
    for name in [chrome] if chrome else PROGRAMS:
        if program := shutil.which(name):
            return program
    if chrome:
        raise BadInput(f"$CHROME names {chrome}, which is no program; name a Chromium or Chrome")
    raise BadInput(
        f"device browser: no Chromium found (looked for {', '.join(PROGRAMS)}); install one, such as "
        "`apt-get install chromium`, or name it with the environment variable CHROME"
    )
