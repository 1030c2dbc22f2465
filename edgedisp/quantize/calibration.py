"""GPTQ over a whole model, layer by layer on calibration tokens.

A linear map is rounded under the inputs that it will have in the quantized model: earlier maps are rounded
first. Maps that read one tensor (q, k, v; gate, up) are rounded as one weight under one H = E[x x^T].

Correction: earlier rounding changed the inputs (x instead of x0) and the residual stream (r instead of r0).
A map is rounded from the weight that makes up for a share of it, with a ridge against overfitting:

    W + share * ((W E[(x0 - x) x^T] + E[(r0 - r) x^T]) (H + ridge)^-1)

(x0 in place of x: GPTAQ, Li et al. 2025, arXiv 2504.02692, there column by column.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
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
from edgedisp.data.packing import PADDING, START, row_positions
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.quantize.gptq import gptq
from edgedisp.quantize.grid import Blocks, Grid, Scales, dequantize

LINEAR = nn.Linear | Conv1D  # GPT-2's Conv1D holds [in, out]
CORRECTION = 0.5  # share of what earlier rounding changed that later maps make up for; all of it overfits
RIDGE = 0.1  # of the correction: a share of H's mean diagonal
# A tied head is the embedding too. Each row's own error is added with this weight (a share of the mean
# squared activation): the head's error alone would make the rows coarser than rounding to nearest does.
TIED = 1.0

Grids = Grid | Mapping[str, Grid]
"""One grid for all, or by parameter name."""
Inputs = dict[nn.Module, Tensor]
"""What modules read, fp32 [tokens, in]."""
Waves = dict[nn.Module, tuple[list[Any], nn.Module | None]]
"""The first of the maps that read one tensor -> as of `LayerCall.waves`."""


@dataclass(frozen=True)
class CalibrationText:
    """tokens: unsigned integers [blocks, context]. marks (data/packing.py), of the same shape: rows that are
    apart, as in training, and padding, which counts for nothing; None: each block is one text."""

    tokens: NDArray[Any]
    marks: NDArray[np.uint8] | None = None

    def first(self, tokens: int) -> CalibrationText:
        """The first blocks that have at least so many tokens."""
        return self[: -(-tokens // self.tokens.shape[1])]

    def __getitem__(self, blocks: slice) -> CalibrationText:
        return CalibrationText(self.tokens[blocks], None if self.marks is None else self.marks[blocks])

    def inputs(self, model: nn.Module) -> dict[str, Tensor]:
        """What the model is called with."""
        arrays = {"input_ids": self.tokens.astype(np.int64)}
        if self.marks is not None:
            arrays["position_ids"] = row_positions(self.marks & START != 0)
        device = next(model.parameters()).device
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}

    @property
    def real(self) -> Tensor | None:
        """Indices of the tokens that are no padding, all blocks end to end; None: all."""
        if self.marks is None:
            return None
        return torch.from_numpy(np.flatnonzero(self.marks & PADDING == 0))


@torch.no_grad()
def gptq_model(
    model: Any, text: CalibrationText, grids: Grids, *, head: Grid | None = None, progress: Progress = silent
) -> dict[str, Blocks]:
    """Round the layers' linear maps of `model` in place by GPTQ, then the output head on the grid `head`.

    Returns parameter name -> blocks. BadInput without text.
    """
    blocks = calibrate(model, text, grids, progress=progress)
    if head is not None:
        output = model.get_output_embeddings()
        columns = output.weight.shape[1]
        second = torch.zeros(columns, columns, device=output.weight.device)

        def add(real: Tensor | None, module: nn.Module, args: tuple[Any, ...], _: dict[str, Any]) -> None:
            x = _flat(args[0], real)
            second.addmm_(x.T, x)
            raise _Stop

        for index in range(len(text.tokens)):
            block = text[index : index + 1]
            run = partial(model, **block.inputs(model), use_cache=False)
            _with_hooks([output], partial(add, block.real), run)
        second /= text.tokens.size if text.real is None else len(text.real)
        if output.weight is model.get_input_embeddings().weight:
            second += TIED * second.diagonal().mean() * torch.eye(len(second), device=second.device)
        name = next(name for name, parameter in model.named_parameters() if parameter is output.weight)
        blocks[name], _ = _round({name: read_weight(output)}, second, head)[name]
        write_weight(output, dequantize(blocks[name], head))
    return blocks


@torch.no_grad()
def calibrated_start(
    model: nn.Module, text: CalibrationText, grid: Grid, progress: Progress = silent
) -> dict[str, Scales]:
    """Where training under GPTQ's rounding starts: puts the latent weights into the layers of `model` and
    returns the scales that round them to the GPTQ-quantized model, by parameter name, on the model's device.

    BadInput without text.
    """
    latents: dict[str, Tensor] = {}
    blocks = calibrate(model, text, grid, latents, progress)
    for name, latent in latents.items():
        write_weight(model.get_submodule(name.removesuffix(".weight")), latent)
    return {name: Scales(part.scales.clone(), part.zero_points) for name, part in blocks.items()}


@torch.no_grad()
def calibrate(
    model: nn.Module,
    text: CalibrationText,
    grids: Grids,
    latents: dict[str, Tensor] | None = None,
    progress: Progress = silent,
) -> dict[str, Blocks]:
    """Round every linear map of the layers in place; returns parameter name -> blocks, in the order of
    computation.

    latents: gets parameter name -> the latent weight fp32 [out, in], which rounds to the blocks on their
    scales. The model is left in eval mode. BadInput without text.
    """
    if not len(text.tokens):
        raise BadInput("no calibration text: at least one block of tokens is needed")
    model.eval()
    blocks: dict[str, Blocks] = {}
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    layers = decoder_layers(model)
    calls, states = layer_calls(model, layers, text)
    samples, sample = layer_calls(model, layers, text[:1])  # what reads what, one block shows
    plain = states  # of the unrounded model

    def round_maps(waves: Waves, unrounded: Inputs, first: nn.Module, inputs: Inputs) -> None:
        """Round the maps that read what `first` is about to read."""
        modules, stream = waves.get(first, ((), None))
        if not modules:  # it only reads the residual stream
            return
        readers = [first] if stream is None else [first, stream]
        moments = _moments(*([of[reader] for reader in readers] for of in (inputs, unrounded)))
        weights = {names[module]: read_weight(module) for module in modules}
        rounded = _round(_corrected(weights, moments), moments["second"], grids)
        for module, (name, (part, latent)) in zip(modules, rounded.items()):
            write_weight(module, dequantize(part, _grid(grids, name)))
            blocks[name] = part
            if latents is not None:
                latents[name] = latent

    for index, call in enumerate(calls):
        progress(index, len(calls), "rounding layer by layer")
        readers_of = samples[index].waves(states[: len(sample)])
        waves = {modules[0]: (modules, stream) for modules, stream in readers_of}
        readers = {*waves, *(stream for _, stream in waves.values() if stream is not None)}
        unrounded, plain = call.trace(plain, readers)
        _, states = call.trace(states, readers, partial(round_maps, waves, unrounded))
    progress(len(calls), len(calls), "rounding layer by layer")
    return blocks


def _grid(grids: Grids, name: str) -> Grid:
    return grids if isinstance(grids, Grid) else grids[name]


def _round(weights: dict[str, Tensor], second: Tensor, grids: Grids) -> dict[str, tuple[Blocks, Tensor]]:
    """Blocks and latent weights of weights that read one tensor: those on one grid are rounded as one."""
    rounded: dict[str, tuple[Blocks, Tensor]] = {}
    for grid in dict.fromkeys(_grid(grids, name) for name in weights):
        group = [name for name in weights if _grid(grids, name) == grid]
        joined = weights[group[0]] if len(group) == 1 else torch.cat([weights[name] for name in group])
        blocks, latent = gptq(joined, grid, second)
        first = 0
        for name in group:
            rows = slice(first, first + len(weights[name]))
            rounded[name], first = (blocks.rows(rows), latent[rows]), rows.stop
    return {name: rounded[name] for name in weights}


def read_weight(module: Any) -> Tensor:
    """The weight of a linear map, fp32 [out, in]."""
    weight: Tensor = module.weight.detach()
    return (weight.T if isinstance(module, Conv1D) else weight).float()


def write_weight(module: Any, values: Tensor) -> None:
    """In place: a model's weights may lie in one piece of memory."""
    module.weight.copy_(values.T if isinstance(module, Conv1D) else values)


