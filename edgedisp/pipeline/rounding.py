"""The rounding that quantization-aware training and its bundle share. Two methods can be trained under:

rtn    scales follow the weights: they are computed anew in every step, and by the bundle at the end
gptq   when rounding begins, the model is calibrated. Its scales stay fixed, and training goes on from
       GPTQ's latent weights, so the first rounded step sees the GPTQ-quantized model. The scales are
       written beside the trained weights (SCALES), and the bundle is rounded on them. Embedding and
       lm_head are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgedisp.core.distributed import is_main_process
from edgedisp.core.progress import Progress, silent
from edgedisp.pipeline.options import BundleRounding
from edgedisp.pipeline.prepare import training_text
from edgedisp.quantize.calibration import CalibrationText, calibrated_start, gptq_model, read_weight
from edgedisp.quantize.grid import (
    Blocks,
    Choice,
    Grid,
    Scales,
    dequantize,
    in_groups,
    quantize,
    round_to,
    uniform_grids,
)
from edgedisp.recipe import QuantizeBits
from edgedisp.train.quantized_weights import Rounding, round_weights

if TYPE_CHECKING:
    from edgedisp.train.callbacks import QuantizationAware

SCALES = "quantization/scales.safetensors"  # in a folder of its own: model.save clears the top
SLICE_VALUES = 1 << 22  # weight values rounded at a time: 16 MB of fp32, and a few times that in between


def grids(rounding: BundleRounding) -> tuple[Grid, Grid]:
    """Of the layers' linear maps, and of the embedding and the lm_head."""
    section = rounding.section
    return uniform_grids(rounding.bits, section.group, section.symmetric, section.head_bits)


def outer_method(section: QuantizeBits) -> str:
    """The method for what gptq leaves to the rewriter: the embedding, and an lm_head of 8 bits."""
    if section.method != "gptq":
        return section.method
    return "rtn" if section.head_bits == 8 else "k_quant"


def _rounding(grid: Grid, scales: Mapping[str, Scales] | None = None) -> Rounding:
    """To nearest, or on fixed scales; some rows at a time, which then stay in the processor's cache."""

    def rounded(name: str, weight: Tensor) -> Tensor:
        step = max(1, SLICE_VALUES // weight.shape[1])
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        for rows in (slice(first, first + step) for first in range(0, len(weight), step)):
            part = weight[rows]
            blocks = quantize(part, grid) if scales is None else _blocks(part, scales[name].rows(rows), grid)
            out[rows] = dequantize(blocks, grid)
        return out

    return rounded


def _blocks(weight: Tensor, scales: Scales, grid: Grid) -> Blocks:
    return round_to(in_groups(weight, grid.group), scales, grid, weight.shape[1])


def aware_callback(
    rounding: BundleRounding, start: float, text: CalibrationText, output_dir: Path, progress: Progress
) -> QuantizationAware:
    """The callback that trains under the bundle's rounding from a share `start` of the run on.

    gptq calibrates on the first blocks of `text`, when rounding begins, and leaves its scales in
    `output_dir`. A run that is continued reads those again.
    """
    from edgedisp.train.callbacks import QuantizationAware  # the Trainer; a bundle needs none

    (grid, outer), scales = grids(rounding), dict[str, Scales]()
    if rounding.section.method != "gptq":
        return QuantizationAware(_rounding(grid), _rounding(outer), start=start)

    def begin(model: Any, continued: bool) -> None:
        if continued:
            scales.update(read_scales(output_dir, next(model.parameters()).device))
            return
        calibration = text.first(rounding.section.calibration_tokens)
        scales.update(calibrated_start(model, calibration, grid, progress))
        if is_main_process():  # all processes calibrate alike
            write_scales(scales, output_dir)

    return QuantizationAware(_rounding(grid, scales), _rounding(outer), start=start, begin=begin)


def write_scales(scales: Mapping[str, Scales], model_folder: Path) -> None:
    """Write the scales beside the weights, whole or not at all."""
    tensors = {
        f"{name}.{part}": values.contiguous()
        for name, fixed in scales.items()
        for part, values in fixed._asdict().items()
        if values is not None
    }
    path = model_folder / SCALES
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    save_file(tensors, unfinished)
    unfinished.replace(path)


def read_scales(model_folder: Path, device: torch.device | str = "cpu") -> dict[str, Scales]:
    """Parameter name -> the scales that training under gptq left."""
    tensors, ending = load_file(model_folder / SCALES, str(device)), ".scales"
    names = (name.removesuffix(ending) for name in tensors if name.endswith(ending))
    return {name: Scales(tensors[name + ending], tensors.get(f"{name}.zero_points")) for name in names}


def trained_roundings(rounding: BundleRounding, model_folder: Path) -> tuple[Rounding, Rounding]:
    """The rounding that a quantization-aware training of `model_folder` ended with: of the layers, and of the
    embedding and the lm_head."""
    grid, outer = grids(rounding)
    scales = read_scales(model_folder) if rounding.section.method == "gptq" else None
    return _rounding(grid, scales), _rounding(outer)


def trained_blocks(rounding: BundleRounding, model: Any, model_folder: Path) -> dict[str, Blocks]:
    """Parameter name -> blocks of every weight of the layers, rounded on the scales that training left.

    All others are left to the rewriter, which rounds them to nearest.
    """
    grid, _ = grids(rounding)
    return {
        name: _blocks(read_weight(model.get_submodule(name.removesuffix(".weight"))), scales, grid)
        for name, scales in read_scales(model_folder).items()
    }


def gptq_blocks(rounding: BundleRounding, model: Any, corpus: Path, progress: Progress) -> dict[str, Blocks]:
    """Parameter name -> blocks by GPTQ, which rounds `model` in place: the layers, and an lm_head of 4 bits;
    one of 8 bits loses nothing worth the time."""
    grid, outer = grids(rounding)
    text = training_text(corpus).first(rounding.section.calibration_tokens)
    return gptq_model(model, text, grid, head=outer if outer.bits < 8 else None, progress=progress)


@torch.no_grad()
def round_as_bundle(rounding: BundleRounding, model: Any, corpus: Path) -> None:
    """Round the weights of `model` in place as its bundle rounds them."""
    section = rounding.section
    by_gptq = gptq_blocks(rounding, model, corpus, silent) if section.method == "gptq" else {}

    def remaining(grid: Grid) -> Rounding:
        choice = Choice(grid, outer_method(section))
        return lambda name, weight: weight if name in by_gptq else dequantize(choice.blocks(weight), grid)

    layers, outer = grids(rounding)
    round_weights(model, remaining(layers), remaining(outer))
