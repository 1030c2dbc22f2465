"""Which arithmetic this machine is fast in. Asked of the system and the driver, so that no torch is loaded.

A processor without bfloat16 instructions still multiplies bfloat16, by loops of torch's own: a training step
of SmolLM2-135M took 250 s on two cores with AVX2 alone, where float32 takes 12 s. Most laptops are such
machines.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from edgedisp.bench.hardware import cpu_features
from edgedisp.bench.machine import installed_version

BF16_PROCESSORS = {"avx512_bf16", "amx_bf16", "bf16"}
BF16_CAPABILITY = 8.0  # Ampere; what is older computes bfloat16 in float32


def multiplies_bf16(root: Path = Path("/")) -> bool:
    """Whether training in bfloat16 is the fast way here: on the GPU if torch would use one, else the CPU."""
    capability = gpu_capability()
    if capability is not None:
        return capability >= BF16_CAPABILITY
    return bool(BF16_PROCESSORS & set(cpu_features(root)))


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
    asked = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        return ()
    return tuple(float(line) for line in done.stdout.split() if re.fullmatch(r"\d+\.\d+", line))
