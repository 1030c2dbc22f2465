"""Small facts about the hardware, read from system files: processor, memory, clocks, temperature, load.

`root` stands before /sys and /proc, for tests and for copies of another machine's files; a Mac's copy holds
the answers of its sysctl in files under `sysctl/`. What a system does not tell is None, never a guess. Linux
tells most; macOS is asked through sysctl and psutil, Windows through psutil.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

from edgedisp.bench.cores import cgroup_folders, read_text

# Feature as reported -> name in /proc/cpuinfo. Those that decide which matrix kernels onnxruntime picks.
X86_FEATURES = {
    "avx2": "avx2",
    "fma": "fma",
    "avx512": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
}
ARM_FEATURES = {
    "neon": "asimd",
    "dotprod": "asimddp",
    "fp16": "asimdhp",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sme": "sme",
}
MAC_FEATURES = {"dotprod": "FEAT_DotProd", "i8mm": "FEAT_I8MM", "sme": "FEAT_SME"}

HERE = Path("/")
TICKS_PER_S = 100  # of /proc/stat on every Linux for x86 and ARM, where another machine's is read
UNLIMITED = 1 << 60  # version 1 control groups write "no limit" as a number near 2^63


def cpu_model(root: Path = HERE) -> str | None:
    """Name of the processor: /proc/cpuinfo on x86, the board's or chip's name on ARM, sysctl on a Mac."""
    found = _cpuinfo(root)
    named = found.get("model name") or found.get("Hardware") or found.get("Model")
    board = read_text(root / "proc/device-tree/model")
    part = None
    if "CPU implementer" in found:
        part = f"ARM implementer {found['CPU implementer']} part {found.get('CPU part')}"
    asked = _sysctl("machdep.cpu.brand_string", root) or (platform.processor() if root == HERE else None)
    return named or (board and board.rstrip("\0")) or part or asked or None


def cpu_features(root: Path = HERE) -> list[str]:
    """Instruction sets that matter here, named as in the tables above; [] where the system tells nothing."""
    found = _cpuinfo(root)
    flags = set((found.get("flags") or found.get("Features") or "").split())
    known = ARM_FEATURES if "Features" in found else X86_FEATURES
    if flags:
        return [name for name, flag in known.items() if flag in flags]
    return [name for name, key in MAC_FEATURES.items() if _sysctl(f"hw.optional.arm.{key}", root) == "1"]


def _cpuinfo(root: Path) -> dict[str, str]:
    """Keys of /proc/cpuinfo, the first processor's where they repeat."""
    found: dict[str, str] = {}
    for line in (read_text(root / "proc/cpuinfo") or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            found.setdefault(key.strip(), value.strip())
    return found


def _sysctl(key: str, root: Path) -> str | None:
    """One value of macOS's sysctl; None elsewhere."""
    if root != HERE:
        return read_text(root / "sysctl" / key)
    if sys.platform != "darwin":
        return None
    done = subprocess.run(["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, timeout=5)
    return done.stdout.strip() if done.returncode == 0 else None


def memory(root: Path = HERE) -> dict[str, int | None]:
    """`memory_bytes`, `memory_available_bytes` and the container's `memory_limit_bytes` (None without one).

    The available bytes are what the system could give without swapping; a container's limit, less what the
    container already uses, is taken into account.
    """
    table = dict(re.findall(r"^(\w+):\s+(\d+) kB", read_text(root / "proc/meminfo") or "", re.MULTILINE))
    total = int(table["MemTotal"]) * 1024 if "MemTotal" in table else None
    available = int(table["MemAvailable"]) * 1024 if "MemAvailable" in table else None
    if total is None and root == HERE:
        import psutil

        seen = psutil.virtual_memory()
        total, available = int(seen.total), int(seen.available)
    if total is None and (told := _sysctl("hw.memsize", root)) and told.isdigit():
        total = int(told)
    limit, left = _memory_limit(root)
    if left is not None and available is not None:
        available = min(available, left)
    return {"memory_bytes": total, "memory_available_bytes": available, "memory_limit_bytes": limit}


def _memory_limit(root: Path) -> tuple[int | None, int | None]:
    """Smallest memory limit of this process's control groups and what is left under it, in bytes."""
    limits: list[tuple[int, int]] = []
    for controller, limit_name, used_name in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for folder in cgroup_folders(root, controller):
            limit, used = read_text(folder / limit_name), read_text(folder / used_name)
            if limit and limit.isdigit() and int(limit) < UNLIMITED:
                taken = int(used) - _file_cache(folder) if used and used.isdigit() else 0
                limits.append((int(limit), max(0, int(limit) - taken)))
    if not limits:
        return None, None
    return min(limit for limit, _ in limits), min(left for _, left in limits)


def _file_cache(folder: Path) -> int:
    """Bytes of file cache that a control group is charged with and that the kernel gives up on demand."""
    table = dict(re.findall(r"^(\w+) (\d+)$", read_text(folder / "memory.stat") or "", re.MULTILINE))
    return int(table.get("inactive_file", 0))


def readings(root: Path = HERE) -> dict[str, float | None]:
    """What the machine is doing now: clock in MHz (mean over CPUs), temperature in degrees, load average.

    `busy_cpu_s` is the CPU time all processes have used since boot, and `stolen_cpu_s` what a hypervisor gave
    to others: two readings around a run, less the run's own CPU time, tell how much the neighbours took.
    `battery_j` is the energy left in a battery that is being used.
    """
    ticks = (read_text(root / "proc/stat") or "").splitlines()[:1]
    fields = [int(f) for f in ticks[0].split()[1:]] if ticks else []
    hertz = os.sysconf("SC_CLK_TCK") if root == HERE and hasattr(os, "sysconf") else TICKS_PER_S
    # fields: user nice system idle iowait irq softirq steal; guest time is inside user time already
    return {
        "load_average_1m": _load_average(root),
        "clock_mhz": _clock_mhz(root),
        "temperature_c": _temperature(root),
        "busy_cpu_s": (sum(fields[:3]) + sum(fields[5:7])) / hertz if len(fields) >= 8 else None,
        "stolen_cpu_s": fields[7] / hertz if len(fields) >= 8 else None,
        "battery_j": _battery_j(root),
    }


def _load_average(root: Path) -> float | None:
    """Processes that ran or waited to run, on average over the last minute."""
    if root == HERE:
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    fields = (read_text(root / "proc/loadavg") or "").split()
    return float(fields[0]) if fields else None


def _battery_j(root: Path) -> float | None:
    """Joules left in the batteries; None without one, or while one is charged or full.

    Drivers tell energy in microwatt-hours, or charge in microampere-hours with the voltage in microvolts. The
    counter moves every half minute or so: good for a whole measurement, not for one repetition.
    """
    left = []
    for battery in sorted((root / "sys/class/power_supply").glob("*")):
        if read_text(battery / "status") != "Discharging":
            continue
        energy, charge, voltage = (
            read_text(battery / name) for name in ("energy_now", "charge_now", "voltage_now")
        )
        if energy and energy.isdigit():
            left.append(int(energy) * 3600e-6)
        elif charge and voltage and charge.isdigit() and voltage.isdigit():
            left.append(int(charge) * 3600e-6 * int(voltage) * 1e-6)
    return sum(left) if left else None


def _clock_mhz(root: Path) -> float | None:
    """Mean clock of the CPUs, from cpufreq or, on x86 without it, from /proc/cpuinfo."""
    files = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    clocks = [int(text) / 1000 for text in map(read_text, files) if text and text.isdigit()]
    if not clocks:
        found = re.findall(r"^cpu MHz\s*: ([\d.]+)", read_text(root / "proc/cpuinfo") or "", re.MULTILINE)
        clocks = [float(text) for text in found]
    return sum(clocks) / len(clocks) if clocks else None


def _temperature(root: Path) -> float | None:
    """Hottest thermal zone in degrees Celsius."""
    texts = [read_text(f) for f in (root / "sys/class/thermal").glob("thermal_zone*/temp")]
    degrees = [int(text) / 1000 for text in texts if text and text.lstrip("-").isdigit()]
    return max(degrees) if degrees else None
