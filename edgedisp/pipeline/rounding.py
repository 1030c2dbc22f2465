"""The rounding that quantization-aware training and its bundle share. Two methods can be trained under:

rtn    scales follow the weights: they are computed anew in every step, and by the bundle at the end
gptq   when rounding begins, the model is calibrated. Its scales stay fixed, and training goes on from
       GPTQ's latent weights, so the first rounded step sees the GPTQ-quantized model. The scales are
       written beside the trained weights (SCALES), and the bundle is rounded on them. Embedding and
       lm_head are rounded to nearest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from edgedisp.core.distributed import is_main_process
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.pipeline.options import BundleRounding
from edgedisp.pipeline.prepare import training_blocks
from edgedisp.quantize.calibration import Scales, calibrated_start, gptq_model
from edgedisp.quantize.grid import Blocks, Grid, dequantize, in_groups, quantize, round_to
from edgedisp.quantize.rounding_methods import Choice
from edgedisp.recipe import QuantizeBits
from edgedisp.train.quantized_weights import Rounding, round_weights, weights_of

if TYPE_CHECKING:
    from edgedisp.train.callbacks import QuantizationAware

SCALES = "quantization/scales.safetensors"  # in a folder of its own: model.save clears the top
SLICE_VALUES = 1 << 22  # weight values rounded at a time: 16 MB of fp32, and a few times that in between


def grids(rounding: BundleRounding) -> tuple[Grid, Grid]:
    """Of the layers' linear maps, and of the embedding and the lm_head."""
    bits, section = rounding.bits, rounding.section
    outer = Grid(section.head_bits, section.group, section.symmetric)
    return Grid(bits, section.group, section.symmetric), outer


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
        for first in range(0, len(weight), step):
            rows = weight[first : first + step]
            if scales is None:
                blocks = quantize(rows, grid)
            else:
                blocks = _blocks(rows, scales[name].rows(first, len(rows)), grid)
            out[first : first + step] = dequantize(blocks, grid)
        return out

    return rounded


def _blocks(weight: Tensor, scales: Scales, grid: Grid) -> Blocks:
    return round_to(in_groups(weight, grid.group), scales.scales, scales.zero_points, grid, weight.shape[1])


def aware_callback(
    rounding: BundleRounding, start: float, tokens: NDArray[Any], output_dir: Path, progress: Progress
) -> QuantizationAware:
    """The callback that trains under the bundle's rounding from a share `start` of the run on.

    tokens [blocks, context]: gptq calibrates on the first of them, when rounding begins, and leaves its
    scales in `output_dir`. A run that is continued reads those again.
    """
    from edgedisp.train.callbacks import QuantizationAware  # the Trainer; a bundle needs none

    (grid, outer), path = grids(rounding), output_dir / SCALES
    if rounding.section.method != "gptq":
        return QuantizationAware(_rounding(grid), _rounding(outer), start=start)
    scales: dict[str, Scales] = {}

    def begin(model: Any, continued: bool) -> None:
        if continued:
            scales.update(read_scales(path, grid, next(model.parameters()).device))
            return
        blocks = -(-rounding.section.calibration_tokens // tokens.shape[1])
        scales.update(calibrated_start(model, tokens[:blocks], lambda name: grid, progress))
        if is_main_process():  # all processes calibrate alike
            write_scales(scales, grid, path)

    return QuantizationAware(_rounding(grid, scales), _rounding(outer), start=start, begin=begin)


def write_scales(scales: dict[str, Scales], grid: Grid, path: Path) -> None:
    """Write the scales beside the weights; the grids as one entry of metadata, whose order is not kept."""
    tensors = {}
    for name, fixed in scales.items():
        tensors[f"{name}.scales"] = fixed.scales.contiguous()
        if fixed.zero_points is not None:
            tensors[f"{name}.zero_points"] = fixed.zero_points.contiguous()
    metadata = {"grids": json.dumps(dict.fromkeys(sorted(scales), asdict(grid)))}
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_bytes(save(tensors, metadata))
    unfinished.replace(path)


def read_scales(path: Path, grid: Grid, device: torch.device | str = "cpu") -> dict[str, Scales]:
    """Parameter name -> the scales that training left; empty where it left none.

    Raises BadInput if they belong to another grid.
    """
    scales: dict[str, Scales] = {}
    if not path.is_file():
        return scales
    with safe_open(path, "pt", device=str(device)) as file:
        names = set(file.keys())
        for name, values in json.loads(file.metadata()["grids"]).items():
            if (stored := Grid(**values)) != grid:
                raise BadInput(
                    f"{path}: the scales of {name} were trained on {stored}, the bundle is on {grid}"
                )
            points = f"{name}.zero_points"
            zero_points = file.get_tensor(points) if points in names else None
            scales[name] = Scales(file.get_tensor(f"{name}.scales"), zero_points)
    return scales


def trained_roundings(rounding: BundleRounding, model_folder: Path) -> tuple[Rounding, Rounding]:
    """The rounding that a quantization-aware training of `model_folder` ended with: of the layers, and of the
    embedding and the lm_head."""
    grid, outer = grids(rounding)
    scales = read_scales(model_folder / SCALES, grid)
    return _rounding(grid, scales or None), _rounding(outer)


def trained_blocks(rounding: BundleRounding, model: Any, model_folder: Path) -> dict[str, Blocks]:
    """Parameter name -> blocks of every weight of the layers, rounded on the scales that training left.

    All others are left to the rewriter, which rounds them to nearest.
    """
    grid, _ = grids(rounding)
    scales = read_scales(model_folder / SCALES, grid)
    return {
        weight.name: _blocks(weight.values(), scales[weight.name], grid)
        for weight in weights_of(model, *trained_roundings(rounding, model_folder))
        if weight.name in scales
    }


def gptq_blocks(rounding: BundleRounding, model: Any, corpus: Path, progress: Progress) -> dict[str, Blocks]:
    """Parameter name -> blocks by GPTQ, which rounds `model` in place: the layers, and an lm_head of 4 bits;
    one of 8 bits loses nothing worth the time."""
    grid, outer = grids(rounding)
    text = training_blocks(corpus, rounding.section.calibration_tokens)
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
