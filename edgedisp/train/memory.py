"""Memory of a process that trains: its peak, freed memory kept, activations computed again instead of kept.

A step allocates and frees some gigabytes of activations and gradients. The C library (glibc) gives large
blocks back to the system at once, and the next step gets them anew: 300,000 page faults, each a page of
zeros, for a step of SmolLM2-135M with 4 x 256 tokens, and 12 to 15 % of its time. Told to keep them, the
process faults once and runs on. Its highest memory is no larger; it only stays there while it trains.

Left out: other C libraries (musl, macOS, Windows), where nothing is changed, and GPUs, whose memory torch
keeps by itself.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

# Parameters of mallopt(3) and their defaults. Setting the trim threshold ends glibc's own adjustment of it
# and of the size from which blocks come from the system directly.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
KEEPING = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 << 20}
DEFAULTS = {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 128 << 10, M_TOP_PAD: 0}

# What transformers keeps in a model's modules for gradient checkpointing.
HOOKS = "_require_grads_hooks"
RECOMPUTING = ("gradient_checkpointing", "_gradient_checkpointing_func", HOOKS, "_require_grads_hook")


def recompute_activations(model: Any) -> None:
    """Gradient checkpointing: keep each layer's inputs and compute the rest again in the backward pass."""
    # Renamed in transformers 5.23; the old name warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # Hooks on the layers, such as the dispersion term's, are not run again this way.
    enable({"use_reentrant": False})


@contextmanager
def activations_recomputed(model: nn.Module) -> Iterator[None]:
    """Inside the block, `recompute_activations`; afterwards whatever the model did before.

    transformers' own way to turn it off forgets the hooks on the embedding, and that it may have been on.
    """
    before = [
        (own, {name: own[name] for name in RECOMPUTING if name in own}) for own in map(vars, model.modules())
    ]
    try:
        recompute_activations(model)
        yield
    finally:
        for own, kept in before:
            for hook in own.get(HOOKS, ()):
                if hook not in kept.get(HOOKS, ()):
                    hook.remove()
            for name in RECOMPUTING:
                own.pop(name, None)
            own.update(kept)


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside the block the process keeps what it frees; afterwards it gives back what it can."""
    libc = _glibc()
    if libc is None:
        yield
        return
    for parameter, value in KEEPING.items():
        libc.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in DEFAULTS.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The process's C library if it is glibc."""
    if platform.libc_ver()[0] != "glibc":
        return None
    found = ctypes.CDLL(None)
    return found if hasattr(found, "mallopt") and hasattr(found, "malloc_trim") else None


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far."""
    # Linux: not `ru_maxrss`, which a child inherits from the process that started it.
    if (status := Path("/proc/self/status")).is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
