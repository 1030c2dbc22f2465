"""How many threads are worth starting: the physical cores that this process may really use.

`os.cpu_count()` counts the machine's logical CPUs. Three things make it too large for matrix work: the
process may be pinned to some CPUs (affinity, cpusets), two logical CPUs may be one core (SMT siblings), and
a container may have a quota of CPU time far below the CPUs it can see. A thread too many is not harmless:
onnxruntime's threads wait for one another at every operator, so one that is not running stops all.

Left out: performance against efficiency cores. Which of them to use is a matter of measuring on the device
(device profiles name a thread count where one is known).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path


def physical_cores(root: Path = Path("/"), affinity: Collection[int] | None = None) -> int:
    """Physical cores available to this process, at least 1.

    `root` stands before /sys and /proc, `affinity` for the CPU numbers the process may run on (default: what
    the system says). A quota of 2.5 CPUs gives 2: the third thread would spend most of its time stopped.
    """
    cpus = logical_cpus() if affinity is None else set(affinity)
    cores = _distinct_cores(root, cpus)
    quota = cpu_quota(root)
    return max(1, cores if quota is None else min(cores, int(quota)))


def logical_cpus() -> set[int]:
    """Numbers of the logical CPUs that this process may run on."""
    if sys.platform == "linux":
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _distinct_cores(root: Path, cpus: Collection[int]) -> int:
    """Cores behind the CPU numbers `cpus`: siblings of one core count once."""
    groups = {_siblings(root, cpu) for cpu in cpus}
    if None not in groups:
        return len(groups)
    if told := read_text(root / "sysctl/hw.physicalcpu"):  # a copy of a Mac's answers
        return min(int(told), len(cpus)) if told.isdigit() else len(cpus)
    if root == Path("/") and sys.platform != "linux":
        import psutil

        physical = psutil.cpu_count(logical=False)  # macOS and Windows: no /sys, but no affinity games either
        return min(physical or len(cpus), len(cpus))
    return len(cpus)  # Linux without topology files (some emulators): take each CPU for a core


def _siblings(root: Path, cpu: int) -> str | None:
    """The sibling list of one CPU, as the kernel writes it ("0,4"); None where there is no topology."""
    topology = root / "sys/devices/system/cpu" / f"cpu{cpu}" / "topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # the second is the name before Linux 5.3
        text = read_text(topology / name)
        if text:
            return text
    return None


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that the control groups of this process allow; None without a limit.

    Both versions are read, from the process's own group upwards, and the smallest limit counts.
    """
    limits = [_quota_v2(folder) for folder in cgroup_folders(root, "")]
    limits += [_quota_v1(folder) for folder in cgroup_folders(root, "cpu")]
    found = [limit for limit in limits if limit is not None]
    return min(found) if found else None


def cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Folders of this process's control group and its parents; "" is version 2, else a version 1 controller.

    Inside a container the path in /proc/self/cgroup is often the host's and does not exist here; what is
    mounted at the top is then the container's own group, and is always part of the list.
    """
    folders = []
    for line in (read_text(root / "proc/self/cgroup") or "").splitlines():
        if line.count(":") < 2:
            continue
        _, names, path = line.split(":", 2)  # "4:cpu,cpuacct:/box" in version 1, "0::/box" in version 2
        if (controller in names.split(",")) if controller else (names == ""):
            top = root / "sys/fs/cgroup" / (names if controller else "")
            own = top / path.lstrip("/")
            folders += [own, *[p for p in own.parents if p.is_relative_to(top)]]
    tops = {"": ["", "unified"], "cpu": ["cpu", "cpu,cpuacct"]}.get(controller, [controller])
    folders += [root / "sys/fs/cgroup" / top for top in tops]
    return list(dict.fromkeys(f for f in folders if f.is_dir()))


def _quota_v2(folder: Path) -> float | None:
    """cpu.max is "quota period" in microseconds, or "max period"."""
    parts = (read_text(folder / "cpu.max") or "").split()
    if len(parts) != 2 or not parts[0].isdigit() or not parts[1].isdigit():
        return None
    return int(parts[0]) / int(parts[1])


def _quota_v1(folder: Path) -> float | None:
    """cpu.cfs_quota_us is -1 without a limit."""
    quota, period = read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")
    if not quota or not period or not quota.isdigit() or not period.isdigit():
        return None
    return int(quota) / int(period)


def read_text(path: Path) -> str | None:
    """Stripped text of a small system file; None where the system does not offer it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
