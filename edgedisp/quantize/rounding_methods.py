"""Methods that choose scales and integers from the weight alone: `rtn` and `k_quant`.

Each takes a weight fp32 [out, in], the grid and optionally `importance` [in], what an error in an input
column costs (the mean of its squared activations, positive).

onnxruntime's quantizers (`quantization.matmul_nbits_quantizer` 1.31) work on graphs alone. Rounding to
nearest is the same there. Its `k_quant` has no importance and no symmetric form, and finds nothing better
than rounding on SmolLM2-135M (relative error 0.082; here 0.070).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edgedisp.quantize.grid import (
    Blocks,
    Grid,
    check_weight,
    concatenate,
    dequantize,
    in_groups,
    inverse,
    quantize,
    ranges,
    round_to,
    storable,
)

K_STARTS = 20  # starting scales that k_quant tries
ROUNDED_VALUES = 1 << 17  # values rounded at a time: half a MB, so that a method works in the cache


def rtn(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Blocks:
    """Round to nearest over the whole range of each group."""
    return quantize(weight, grid)


def k_quant(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Blocks:
    """The least weighted squared error over starting scales around the range's own, each followed by the
    least-squares scale (and minimum) under its integers. This is llama.cpp's k-quants' search."""
    check_weight(weight)
    values = in_groups(weight, grid.group)
    cost = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance
    cost = in_groups(cost[None], grid.group)  # 0 for padding
    if importance is None:  # llama.cpp's: larger values count more
        cost = cost * (values.abs() + values.square().mean(-1, keepdim=True).sqrt())

    def error(scales: Tensor, zero_points: Tensor | None) -> Tensor:
        blocks = round_to(values, scales, zero_points, grid, columns=values[0].numel())
        return (dequantize(blocks, grid).reshape(values.shape) - values).square().mul_(cost).sum(-1)

    scales, zero_points = ranges(values, grid)
    least = error(scales, zero_points)
    for step in range(K_STARTS):
        start = ranges(values * (0.75 + 0.4 * step / (K_STARTS - 1)), grid)
        new_scales, new_zero_points = _least_squares(values, cost, *start, grid)
        new_error = error(new_scales, new_zero_points)
        better = new_error < least
        least = torch.where(better, new_error, least)
        scales = torch.where(better, new_scales, scales)
        if zero_points is not None and new_zero_points is not None:
            zero_points = torch.where(better, new_zero_points, zero_points)
    return round_to(values, scales, zero_points, grid, weight.shape[1])


def _least_squares(
    values: Tensor, cost: Tensor, scales: Tensor, zero_points: Tensor | None, grid: Grid
) -> tuple[Tensor, Tensor | None]:
    """The scale (and zero point) that fit best under the integers of the given ones."""
    q = round_to(values, scales, zero_points, grid, 0).q.float()
    if zero_points is None:
        q = q - float(grid.middle)
        return storable((cost * values * q).sum(-1) / (cost * q * q).sum(-1).clamp(min=1e-30)), None
    total = cost.sum(-1)
    sum_q, sum_v = (cost * q).sum(-1), (cost * values).sum(-1)
    sum_qq, sum_qv = (cost * q * q).sum(-1), (cost * q * values).sum(-1)
    determinant = total * sum_qq - sum_q * sum_q
    fitted = (total * sum_qv - sum_q * sum_v) / determinant
    fitted = storable(torch.where((determinant > 0) & torch.isfinite(fitted) & (fitted > 0), fitted, scales))
    minimum = (sum_v - fitted * sum_q) / total.clamp(min=1e-30)
    return fitted, torch.round(-minimum * inverse(fitted)).clamp(0, grid.highest).to(torch.uint8)


METHODS: dict[str, Callable[[Tensor, Grid, Tensor | None], Blocks]] = {"rtn": rtn, "k_quant": k_quant}


@dataclass(frozen=True)
class Choice:
    """How a weight is rounded. method: a name in `METHODS`."""

    grid: Grid
    method: str = "rtn"

    def blocks(self, weight: Tensor, importance: Tensor | None = None) -> Blocks:
        """`weight` fp32 [out, in] rounded by the method, a few rows at a time: rows are independent."""
        step = max(1, ROUNDED_VALUES // weight.shape[1])
        parts = (METHODS[self.method](rows, self.grid, importance) for rows in weight.split(step))
        return concatenate(list(parts))
