"""Where quantization-aware training starts from: a model calibrated by GPTQ that can still be trained.

`calibrated_start` rounds a model layer by layer as `calibrated.py` does, but leaves GPTQ's latent weights in
it (gptq.py) and hands out the scales. Rounded on them, the model is the GPTQ-quantized one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgedisp.core.progress import Progress, silent
from edgedisp.quantize.calibrate import Wave, calibrate
from edgedisp.quantize.gptq import gptq_latent
from edgedisp.quantize.grid import Grid, by_grid, dequantize, split_rows, stacked


@dataclass(frozen=True)
class Scales:
    """Of a weight [out, in]: scales fp32 and zero points uint8 (None: symmetric), each [out, groups]."""

    scales: Tensor
    zero_points: Tensor | None

    def rows(self, first: int, count: int) -> Scales:
        """Those of `count` rows."""
        points = None if self.zero_points is None else self.zero_points[first : first + count]
        return Scales(self.scales[first : first + count], points)


@torch.no_grad()
def calibrated_start(
    model: nn.Module,
    layers: nn.ModuleList,
    tokens: NDArray[Any],
    grids: Callable[[str], Grid],
    *,
    correction: float = 0.0,
    progress: Progress = silent,
) -> dict[str, Scales]:
    """Put GPTQ's latent weights into `layers`; return parameter name -> the scales they are rounded on.

    tokens: unsigned integers [blocks, context], all real text. `grids`: of each parameter by name. Scales
    lie on the model's device. BadInput names a weight that cannot be quantized.
    """
    latents: dict[str, Tensor] = {}
    found: dict[str, Scales] = {}

    def rounding(wave: Wave) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {}
        for grid, wanted in by_grid(wave.wanted, lambda name: grids(f"{name}.weight")):
            held |= together(wanted, wave.second, grid)
        return held

    def together(wanted: dict[str, Tensor], second: Tensor, grid: Grid) -> dict[str, Tensor]:
        joined, heights = stacked(wanted)
        blocks, latent = gptq_latent(joined, grid, second)
        latents.update(zip(wanted, latent.split(heights)))
        for name, part in zip(wanted, split_rows(blocks, heights)):
            found[f"{name}.weight"] = Scales(part.scales.clone(), part.zero_points)
        return dict(zip(wanted, dequantize(blocks, grid).split(heights)))

    device = next(model.parameters()).device
    blocks = torch.from_numpy(np.asarray(tokens, np.int64)).to(device)
    calibrate(model, layers, blocks, rounding, progress, "calibrating layer by layer", correction=correction)
    for name, latent in latents.items():
        module: Any = model.get_submodule(name)
        module.weight.copy_(latent.T if isinstance(module, Conv1D) else latent)
    return found
