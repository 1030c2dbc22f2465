"""Speed and memory of training: compiled layers, freed memory reused, timed steps.

glibc gives large blocks back to the system at once, and the next step faults them in anew: 12 to 15 % of the
time of a step of SmolLM2-135M (4 x 256 tokens).
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import psutil
import torch
from torch import nn

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.recipe import Train
from edgedisp.train.chunked_cross_entropy import chunked_head

MALLOC_OPTIONS = {-4: (0, 65536), -1: (2**31 - 1, 128 << 10), -2: (64 << 20, 0)}
"""M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD of mallopt(3) -> value, default."""
WARM_UP_STEPS, TIMED_STEPS = 2, 2  # allocations and the choice of kernels make the first ones slower


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Inside the block the transformer layers of `model` run compiled in training passes. Each layer's
    `forward` is compiled, not its call, so hooks stay outside, and all layers share one program. Raises
    BadInput where the CPU has no compiler."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        raise BadInput("train.compile: there is no C++ compiler: install g++ or clang++, or leave it off")
    layers = decoder_layers(model)
    for layer in layers:
        layer.forward = _when_training(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _when_training(layer: nn.Module) -> Callable[..., Any]:
    """Passes without gradients run plain: each of their shapes would be compiled for itself."""
    plain, compiled = layer.forward, torch.compile(layer.forward, dynamic=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if layer.training and torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Inside the block the process keeps what it frees (glibc); afterwards it gives back what it can."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    for parameter, (value, _) in MALLOC_OPTIONS.items():
        libc.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, (_, default) in MALLOC_OPTIONS.items():
            libc.mallopt(parameter, default)
        libc.malloc_trim(0)


def time_steps(
    model: Any, train: Train, context: int, seed: int, progress: Progress = silent
) -> dict[str, Any]:
    """Time full-weight AdamW steps of one micro-batch of random tokens; throw the model away afterwards.

    Returns seconds (`micro_step_s` forward and backward, `optimizer_s`, `forward_s_per_token`) and bytes:
    `process_bytes`, the process without weights, and `activation_bytes`, what a forward pass adds.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).train()
    if train.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (train.batch, context), generator=generator).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    process = psutil.Process()
    before = after_forward = process.memory_info().rss
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    times, steps = [], WARM_UP_STEPS + TIMED_STEPS
    with chunked_head(model):
        for step in range(steps):
            marks = [_now(device)]
            with torch.autocast(device, torch.bfloat16, enabled=train.precision == "bf16"):
                with torch.no_grad():  # separately, as a training pass may hold work of the backward pass
                    model(input_ids=ids[:1], use_cache=False)
                marks.append(_now(device))
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            if step == 0:  # later, freed gradients and moments are in the way
                after_forward = process.memory_info().rss
            loss.backward()
            marks.append(_now(device))
            optimizer.step()
            optimizer.zero_grad()
            marks.append(_now(device))
            times.append([end - start for start, end in pairwise(marks)])
            progress(step + 1, steps, "timing training steps")
    forward, both, update = map(statistics.median, zip(*times[WARM_UP_STEPS:]))
    return {
        "micro_step_s": both,
        "optimizer_s": update,
        "forward_s_per_token": forward / context,
        "process_bytes": max(0, before - weights),
        "activation_bytes": after_forward - before,
    }


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
