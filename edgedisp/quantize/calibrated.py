"""GPTQ over a whole model: calibration text in, blocks for every linear map of the layers out.

The embedding and the head are left to the rewriter, which rounds each of them once for both uses. At 8 bits
they lose next to nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgedisp import BadInput, Progress, silent
from edgedisp.quantize.calibrate import calibrate
from edgedisp.quantize.gptq import gptq
from edgedisp.quantize.grid import Grid, dequantize
from edgedisp.quantize.made import Made


def gptq_model(
    model: nn.Module,
    layers: nn.ModuleList,
    tokens: NDArray[Any],
    grid: Grid,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    progress: Progress = silent,
) -> Made:
    """Round `layers` of `model` in place, in the order of computation, each map by `gptq`.

    tokens: unsigned integers [blocks, context], all real text. BadInput names the weight that cannot be
    quantized.
    """
    made = Made()

    def rounding(name: str, weight: Tensor, second: Tensor) -> Tensor:
        try:
            blocks = gptq(weight, grid, second, damping=damping, act_order=act_order)
        except BadInput as error:
            raise BadInput(f"{name}: {error}") from error
        made.add(weight, blocks, grid)
        return dequantize(blocks, grid)

    blocks = torch.from_numpy(np.asarray(tokens, np.int64))
    calibrate(model, layers, blocks, rounding, progress, "rounding layer by layer")
    return made
