"""Why fewer bits can be slower, as far as the machine tells: a missing kernel, too few threads, heat.

At accuracy level 4 onnxruntime multiplies int4 and int8 weights in 8-bit integers. It is fast where the
processor adds up four such products in one instruction: VNNI on x86, dotprod or i8mm on ARM. Without them the
same result takes several instructions, and fp32, which reads more memory but multiplies in one go, can win.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Features (hardware.py) any of which gives the fast 8-bit product, by architecture.
FAST_ON_ARM = ("dotprod", "i8mm")
FAST_ON_X86 = ("avx512_vnni", "avx_vnni", "amx_int8")
DRIFT_PERCENT = 10.0
ARM = ("arm", "aarch64")


def causes(row: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    """The known reasons why `row` may be slower than a bundle with more bits, as the end of a sentence."""
    found = [missing_kernel(machine), _threads(row, machine), _throttled(row)]
    known = [reason for reason in found if reason]
    if known:
        return "; ".join(known)
    return "look for a missing kernel (`edgedisp doctor` lists CPU features), too few threads or throttling"


def missing_kernel(machine: Mapping[str, Any]) -> str | None:
    """What the processor lacks for fast 8-bit products; None where it has it, or tells no features."""
    features = set(machine.get("features") or ())
    if not features:
        return None
    arm = "neon" in features or str(machine.get("architecture")).lower().startswith(ARM)
    if features & set(FAST_ON_ARM if arm else FAST_ON_X86):
        return None
    if arm:
        return "kernel missing: this CPU has neither dotprod nor i8mm, so 8-bit products take several steps"
    return (
        "kernel missing: this CPU has no VNNI (avx512_vnni, avx_vnni), so 8-bit products take several steps"
    )


def _threads(row: Mapping[str, Any], machine: Mapping[str, Any]) -> str | None:
    threads, cores = row.get("threads"), machine.get("physical_cores")
    if not threads or not cores or threads == cores:
        return None
    few = "too few threads" if threads < cores else "too many threads"
    return f"{few}: {threads} on {cores} cores (`--threads sweep` finds the best count)"


def _throttled(row: Mapping[str, Any]) -> str | None:
    fell, drift = row.get("clock_fell_percent"), row.get("drift_percent")
    if fell is not None and fell > DRIFT_PERCENT:
        return f"throttling: the clock fell by {fell:.0f} %"
    if drift is not None and drift < -DRIFT_PERCENT:
        return f"throttling is likely: decode slowed down by {-drift:.0f} % over the repetitions"
    return None


def clock_fell_percent(own: Sequence[Mapping[str, Any]]) -> float | None:
    """By how much the clock after the last repetition is below the first's; None where it is not told."""
    clocks = [r.get("clock_mhz") for r in own]
    first, last = clocks[0], clocks[-1]
    return None if first is None or last is None or not first else 100.0 * (first - last) / first
