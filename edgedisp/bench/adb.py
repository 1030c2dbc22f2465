"""`adb[:SERIAL]`: an Android phone on USB, or in the network once `adb connect` has reached it.

The phone page measures in the phone's browser, which needs nothing installed. It is served on this machine's
127.0.0.1, and a port of the phone's own 127.0.0.1 leads there through the cable (`adb reverse`): no network
is needed, and the browser takes the page for a local one, with threads and its finest clock. Model, chip,
battery and thermal status are read before and after, since heat decides much on a phone.
$EDGEDISP_ADB is the command to use in place of `adb`, such as `adb -P 5038`.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edgedisp.bench.browser import PageDevice
from edgedisp.bench.devices import BenchOptions, check_memory, external_program
from edgedisp.bench.page_protocol import PAGE_BYTES
from edgedisp.bench.page_server import PageServer
from edgedisp.bench.phone import PORT
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import printable
from edgedisp.core.results import Json

ANSWER_S = 30.0
LOOK_S = 5.0  # between questions whether the phone is still there: each costs it a little
# android.os.BatteryManager and android.os.PowerManager
BATTERY = {1: "unknown", 2: "charging", 3: "discharging", 4: "not charging", 5: "full"}
THERMAL = {0: "none", 1: "light", 2: "moderate", 3: "severe", 4: "critical", 5: "emergency", 6: "shutdown"}
# Name -> property of Android.
PROPERTIES = {
    "manufacturer": "ro.product.manufacturer",
    "model": "ro.product.model",
    "maker": "ro.soc.manufacturer",  # since Android 12
    "chip": "ro.soc.model",
    "board": "ro.board.platform",
    "android": "ro.build.version.release",
    "architecture": "ro.product.cpu.abi",
}
LOW_PERCENT = 20


class AdbFailed(BuildFailed):
    """adb failed; the message ends with adb's own."""


@contextmanager
def connect(name: str, bundles: Mapping[str, Path], options: BenchOptions) -> Iterator[PhonePage]:
    """The phone of `adb:SERIAL`, or the only one, as a device; see `devices.py`."""
    program = external_program(name, "EDGEDISP_ADB", "adb", "install adb, such as `apt-get install adb`")
    serial = name.partition(":")[2]
    phone = Phone(name, (*program, *(["-s", serial] if serial else [])))
    try:
        phone.adb("get-state")
        machine = phone.machine()
    except AdbFailed as error:
        raise BadInput(
            f"{error}; plug the phone in, turn on USB debugging in its developer options and allow this "
            "computer on its screen; of several name one, as `adb devices` lists them: adb:SERIAL"
        ) from error
    yield PhonePage(phone, bundles, options, machine)


@dataclass(frozen=True)
class Phone:
    """A phone that takes commands. name: as the user wrote it; command: adb with its options."""

    name: str
    command: tuple[str, ...]

    def adb(self, *words: str, stdin: str = "") -> str:
        """What an adb command prints. Raises AdbFailed."""
        try:
            result = subprocess.run(
                [*self.command, *words], input=stdin.encode(), capture_output=True, timeout=ANSWER_S
            )
        except subprocess.TimeoutExpired:
            raise AdbFailed(f"{self.name}: adb gave no answer within {ANSWER_S:g} s") from None
        output, errors = (text.decode("utf-8", "replace") for text in (result.stdout, result.stderr))
        if result.returncode:
            why = printable((errors.strip() or output.strip()).replace("\n", "; "))
            raise AdbFailed(f"{self.name}: adb ended with code {result.returncode}: {why[:500]}")
        return output.replace("\r\n", "\n")

    def shell(self, script: str) -> str:
        """What a script prints in the phone's shell, which reads it from stdin: command lines can be seen."""
        return self.adb("shell", "-T", "sh", stdin=script + "\nexit 0\n")

    def machine(self) -> Json:
        """The keys of the runner's description, and `phone`; None: not known."""
        props = dict(re.findall(r"^\[([^\]]+)\]: \[(.*)\]$", self.shell("getprop"), re.MULTILINE))
        memory = dict(re.findall(r"^(\w+):\s+(\d+) kB", self.shell("cat /proc/meminfo"), re.MULTILINE))
        texts = {name: printable(props.get(key, ""))[:200] or None for name, key in PROPERTIES.items()}
        total, available = (memory.get(name) for name in ("MemTotal", "MemAvailable"))
        return {
            "cpu": " ".join(filter(None, (texts["maker"], texts["chip"] or texts["board"]))) or None,
            "architecture": texts.pop("architecture"),
            "memory_bytes": total and int(total) * 1024,
            "memory_available_bytes": available and int(available) * 1024,
            "system": f"Android {texts['android'] or ''}".strip(),
            "phone": {**texts, "measured_by": "the phone page in its browser"},
        }

    def state(self) -> Json:
        """Load, battery and heat; None: not known. Raises AdbFailed."""
        text = self.shell("(dumpsys battery; dumpsys thermalservice; cat /proc/loadavg) 2>/dev/null")
        names = "level|temperature|status|Thermal Status"
        figures = dict(re.findall(rf"^ *({names}): (\d{{1,9}})$", text, re.MULTILINE))
        level, tenths, status, thermal = (int(figures.get(name, -1)) for name in names.split("|"))
        load = re.search(r"^([\d.]+) [\d.]+ [\d.]+ ", text, re.MULTILINE)
        return {
            "load_average_1m": float(load.group(1)) if load else None,
            "battery_percent": None if level < 0 else level,
            "battery_status": BATTERY.get(status),
            "battery_temperature_c": None if tenths < 0 else tenths / 10,
            "thermal_status": THERMAL.get(thermal),  # since Android 10
        }


