"""Learned scales: a group's scale times exp(RATE * stretch), where the stretch is a trained parameter.

The scale s of a group decides both how fine its steps are and where its values are cut off. A value w is held
as s * (n - z), with n = round(w / s + z) cut to the grid's integers. Rounding has no useful derivative, so it
is passed through, as in learned step size quantization (Esser et al. 2020, arXiv 1902.08153):

    d held / d s = (n - z) - w / s    inside the grid's range
                 = (n - z)            where the value is cut off

Summed over the group against the gradient of the loss in the held values, this is the scale's gradient. A
scale is learned by its logarithm, as the scales of a model differ by orders of magnitude while AdamW moves
every parameter by about the learning rate. It starts at 0, where the scales are the method's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgedisp.quantize.grid import Blocks, Grid, dequantize, in_groups, inverse, round_to, storable
from edgedisp.quantize.start import Scales

RATE = 10.0  # at a learning rate of 1e-4 a scale moves by about a thousandth in a step


class LearnedScales:
    """Rounding on `scales(name, weight)` times exp(RATE * stretch), each parameter on the grid of its name.

    Weights are fp32 [out, in], stretches fp32 [out, groups].
    """

    def __init__(self, grids: Callable[[str], Grid], scales: Callable[[str, Tensor], Scales]) -> None:
        self.grids, self._scales = grids, scales

    def shape(self, name: str, weight: Tensor) -> tuple[int, int]:
        """Of the stretch."""
        return len(weight), -(-weight.shape[1] // self.grids(name).group)

    def scales(self, name: str, weight: Tensor, stretch: Tensor) -> Scales:
        own = self._scales(name, weight)
        return Scales(storable(own.scales * torch.exp(RATE * stretch)), own.zero_points)

    def rounded(self, name: str, weight: Tensor, stretch: Tensor) -> Tensor:
        return dequantize(self._blocks(name, weight, stretch), self.grids(name))

    def gradient(self, name: str, weight: Tensor, stretch: Tensor, gradient: Tensor) -> Tensor:
        """Of the loss in the stretch, from that in the rounded weight [out, in]."""
        grid, blocks = self.grids(name), self._blocks(name, weight, stretch)
        center = float(grid.middle) if blocks.zero_points is None else blocks.zero_points[..., None].float()
        steps = in_groups(weight, grid.group) * inverse(blocks.scales)[..., None]
        held = blocks.q.float() - center
        inside = (steps + center >= -0.5) & (steps + center <= grid.highest + 0.5)
        slope = torch.where(inside, held - steps, held)
        return RATE * blocks.scales * (in_groups(gradient, grid.group) * slope).sum(-1)

    def _blocks(self, name: str, weight: Tensor, stretch: Tensor) -> Blocks:
        grid, own = self.grids(name), self.scales(name, weight, stretch)
        values = in_groups(weight, grid.group)
        return round_to(values, own.scales, own.zero_points, grid, weight.shape[1])
