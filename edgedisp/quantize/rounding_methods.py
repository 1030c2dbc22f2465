"""Methods that choose scales and integers for a weight alone, on the grid that ships.

Each takes a weight fp32 [out, in], the grid, and optionally an `importance` [in] (positive; how much an error
in an input column costs: the mean of its squared activations), and returns `Blocks`. They differ in what they
minimize over a group's scale and zero point:

- `rtn`: nothing; the range of the group, rounded to nearest.
- `k_quant`: the weighted squared error over starting scales, each followed by the least-squares scale and
  minimum under its integers (llama.cpp's k-quants; onnxruntime's `k_quant`).

`gptq.py` has the method that also lets later columns make up for earlier ones.

Why not onnxruntime's own (`quantization.matmul_nbits_quantizer` 1.31): its
rounding to nearest is this one. Its `k_quant` has no importance and no symmetric form, fails where a row's
zero points do not fill whole bytes, and on SmolLM2-135M's own weights finds nothing better than rounding
(relative error 0.082; here 0.070). Its GPTQ and AWQ need other packages. And each works on graphs alone,
not on a weight that a trainer or a search holds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgedisp.quantize.grid import (
    Blocks,
    Grid,
    check_weight,
    dequantize,
    in_groups,
    inverse,
    quantize,
    ranges,
    round_to,
    storable,
)

K_STARTS = 20  # starting scales tried by k_quant


def rtn(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Blocks:
    """Round to nearest over the whole range of each group."""
    return quantize(weight, grid)


def k_quant(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Blocks:
    """Starting scales around the range's own, each refined by least squares under its integers."""
    values, weights = _grouped(weight, grid, importance)
    if importance is None:  # llama.cpp's: larger values count more
        weights = weights * (values.abs() + values.square().mean(-1, keepdim=True).sqrt())
    best = _Best(values, weights, grid)
    scales, zero_points = ranges(values, grid)
    best.offer(scales, zero_points)
    for step in range(K_STARTS):
        factor = 0.75 + 0.4 * step / (K_STARTS - 1)
        start, center = ranges(values * factor, grid)
        best.offer(*_least_squares(values, weights, start, center, grid))
    return best.blocks(weight.shape[1])


def _least_squares(
    values: Tensor, weights: Tensor, scales: Tensor, zero_points: Tensor | None, grid: Grid
) -> tuple[Tensor, Tensor | None]:
    """Scale (and zero point) that fit best, when the integers are those of the given ones."""
    q = round_to(values, scales, zero_points, grid, 0).q.float()
    if zero_points is None:
        q = q - float(grid.middle)
        fitted = (weights * values * q).sum(-1) / (weights * q * q).sum(-1).clamp(min=1e-30)
        return storable(fitted), None
    total = weights.sum(-1)
    sum_q, sum_v = (weights * q).sum(-1), (weights * values).sum(-1)
    sum_qq, sum_qv = (weights * q * q).sum(-1), (weights * q * values).sum(-1)
    determinant = total * sum_qq - sum_q * sum_q
    fitted = (total * sum_qv - sum_q * sum_v) / determinant
    fitted = torch.where((determinant > 0) & torch.isfinite(fitted) & (fitted > 0), fitted, scales)
    fitted = storable(fitted)
    minimum = (sum_v - fitted * sum_q) / total.clamp(min=1e-30)
    center = torch.round(-minimum * inverse(fitted)).clamp(0, grid.highest).to(torch.uint8)
    return fitted, center


METHODS: dict[str, Callable[[Tensor, Grid, Tensor | None], Blocks]] = {
    "rtn": rtn,
    "k_quant": k_quant,
}


def _grouped(weight: Tensor, grid: Grid, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Values [out, groups, group] and what an error in each costs, [1, groups, group]; 0 for padding."""
    check_weight(weight)
    cost = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance
    return in_groups(weight, grid.group), in_groups(cost[None], grid.group)


class _Best:
    """The scales and zero points of the least weighted error so far, group by group."""

    def __init__(self, values: Tensor, weights: Tensor, grid: Grid) -> None:
        self.values, self.weights, self.grid = values, weights, grid
        self.error = torch.full(values.shape[:-1], torch.inf, device=values.device)
        self.scales = torch.zeros_like(self.error)
        self.zero_points: Tensor | None = None

    def offer(self, scales: Tensor, zero_points: Tensor | None) -> None:
        made = round_to(self.values, scales, zero_points, self.grid, 0)
        flat = dequantize(Blocks(made.q, scales, zero_points, self.values[0].numel()), self.grid)
        difference = flat.reshape(self.values.shape) - self.values
        error = difference.square().mul_(self.weights).sum(-1)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scales = torch.where(better, scales, self.scales)
        if zero_points is not None:
            before = zero_points if self.zero_points is None else self.zero_points
            self.zero_points = torch.where(better, zero_points, before)

    def blocks(self, columns: int) -> Blocks:
        return round_to(self.values, self.scales, self.zero_points, self.grid, columns)
