"""What this machine is, as the runner describes it, which arithmetic it is fast in, and `edgedisp doctor`.

No package is imported to learn its version, and no torch to learn about the GPU, so asking is cheap. A
processor without bfloat16 instructions multiplies bfloat16 by loops of torch's own: a training step of
SmolLM2-135M took 250 s on two cores with AVX2 alone, where float32 takes 12 s.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.core.files import data_folder

RUNNER = data_folder("export") / "runner" / "runner.py"
PACKAGES = ("torch", "transformers", "numpy", "onnx", "onnxruntime", "onnxruntime-genai")
# Flags of /proc/cpuinfo any of which gives the fast 8-bit product that accuracy level 4 needs.
FAST_ON_X86 = {"avx512_vnni", "avx_vnni", "amx_int8"}
FAST_ON_ARM = {"asimddp", "i8mm"}
BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}
BF16_CAPABILITY = 8.0  # Ampere; what is older computes bfloat16 in float32
GIB = 1 << 30
DISK_NEEDED = 5 * GIB  # two arms of a 135M model: weights, checkpoints with optimizer states, six bundles
MEMORY_NEEDED = 6 * GIB  # fp32 weights, gradients and AdamW states of 135M, activations of 4 x 256 tokens

Row = dict[str, str]
"""One line of `edgedisp doctor`: {check, status (ok, warn, missing), value, advice}.

warn: works, but worse than it could; missing: something will not work.
"""


@cache
def runner() -> ModuleType:
    """export/runner/runner.py as a module: a device's description of itself is this machine's too."""
    spec = importlib.util.spec_from_file_location("edgedisp_runner", RUNNER)
    if spec is None or spec.loader is None or not RUNNER.is_file():
        raise BadInput(f"{RUNNER}: the runner program is missing; install edgedisp again")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def describe() -> dict[str, Any]:
    """This machine in plain JSON values; the keys are those of `describe` in the runner."""
    description: dict[str, Any] = runner().describe(PACKAGES)
    return description


def physical_cores() -> int:
    """Physical cores that this process may really use: affinity, SMT siblings and quotas considered."""
    return int(runner().physical_cores())


def installed_version(package: str) -> str | None:
    """Version of an installed distribution; None where it is not installed."""
    version: str | None = runner().installed_version(package)
    return version


def multiplies_bf16() -> bool:
    """Whether training in bfloat16 is the fast way here: on the GPU if torch would use one, else the CPU."""
    capability = gpu_capability()
    if capability is not None:
        return capability >= BF16_CAPABILITY
    return bool(BF16_FEATURES & set(runner().cpu()["features"]))


def gpu_capability() -> float | None:
    """CUDA compute capability of the least GPU that this process and its torch can use; None without one."""
    program = shutil.which("nvidia-smi")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if program is None or hidden or "+cpu" in (installed_version("torch") or "+cpu"):
        return None
    return min(_capabilities(program), default=None)


@cache
def _capabilities(program: str) -> tuple[float, ...]:
    """What the driver says of each card."""
    command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if result.returncode:
        return ()
    return tuple(float(line) for line in result.stdout.split() if re.fullmatch(r"\d+\.\d+", line))


def doctor(folders: Mapping[str, Path], distribution: str = "edgedisp") -> list[Row]:
    """Is everything installed that a build needs, and if not, which command installs it?

    folders: name -> folder whose free disk counts. Versions are compared with the bounds in the installed
    distribution's own metadata; no network is used.
    """
    machine = describe()
    rows = [*_packages(distribution), *_processor(machine), _memory(machine)]
    return rows + [_disk(f"disk, {name}", path) for name, path in folders.items()]


def _row(check: str, status: str, value: str, advice: str = "") -> Row:
    return {"check": check, "status": status, "value": value, "advice": "" if status == "ok" else advice}


def _packages(distribution: str) -> Iterator[Row]:
    """Rows for Python, the distribution, each of its requirements and each of its extras."""
    from packaging.requirements import Requirement

    try:
        about = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        advice = f"{sys.executable} -m pip install -e . in a checkout, or pip install {distribution}"
        yield _row(distribution, "missing", "not installed as a distribution", advice)
        return
    python = Requirement(f"python{(about.get_all('Requires-Python') or [''])[0]}")
    version = platform.python_version()
    fits = python.specifier.contains(version, prereleases=True)
    yield _row("python", "ok" if fits else "missing", version, f"install {python}")
    yield _row(distribution, "ok", metadata.version(distribution))
    requirements = [Requirement(text) for text in metadata.requires(distribution) or []]

    def needed(requirement: Any, extra: str) -> bool:
        return requirement.marker is None or requirement.marker.evaluate({"extra": extra})

    base = [r for r in requirements if needed(r, "")]
    for requirement in base:
        yield _row(requirement.name, *_version(requirement), _install([requirement]))
    for extra in about.get_all("Provides-Extra") or []:
        members = [r for r in requirements if r not in base and r.name != distribution and needed(r, extra)]
        lacking = [r for r in members if _version(r)[0] != "ok"]
        names = ", ".join(f"{r.name} ({_version(r)[1]})" for r in lacking)
        status, text = ("warn", f"without {names}") if lacking else ("ok", "complete")
        yield _row(f"extra [{extra}]", status, text, _install(lacking))


def _version(requirement: Any) -> tuple[str, str]:
    """(status, text) of a requirement's package. Pre-releases count, local labels do not."""
    version = installed_version(requirement.name)
    if version is None:
        return "missing", "not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return "ok", version
    return "warn", f"{version}, tried with {requirement.specifier}"


