"""GPTQ over a whole model, layer by layer on calibration tokens.

A linear map is rounded under the inputs that it will have in the quantized model: earlier maps are rounded
first. Maps that read one tensor (q, k, v; gate, up) are rounded as one weight under one H = E[x x^T].

Correction: earlier rounding changed the inputs (x instead of x0) and the residual stream (r instead of r0).
A map is rounded from the weight that makes up for a share of it, with a ridge against overfitting:

    W + share * ((W E[(x0 - x) x^T] + E[(r0 - r) x^T]) (H + ridge)^-1)

(x0 in place of x: GPTAQ, Li et al. 2025, arXiv 2504.02692, there column by column.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.quantize.gptq import gptq
from edgedisp.quantize.grid import Blocks, Grid, check_weight, dequantize

LINEAR = nn.Linear | Conv1D  # GPT-2's Conv1D holds [in, out]
CORRECTION = 0.5  # share of what earlier rounding changed that later maps make up for; all of it overfits
RIDGE = 0.1  # of the correction: a share of H's mean diagonal
# A tied head is the embedding too. Each row's own error is added with this weight (a share of the mean
# squared activation): the head's error alone would make the rows coarser than rounding to nearest does.
TIED = 1.0

Grids = Callable[[str], Grid]
"""Parameter name -> its grid."""

Rounded = dict[str, tuple[Blocks, Tensor]]
"""Parameter name -> blocks, and the latent weight fp32 [out, in] that rounds to them on their scales."""


@dataclass(frozen=True)
class Scales:
    """Of a weight [out, in]: scales fp32 and zero points uint8 (None: symmetric), each [out, groups]."""

    scales: Tensor
    zero_points: Tensor | None

    def rows(self, first: int, count: int) -> Scales:
        points = None if self.zero_points is None else self.zero_points[first : first + count]
        return Scales(self.scales[first : first + count], points)


@torch.no_grad()
def gptq_model(
    model: Any,
    tokens: NDArray[Any],
    grid: Grid | Mapping[str, Grid],
    *,
    head: Grid | None = None,
    correction: float = CORRECTION,
    progress: Progress = silent,
) -> dict[str, Blocks]:
    """Round the layers' linear maps of `model` in place by GPTQ, then the output head on the grid `head`.

    tokens: unsigned integers [blocks, context], all real text. `grid`: one for all, or by parameter name.
    Returns parameter name -> blocks. BadInput names the weight that cannot be quantized, or says that there
    are no tokens.
    """
    grids: Grids = (lambda name: grid) if isinstance(grid, Grid) else grid.__getitem__
    text = _text(model, tokens)
    blocks = {
        name: part
        for rounded in calibrate(model, text, grids, correction, progress)
        for name, (part, _) in rounded.items()
    }
    if head is not None:
        output = model.get_output_embeddings()
        run = lambda block: model(input_ids=block[None], use_cache=False)  # noqa: E731
        second = _moments(run, [output], text, [], {})["second"]
        if output.weight is model.get_input_embeddings().weight:
            second += TIED * second.diagonal().mean() * torch.eye(len(second), device=second.device)
        name = next(name for name, parameter in model.named_parameters() if parameter is output.weight)
        blocks[name], _ = _round({name: _read(output)}, second, lambda _: head)[name]
        _write(output, dequantize(blocks[name], head))
    return blocks


@torch.no_grad()
def calibrated_start(
    model: nn.Module, tokens: NDArray[Any], grids: Grids, progress: Progress = silent
) -> dict[str, Scales]:
    """Where training under GPTQ's rounding starts: puts the latent weights into the layers of `model` and
    returns the scales that round them to the GPTQ-quantized model, by parameter name, on the model's device.

    tokens: unsigned integers [blocks, context]. BadInput names a weight that cannot be quantized.
    """
    scales: dict[str, Scales] = {}
    latents: dict[str, Tensor] = {}
    for rounded in calibrate(model, _text(model, tokens), grids, CORRECTION, progress):
        for name, (blocks, latents[name]) in rounded.items():
            scales[name] = Scales(blocks.scales.clone(), blocks.zero_points)
    for name, latent in latents.items():
        _write(model.get_submodule(name.removesuffix(".weight")), latent)
    return scales


def _text(model: nn.Module, tokens: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.asarray(tokens, np.int64)).to(next(model.parameters()).device)


@torch.no_grad()
def calibrate(
    model: nn.Module, text: Tensor, grids: Grids, correction: float, progress: Progress = silent
) -> Iterator[Rounded]:
    """Round every linear map of the layers in place, in the order of computation; yields those that were
    rounded together. text: int64 [blocks, tokens], on the model's device.

    `correction`: the share, in [0, 1], of what earlier rounding changed that later maps make up for. The
    model is left in eval mode. BadInput if there is no text.
    """
    if not len(text):
        raise BadInput("no calibration text: at least one block of tokens is needed")
    model.eval()
    layers = decoder_layers(model)
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    calls, states = layer_calls(model, layers, text)
    plain = states if correction else []  # of the unrounded model
    for index, call in enumerate(calls):
        progress(index, len(layers), "rounding layer by layer")
        originals: dict[Any, Tensor] = {}
        for modules in _waves(call, states[0]):
            weights = {names[module]: _read(module) for module in modules}
            stream = residual_of(call, modules[0], states[0]) if plain and len(modules) == 1 else None
            read = modules[:1] if stream is None else [modules[0], stream]
            moments = _moments(call, read, states, plain, originals)
            if plain:
                weights = _corrected(weights, moments, correction)
                originals |= {module: module.weight.data.clone() for module in modules}
            rounded = _round(weights, moments["second"], grids)
            for module in modules:
                _write(module, dequantize(rounded[names[module]][0], grids(names[module])))
            yield rounded
        with _restored(originals):
            plain = [call(state) for state in plain]
        states = [call(state) for state in states]
    progress(len(layers), len(layers), "rounding layer by layer")


def _round(weights: dict[str, Tensor], second: Tensor, grids: Grids) -> Rounded:
    """Weights that read one tensor: those on one grid are rounded as one. BadInput names a damaged one."""
    rounded: Rounded = {}
    for name, weight in weights.items():
        try:
            check_weight(weight)
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from error
    for grid in dict.fromkeys(map(grids, weights)):
        names = [name for name in weights if grids(name) == grid]
        joined = weights[names[0]] if len(names) == 1 else torch.cat([weights[name] for name in names])
        blocks, latent = gptq(joined, grid, second)
        first = 0
        for name in names:
            rows = slice(first, first + len(weights[name]))
            rounded[name], first = (blocks.rows(rows), latent[rows]), rows.stop
    return rounded


def _read(module: Any) -> Tensor:
    """The weight fp32 [out, in]."""
    weight: Tensor = module.weight.detach()
    return (weight.T if isinstance(module, Conv1D) else weight).float()


def _write(module: Any, values: Tensor) -> None:
    """In place: a model's weights may lie in one piece of memory."""
    module.weight.copy_(values.T if isinstance(module, Conv1D) else values)


