"""What the linear maps of a layer read: passes through single layers, ended by hooks.

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

LINEAR = nn.Linear | Conv1D  # GPT-2's Conv1D holds [in, out]


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


def reached(
    call: LayerCall, module: nn.Module, source: nn.Module | None, state: Tensor
) -> tuple[Tensor, Tensor | None]:
    """In a pass that ends before `module`: its inputs [tokens, in], and those of `source`, both fp32."""
    found: dict[nn.Module, Tensor] = {}

    def note(which: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[which] = args[0].reshape(-1, args[0].shape[-1]).float()
        if which is module:
            raise _Enough

    hooked = [module] if source is None else [source, module]
    with_hooks(hooked, note, lambda: call(state))
    return found[module], None if source is None else found[source]


def residual_of(call: LayerCall, module: nn.Module, state: Tensor) -> nn.Module | None:
    """The module of the layer that reads the residual stream which `module`'s output is added to.

    Found by value: some tensor that is read later, or the layer's output, is that sum to the bit. None where
    there is no such sum: other maps, a norm in between, a parallel branch.
    """
    before: list[tuple[nn.Module, Tensor]] = []
    outputs: list[Tensor] = []
    later: list[Tensor] = []

    def read(which: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].numel() == state.numel():
            tensor = args[0].reshape(state.shape)
            (later.append(tensor) if outputs else before.append((which, tensor)))

    def written(which: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        outputs.append(output)

    handle = module.register_forward_hook(written)
    try:
        with_hooks(list(call.layer.modules()), read, lambda: later.append(call(state)))
    finally:
        handle.remove()
    if outputs[0].numel() != state.numel():
        return None
    output = outputs[0].reshape(state.shape)
    for which, stream in before:
        whole = stream + output
        if any(torch.equal(whole, tensor) for tensor in later):
            return which
    return None


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


def waves_of(call: LayerCall, state: Tensor) -> list[list[Any]]:
    """The layer's linear maps in the order of computation, those that read the same tensor together."""
    inputs: list[Tensor] = []  # kept, as an address could be used twice
    waves: list[list[Any]] = []

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