def _moments(inputs: Sequence[Tensor], unrounded: Sequence[Tensor]) -> dict[str, Tensor]:
    """second: H = E[x x^T] for inputs x [tokens, in]; drift: E[(x0 - x) x^T], x0 of the unrounded model. With
    residual streams r as second inputs also residual: E[(r0 - r) x^T]."""
    x = inputs[0]
    factors = [x, *(x0 - x1 for x0, x1 in zip(unrounded, inputs))]
    return {name: factor.T @ x / len(x) for name, factor in zip(("second", "drift", "residual"), factors)}


def _corrected(weights: dict[str, Tensor], moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that give, on the inputs of the rounded model, more of what the unrounded model gives."""
    joined = torch.cat(list(weights.values()))
    missing = joined @ moments["drift"]
    if "residual" in moments:
        missing += moments["residual"]
    metric = moments["second"].clone()
    metric.diagonal().add_(RIDGE * metric.diagonal().mean().clamp(min=1e-12))
    change = torch.cholesky_solve(missing.T, torch.linalg.cholesky(metric)).T
    parts = joined.add_(change, alpha=CORRECTION).split([len(weight) for weight in weights.values()])
    return dict(zip(weights, parts))


# ---------------------------------------------------------------- what a layer's modules read


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


def _with_hooks(modules: Iterable[nn.Module], hook: Callable[..., None], run: Callable[[], Any]) -> None:
    """`run`, which a hook may end, with `hook(module, args, kwargs)` before each of `modules`."""
    with ExitStack() as hooks, suppress(_Stop):
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        run()


def _flat(states: Tensor, real: Tensor | None) -> Tensor:
    """[tokens, features], fp32, without padding."""
    rows = states.reshape(-1, states.shape[-1])
    return (rows if real is None else rows[real.to(rows.device)]).float()


@dataclass(frozen=True)
class LayerCall:
    """A layer with what it is called with beside the states of a text: rotary positions, mask. real: as of
    `CalibrationText`."""

    layer: nn.Module
    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    real: Tensor | None

    def __call__(self, state: Tensor) -> Tensor:
        output = self.layer(state, *self.positional, **self.keywords)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def trace(
        self,
        states: Tensor,
        readers: Iterable[nn.Module],
        at: Callable[[nn.Module, Inputs], None] | None = None,
    ) -> tuple[Inputs, Tensor]:
        """What each of `readers` reads, and the layer's output. at: is called before each of them computes,
        with it and what was read so far."""
        inputs: Inputs = {}

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[module] = _flat(args[0], self.real)
            if at is not None:
                at(module, inputs)

        outputs: list[Tensor] = []
        _with_hooks(readers, read, lambda: outputs.append(self(states)))
        return inputs, outputs[0]

    def waves(self, state: Tensor) -> list[tuple[list[Any], nn.Module | None]]:
        """The linear maps in the order of computation, those that read the same tensor together; with the
        module that reads the residual stream to which a map's output is added.

        The stream is found by value: a tensor that is read later, or the layer's output, is that sum to the
        bit. None where there is no such sum: several maps, a norm in between, a parallel branch.
        """
        reads: list[tuple[nn.Module, Tensor]] = []
        outputs: dict[nn.Module, tuple[int, Tensor]] = {}  # how many reads were before, and the output

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if args and isinstance(args[0], Tensor):
                reads.append((module, args[0]))

        def written(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            outputs[module] = len(reads), output

        linear = [module for module in self.layer.modules() if isinstance(module, LINEAR)]
        with ExitStack() as hooks:
            for product in linear:
                hooks.callback(product.register_forward_hook(written).remove)
            _with_hooks(self.layer.modules(), read, lambda: reads.append((self.layer, self(state))))
        waves: dict[int, list[Any]] = {}
        for module, tensor in reads:
            if isinstance(module, LINEAR):
                waves.setdefault(id(tensor), []).append(module)

        def stream_of(module: nn.Module) -> nn.Module | None:
            count, output = outputs[module]
            same_size = [(reader, x.reshape(-1)) for reader, x in reads if x.numel() == output.numel()]
            before = sum(x.numel() == output.numel() for _, x in reads[:count])
            sums = ((reader, stream + output.reshape(-1)) for reader, stream in same_size[:before])
            later = [tensor for _, tensor in same_size[before:]]
            return next((reader for reader, total in sums if any(torch.equal(total, x) for x in later)), None)

        return [(wave, stream_of(wave[0]) if len(wave) == 1 else None) for wave in waves.values()]


def layer_calls(
    model: nn.Module, layers: nn.ModuleList, text: CalibrationText
) -> tuple[list[LayerCall], Tensor]:
    """How the model calls each layer, and the states [blocks, tokens, features] that reach the first one."""
    calls: list[LayerCall] = []
    states: list[Tensor] = []

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not calls:
            states.append(args[0] if args else kwargs["hidden_states"])
        keywords = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(LayerCall(module, args[1:], keywords, text.real))
        if len(calls) == len(layers):
            raise _Stop

    _with_hooks(layers, read, partial(model, **text.inputs(model), use_cache=False))
    return calls, states[0]
