"""Layer by layer through a model on calibration tokens: what each linear map sees, and its rounding.

A linear map is rounded under the inputs that it will have in the quantized model. So earlier maps are rounded
first, and the states of the tokens are those of the model so far (sequential, as in GPTQ). Within a layer,
maps that read the same tensor (q, k and v; gate and up) are rounded together, as one weight with the rows of
all, in the order of computation: what their inputs say is worked out once. The states before one layer are
kept, `tokens x features`, and nothing else of the model's activations.

Correction. By the time a map is rounded, its inputs x differ from those of the unrounded model, x0, as
earlier maps were rounded; and where its output is added to the residual stream, that stream r differs from
r0. So the output that is wanted is W x0 + (r0 - r), not W x, and what is handed over for rounding is

    W + share * ((W E[(x0 - x) x^T] + E[(r0 - r) x^T]) (H + ridge)^-1),    H = E[x x^T]

which for share 1 and no ridge is the least-squares map from x to the wanted output. (x0 in place of x: GPTAQ,
Li et al. 2025, arXiv 2504.02692, there column by column; for a quadratic loss, moving the weight that is
rounded is the same. The residual stream is added here.) Calibration text is little, so all of it overfits
(SmolLM2-135M trained on 80k tokens, 4 bits, 16k tokens of calibration; share 0, 1/2 and, without the stream,
1/2 and 1: perplexity 13.49, 13.16, 13.14, 13.26 on held-out text against 12.56 unrounded, 26.8, 26.7, 27.1,
27.7 on wikitext-2 against 25.4). The unrounded model's states are carried along, and within a layer its
weights are put back while it runs.

What a layer is called with beside its states (rotary positions, mask) is taken from a pass over the first
block; it is the same for all, as blocks are of one length and without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent

LINEAR = nn.Linear | Conv1D  # GPT-2's Conv1D holds [in, out]
CORRECTION = 0.5  # the share of what earlier rounding changed that later maps make up for
RIDGE = 0.1  # of the correction: a share of H's mean diagonal


@dataclass(frozen=True)
class Wave:
    """Linear maps that read one tensor: by module name, weights fp32 [out, in] as they are and as they are to
    be rounded (the same without correction), and H fp32 [in, in], the mean of x x^T over all tokens."""

    weights: dict[str, Tensor]
    wanted: dict[str, Tensor]
    second: Tensor


Rounding = Callable[[Wave], dict[str, Tensor]]
"""-> the wave's names, with the weights as a grid holds them."""


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
    *,
    correction: float = 0.0,
) -> None:
    """Round every linear map of `layers` in place. blocks: int64 [n, tokens], on the model's device.

    `rounding` is called in the order of computation. `correction`: the share, in [0, 1], of what earlier
    rounding changed that later maps make up for. The model is left in eval mode. BadInput if there are no
    blocks.
    """
    if not len(blocks):
        raise BadInput("no calibration text: at least one block of tokens is needed")
    model.eval()
    names = {module: name for name, module in model.named_modules()}
    calls = layer_calls(model, layers, blocks[0])
    states = [states_before(model, layers[0], block) for block in blocks]
    plain = states if correction else []
    for index, call in enumerate(calls):
        progress(index, len(layers), note)
        held = _Held()
        for together in waves_of(call, states[0]):
            weights = {names[module]: _weight(module) for module in together}
            if correction:
                second, shift = _moments(call, together, states, plain, held)
                wanted = _corrected(weights, second, shift, correction)
                held.keep(together)
            else:
                second, wanted = second_moment(call, together[0], states), weights
            _write(together, rounding(Wave(weights, wanted, second)), names)
        with held.unrounded():
            plain = [call(state) for state in plain]
        states = [call(state) for state in states]
    progress(len(layers), len(layers), note)


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.weight.detach()
    return (weight.T if isinstance(module, Conv1D) else weight).float()


@dataclass
class _Held:
    """The unrounded weights of the layer at hand, by module."""

    weights: dict[Any, Tensor] = field(default_factory=dict)

    def keep(self, modules: Sequence[Any]) -> None:
        """Copies of theirs, before they are rounded."""
        self.weights |= {module: module.weight.data.clone() for module in modules}

    @contextmanager
    def unrounded(self) -> Iterator[None]:
        """The layer with its own weights."""
        rounded = {module: module.weight.data for module in self.weights}
        try:
            for module, weight in self.weights.items():
                module.weight.data = weight
            yield
        finally:
            for module, weight in rounded.items():
                module.weight.data = weight


def _write(modules: Sequence[Any], found: dict[str, Tensor], names: dict[Any, str]) -> None:
    """In place: a model's weights may lie in one piece of memory, which is not freed in parts."""
    for module in modules:
        values = found[names[module]]
        module.weight.copy_(values.T if isinstance(module, Conv1D) else values)


def _moments(
    call: LayerCall,
    together: Sequence[nn.Module],
    states: Sequence[Tensor],
    plain: Sequence[Tensor],
    held: _Held,
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """H, and of the difference to the unrounded model: E[(x0 - x) x^T] and E[(r0 - r) x^T]; the latter None
    where the output is not added to a residual stream."""
    module = together[0]
    source = residual_of(call, module, states[0]) if len(together) == 1 else None
    second = drift = stream = None
    tokens = 0
    for state, other in zip(states, plain):
        x, r = _reached(call, module, source, state)
        with held.unrounded():
            x0, r0 = _reached(call, module, source, other)
        tokens += len(x)
        second = _added(second, x, x)
        drift = _added(drift, x0 - x, x)
        if r is not None and r0 is not None:
            stream = _added(stream, r0 - r, x)
    if second is None or drift is None:
        raise ValueError("no states")
    return second / tokens, (drift / tokens, None if stream is None else stream / tokens)


def _added(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left.T @ right if total is None else total.addmm_(left.T, right)


def _corrected(
    weights: dict[str, Tensor], second: Tensor, shift: tuple[Tensor, Tensor | None], share: float
) -> dict[str, Tensor]:
    """The weights that give, on the inputs of the rounded model, `share` more of what the unrounded gives."""
    drift, stream = shift
    joined = torch.cat(list(weights.values()))
    missing = joined @ drift
    if stream is not None:
        missing += stream
    metric = second.double()
    metric.diagonal().add_(RIDGE * metric.diagonal().mean().clamp(min=1e-12))
    change = torch.cholesky_solve(missing.T.double(), torch.linalg.cholesky(metric)).T.float()
    wanted = joined.add_(change, alpha=share).split([len(weight) for weight in weights.values()])
    return dict(zip(weights, wanted))


def _reached(
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
