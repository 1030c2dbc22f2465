"""GPTQ over a whole model, layer by layer on calibration tokens.

A linear map is rounded under the inputs that it will have in the quantized model: earlier maps are rounded
first, and the states of the tokens are those of the model so far. Maps that read the same tensor (q, k, v;
gate, up) are rounded as one weight, since their inputs' second moment H = E[x x^T] is the same.

Correction: earlier rounding changed the inputs (x instead of x0) and the residual stream (r instead of r0),
so a map is rounded from the weight that makes up for part of it, with a ridge against overfitting on little
text:

    W + share * ((W E[(x0 - x) x^T] + E[(r0 - r) x^T]) (H + ridge)^-1)

(x0 in place of x: GPTAQ, Li et al. 2025, arXiv 2504.02692, there column by column.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.quantize.gptq import gptq, gptq_latent
from edgedisp.quantize.grid import Blocks, Grid, dequantize, split_rows, stacked
from edgedisp.quantize.layer_inputs import (
    LayerCall,
    layer_calls,
    reached,
    residual_of,
    second_moment,
    states_before,
    waves_of,
)

CORRECTION = 0.5  # share of what earlier rounding changed that later maps make up for; all of it overfits
RIDGE = 0.1  # of the correction: a share of H's mean diagonal
# A tied head is the embedding too. Each row's own error is added with this weight (a share of the mean
# squared activation): the head's error alone would make the rows coarser than rounding to nearest does.
TIED = 1.0

Grids = Callable[[str], Grid]
"""Parameter name -> its grid."""


@dataclass(frozen=True)
class Wave:
    """Linear maps that read one tensor: weights fp32 [out, in] to be rounded, by parameter name, and H fp32
    [in, in], the mean of x x^T over all tokens."""

    weights: dict[str, Tensor]
    second: Tensor


Rounding = Callable[[Wave], dict[str, Tensor]]
"""-> the wave's names, with the dequantized weights."""


@dataclass(frozen=True)
class Scales:
    """Of a weight [out, in]: scales fp32 and zero points uint8 (None: symmetric), each [out, groups]."""

    scales: Tensor
    zero_points: Tensor | None

    def rows(self, first: int, count: int) -> Scales:
        """Those of `count` rows."""
        points = None if self.zero_points is None else self.zero_points[first : first + count]
        return Scales(self.scales[first : first + count], points)


def gptq_model(
    model: nn.Module,
    tokens: NDArray[Any],
    grid: Grid | Mapping[str, Grid],
    *,
    head: Grid | None = None,
    correction: float = CORRECTION,
    progress: Progress = silent,
) -> dict[str, Blocks]:
    """Round the linear maps of the layers of `model` in place by GPTQ; then the output head, on its grid
    `head`.

    tokens: unsigned integers [blocks, context], all real text. `grid`: one for all, or by parameter name;
    maps that are stored as one weight need the same. Returns parameter name -> blocks. BadInput names the
    weight that cannot be quantized, or says that there are no tokens.
    """
    blocks: dict[str, Blocks] = {}
    by_name: Grids = (lambda name: grid) if isinstance(grid, Grid) else grid.__getitem__
    text = torch.from_numpy(np.asarray(tokens, np.int64))
    calibrate(model, text, lambda wave: _round_wave(wave, by_name, blocks), correction, progress)
    if head is not None:
        on_head = head
        output: Any = model.get_output_embeddings()  # type: ignore[operator]
        second = second_moment(lambda block: model(input_ids=block[None], use_cache=False), output, text)
        if output.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
            second += TIED * second.diagonal().mean() * torch.eye(len(second), device=second.device)
        name = next(name for name, parameter in model.named_parameters() if parameter is output.weight)
        wave = Wave({name: output.weight.detach().float()}, second)
        output.weight.data.copy_(_round_wave(wave, lambda name: on_head, blocks)[name])
    return blocks


