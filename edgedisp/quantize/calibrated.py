"""GPTQ over a whole model: calibration text in, blocks for every linear map of the layers out.

The embedding and the head are left to the rewriter, which rounds each of them once for both uses. At 8 bits
they lose next to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgedisp import BadInput, Progress, silent
from edgedisp.quantize.calibrate import calibrate
from edgedisp.quantize.gptq import gptq
from edgedisp.quantize.grid import Grid, check_weight, dequantize, split_rows
from edgedisp.quantize.made import Made


def gptq_model(
    model: nn.Module,
    layers: nn.ModuleList,
    tokens: NDArray[Any],
    grid: Grid | Mapping[str, Grid],
    *,
    damping: float = 0.01,
    act_order: bool = True,
    progress: Progress = silent,
) -> Made:
    """Round `layers` of `model` in place, in the order of computation, each map by `gptq`.

    tokens: unsigned integers [blocks, context], all real text. `grid`: one for all, or by name of the module;
    those that are stored as one weight need the same. BadInput names the weight that cannot be quantized.
    """
    made = Made()

    def rounding(weights: dict[str, Tensor], second: Tensor) -> dict[str, Tensor]:
        grids = {name: grid if isinstance(grid, Grid) else grid[name] for name in weights}
        held: dict[str, Tensor] = {}
        for on in dict.fromkeys(grids.values()):
            held |= together({name: weights[name] for name in weights if grids[name] == on}, second, on)
        return held

    def together(weights: dict[str, Tensor], second: Tensor, on: Grid) -> dict[str, Tensor]:
        for name, weight in weights.items():
            try:
                check_weight(weight)
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from error
        stacked = torch.cat(list(weights.values()))
        blocks = gptq(stacked, on, second, damping=damping, act_order=act_order)
        heights = [len(weight) for weight in weights.values()]
        for weight, part in zip(weights.values(), split_rows(blocks, heights)):
            made.add(weight, part, on)
        return dict(zip(weights, dequantize(blocks, on).split(heights)))

    blocks = torch.from_numpy(np.asarray(tokens, np.int64))
    calibrate(model, layers, blocks, rounding, progress, "rounding layer by layer")
    return made
