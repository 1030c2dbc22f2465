"""`adb[:SERIAL]`: an Android phone on USB, or in the network once `adb connect` has reached it.

The phone page measures in the phone's browser, which needs nothing installed. It is served on this machine's
127.0.0.1, and a port of the phone's own 127.0.0.1 leads there through the cable (`adb reverse`): no network
is needed, and the browser takes the page for a local one, with threads and its finest clock. Model, chip,
battery and thermal status are read before and after, since heat decides much on a phone.
$EDGEDISP_ADB is the command to use in place of `adb`, such as `adb -P 5038`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from edgedisp.bench.browser import PageDevice
from edgedisp.bench.bundles import PAGE_BYTES
from edgedisp.bench.devices import Address, BenchOptions, external_program
from edgedisp.bench.page_server import PageServer
from edgedisp.bench.phone import PORT
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import printable
from edgedisp.core.results import Json

MIB = 1 << 20
ANSWER_S = 30.0
LOOK_S = 5.0  # between questions whether the phone is still there: each costs it a little
MARK = "-- edgedisp: "
# Name -> a command of the phone's shell.
IDENTITY = {
    "props": "getprop",
    "architecture": "uname -m",
    "online": "cat /sys/devices/system/cpu/online",
    "memory": "cat /proc/meminfo",
}
STATE = {
    "battery": "dumpsys battery",
    "thermal": "dumpsys thermalservice",  # since Android 10
    "saver": "settings get global low_power",
    "load": "cat /proc/loadavg",
}
# android.os.BatteryManager and android.os.PowerManager
BATTERY = {1: "unknown", 2: "charging", 3: "discharging", 4: "not charging", 5: "full"}
THERMAL = {0: "none", 1: "light", 2: "moderate", 3: "severe", 4: "critical", 5: "emergency", 6: "shutdown"}
SKIN = 3  # kind of temperature: what a hand feels, and what phones throttle by
LOW_PERCENT = 20


class AdbFailed(BuildFailed):
    """adb failed; the message ends with adb's own."""


