"""What stands for an Android phone in the tests of `adb` devices, and the adb server that reaches it.

A folder: `bin` holds what Android has and Linux lacks (getprop, dumpsys, am, input, run-as ...) as small
scripts, `termux` a Python that only `run-as` gets to, `home` what is written there. `am start` opens a
headless Chromium on the address. The rest (grep, uname, /proc) is this machine's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adbd import MODEL, Adbd

from edgedisp.bench.chromium import FLAGS, find_browser
from edgedisp.core.errors import BadInput

PROGRAM = shutil.which("adb")
MISSING = None if PROGRAM else "no adb here (apt-get install adb)"
PROPS = {
    "ro.product.manufacturer": "Testmaker",
    "ro.product.model": MODEL,
    "ro.soc.manufacturer": "Chipmaker",
    "ro.soc.model": "CM1234",
    "ro.board.platform": "board",
    "ro.build.version.release": "14",
    "ro.build.version.sdk": "34",
    "ro.product.cpu.abi": "arm64-v8a",
}
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  status: {status}
  health: 2
  present: true
  level: {level}
  scale: 100
  voltage: 4200
  temperature: 291
"""
THERMAL = """IsStatusOverride: false
Thermal Status: {thermal}
Cached temperatures:
\tTemperature{{mValue=0.0, mType=3, mName=skin, mStatus=0}}
HAL Ready: true
Current temperatures from HAL:
\tTemperature{{mValue=48.5, mType=0, mName=CPU0, mStatus=0}}
\tTemperature{{mValue=31.5, mType=3, mName=skin, mStatus=0}}
"""
# The phone's own programs. `run-as` is refused unless Termux is the debug build; a Python is in Termux alone.
PROGRAMS = {
    "getprop": 'cat "$PHONE/props"',
    "dumpsys": 'cat "$PHONE/$1"',
    "settings": "echo 0",
    "input": 'echo "$@" >> "$PHONE/input"',
    "run-as": '[ -e "$PHONE/debuggable" ] || exit 1; shift; PATH="$PHONE/termux:$PATH" exec "$@"',
    "python3": "exit 127",
    "python": "exit 127",
    "am": """echo "Starting: Intent { act=android.intent.action.VIEW }"
        [ -e "$PHONE/browser" ] || { echo "Error: Activity not started, unable to resolve Intent"; exit 0; }
        while [ "$1" != -d ]; do shift; done
        echo "$2" > "$PHONE/opened"
        setsid "$PHONE/browser" "$2" > /dev/null 2>&1 < /dev/null &
        echo $! > "$PHONE/browser.pid" """,
}


class AndroidPhone(Adbd):
    """A phone that adb can connect to."""

    def state(self, *, thermal: int = 0, level: int = 85, status: int = 3) -> None:
        """What dumpsys tells from now on."""
        (self.folder / "battery").write_text(BATTERY.format(level=level, status=status))
        (self.folder / "thermalservice").write_text(THERMAL.format(thermal=thermal))


@contextmanager
def phone(folder: Path, **options: object) -> Iterator[AndroidPhone]:
    """A phone in `folder`, with what it started ended at the end."""
    for name in ("bin", "termux", "home"):
        (folder / name).mkdir(parents=True)
    for name, text in PROGRAMS.items():
        _program(folder / "bin" / name, text)
    _program(folder / "termux" / "python3", f'exec {sys.executable} "$@"')
    with contextlib.suppress(BadInput):
        root = "--no-sandbox" if os.geteuid() == 0 else ""
        words = [find_browser(), *FLAGS, root, f"--user-data-dir={folder / 'profile'}"]
        _program(folder / "browser", f'exec {" ".join(words)} "$@"')
    (folder / "props").write_text("".join(f"[{name}]: [{value}]\n" for name, value in PROPS.items()))
    found = AndroidPhone(folder, **options)  # type: ignore[arg-type]
    found.state()
    try:
        yield found
    finally:
        found.cut()
        close_browser(folder)


def _program(place: Path, text: str) -> None:
    place.write_text(f"#!/bin/sh\n{text}\n")
    place.chmod(0o755)


def close_browser(folder: Path) -> None:
    """End the browser that `am` started, with its helpers, which form one group."""
    if (told := folder / "browser.pid").exists():
        group = int(told.read_text())
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, sign)
                time.sleep(0.3)
        told.unlink()


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """An adb server with keys of its own; the command to reach it, for $EDGEDISP_ADB."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"env HOME={folder} {PROGRAM} -P {port}"
    subprocess.run([*command.split(), "start-server"], check=True, capture_output=True, timeout=30)
    try:
        yield command
    finally:
        subprocess.run([*command.split(), "kill-server"], check=False, capture_output=True, timeout=30)


def connect(command: str, found: Adbd) -> None:
    """Have adb connect to a phone."""
    words = [*command.split(), "connect", f"127.0.0.1:{found.port}"]
    subprocess.run(words, check=False, capture_output=True, timeout=30)


def disconnect(command: str) -> None:
    """Have adb forget all phones."""
    subprocess.run([*command.split(), "disconnect"], check=False, capture_output=True, timeout=30)
