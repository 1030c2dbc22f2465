"""GPTQ (Frantar et al. 2023) on the grid that ships: columns are rounded one after the other, and those not
yet rounded make up for the error of those that are.

The layer's error is `(w - w') H (w - w')^T` for each row w, with H the mean of x x^T over calibration tokens.
Scales and zero points are chosen first, from the weight itself ("static groups"), by `k_quant` weighted with
the diagonal of H; so columns can be taken in the order of their importance (`act_order`) while groups stay
neighbours in memory, as the kernels need. With the integers fixed, `refit` then solves for the scales that
minimize the layer's error exactly: a small linear system for each row.

Each column is rounded to nearest from a value that has made up for the columns before it. These values are
the "latent" weight: rounded to nearest on the same scales it gives GPTQ's integers, and training can go on
from it, as it lies inside the cells of the grid and not on their centers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from edgedisp.quantize.grid import Blocks, Grid, check_weight, concatenate, dequantize, inverse, storable
from edgedisp.quantize.rounding_methods import k_quant

BLOCK = 128  # columns whose corrections are applied to the rest at once
ROWS = 4096  # rounded at a time, a column of them in one step
SEARCHED = 512  # rows whose scales are searched for at a time: that holds ten times their values
REFITTED = 32  # rows whose scales are solved for at a time: that holds groups x columns values of each
EDGE = 0.499  # how far from an integer, in steps, a latent value may lie: the next one begins at a half


def gptq(
    weight: Tensor,
    grid: Grid,
    hessian: Tensor,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    refitted: bool = True,
) -> Blocks:
    """Round fp32 [out, in] under `hessian` [in, in]; `damping` is a share of its mean diagonal.

    A column that calibration never excited is rounded to nearest: nothing is known of its cost.
    """
    found = _by_rows(weight, grid, hessian, damping, act_order, refitted)
    return concatenate([blocks for blocks, _ in found])


def gptq_latent(
    weight: Tensor,
    grid: Grid,
    hessian: Tensor,
    *,
    damping: float = 0.01,
    act_order: bool = True,
    refitted: bool = True,
) -> tuple[Blocks, Tensor]:
    """`gptq`, and the latent weight fp32 [out, in], which rounds to its integers on its scales."""
    parts: list[Blocks] = []
    latent = torch.empty_like(weight)
    for blocks, steps in _by_rows(weight, grid, hessian, damping, act_order, refitted):
        first = sum(len(part.q) for part in parts)
        latent[first : first + len(steps)] = steps.mul_(_by_column(blocks.scales, grid, weight.shape[1]))
        parts.append(blocks)
    return concatenate(parts), latent


def _by_rows(
    weight: Tensor, grid: Grid, hessian: Tensor, damping: float, act_order: bool, refitted: bool
) -> Iterator[tuple[Blocks, Tensor]]:
    """Some rows at a time, as they are independent: their blocks, and the values before rounding in steps
    from the zero point, fp32 [rows, in]."""
    check_weight(weight)
    columns = weight.shape[1]
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    diagonal += damping * diagonal.mean().clamp(min=1e-12)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(columns)
    factor = _upper_factor(hessian[order][:, order])
    for first in range(0, len(weight), ROWS):
        rows = weight[first : first + ROWS]
        start = concatenate([k_quant(some, grid, diagonal.clone()) for some in rows.split(SEARCHED)])
        q, before = _rounded(rows[:, order], start, order, factor, grid)
        padded = start.q.reshape(len(rows), -1).clone()
        padded[:, order] = q
        blocks = Blocks(padded.reshape(start.q.shape), start.scales, start.zero_points, columns)
        if refitted:
            blocks = refit(blocks, rows, grid, hessian)
        latent = torch.empty_like(rows)
        latent[:, order] = before
        yield blocks, latent


def _by_column(values: Tensor, grid: Grid, columns: int) -> Tensor:
    """[out, groups] -> [out, in]: each group's value at each of its columns."""
    return values.repeat_interleave(grid.group, dim=1)[:, :columns]


