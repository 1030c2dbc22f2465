"""Layer by layer through a model on calibration tokens: what each linear map sees, and its rounding.

A linear map is rounded under the inputs that it will have in the quantized model, so earlier maps are rounded
first, and the tokens' states are those of the model so far (sequential, as in GPTQ). Within a layer the maps
that share an input are rounded together, in the order of computation. The states of one layer alone are kept:
tokens x hidden values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgedisp import Progress, silent

Rounding = Callable[[str, Tensor, Tensor], Tensor]
"""(name, weight fp32 [out, in], H [in, in]) -> the weight as the grid holds it, [out, in]."""


@dataclass
class States:
    """Hidden states of every calibration block before a layer, and what else the layer is called with."""

    hidden: list[Tensor]
    arguments: list[dict[str, Any]]
    rest: list[tuple[Any, ...]]


class _Stop(Exception):
    pass


@torch.no_grad()
def calibrate(
    model: nn.Module,
    layers: nn.ModuleList,
    blocks: Tensor,
    rounding: Rounding,
    progress: Progress = silent,
    note: str = "",
) -> None:
    """Round every linear map of `layers` in place, in the order of computation. blocks int64 [n, tokens]."""
    states = first_states(model, layers, blocks)
    for index, layer in enumerate(layers):
        progress(index, len(layers), note)
        for names in waves(layer, states):
            second = moments(layer, names, states)
            for name in names:
                module = layer.get_submodule(name)
                turned = not isinstance(module, nn.Linear)
                weight: Any = module.weight
                values = weight.detach().float()
                held = rounding(f"{index}.{name}", values.T if turned else values, second[name])
                weight.copy_(held.T if turned else held)
        advance(layer, states)
    progress(len(layers), len(layers), note)


@torch.no_grad()
def first_states(model: nn.Module, layers: nn.ModuleList, blocks: Tensor) -> States:
    """What the first layer is called with, block by block."""
    states = States([], [], [])

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.hidden.append(args[0] if args else kwargs.pop("hidden_states"))
        states.rest.append(args[1:])
        states.arguments.append(kwargs)
        raise _Stop

    handle = layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for block in blocks:
            with suppress(_Stop):
                model(input_ids=block[None], use_cache=False)
    finally:
        handle.remove()
    return states


def run(layer: nn.Module, states: States, index: int) -> Tensor:
    out = layer(states.hidden[index], *states.rest[index], **states.arguments[index])
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def advance(layer: nn.Module, states: States) -> None:
    for index in range(len(states.hidden)):
        states.hidden[index] = run(layer, states, index)


def linear_names(layer: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)]


@torch.no_grad()
def waves(layer: nn.Module, states: States) -> Iterator[list[str]]:
    """Names of the linear maps, those that read the same tensor together, in the order of computation."""
    seen: list[tuple[int, list[str]]] = []
    kept: list[Tensor] = []  # or an address could be used twice
    handles = []
    for name in linear_names(layer):

        def note(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            kept.append(args[0])
            for tensor, names in seen:
                if tensor == id(args[0]):
                    names.append(name)
                    return
            seen.append((id(args[0]), [name]))

        handles.append(layer.get_submodule(name).register_forward_pre_hook(note))
    try:
        run(layer, states, 0)
    finally:
        for handle in handles:
            handle.remove()
    return iter([names for _, names in seen])


@torch.no_grad()
def moments(layer: nn.Module, names: list[str], states: States) -> dict[str, Tensor]:
    """H = mean over tokens of x x^T, fp32 [in, in], of the input that `names` share."""
    total: Tensor | None = None
    count = 0

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal total, count
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        total = x.T @ x if total is None else total.addmm_(x.T, x)
        count += len(x)
        raise _Stop

    handle = layer.get_submodule(names[0]).register_forward_pre_hook(add)
    try:
        for index in range(len(states.hidden)):
            with suppress(_Stop):
                run(layer, states, index)
    finally:
        handle.remove()
    if total is None:
        raise RuntimeError("a linear map was never called")
    return dict.fromkeys(names, total / count)