def _install(requirements: list[Any]) -> str:
    """The command that gets these packages within their bounds."""
    return f"{sys.executable} -m pip install " + " ".join(f'"{r.name}{r.specifier}"' for r in requirements)


def _processor(machine: Mapping[str, Any]) -> Iterator[Row]:
    """CPU features that decide the kernels, and the threads that a run will use."""
    features, quota = machine["features"], machine["cpu_quota"]
    fast = (FAST_ON_X86 | FAST_ON_ARM) & set(features)
    text = f"{machine['cpu'] or 'unknown'}: {' '.join(features) or 'no known features'}"
    advice = "int8 and int4 run on slower kernels here (no VNNI, no dot product)"
    yield _row("processor", "ok" if fast else "warn", text, advice)
    limit = "no quota" if quota is None else f"a quota of {quota:g} CPUs"
    text = f"{machine['physical_cores']} cores, {machine['logical_cpus']} CPUs, {limit}"
    advice = "less than one CPU: timings will be those of a throttled machine"
    yield _row("threads", "ok" if quota is None or quota >= 1 else "warn", text, advice)


def _memory(machine: Mapping[str, Any]) -> Row:
    total, available = machine["memory_bytes"], machine["memory_available_bytes"]
    if total is None or available is None:
        return _row("memory", "warn", "the system does not tell", "watch it during the first build")
    text = f"{available / GIB:.1f} of {total / GIB:.1f} GiB free"
    needed = f"training 135M parameters takes about {MEMORY_NEEDED / GIB:.0f} GiB; an adapter takes less"
    return _row("memory", "ok" if available >= MEMORY_NEEDED else "warn", text, needed)


def _disk(check: str, folder: Path) -> Row:
    """Free bytes where `folder` is or will be made."""
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        return _row(check, "missing", f"{parent} is not writable", "choose another folder")
    free = shutil.disk_usage(parent).free
    advice = f"a build of 135M parameters takes about {DISK_NEEDED / GIB:.0f} GiB"
    return _row(
        check, "ok" if free >= DISK_NEEDED else "warn", f"{free / GIB:.1f} GiB free in {folder}", advice
    )