@contextmanager
def _restored(weights: Mapping[Any, Tensor]) -> Iterator[None]:
    """The modules with these weights."""
    rounded = {module: module.weight.data for module in weights}
    try:
        for module, weight in weights.items():
            module.weight.data = weight
        yield
    finally:
        for module, weight in rounded.items():
            module.weight.data = weight


def _moments(
    run: Callable[[Tensor], Any],
    read: Sequence[nn.Module],
    states: Sequence[Tensor] | Tensor,
    plain: Sequence[Tensor],
    originals: Mapping[Any, Tensor],
) -> dict[str, Tensor]:
    """second: H = E[x x^T] for the inputs x of `read[0]`. With `plain` states also drift: E[(x0 - x) x^T].
    With a second module, which reads the residual stream r, also residual: E[(r0 - r) x^T]."""
    sums: dict[str, Tensor] = {}
    tokens = 0

    def add(name: str, left: Tensor, x: Tensor) -> None:
        sums[name] = sums[name].addmm_(left.T, x) if name in sums else left.T @ x

    for index, state in enumerate(states):
        x, *r = _layer_inputs(partial(run, state), read)
        tokens += len(x)
        add("second", x, x)
        if plain:
            with _restored(originals):
                x0, *r0 = _layer_inputs(partial(run, plain[index]), read)
            add("drift", x0 - x, x)
            if r:
                add("residual", r0[0] - r[0], x)
    return {name: total / tokens for name, total in sums.items()}


