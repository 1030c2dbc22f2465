"""What an Android phone is and how it fares, from the texts of its own commands.

`getprop` tells model and chip, `dumpsys battery` and `dumpsys thermalservice` (Android 10) its battery and
whether it slows itself down, and a few files of /proc and /sys the rest, as far as the phone lets adb's shell
read them. They are asked for in one command, since each costs the phone a process. What a phone does not
tell is None.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgedisp.bench.uploads import printable

MARK = "-- edgedisp: "
LONGEST_FACT = 200
# What may be read between two turns: quick even where sensors are slow.
QUICK = ("/proc/loadavg", "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
FACTS = (
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/sys/devices/system/cpu/online",
    "/sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list",
)
LOOK = {
    "props": "getprop",
    "kernel": "uname -m",
    "files": f"grep -sH '' {' '.join(FACTS)}",  # one process prints all, each line after its path
}
STATE = {
    "battery": "dumpsys battery",
    "thermal": "dumpsys thermalservice",
    "saver": "settings get global low_power",
    "files": f"grep -sH '' {' '.join(QUICK)}",
}
READINGS = {"files": STATE["files"]}

# android.os.BatteryManager and android.os.PowerManager.
BATTERY = {1: "unknown", 2: "charging", 3: "discharging", 4: "not charging", 5: "full"}
THERMAL = {0: "none", 1: "light", 2: "moderate", 3: "severe", 4: "critical", 5: "emergency", 6: "shutdown"}
SKIN = 3  # kind of temperature: what a hand feels, and what phones throttle by
LOW_PERCENT = 20


def script(parts: Mapping[str, str]) -> str:
    """One shell command for several, whose output `sections` takes apart."""
    return "; ".join(f"echo '{MARK}{name}'; {command} 2>/dev/null" for name, command in parts.items())


def sections(text: str) -> dict[str, str]:
    """Name -> what its command printed."""
    found: dict[str, str] = {}
    for part in re.split(rf"^{re.escape(MARK)}", text, flags=re.MULTILINE)[1:]:
        name, _, said = part.partition("\n")
        found[name.strip()] = said
    return found


def files(text: str) -> dict[str, str]:
    """Path below / -> text, of lines `/PATH:TEXT`."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        path, colon, rest = line.partition(":")
        if colon and path.startswith(("/proc/", "/sys/")):
            found.setdefault(path.lstrip("/"), []).append(rest)
    return {path: "\n".join(lines) + "\n" for path, lines in found.items()}


def identity(props_text: str) -> dict[str, Any]:
    """{manufacturer, model, soc, android, api, abi} of `getprop`."""
    props = dict(re.findall(r"^\[([^\]]+)\]: \[(.*)\]$", props_text, re.MULTILINE))

    def told(*names: str) -> str | None:
        value = next((props[name] for name in names if props.get(name, "").strip()), "")
        return printable(value).strip()[:LONGEST_FACT] or None

    made_by, chip = told("ro.soc.manufacturer"), told("ro.soc.model", "ro.board.platform", "ro.hardware")
    named = chip and made_by and props.get("ro.soc.model")
    return {
        "manufacturer": told("ro.product.manufacturer"),
        "model": told("ro.product.model"),
        "soc": f"{made_by} {chip}" if named else chip,
        "android": told("ro.build.version.release"),
        "api": told("ro.build.version.sdk"),
        "abi": told("ro.product.cpu.abi"),
    }


def state(told: Mapping[str, str]) -> dict[str, Any]:
    """How the phone fares now: {battery_percent, battery_status, powered_by [], battery_temperature_c,
    thermal_status, skin_temperature_c, battery_saver}, of the sections of STATE."""
    battery = dict(re.findall(r"^\s*([\w ]+): (\S+)$", told.get("battery", ""), re.MULTILINE))
    level, scale = _whole(battery.get("level")), _whole(battery.get("scale"))
    tenths = _whole(battery.get("temperature"))
    thermal = told.get("thermal", "")
    status = re.search(r"^\s*Thermal Status: (\d+)", thermal, re.MULTILINE)
    # The last list holds what the sensors say now; the one before is what was told to listeners.
    now = thermal.rpartition("Current temperatures")[2] or thermal
    skin = [float(value) for value in re.findall(rf"mValue=(-?[\d.]+), mType={SKIN},", now)]
    saver = told.get("saver", "").strip()
    return {
        "battery_percent": round(100 * level / scale) if level is not None and scale else None,
        "battery_status": BATTERY.get(_whole(battery.get("status")) or 0),
        "powered_by": [name.split()[0] for name, on in battery.items()
                       if name.endswith(" powered") and on == "true"],
        "battery_temperature_c": None if tenths is None else tenths / 10,
        "thermal_status": THERMAL.get(int(status.group(1))) if status else None,
        "skin_temperature_c": max(skin, default=None),
        "battery_saver": saver == "1" if saver in ("0", "1") else None,
    }  # fmt: skip


def _whole(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch(r"-?\d{1,9}", text) else None


def warnings(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> list[str]:
    """What to beware of in figures that were taken between two states; `after` None: it is not known."""
    found = []
    hot = [(when, one.get("thermal_status")) for when, one in (("before", before), ("after", after or {}))]
    for when, status in hot:
        if status not in (None, "none"):
            found.append(
                f"thermal status {status} {when} the measurement: the phone slows itself down; let it cool"
            )
    states = [one for one in (before, after) if one]
    if any(one.get("battery_status") == "charging" for one in states):
        found.append("the phone was being charged meanwhile, which warms it; `adb tcpip` works without cable")
    levels = [one["battery_percent"] for one in states if one.get("battery_percent") is not None]
    if levels and min(levels) < LOW_PERCENT:
        found.append(f"battery at {min(levels)} %: many phones run slower below {LOW_PERCENT} %; charge it")
    if any(one.get("battery_saver") for one in states):
        found.append("the battery saver was on: it lowers clocks; turn it off")
    return found


def cpus(online: str | None) -> list[int]:
    """CPU numbers of a kernel list such as `0-3,6`; [] where it is not told."""
    found: list[int] = []
    for part in (online or "").strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit() and (last or first).isdigit():
            found += range(int(first), int(last or first) + 1)
    return found