@torch.no_grad()
def calibrated_start(
    model: nn.Module, tokens: NDArray[Any], grids: Grids, progress: Progress = silent
) -> dict[str, Scales]:
    """Where training under GPTQ's rounding starts: puts its latent weights into the layers of `model` and
    returns the scales that round them to the GPTQ-quantized model, by parameter name, on the model's device.

    tokens: unsigned integers [blocks, context]. BadInput names a weight that cannot be quantized.
    """
    blocks: dict[str, Blocks] = {}
    latents: dict[str, Tensor] = {}
    text = torch.from_numpy(np.asarray(tokens, np.int64)).to(next(model.parameters()).device)
    calibrate(model, text, lambda wave: _round_wave(wave, grids, blocks, latents), CORRECTION, progress)
    for name, latent in latents.items():
        module: Any = model.get_submodule(name.removesuffix(".weight"))
        module.weight.copy_(latent.T if isinstance(module, Conv1D) else latent)
    return {name: Scales(one.scales.clone(), one.zero_points) for name, one in blocks.items()}


def _round_wave(
    wave: Wave, grids: Grids, blocks: dict[str, Blocks], latents: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The dequantized weights of a wave; their blocks and, on request, latent weights go into the
    mappings."""
    values: dict[str, Tensor] = {}
    for grid in dict.fromkeys(map(grids, wave.weights)):
        weights = {name: weight for name, weight in wave.weights.items() if grids(name) == grid}
        joined, heights = stacked(weights)
        if latents is None:
            rounded = gptq(joined, grid, wave.second)
        else:
            rounded, latent = gptq_latent(joined, grid, wave.second)
            latents.update(zip(weights, latent.split(heights)))
        blocks.update(zip(weights, split_rows(rounded, heights)))
        values |= zip(weights, dequantize(rounded, grid).split(heights))
    return values


@torch.no_grad()
def calibrate(
    model: nn.Module, blocks: Tensor, rounding: Rounding, correction: float, progress: Progress = silent
) -> None:
    """Round every linear map of the layers in place. blocks: int64 [n, tokens], on the model's device.

    `rounding` is called in the order of computation. `correction`: the share, in [0, 1], of what earlier
    rounding changed that later maps make up for. The model is left in eval mode. BadInput if there are no
    blocks.
    """
    if not len(blocks):
        raise BadInput("no calibration text: at least one block of tokens is needed")
    model.eval()
    layers = decoder_layers(model)
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    calls = layer_calls(model, layers, blocks[0])
    states = [states_before(model, layers[0], block) for block in blocks]
    plain = states if correction else []
    for index, call in enumerate(calls):
        progress(index, len(layers), "rounding layer by layer")
        originals = _Originals()
        for modules in waves_of(call, states[0]):
            weights = {names[module]: _weight(module) for module in modules}
            if correction:
                second, shift = _moments(call, modules, states, plain, originals)
                weights = _corrected(weights, second, shift, correction)
                originals.keep(modules)
            else:
                second = second_moment(call, modules[0], states)
            rounded = rounding(Wave(weights, second))
            for module in modules:  # in place: a model's weights may lie in one piece of memory
                values = rounded[names[module]]
                module.weight.copy_(values.T if isinstance(module, Conv1D) else values)
        with originals.restored():
            plain = [call(state) for state in plain]
        states = [call(state) for state in states]
    progress(len(layers), len(layers), "rounding layer by layer")


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.weight.detach()
    return (weight.T if isinstance(module, Conv1D) else weight).float()


@dataclass
class _Originals:
    """The unrounded weights of the layer at hand, by module."""

    weights: dict[Any, Tensor] = field(default_factory=dict)

    def keep(self, modules: Sequence[Any]) -> None:
        """Copies of theirs, before they are rounded."""
        self.weights |= {module: module.weight.data.clone() for module in modules}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """The layer with its own weights."""
        rounded = {module: module.weight.data for module in self.weights}
        try:
            for module, weight in self.weights.items():
                module.weight.data = weight
            yield
        finally:
            for module, weight in rounded.items():
                module.weight.data = weight


def _moments(
    call: LayerCall,
    modules: Sequence[nn.Module],
    states: Sequence[Tensor],
    plain: Sequence[Tensor],
    originals: _Originals,
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """H, and of the difference to the unrounded model: E[(x0 - x) x^T] and E[(r0 - r) x^T]; the latter None
    where the output is not added to a residual stream."""
    module = modules[0]
    source = residual_of(call, module, states[0]) if len(modules) == 1 else None
    second = drift = stream = None
    tokens = 0
    for state, other in zip(states, plain):
        x, r = reached(call, module, source, state)
        with originals.restored():
            x0, r0 = reached(call, module, source, other)
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
