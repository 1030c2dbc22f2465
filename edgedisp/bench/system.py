"""What this machine is, as the runner describes it, which arithmetic it is fast in, and `edgedisp doctor`.

No package is imported to learn its version, and no torch to learn about the GPU, so asking is cheap. A
processor without bfloat16 instructions multiplies bfloat16 by loops of torch's own: a training step of
SmolLM2-135M took 250 s on two cores with AVX2 alone, where float32 takes 12 s.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
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
    """Whether training in bfloat16 is the fast way here: on the GPU if torch would use one, else the CPU.

    Of Intel's processors those with AMX alone: with AVX512-BF16 (a Xeon of 2023) a step of SmolLM2-135M takes
    1.8 times as long as in fp32.
    """
    capability = gpu_capability()
    if capability is not None:
        return capability >= BF16_CAPABILITY
    cpu = runner().cpu()
    features = BF16_FEATURES & set(cpu["features"])
    return "amx_bf16" in features if "Intel" in (cpu["cpu"] or "") else bool(features)


@cache
def gpu_capability() -> float | None:
    """CUDA compute capability of the least GPU that this process and its torch can use; None without one."""
    program = shutil.which("nvidia-smi")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    if program is None or hidden or "+cpu" in (installed_version("torch") or "+cpu"):
        return None
    command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    lines = [] if result.returncode else result.stdout.split()
    return min((float(line) for line in lines if re.fullmatch(r"\d+\.\d+", line)), default=None)


def doctor(distribution: str = "edgedisp") -> list[Row]:
    """Is everything installed that a build needs, and if not, which command installs it?

    Versions are compared with the bounds in the installed distribution's metadata; no network is used.
    """
    machine = describe()
    features, quota, free = machine["features"], machine["cpu_quota"], machine["memory_available_bytes"]
    fast = (FAST_ON_X86 | FAST_ON_ARM) & {*features}
    cores = f"{machine['physical_cores']} cores, {machine['logical_cpus']} CPUs, quota {quota or 'none'}"
    slow = "int8 and int4 run on slower kernels here (no VNNI, no dot product)"
    throttled = "less than one CPU: timings will be those of a throttled machine"
    needed = f"training 135M parameters takes about {MEMORY_NEEDED / GIB:.0f} GiB; an adapter takes less"
    memory = "not known" if free is None else f"{free / GIB:.1f} GiB free"
    return [
        _row("python", True, sys.version.split()[0], ""),
        *_packages(distribution),
        _row("processor", bool(fast), f"{machine['cpu']}: {' '.join(features) or 'no known features'}", slow),
        _row("threads", quota is None or quota >= 1, cores, throttled),
        _row("memory", (free or 0) >= MEMORY_NEEDED, memory, needed),
    ]


def _row(check: str, is_ok: bool, value: str, advice: str, status: str = "warn") -> Row:
    status = "ok" if is_ok else status
    return {"check": check, "status": status, "value": value, "advice": "" if is_ok else advice}


def _packages(distribution: str) -> Iterator[Row]:
    """Rows for the distribution and each of its requirements. What an extra needs may be missing."""
    from packaging.requirements import Requirement

    version = installed_version(distribution)
    advice = f"{sys.executable} -m pip install -e . in a checkout, or pip install {distribution}"
    yield _row(distribution, version is not None, version or "not installed", advice, "missing")
    for text in (metadata.requires(distribution) or ()) if version else ():
        requirement = Requirement(text)
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        extra = re.search(r"extra == ['\"](\w+)", str(requirement.marker))
        if requirement.name == distribution or not (needed or extra):
            continue
        version = installed_version(requirement.name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        specifier = f"{requirement.name}{requirement.specifier}"
        yield _row(
            requirement.name if needed or not extra else f"{requirement.name} [{extra.group(1)}]",
            fits,
            (version or "not installed") + ("" if fits else f", tried with {requirement.specifier}"),
            f'{sys.executable} -m pip install "{specifier}"',
            "missing" if needed and version is None else "warn",
        )
