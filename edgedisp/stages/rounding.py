"""The rounding that training and bundle share: quantization-aware training, and what its bundle is made of.

How a bundle's weights are rounded is told by its section of the recipe (grid and method); here it becomes
functions over weights that the training room can use. Two methods can be trained under:

    rtn    scales follow the weights: they are found anew in every step, and by the bundle at the end
    gptq   when rounding begins, the model is calibrated. Its scales are kept, and training goes on from
           GPTQ's latent weights, so the first rounded step sees the GPTQ-quantized model. The scales are
           written beside the trained weights (SCALES), and the bundle is rounded on them. Embedding and head
           are rounded to nearest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from edgedisp import BadInput, Progress
from edgedisp.dispersion.collect import decoder_layers
from edgedisp.quantize.grid import Blocks, Grid, dequantize, in_groups, quantize, round_to
from edgedisp.quantize.made import Made
from edgedisp.quantize.start import Scales, calibrated_start
from edgedisp.recipe import BITS, QuantizeBits
from edgedisp.recipe import QuantizationAware as Chosen
from edgedisp.train.quantization_aware import QuantizationAware
from edgedisp.train.rounded import Rounding, weights_of

SCALES = "quantization/scales.safetensors"  # in a folder of its own: model.save clears the top
SLICE_VALUES = 1 << 22  # weight values rounded at a time: 16 MB of fp32, and a few times that in between


def grids(section: QuantizeBits, bits: int) -> tuple[Grid, Grid]:
    """Of the layers' maps, and of the embedding and the head."""
    return Grid(bits, section.group, section.symmetric), Grid(
        section.head_bits, section.head_group or section.group, section.symmetric
    )


def to_nearest(section: QuantizeBits, bits: int) -> tuple[Rounding, Rounding]:
    """How a bundle of method rtn rounds: body, ends."""
    body, ends = grids(section, bits)
    return partial(_nearest, grid=body), partial(_nearest, grid=ends)


def _nearest(name: str, weight: Tensor, grid: Grid) -> Tensor:
    return _in_slices(weight, lambda rows, first: dequantize(quantize(rows, grid), grid))


def _on_scales(name: str, weight: Tensor, grid: Grid, scales: dict[str, Scales]) -> Tensor:
    own = scales[name]
    return _in_slices(
        weight, lambda rows, first: dequantize(_blocks(rows, own.rows(first, len(rows)), grid), grid)
    )


def _blocks(weight: Tensor, scales: Scales, grid: Grid) -> Blocks:
    return round_to(in_groups(weight, grid.group), scales.scales, scales.zero_points, grid, weight.shape[1])


def _in_slices(weight: Tensor, rounded: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Some rows at a time, which then stay in the processor's cache."""
    step = max(1, SLICE_VALUES // weight.shape[1])
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    for first in range(0, len(weight), step):
        out[first : first + step] = rounded(weight[first : first + step], first)
    return out


def aware(
    chosen: Chosen, section: QuantizeBits, tokens: NDArray[Any], own: Path, progress: Progress
) -> QuantizationAware:
    """The callback that trains under the bundle's rounding; with gptq it leaves its scales in `own`.

    tokens [blocks, context]: gptq calibrates on the first of them, when rounding begins.
    """
    bits = BITS[chosen.precision]
    grid, ends = grids(section, bits)
    body, at_ends = to_nearest(section, bits)
    begin = None
    if section.method == "gptq":
        scales: dict[str, Scales] = {}
        body = partial(_on_scales, grid=grid, scales=scales)
        begin = partial(_begin, scales, section, grid, tokens, own, progress)
    named = f"{section.method} {grid}, ends {ends}"
    return QuantizationAware(body, at_ends, grid=named, start=chosen.start, ramp=chosen.ramp, begin=begin)


def _begin(
    scales: dict[str, Scales],
    section: QuantizeBits,
    grid: Grid,
    tokens: NDArray[Any],
    own: Path,
    progress: Progress,
    model: Any,
    continued: bool,
) -> None:
    """Find the scales: by calibrating `model`, or those of the run that is continued."""
    if continued:
        scales.update(trained_scales(own, grid))
        return
    blocks = -(-section.calibration_tokens // tokens.shape[1])
    found = calibrated_start(
        model,
        decoder_layers(model),
        tokens[:blocks],
        grid,
        damping=section.damping,
        act_order=section.act_order,
        correction=section.correction,
        progress=progress,
    )
    scales.update(found)
    _keep(scales, grid, own)


def _keep(scales: dict[str, Scales], grid: Grid, own: Path) -> None:
    """Write the scales beside the weights, where the bundle finds them."""
    tensors = {}
    for name, one in scales.items():
        tensors[f"{name}.scales"] = one.scales.contiguous()
        if one.zero_points is not None:
            tensors[f"{name}.zero_points"] = one.zero_points.contiguous()
    told = {"grid": json.dumps({"bits": grid.bits, "group": grid.group, "symmetric": grid.symmetric})}
    path = own / SCALES
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(save(tensors, told))


def trained_scales(model_folder: Path, grid: Grid) -> dict[str, Scales]:
    """The scales that training left beside the weights; empty where it left none.

    BadInput if they belong to another grid.
    """
    path = model_folder / SCALES
    if not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        stored = Grid(**json.loads(file.metadata()["grid"]))
        names = set(file.keys())
        if stored != grid:
            raise BadInput(f"{path}: these scales were trained on {stored}, the bundle is made of {grid}")
        return {
            name: Scales(
                file.get_tensor(f"{name}.scales"),
                file.get_tensor(f"{name}.zero_points") if f"{name}.zero_points" in names else None,
            )
            for name in (key.removesuffix(".scales") for key in names if key.endswith(".scales"))
        }


def trained_roundings(section: QuantizeBits, bits: int, model_folder: Path) -> tuple[Rounding, Rounding]:
    """The rounding that a quantization-aware training of `model_folder` ended with: body, ends."""
    body, ends = to_nearest(section, bits)
    grid, _ = grids(section, bits)
    if section.method == "gptq":
        body = partial(_on_scales, grid=grid, scales=trained_scales(model_folder, grid))
    return body, ends


def trained_blocks(section: QuantizeBits, bits: int, opened: Any, model_folder: Path) -> Made:
    """Blocks of every weight of the layers, rounded on the scales that training left."""
    grid, _ = grids(section, bits)
    scales, made = trained_scales(model_folder, grid), Made()
    for weight in weights_of(opened, *to_nearest(section, bits)):
        if weight.name in scales:
            values = (weight.parameter.detach().T if weight.turned else weight.parameter.detach()).float()
            made.add(values, _blocks(values, scales[weight.name], grid), grid)
    return made
