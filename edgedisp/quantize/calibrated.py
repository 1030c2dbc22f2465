"""A calibrated method over a whole model: calibration text in, blocks for every linear map out.

The linear maps of the layers come first, in the order of computation. The head is rounded last and on
request (`head`, its grid), under the inputs that it has in the model rounded so far. Where it is the
embedding too, one tensor serves both. Minimizing the head's error alone would make the rows themselves
coarser than rounding does, and with them what the lookup hands to the first layer; so each row's own error is
added with the weight `TIED` (4 bits, group 32, SmolLM2-135M, nothing else rounded; 1, 0.1 and rounding to
nearest: error of the rows 0.094, 0.109, 0.093, of the logits 0.037, 0.030, 0.084, perplexity over 2,000 to
3,000 tokens of wikitext-2 x1.00, x1.02, x1.10; with 10, x1.03). At 8 bits both lose next to nothing; then the
head is left to the rewriter, which rounds it once for both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgedisp.core.progress import Progress, silent
from edgedisp.quantize.calibrate import Wave, calibrate, second_moment
from edgedisp.quantize.gptq import gptq
from edgedisp.quantize.grid import Blocks, Grid, by_grid, dequantize, split_rows, stacked
from edgedisp.quantize.made import Made

TIED = 1.0  # mean squared activations of the lookup, as it were, as a share of the head's

Method = Callable[[Tensor, Grid, Tensor], Blocks]
"""(weight fp32 [out, in], grid, H fp32 [in, in]: the mean of x x^T of its inputs) -> blocks."""


def gptq_model(
    model: nn.Module,
    layers: nn.ModuleList,
    tokens: NDArray[Any],
    grid: Grid | Mapping[str, Grid],
    *,
    head: Grid | None = None,
    correction: float = 0.0,
    progress: Progress = silent,
) -> Made:
    """Round `layers` of `model` in place, in the order of computation, each map by `gptq`; then the head.

    tokens: unsigned integers [blocks, context], all real text. `grid`: one for all, or by name of the module;
    those that are stored as one weight need the same. `correction`: calibrate.py. BadInput names the weight
    that cannot be quantized.
    """
    return _round(model, layers, tokens, grid, head, gptq, correction, progress)


def _round(
    model: nn.Module,
    layers: nn.ModuleList,
    tokens: NDArray[Any],
    grid: Grid | Mapping[str, Grid],
    head: Grid | None,
    method: Method,
    correction: float,
    progress: Progress,
) -> Made:
    made = Made()

    def rounding(wave: Wave) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {}
        for on, wanted in by_grid(wave.wanted, lambda name: grid if isinstance(grid, Grid) else grid[name]):
            held |= together(wanted, wave, on)
        return held

    def together(wanted: dict[str, Tensor], wave: Wave, on: Grid) -> dict[str, Tensor]:
        joined, heights = stacked(wanted)
        blocks = method(joined, on, wave.second)
        for name, part in zip(wanted, split_rows(blocks, heights)):
            made.add(wave.weights[name], part, on)
        return dict(zip(wanted, dequantize(blocks, on).split(heights)))

    blocks = torch.from_numpy(np.asarray(tokens, np.int64))
    calibrate(model, layers, blocks, rounding, progress, "rounding layer by layer", correction=correction)
    if head is not None:
        progress(len(layers), len(layers), "rounding the head")
        output: Any = model.get_output_embeddings()  # type: ignore[operator]
        second = second_moment(lambda block: model(input_ids=block[None], use_cache=False), output, blocks)
        if output.weight is model.get_input_embeddings().weight:  # type: ignore[operator]
            second += TIED * second.diagonal().mean() * torch.eye(len(second), device=second.device)
        with torch.no_grad():
            own = {"the head": output.weight.float()}
            output.weight.copy_(together(own, Wave(own, own, second), head)["the head"])
    return made
