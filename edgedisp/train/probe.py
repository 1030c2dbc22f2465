"""Time a few real training steps, for `edgedisp plan`."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import Any

import psutil
import torch
from torch import nn

from edgedisp.core.progress import Progress, silent
from edgedisp.train.fused_head import fused_head, why_not_fused
from edgedisp.train.memory import recompute_activations
from edgedisp.train.settings import TrainSettings

WARM_UP = 2  # allocations and the choice of kernels make these up to three times slower
STEPS = WARM_UP + 2


def time_steps(
    model: nn.Module, settings: TrainSettings, context: int, *, vocabulary: int, progress: Progress = silent
) -> dict[str, Any]:
    """Take full-weight AdamW steps of one micro-batch on random tokens and time their parts.

    The model is changed; throw it away. Returns seconds (`micro_step_s` forward and backward of a
    micro-batch, `optimizer_s`, `forward_s_per_token`) and bytes: `process_bytes`, what the process holds
    beside the weights, and `activation_bytes`, what the forward pass adds to it.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).train()
    is_fused = settings.fused_head and why_not_fused(model) is None
    if settings.gradient_checkpointing:
        recompute_activations(model)
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(0, vocabulary, (settings.batch, context), generator=generator).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    process = psutil.Process()
    before = process.memory_info().rss
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    after_forward = before
    forward, both, update = [], [], []
    with fused_head(model) if is_fused else nullcontext():
        for step in range(STEPS):
            marks = [_now(device)]
            with torch.autocast(device, torch.bfloat16, enabled=settings.precision == "bf16"):
                with torch.no_grad():  # on its own, as a training pass may hold work of the backward pass
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
            forward.append(marks[1] - marks[0])
            both.append(marks[2] - marks[1])
            update.append(marks[3] - marks[2])
            progress(step + 1, STEPS, "timing training steps")
    return {
        "micro_step_s": statistics.median(both[WARM_UP:]),
        "optimizer_s": statistics.median(update[WARM_UP:]),
        "forward_s_per_token": statistics.median(forward[WARM_UP:]) / context,
        "process_bytes": max(0, before - weights),
        "activation_bytes": after_forward - before,
    }


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
