"""An Android phone's model, chip, battery and heat, from the output of its own commands.

`getprop` tells model and chip, `dumpsys battery` and `dumpsys thermalservice` (Android 10) its battery and
whether it slows itself down, and a few files of /proc and /sys the rest. What is not known is None.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from edgedisp.bench.page_protocol import printable

MARK = "-- edgedisp: "
# Name -> what the phone's shell is asked. One command for several, as each costs the phone a process.
IDENTITY = {
    "props": "getprop",
    "architecture": "uname -m",
    "online": "cat /sys/devices/system/cpu/online",
    "memory": "cat /proc/meminfo",
}
STATE = {
    "battery": "dumpsys battery",
    "thermal": "dumpsys thermalservice",
    "saver": "settings get global low_power",
    "load": "cat /proc/loadavg",
}
# android.os.BatteryManager and android.os.PowerManager
BATTERY = {1: "unknown", 2: "charging", 3: "discharging", 4: "not charging", 5: "full"}
THERMAL = {0: "none", 1: "light", 2: "moderate", 3: "severe", 4: "critical", 5: "emergency", 6: "shutdown"}
SKIN = 3  # kind of temperature: what a hand feels, and what phones throttle by
LOW_PERCENT = 20


def script(commands: Mapping[str, str]) -> str:
    """One shell command for several, whose output `split_answers` takes apart."""
    return "; ".join(f"echo '{MARK}{name}'; {command} 2>/dev/null" for name, command in commands.items())


def split_answers(text: str) -> dict[str, str]:
    """Name -> what its command printed, of the output of `script`."""
    parts = re.split(rf"^{re.escape(MARK)}", text, flags=re.MULTILINE)[1:]
    return {name.strip(): answer for name, _, answer in (part.partition("\n") for part in parts)}


def phone_machine(answers: Mapping[str, str]) -> dict[str, Any]:
    """The keys of the runner's description, and `phone`: what adb's shell tells. What it does not is None."""
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
    """How many CPUs a kernel list such as `0-3,6` names; None where it is not told."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", text)
    return sum(int(last or first) - int(first) + 1 for first, last in ranges) or None


def phone_state(answers: Mapping[str, str]) -> dict[str, Any]:
    """Load, battery and heat, from the answers to STATE."""
    battery = dict(re.findall(r"^\s*([\w ]+): (\S+)$", answers.get("battery", ""), re.MULTILINE))
    level, scale, tenths, status = (
        int(battery[name]) if re.fullmatch(r"-?\d{1,9}", battery.get(name, "")) else None
        for name in ("level", "scale", "temperature", "status")
    )
    thermal = answers.get("thermal", "")
    thermal_status = re.search(r"^\s*Thermal Status: (\d+)", thermal, re.MULTILINE)
    # The last list holds what the sensors say now; the one before is what was told to listeners.
    now = thermal.rpartition("Current temperatures")[2] or thermal
    skin = [float(value) for value in re.findall(rf"mValue=(-?[\d.]+), mType={SKIN},", now)]
    saver = answers.get("saver", "").strip()
    load = re.match(r"\s*([\d.]+)", answers.get("load", ""))
    return {
        "load_average_1m": float(load.group(1)) if load else None,
        "battery_percent": round(100 * level / scale) if level is not None and scale else None,
        "battery_status": BATTERY.get(status or 0),
        "battery_temperature_c": None if tenths is None else tenths / 10,
        "thermal_status": THERMAL.get(int(thermal_status.group(1))) if thermal_status else None,
        "skin_temperature_c": max(skin, default=None),
        "battery_saver": saver == "1" if saver in ("0", "1") else None,
    }


def state_warnings(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> list[str]:
    """Warnings for figures that were measured between two states; `after` None: the phone was gone."""
    warnings = [] if after else ["the phone was gone when its state was to be read"]
    for when, state in (("before", before), ("after", after or {})):
        if (status := state.get("thermal_status")) not in (None, "none"):
            warnings.append(
                f"thermal status {status} {when} the measurement: the phone slows itself down; let it cool"
            )
    states = [state for state in (before, after) if state]
    if any(state.get("battery_status") == "charging" for state in states):
        warnings.append("the phone was being charged, which warms it; `adb tcpip` works without cable")
    levels = [state["battery_percent"] for state in states if state.get("battery_percent") is not None]
    if levels and min(levels) < LOW_PERCENT:
        warnings.append(
            f"battery at {min(levels)} %: many phones run slower below {LOW_PERCENT} %; charge it"
        )
    if any(state.get("battery_saver") for state in states):
        warnings.append("the battery saver was on: it lowers clocks; turn it off")
    return warnings