@dataclass(frozen=True)
class Phone:
    """A phone that takes commands. `command`: adb with its options; `name`: as the user wrote it."""

    command: tuple[str, ...]
    name: str

    def run(self, *words: str, stdin: str = "") -> str:
        """What an adb command prints. Raises AdbFailed."""
        command = [*self.command, *words]
        try:
            result = subprocess.run(
                command, input=stdin.encode(), capture_output=True, timeout=ANSWER_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise AdbFailed(f"{self.name}: adb gave no answer within {ANSWER_S:g} s") from None
        texts = (
            text.decode("utf-8", "replace").replace("\r\n", "\n") for text in (result.stdout, result.stderr)
        )
        out, errors = texts
        if result.returncode:
            why = printable((errors.strip() or out.strip()).replace("\n", "; "))
            raise AdbFailed(f"{self.name}: adb ended with code {result.returncode}: {why[:500]}")
        return out

    def shell(self, script: str) -> str:
        """What a script prints in the phone's shell, which reads it from stdin: command lines can be seen."""
        return self.run("shell", "-T", "sh", stdin=script + "\nexit 0\n")

    def ask(self, commands: Mapping[str, str]) -> dict[str, str]:
        """Name -> what its command printed there. One call for all, as each costs the phone a process."""
        script = "; ".join(f"echo '{MARK}{name}'; {line} 2>/dev/null" for name, line in commands.items())
        parts = re.split(rf"^{re.escape(MARK)}", self.shell(script), flags=re.MULTILINE)[1:]
        return {name.strip(): answer for name, _, answer in (part.partition("\n") for part in parts)}


def find_phone(name: str, serial: str | None) -> Phone:
    """The attached phone with this serial, or the only one. $ANDROID_SERIAL names one too, as for adb.

    Raises BadInput where adb is missing, none or several are attached, or it does not take commands.
    """
    program = external_program(name, "EDGEDISP_ADB", "adb", "install adb, such as `apt-get install adb`")
    try:
        text = Phone(program, name).run("devices", "-l")
    except AdbFailed as error:
        raise BadInput(str(error)) from error
    # adb may print news of its server first.
    lines = text.rpartition("List of devices attached")[2]
    states = re.findall(r"^\s*(\(no serial number\)|\S+)\s+(no permissions|\S+)", lines, re.MULTILINE)
    attached = {printable(name): printable(state) for name, state in states}
    serial = serial or os.environ.get("ANDROID_SERIAL")
    if serial is None and len(attached) == 1:
        serial = next(iter(attached))
    if serial is None or attached.get(serial) != "device":
        state = f"{serial} is {attached.get(serial, 'not attached')}" if serial else None
        listed = ", ".join(f"adb:{name} ({state})" for name, state in attached.items()) or "none"
        raise BadInput(
            f"{name}: {state or f'{len(attached)} are attached'}; of these ({listed}) name one that is a "
            "`device`, or plug one in, turn on USB debugging in its developer options and allow this "
            "computer on its screen"
        )
    return Phone((*program, "-s", serial), name)


@contextmanager
def connect(address: Address, bundles: Mapping[str, Path], options: BenchOptions) -> Iterator[PhonePage]:
    """The phone as a device; see `devices.py`."""
    phone = find_phone(address.name, address.serial)
    try:
        machine = phone_machine(phone.ask(IDENTITY))
    except AdbFailed as error:
        raise BadInput(str(error)) from error
    yield PhonePage(phone, bundles, options, machine)


class PhonePage(PageDevice):
    """The phone's browser. Raises BadInput where a bundle does not fit into the phone's memory."""

    def __init__(
        self, phone: Phone, bundles: Mapping[str, Path], options: BenchOptions, machine: Json
    ) -> None:
        available = machine["memory_available_bytes"]
        super().__init__(phone.name, bundles, options, available)
        self.phone, self.machine, self.looked = phone, machine, 0.0
        largest = max(self.plan.bundles, key=lambda bundle: bundle.weights_bytes)
        least = largest.weights_bytes + PAGE_BYTES
        if available is not None and least > available:
            raise BadInput(
                f"{phone.name}: {available / MIB:.0f} MiB of memory are free there, and {largest.label} "
                f"takes at least {least / MIB:.0f}; close apps, or take a bundle of fewer bits"
            )

    def state(self) -> Json | None:
        with suppress(AdbFailed):
            return phone_state(self.phone.ask(STATE))
        return None

    def warnings(self, states: dict[str, Json | None]) -> Iterator[str]:
        return state_warnings(states)

    @contextmanager
    def open(self, server: PageServer) -> Iterator[None]:
        """Lead a port of the phone's 127.0.0.1 to the server, PORT if it is free, and open the page there."""
        phone = self.phone
        try:
            phone.run("reverse", "--no-rebind", f"tcp:{PORT}", f"tcp:{server.port}")
            self.port = PORT
        except AdbFailed:
            self.port = int(phone.run("reverse", "tcp:0", f"tcp:{server.port}").strip() or 0)
        try:
            address = shlex.quote(f"http://127.0.0.1:{self.port}/{server.token}/?run=bench")
            output = phone.shell(
                "input keyevent KEYCODE_WAKEUP >/dev/null 2>&1\n"
                f"am start -a android.intent.action.VIEW -d {address} 2>&1"
            )
            if error := re.search(r"^Error.*", output, re.MULTILINE):
                text = printable(error.group())[:200]
                raise BuildFailed(f"{phone.name}: no browser opens the page there: {text}")
            yield
        finally:
            with suppress(AdbFailed):  # where the phone is gone, the port is too
                phone.run("reverse", "--remove", f"tcp:{self.port}")

    def gone(self) -> str | None:
        if time.monotonic() - self.looked < LOOK_S:
            return None
        self.looked = time.monotonic()
        with suppress(AdbFailed):
            if f"tcp:{self.port}" in self.phone.run("reverse", "--list").split():
                return None
        return "it is not attached any more, or its port no longer leads here"

    def hint(self) -> str:
        return "; unlock the phone, and leave the page in front" + "".join(f"; {n}" for n in self.notes[:1])

    def describe(self, page: Json) -> Json:
        """What adb says of the phone, and what the page says where adb does not."""
        return {**page, **{name: value for name, value in self.machine.items() if value is not None}}


def phone_machine(answers: Mapping[str, str]) -> Json:
    """The keys of the runner's description, and `phone`, from the answers to IDENTITY; None: not known."""
    props = dict(re.findall(r"^\[([^\]]+)\]: \[(.*)\]$", answers.get("props", ""), re.MULTILINE))

    def prop(*names: str) -> str | None:
        return next((printable(props[n]).strip()[:200] for n in names if props.get(n, "").strip()), None)

    chip = prop("ro.soc.model", "ro.board.platform", "ro.hardware")
    maker = prop("ro.soc.manufacturer") if prop("ro.soc.model") else None
    phone = {
        "manufacturer": prop("ro.product.manufacturer"),
        "model": prop("ro.product.model"),
        "soc": f"{maker} {chip}" if maker else chip,
        "android": prop("ro.build.version.release"),
        "api": prop("ro.build.version.sdk"),
        "abi": prop("ro.product.cpu.abi"),
        "measured_by": "the phone page in its browser",
    }
    table = dict(re.findall(r"^(\w+):\s+(\d+) kB", answers.get("memory", ""), re.MULTILINE))
    total, available = (int(table[k]) * 1024 if k in table else None for k in ("MemTotal", "MemAvailable"))
    cores = count_cpus(answers.get("online", ""))
    return {
        "cpu": phone["soc"],
        "architecture": answers.get("architecture", "").strip() or phone["abi"],
        "physical_cores": cores,
        "logical_cpus": cores,
        "memory_bytes": total,
        "memory_available_bytes": available,
        "system": f"Android {phone['android']} (API {phone['api']})" if phone["android"] else "Android",
        "phone": phone,
    }


def count_cpus(text: str) -> int | None:
    """How many CPUs a kernel list such as `0-3,6` names; None where it names none."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", text)
    return sum(int(last or first) - int(first) + 1 for first, last in ranges) or None


def phone_state(answers: Mapping[str, str]) -> Json:
    """Load, battery and heat, from the answers to STATE; None: not known."""
    battery = dict(re.findall(r"^\s*([\w ]+): (-?\d{1,9})$", answers.get("battery", ""), re.MULTILINE))
    names = ("level", "scale", "temperature", "status")
    level, scale, tenths, status = (int(battery[n]) if n in battery else None for n in names)
    thermal = answers.get("thermal", "")
    thermal_status = re.search(r"^\s*Thermal Status: (\d+)", thermal, re.MULTILINE)
    # The last list holds what the sensors say now; the one before may be older.
    now = thermal.rpartition("Current temperatures")[2] or thermal
    skin = [float(value) for value in re.findall(rf"mValue=(-?[\d.]+), mType={SKIN},", now)]
    load = re.match(r"\s*([\d.]+)", answers.get("load", ""))
    return {
        "load_average_1m": float(load.group(1)) if load else None,
        "battery_percent": round(100 * level / scale) if level is not None and scale else None,
        "battery_status": BATTERY.get(status or 0),
        "battery_temperature_c": None if tenths is None else tenths / 10,
        "thermal_status": THERMAL.get(int(thermal_status.group(1))) if thermal_status else None,
        "skin_temperature_c": max(skin, default=None),
        "battery_saver": {"1": True, "0": False}.get(answers.get("saver", "").strip()),
    }


def state_warnings(states: Mapping[str, Json | None]) -> Iterator[str]:
    """Warnings for figures that were measured between two states of a phone; None: it was gone."""
    if None in states.values():
        yield "the phone was gone when its state was to be read"
    read = {when: state for when, state in states.items() if state is not None}
    for when, state in read.items():
        if (status := state["thermal_status"]) not in (None, "none"):
            yield f"thermal status {status} {when} the measurement: the phone slows itself down; let it cool"
    if any(state["battery_status"] == "charging" for state in read.values()):
        yield "the phone was being charged, which warms it; `adb tcpip` works without cable"
    levels = [state["battery_percent"] for state in read.values() if state["battery_percent"] is not None]
    if levels and min(levels) < LOW_PERCENT:
        yield f"battery at {min(levels)} %: many phones run slower below {LOW_PERCENT} %; charge it"
    if any(state["battery_saver"] for state in read.values()):
        yield "the battery saver was on: it lowers clocks; turn it off"
