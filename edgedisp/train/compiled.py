"""Transformer layers through torch.compile while a model trains, and as they were afterwards.

Outside of the large matrix products a layer is a chain of small passes over its activations: norms, rotary
positions, the gate of the MLP, type conversions. Compiled, they become a few loops that touch each number
once, forward and backward. All layers of a model share one program, so compiling takes about as long for 30
layers as for one: 20 to 60 s on two cores. Losses agree with the plain layers' to rounding.

What is compiled is each layer's `forward`, not its call, so hooks on the layer (the dispersion term's) stay
outside. Passes without gradients, which may have other shapes, run plain: each shape would be compiled for
itself. It needs a C++ compiler on a CPU; `why_not_compiled` says if there is none.

Left out: the whole model in one program. It takes minutes to compile and gains little more, and the output
head is computed elsewhere (fused_head.py).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

COMPILERS = ("g++", "clang++", "c++")


def why_not_compiled(model: nn.Module) -> str | None:
    """Why `compiled_layers` cannot serve a model here, with what would help, or None if it can."""
    if not _layers(model):
        return "it has no transformer layers that could be compiled alike"
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not (os.environ.get("CXX") or any(map(shutil.which, COMPILERS))):
        return f"there is no C++ compiler ({', '.join(COMPILERS)}): install one, or set CXX to one"
    return None


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Inside the block the transformer layers of `model` run compiled.

    Raises ValueError if `why_not_compiled` finds a reason.
    """
    if (reason := why_not_compiled(model)) is not None:
        raise ValueError(f"the layers of this model cannot be compiled: {reason}")
    layers = _layers(model)
    for layer in layers:
        layer.forward = _when_training(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _when_training(layer: nn.Module) -> Callable[..., Any]:
    plain = layer.forward
    compiled = torch.compile(plain, dynamic=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if layer.training and torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward


def _layers(model: nn.Module) -> list[nn.Module]:
    """What transformers itself treats as the units that can be recomputed: the decoder layers."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