def _upper_factor(hessian: Tensor) -> Tensor:
    """U with H^-1 = U^T U, upper triangular."""
    inverted = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    upper: Tensor = torch.linalg.cholesky(inverted, upper=True)
    return upper.float()


def _rounded(
    weight: Tensor, start: Blocks, order: Tensor, factor: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Of the reordered weight: its integers uint8 [out, in], and the values that they were rounded from, as
    steps from the zero point."""
    group = torch.div(order, grid.group, rounding_mode="floor")
    scales = start.scales[:, group].T.contiguous()
    steps = inverse(scales)
    if start.zero_points is None:
        centers = torch.full_like(scales, float(grid.middle))
    else:
        centers = start.zero_points[:, group].T.float().contiguous()
    columns = weight.T.clone(memory_format=torch.contiguous_format)  # [in, out]: a column is then contiguous
    q = torch.empty_like(columns, dtype=torch.uint8)
    for first in range(0, len(order), BLOCK):
        last = min(first + BLOCK, len(order))
        errors = torch.empty_like(columns[first:last])
        for index in range(first, last):
            values = columns[index]
            integers = torch.round(values * steps[index] + centers[index]).clamp_(0, grid.highest)
            q[index] = integers.to(torch.uint8)
            error = (values - (integers - centers[index]) * scales[index]) / factor[index, index]
            columns[index + 1 : last].addr_(factor[index, index + 1 : last], error, alpha=-1.0)
            errors[index - first] = error
        columns[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1.0)
    before = columns.mul_(steps).add_(centers)
    before = torch.clamp(before, q - EDGE, q + EDGE) - centers
    return q.T, before.T


def refit(blocks: Blocks, weight: Tensor, grid: Grid, hessian: Tensor) -> Blocks:
    """The scales that minimize `(w - w') H (w - w')^T` under the given integers, row by row.

    With w' = s_1 z_1 + ... + s_G z_G (z_g the row's integers less the zero point, in group g alone), the
    scales solve A s = b with A_gh = z_g H z_h and b_g = z_g H w. A row whose system cannot be solved, or
    whose error would rise, keeps its scales.
    """
    rows, groups = blocks.scales.shape
    unit = Blocks(blocks.q, torch.ones_like(blocks.scales), blocks.zero_points, blocks.columns)
    whole = dequantize(unit, grid)
    padded = torch.zeros(rows, groups * grid.group, device=weight.device)
    padded[:, : blocks.columns] = whole
    size = groups * grid.group
    metric = torch.zeros(size, size, device=weight.device)
    metric[: blocks.columns, : blocks.columns] = hessian
    found = blocks.scales.clone()
    by_group = metric.reshape(groups, grid.group, size)
    for first in range(0, rows, REFITTED):
        z = padded[first : first + REFITTED].reshape(-1, groups, grid.group)
        through = torch.bmm(z.transpose(0, 1), by_group).transpose(0, 1)  # z_g H: [rows, groups, size]
        a = torch.einsum("rghk,rhk->rgh", through.reshape(len(z), groups, groups, grid.group), z).double()
        target = weight[first : first + REFITTED]
        b = (through[..., : blocks.columns] @ target[..., None])[..., 0].double()
        ridge = a.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-20) * 1e-6
        a = a + ridge[:, None, None] * torch.eye(groups, dtype=a.dtype, device=a.device)
        old = blocks.scales[first : first + REFITTED].double()
        b = b + ridge[:, None] * old
        solved, info = torch.linalg.solve_ex(a, b)
        solved = storable(solved.float()).double()
        better = (info == 0) & torch.isfinite(solved).all(1) & (_cost(solved, a, b) < _cost(old, a, b))
        found[first : first + REFITTED] = torch.where(better[:, None], solved, old).float()
    return Blocks(blocks.q, found, blocks.zero_points, blocks.columns)


def _cost(scales: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The layer's error of each row, up to a constant: s A s - 2 s b."""
    return torch.einsum("rg,rgh,rh->r", scales, a, scales) - 2 * (scales * b).sum(1)
