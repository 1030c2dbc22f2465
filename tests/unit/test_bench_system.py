"""What is known about a machine, from made system files, and the doctor's rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedisp.bench import system
from edgedisp.bench.system import doctor

RUNNER = system.runner()
physical_cores, cpu_quota = RUNNER.physical_cores, RUNNER.cpu_quota


def put(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def topology(root: Path, cores: int, siblings: int, name: str = "core_cpus_list") -> range:
    """CPU c and c + cores (+ 2 cores ...) are one core, as most BIOSes number them."""
    for cpu in range(cores * siblings):
        shared = ",".join(str(cpu % cores + k * cores) for k in range(siblings))
        put(root, f"sys/devices/system/cpu/cpu{cpu}/topology/{name}", shared)
    return range(cores * siblings)


def test_smt_siblings_count_as_one_core(tmp_path: Path) -> None:
    cpus = topology(tmp_path, cores=4, siblings=2)
    assert physical_cores(tmp_path, cpus) == 4
    assert physical_cores(tmp_path, {0, 4}) == 1  # pinned to the two halves of one core
    assert physical_cores(tmp_path, {0, 1}) == 2
    older = topology(tmp_path / "before 5.3", 2, 2, name="thread_siblings_list")
    assert physical_cores(tmp_path / "before 5.3", older) == 2
    assert physical_cores(tmp_path / "none", {0, 1, 2}) == 3


def test_the_quota_of_the_groups_above_counts(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/pod/box")
    put(tmp_path, "sys/fs/cgroup/pod/cpu.max", "200000 100000")
    put(tmp_path, "sys/fs/cgroup/pod/box/cpu.max", "max 100000")
    assert cpu_quota(tmp_path) == 2.0
    put(tmp_path, "sys/fs/cgroup/cpu.max", "150000 100000")  # all that a container sees of its own
    assert cpu_quota(tmp_path) == 1.5


def test_x86_and_arm_processors_are_read_from_their_own_keys(tmp_path: Path) -> None:
    x86 = "model name\t: A Chip\ncpu MHz\t\t: 2000.0\nflags\t\t: fpu avx2 avx512_vnni\n\nmodel name\t: Second"
    put(tmp_path, "x/proc/cpuinfo", x86)
    assert RUNNER.cpu(tmp_path / "x") == {"cpu": "A Chip", "features": ["avx2", "avx512_vnni"]}
    arm = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c"
    put(tmp_path, "a/proc/cpuinfo", arm)
    assert RUNNER.cpu(tmp_path / "a") == {"cpu": "ARM part 0xd0c", "features": ["asimd", "asimddp", "i8mm"]}
    put(tmp_path, "a/proc/device-tree/model", "Raspberry Pi 5\0")
    assert RUNNER.cpu(tmp_path / "a")["cpu"] == "Raspberry Pi 5"


@pytest.mark.parametrize(
    ("cards", "torch", "visible", "capability"),
    [
        ("9.0\n7.5", "2.13.0+cu130", "0", 7.5),
        ("8.0", "2.13.0", "0", 8.0),
        ("8.0", "2.13.0+cpu", "0", None),
        ("8.0", "2.13.0+cu130", "", None),
        ("No devices were found", "2.13.0+cu130", "0", None),
    ],
)
def test_the_least_gpu_that_torch_would_use_decides(  # type: ignore[no-untyped-def]
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cards, torch, visible, capability
) -> None:
    """`nvidia-smi` is a program that answers as the driver's does."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{cards}\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(system, "installed_version", lambda package: torch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    system.gpu_capability.cache_clear()
    assert system.gpu_capability() == capability
    is_fast_gpu = capability is not None and capability >= 8
    for name, features, is_fast in (
        (None, [], False),
        ("AMD EPYC 9654", ["avx2", "avx512_bf16"], True),
        ("Intel(R) Xeon(R) Processor", ["avx512_bf16"], False),
        ("Intel(R) Xeon(R) Processor", ["avx512_bf16", "amx_bf16"], True),
    ):
        cpu = {"cpu": name, "features": features}
        monkeypatch.setattr(RUNNER, "cpu", lambda cpu=cpu: cpu)
        assert system.multiplies_bf16() is (is_fast if capability is None else is_fast_gpu)


def test_a_containers_memory_limit_takes_from_what_is_available(tmp_path: Path) -> None:
    put(tmp_path, "proc/meminfo", "MemTotal:       8000000 kB\nMemAvailable:    6000000 kB")
    gib = 1 << 30
    expected = {"memory_bytes": 8_192_000_000, "memory_available_bytes": 6_144_000_000}
    assert RUNNER.memory(tmp_path) == expected
    put(tmp_path, "sys/fs/cgroup/memory.max", str(4 * gib))
    put(tmp_path, "sys/fs/cgroup/memory.current", str(3 * gib))
    put(tmp_path, "sys/fs/cgroup/memory.stat", f"anon 5\ninactive_file {gib}")
    # 3 used, of which 1 is file cache that can go
    assert RUNNER.memory(tmp_path) == {**expected, "memory_available_bytes": 2 * gib}


def test_readings_come_from_the_kernels_counters(tmp_path: Path) -> None:
    put(tmp_path, "proc/stat", "cpu  100 10 200 9000 50 5 5 40 60 0\ncpu0 1 1 1 1")
    put(tmp_path, "sys/class/thermal/thermal_zone0/temp", "41000")
    put(tmp_path, "sys/class/thermal/thermal_zone1/temp", "55500")
    put(tmp_path, "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq", "1800000")
    put(tmp_path, "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq", "2200000")
    # user + nice + system + irq + softirq + steal, at 100 ticks a second here; guest time is inside user time
    expected = [55.5, 2000.0, (100 + 10 + 200 + 5 + 5 + 40) / 100]
    for folder, values in ((tmp_path, expected), (tmp_path / "nothing", [None] * 3)):
        sensors = RUNNER.read_sensors(folder)
        assert [sensors[key] for key in ("temperature_c", "clock_mhz", "busy_cpu_s")] == values


def test_the_doctor_compares_versions_with_the_bounds_of_the_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = """Metadata-Version: 2.1
Name: madeup
Version: 1.0
Requires-Dist: numpy<1
Requires-Dist: pytest>=1
Requires-Dist: no-such-package>=2,<3
Requires-Dist: never; python_version < '3'
Provides-Extra: fine
Requires-Dist: pytest; extra == 'fine'
Provides-Extra: more
Requires-Dist: another-missing>=1; extra == 'more'"""
    put(tmp_path, "madeup-1.0.dist-info/METADATA", metadata)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = {row["check"]: row for row in doctor("madeup")}
    status = {
        "python": "ok", "numpy": "warn", "pytest": "ok", "no-such-package": "missing",
        "pytest [fine]": "ok", "another-missing [more]": "warn",
    }  # fmt: skip
    assert {name: rows[name]["status"] for name in status} == status and "never" not in rows
    assert "<1" in rows["numpy"]["value"]
    assert 'pip install "no-such-package<3,>=2"' in rows["no-such-package"]["advice"]
    (missing,) = [row for row in doctor("no-such-distribution") if row["status"] == "missing"]
    assert "pip install" in missing["advice"]


def test_every_row_that_is_not_ok_gives_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {**system.describe(), "features": [], "cpu_quota": 0.5, "memory_available_bytes": 1 << 30}
    monkeypatch.setattr(system, "describe", lambda: slow)
    rows = doctor()
    assert [row for row in rows if (row["status"] == "ok") == bool(row["advice"])] == []
    status = {row["check"]: row["status"] for row in rows}
    assert status["processor"] == status["threads"] == status["memory"] == "warn"