class PhonePage(PageDevice):
    """The phone's browser. Raises BadInput where a bundle does not fit into the phone's memory."""

    def __init__(
        self, phone: Phone, bundles: Mapping[str, Path], options: BenchOptions, machine: Json
    ) -> None:
        super().__init__(phone.name, bundles, options, machine)
        self.phone, self.looked = phone, 0.0
        for label, bundle in self.plan.bundles.items():
            available = machine["memory_available_bytes"]
            check_memory(phone.name, available, label, bundle.weights_bytes + PAGE_BYTES)

    def state(self) -> Json | None:
        with suppress(AdbFailed):
            return self.phone.state()
        return None

    def warnings(self, states: Mapping[str, Json | None]) -> Iterator[str]:
        for when, state in ((when, state) for when, state in states.items() if state):
            if state["thermal_status"] not in (None, "none"):
                yield f"thermal status {state['thermal_status']} {when}: the phone slows down; let it cool"
            if state["battery_status"] == "charging":
                yield f"charging {when}, which warms it; `adb tcpip` works without cable"
            if (state["battery_percent"] or 100) < LOW_PERCENT:
                yield f"battery at {state['battery_percent']} % {when}: many phones run slower then"

    @contextmanager
    def open(self, server: PageServer) -> Iterator[None]:
        """Lead a port of the phone's 127.0.0.1 to the server, PORT if it is free, and open the page there."""
        phone = self.phone
        try:
            phone.adb("reverse", "--no-rebind", f"tcp:{PORT}", f"tcp:{server.port}")
            self.port = PORT
        except AdbFailed:
            self.port = int(phone.adb("reverse", "tcp:0", f"tcp:{server.port}").strip() or 0)
        try:
            url = shlex.quote(f"http://127.0.0.1:{self.port}/{server.token}/?run=bench")
            output = phone.shell(
                "input keyevent KEYCODE_WAKEUP >/dev/null 2>&1\n"
                f"am start -a android.intent.action.VIEW -d {url} 2>&1"
            )
            if error := re.search(r"^Error.*", output, re.MULTILINE):
                text = printable(error.group())[:200]
                raise BuildFailed(f"{phone.name}: no browser opens the page there: {text}")
            yield
        finally:
            with suppress(AdbFailed):  # where the phone is gone, the port is too
                phone.adb("reverse", "--remove", f"tcp:{self.port}")

    def gone(self) -> str | None:
        if time.monotonic() - self.looked < LOOK_S:
            return None
        self.looked = time.monotonic()
        with suppress(AdbFailed):
            if f"tcp:{self.port}" in self.phone.adb("reverse", "--list").split():
                return None
        return "it is not attached any more, or its port no longer leads here"

    def hint(self) -> str:
        return "; unlock the phone, and leave the page in front" + "".join(f"; {n}" for n in self.notes[:1])
