"""Layer by layer through a model on calibration tokens: what each linear map sees, and its rounding.

A linear map is rounded under the inputs that it will have in the quantized model. So earlier maps are rounded
first, and the states of the tokens are those of the model so far (sequential, as in GPTQ). Within a layer,
maps that read the same tensor (q, k and v; gate and up) are rounded together, as one weight with the rows of
all, in the order of computation: what their inputs say is worked out once. The states before one layer are
kept, `tokens x features`, and nothing else of the model's activations.

What a layer is called with beside its states (rotary positions, mask) is taken from a pass over the first
block; it is the same for all, as blocks are of one length and without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgedisp import BadInput, Progress, silent

LINEAR = nn.Linear | Conv1D  # GPT-2's Conv1D holds [in, out]

Rounding = Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]
"""(module name -> weight fp32 [out, in] of the maps that read one tensor, H fp32 [in, in]) -> the same names,
with the weights as a grid holds them."""


class _Enough(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass(frozen=True)
class LayerCall:
    """What a layer is called with, without the states."""

    layer: nn.Module
    positional: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, state: Tensor) -> Tensor:
        output = self.layer(state, *self.positional, **self.named)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found


@torch.no_grad()
def calibrate(
    model: nn.Module,
    layers: nn.ModuleList,
    blocks: Tensor,
    rounding: Rounding,
    progress: Progress = silent,
    note: str = "",
) -> None:
    """Round every linear map of `layers` in place. blocks: int64 [n, tokens], on the model's device.

    `rounding` is called in the order of computation, with H the mean of x x^T over all tokens of the maps'
    input x [in]. The model is left in eval mode. BadInput if there are no blocks.
    """
    if not len(blocks):
        raise BadInput("no calibration text: at least one block of tokens is needed")
    model.eval()
    names = {module: name for name, module in model.named_modules()}
    calls = layer_calls(model, layers, blocks[0])
    states = [states_before(model, layers[0], block) for block in blocks]
    for index, call in enumerate(calls):
        progress(index, len(layers), note)
        for together in waves_of(call, states[0]):
            second = second_moment(call, together[0], states)
            _round({names[module]: module for module in together}, second, rounding)
        states = [call(state) for state in states]
    progress(len(layers), len(layers), note)


def _round(modules: dict[str, Any], second: Tensor, rounding: Rounding) -> None:
    weights = {
        name: (module.weight.T if isinstance(module, Conv1D) else module.weight).float()
        for name, module in modules.items()
    }
    for name, held in rounding(weights, second).items():
        module = modules[name]
        module.weight.copy_(held.T if isinstance(module, Conv1D) else held)


def layer_calls(model: nn.Module, layers: nn.ModuleList, block: Tensor) -> list[LayerCall]:
    """How the model calls each layer."""
    found: list[LayerCall] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        found.append(LayerCall(module, args[1:], kwargs))

    with_hooks(layers, note, lambda: model(input_ids=block[None], use_cache=False))
    return found


def states_before(model: nn.Module, layer: nn.Module, block: Tensor) -> Tensor:
    """The states [1, tokens, features] that reach `layer`."""
    reached: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached.append(args[0] if args else kwargs["hidden_states"])
        raise _Enough

    with_hooks([layer], stop, lambda: model(input_ids=block[None], use_cache=False))
    return reached[0]


def waves_of(call: LayerCall, state: Tensor) -> list[list[nn.Module]]:
    """The layer's linear maps in the order of computation, those that read the same tensor together."""
    inputs: list[Tensor] = []  # kept, as an address could be used twice
    waves: list[list[nn.Module]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for seen, wave in zip(inputs, waves):
            if seen is args[0]:
                wave.append(module)
                return
        inputs.append(args[0])
        waves.append([module])

    linear = [module for module in call.layer.modules() if isinstance(module, LINEAR)]
    with_hooks(linear, note, lambda: call(state))
    return waves


@torch.no_grad()
def second_moment(
    call: Callable[[Tensor], Any], module: nn.Module, states: Sequence[Tensor] | Tensor
) -> Tensor:
    """H: the mean over tokens of x x^T, fp32 [in, in], for the input x of a linear map that `call` of each
    state reaches."""
    sums: list[Tensor] = []
    tokens = 0

    def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal tokens
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        tokens += len(x)
        if sums:
            sums[0].addmm_(x.T, x)
        else:
            sums.append(x.T @ x)
        raise _Enough

    for state in states:
        with_hooks([module], add, partial(call, state))
    return sums[0] / tokens


def with_hooks(
    modules: Sequence[nn.Module] | nn.ModuleList, hook: Callable[..., None], run: Callable[[], Any]
) -> None:
    """`run`, which a hook may end, with `hook` before each of `modules`."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        with suppress(_Enough):
            run()
    finally:
        for handle in handles:
            handle.remove()
