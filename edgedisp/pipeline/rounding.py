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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from edgedisp.core.distributed import place
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.quantize.calibration import Scales, calibrated_start, gptq_model
from edgedisp.quantize.grid import Blocks, Grid, dequantize, in_groups, quantize, round_to
from edgedisp.quantize.onnx_rewrite import Choice
from edgedisp.recipe import QuantizationAware as Asked
from edgedisp.recipe import QuantizeBits
from edgedisp.train.quantized_weights import Rounding, round_weights, weights_of

if TYPE_CHECKING:
    from edgedisp.train.quantization_aware import QuantizationAware

SCALES = "quantization/scales.safetensors"  # in a folder of its own: model.save clears the top
SLICE_VALUES = 1 << 22  # weight values rounded at a time: 16 MB of fp32, and a few times that in between

Grids = Callable[[str], Grid]
"""Name of a parameter -> the grid that it is rounded on."""


def uniform_grids(section: QuantizeBits, bits: int) -> tuple[Grid, Grid]:
    """Of the layers' maps, and of the embedding and the head."""
    return Grid(bits, section.group, section.symmetric), Grid(
        section.head_bits, section.group, section.symmetric
    )


@dataclass(frozen=True)
class Trained:
    """The rounding that training sees and its bundle has: the precision's section and bits."""

    section: QuantizeBits
    bits: int

    @property
    def grids(self) -> tuple[Grids, Grids]:
        """Of the layers' maps, and of the embedding and the head."""
        body, ends = uniform_grids(self.section, self.bits)
        return (lambda name: body), (lambda name: ends)


def to_nearest(trained: Trained) -> tuple[Rounding, Rounding]:
    """How a bundle of method rtn rounds: body, ends."""
    body, ends = trained.grids
    return partial(_nearest, grids=body), partial(_nearest, grids=ends)


def _nearest(name: str, weight: Tensor, grids: Grids) -> Tensor:
    grid = grids(name)
    return _in_slices(weight, lambda rows, first: dequantize(quantize(rows, grid), grid))


def _on_scales(name: str, weight: Tensor, grids: Grids, scales: dict[str, Scales]) -> Tensor:
    own, grid = scales[name], grids(name)
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
    asked: Asked, trained: Trained, tokens: NDArray[Any], own: Path, progress: Progress
) -> QuantizationAware:
    """The callback that trains under the bundle's rounding; with gptq it leaves its scales in `own`.

    tokens [blocks, context]: gptq calibrates on the first of them, when rounding begins.
    """
    from edgedisp.train.quantization_aware import QuantizationAware  # the Trainer; a bundle needs none

    body, ends = to_nearest(trained)
    grids = trained.grids[0]
    begin, scales = None, dict[str, Scales]()
    if trained.section.method == "gptq":
        body = partial(_on_scales, grids=grids, scales=scales)
        begin = partial(_begin, scales, trained, tokens, own / SCALES, progress)
    return QuantizationAware(
        body,
        ends,
        start=asked.begins(trained.section.method),
        begin=begin,
    )


def _begin(
    scales: dict[str, Scales],
    trained: Trained,
    tokens: NDArray[Any],
    path: Path,
    progress: Progress,
    model: Any,
    continued: bool,
) -> None:
    """Find the scales: by calibrating `model`, or those of the run that is continued."""
    grids, section = trained.grids[0], trained.section
    if continued:
        scales.update(_read_scales(path, grids, next(model.parameters()).device))
        return
    blocks = -(-section.calibration_tokens // tokens.shape[1])
    found = calibrated_start(model, tokens[:blocks], grids, progress)
    scales.update(found)
    if place().leads:  # all processes calibrate alike
        _write_scales(scales, grids, path)


def _write_scales(scales: dict[str, Scales], grids: Grids, path: Path) -> None:
    """Write the scales beside the weights; the grids as one entry of metadata, whose order is not kept."""
    tensors = {}
    for name, one in scales.items():
        tensors[f"{name}.scales"] = one.scales.contiguous()
        if one.zero_points is not None:
            tensors[f"{name}.zero_points"] = one.zero_points.contiguous()
    metadata = {"grids": json.dumps({name: asdict(grids(name)) for name in sorted(scales)})}
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_bytes(save(tensors, metadata))
    unfinished.replace(path)


def trained_scales(model_folder: Path, grids: Grids) -> dict[str, Scales]:
    """The scales that training left beside the weights; empty where it left none.

    BadInput if they belong to another grid.
    """
    path = model_folder / SCALES
    return _read_scales(path, grids) if path.is_file() else {}


def _read_scales(path: Path, grids: Grids, device: torch.device | str = "cpu") -> dict[str, Scales]:
    found = {}
    with safe_open(path, "pt", device=str(device)) as file:
        known = set(file.keys())
        for name, values in json.loads(file.metadata()["grids"]).items():
            stored = Grid(**values)
            if stored != grids(name):
                raise BadInput(
                    f"{path}: the scales of {name} were trained on {stored}, "
                    f"the bundle is made of {grids(name)}"
                )
            points = f"{name}.zero_points"
            found[name] = Scales(
                file.get_tensor(f"{name}.scales"), file.get_tensor(points) if points in known else None
            )
    return found


def trained_roundings(trained: Trained, model_folder: Path) -> tuple[Rounding, Rounding]:
    """The rounding that a quantization-aware training of `model_folder` ended with: body, ends."""
    body, ends = to_nearest(trained)
    grids, _ = trained.grids
    if scales := trained_scales(model_folder, grids):
        body = partial(_on_scales, grids=grids, scales=scales)
    return body, ends


def trained_blocks(trained: Trained, opened: Any, model_folder: Path) -> dict[str, Blocks]:
    """Parameter name -> blocks of every weight of the layers, rounded on the scales that training left.

    All others are left to the rewriter, which rounds them to nearest.
    """
    grids, _ = trained.grids
    scales = trained_scales(model_folder, grids)
    return {
        weight.name: _blocks(weight.values(), scales[weight.name], grids(weight.name))
        for weight in weights_of(opened, *to_nearest(trained))
        if weight.name in scales
    }


def ends_method(section: QuantizeBits) -> str:
    """The method for what gptq leaves to the rewriter: the embedding, and a head of 8 bits."""
    if section.method != "gptq":
        return section.method
    return "rtn" if section.head_bits == 8 else "k_quant"


@torch.no_grad()
def round_as_bundle(trained: Trained, opened: Any, corpus_folder: Path) -> None:
    """Round the weights of `opened` in place as the bundle of `trained.section` rounds them."""
    section, (body, ends) = trained.section, uniform_grids(trained.section, trained.bits)
    rounded = gptq_blocks(trained, opened, corpus_folder, silent) if section.method == "gptq" else {}

    def others(grid: Grid) -> Rounding:
        choice = Choice(grid, ends_method(section))
        return lambda name, weight: (
            weight if name in rounded else dequantize(choice.blocks(weight), choice.grid)
        )

    round_weights(opened, others(body), others(ends))


def gptq_blocks(trained: Trained, opened: Any, corpus_folder: Path, progress: Progress) -> dict[str, Blocks]:
    """Parameter name -> blocks by GPTQ, which rounds `opened` in place: the layers, and a head of 4 bits; one
    of 8 bits loses nothing worth the time."""
    body, ends = uniform_grids(trained.section, trained.bits)
    tokens = np.load(corpus_folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
    text = tokens[: -(-trained.section.calibration_tokens // tokens.shape[1])]
    return gptq_model(opened, text, body, head=ends if ends.bits < 8 else None, progress=progress)
