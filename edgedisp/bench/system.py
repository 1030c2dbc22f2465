"""What this machine is, as the runner describes it, and which arithmetic it is fast in.

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
from functools import cache
from types import ModuleType
from typing import Any

from edgedisp.bench.worker import RUNNER
from edgedisp.core.errors import BadInput

PACKAGES = ("torch", "transformers", "numpy", "onnx", "onnxruntime", "onnxruntime-genai")
# Flags of /proc/cpuinfo any of which gives the fast 8-bit product that accuracy level 4 needs.
FAST_ON_X86 = {"avx512_vnni", "avx_vnni", "amx_int8"}
FAST_ON_ARM = {"asimddp", "i8mm"}
BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}
BF16_CAPABILITY = 8.0  # Ampere; what is older computes bfloat16 in float32


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
    """What the driver says of each card. Asked once: every training of a recipe wants to know."""
    command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        return ()
    return tuple(float(line) for line in done.stdout.split() if re.fullmatch(r"\d+\.\d+", line))