def _corrected(weights: dict[str, Tensor], moments: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The weights that give, on the inputs of the rounded model, `share` more of what the unrounded gives."""
    joined = torch.cat(list(weights.values()))
    missing = joined @ moments["drift"]
    if "residual" in moments:
        missing += moments["residual"]
    metric = moments["second"].double()
    metric.diagonal().add_(RIDGE * metric.diagonal().mean().clamp(min=1e-12))
    change = torch.cholesky_solve(missing.T.double(), torch.linalg.cholesky(metric)).T.float()
    parts = joined.add_(change, alpha=share).split([len(weight) for weight in weights.values()])
    return dict(zip(weights, parts))


class _Enough(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass(frozen=True)
class LayerCall:
    """What a layer is called with beside its states (rotary positions, mask): the same for all blocks, which
    are of one length and without padding."""

    layer: nn.Module
    positional: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, state: Tensor) -> Tensor:
        output = self.layer(state, *self.positional, **self.named)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states


def _with_hooks(modules: Sequence[nn.Module], hook: Callable[..., None], run: Callable[[], Any]) -> None:
    """`run`, which a hook may end, with `hook(module, args, kwargs)` before each of `modules`."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        with suppress(_Enough):
            run()
    finally:
        for handle in handles:
            handle.remove()


def _layer_inputs(run: Callable[[], Any], modules: Sequence[nn.Module]) -> list[Tensor]:
    """What each of `modules` reads, fp32 [tokens, in], in a pass that ends before the first of them."""
    inputs: dict[nn.Module, Tensor] = {}

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[module] = args[0].reshape(-1, args[0].shape[-1]).float()
        if module is modules[0]:
            raise _Enough

    _with_hooks(modules, read, run)
    return [inputs[module] for module in modules]


def layer_calls(
    model: nn.Module, layers: nn.ModuleList, text: Tensor
) -> tuple[list[LayerCall], list[Tensor]]:
    """How the model calls each layer, and the states [1, tokens, features] of each block that reach the first
    one."""
    calls: list[LayerCall] = []
    states: list[Tensor] = []

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is layers[0]:
            states.append(args[0] if args else kwargs["hidden_states"])
        if len(calls) == len(layers):
            raise _Enough
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(LayerCall(module, args[1:], others))

    for block in text:
        _with_hooks(list(layers), read, partial(model, input_ids=block[None], use_cache=False))
    return calls, states


def _waves(call: LayerCall, state: Tensor) -> list[list[Any]]:
    """The layer's linear maps in the order of computation, those that read the same tensor together."""
    waves: dict[int, tuple[Tensor, list[Any]]] = {}  # with the tensor, or its id could be used again

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        waves.setdefault(id(args[0]), (args[0], []))[1].append(module)

    linear = [module for module in call.layer.modules() if isinstance(module, LINEAR)]
    _with_hooks(linear, read, partial(call, state))
    return [wave for _, wave in waves.values()]


def residual_of(call: LayerCall, module: nn.Module, state: Tensor) -> nn.Module | None:
    """The module of the layer that reads the residual stream which `module`'s output is added to.

    Found by value: a tensor that is read later, or the layer's output, is that sum to the bit. None where
    there is no such sum: other maps, a norm in between, a parallel branch.
    """
    before: list[tuple[nn.Module, Tensor]] = []
    outputs: list[Tensor] = []
    later: list[Tensor] = []

    def read(which: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].numel() == state.numel():
            tensor = args[0].reshape(state.shape)
            (later.append(tensor) if outputs else before.append((which, tensor)))

    handle = module.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        _with_hooks(list(call.layer.modules()), read, lambda: later.append(call(state)))
    finally:
        handle.remove()
    if outputs[0].numel() != state.numel():
        return None
    output = outputs[0].reshape(state.shape)
    for which, stream in before:
        total = stream + output
        if any(torch.equal(total, tensor) for tensor in later):
            return which
    return None
