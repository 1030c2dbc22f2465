"""A headless Chromium of one's own: found, started on one page, watched, and ended with all its processes.

It gets a profile of its own in a temporary folder, no extensions and no background work: nothing is fetched
but the page. Its sandbox is on, except for root, for whom Chromium refuses to start with it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput

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
