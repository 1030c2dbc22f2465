"""GPTQ (Frantar et al. 2023): columns are rounded one after the other, and those not yet rounded make up for
the errors so far.

The layer's error is `(w - w') H (w - w')^T` for each row w, with H = E[x x^T] over calibration tokens.
Scales and zero points come first, from `k_quant` weighted with the diagonal of H ("static groups"), so that
columns can be taken in the order of their importance ("act order") while groups stay neighbours in memory.
Then `refit` finds the scales that minimize the layer's error under the integers.

The latent weight holds the values that the columns were rounded from: rounded to nearest on the same scales
it gives GPTQ's integers, and training can go on from it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from edgedisp.quantize.grid import Blocks, Choice, Grid, concatenate, dequantize, in_groups, inverse, storable

DAMPING = 0.01  # added to H's diagonal, as a share of its mean
BLOCK = 32  # columns whose corrections are applied to the rest at once
ROWS = 4096  # rows rounded at a time, a column of them in one step
REFITTED = 256  # rows whose scales are solved for at a time; that takes groups x groups values for each
EDGE = 0.499  # how far from an integer, in steps, a latent value may lie: the next integer begins at a half


def gptq(weight: Tensor, grid: Grid, hessian: Tensor) -> tuple[Blocks, Tensor]:
    """Round fp32 [out, in] under H [in, in]; also the latent weight fp32 [out, in].

    A column that calibration never excited is rounded to nearest.
    """
    columns = weight.shape[1]
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    diagonal += DAMPING * diagonal.mean().clamp(min=1e-12)
    order = torch.argsort(diagonal, descending=True, stable=True)
    reverse = order.flip(0)
    lower = torch.linalg.cholesky(hessian[reverse][:, reverse].double())
    unit = torch.eye(columns, dtype=lower.dtype, device=lower.device)
    # H^-1 = factor^T factor: read from the last column to the first, H = lower lower^T
    factor = torch.linalg.solve_triangular(lower, unit, upper=False).flip(0, 1).float()
    parts, latent, back = [], torch.empty_like(weight), torch.argsort(order)
    for rows, out in zip(weight.split(ROWS), latent.split(ROWS)):  # rows are independent
        start = Choice(grid, "k_quant").blocks(rows, diagonal.clone())
        q, steps = _round_columns(rows.T.contiguous()[order], start, order, factor, grid)
        integers = start.q.reshape(len(rows), -1).clone()
        integers[:, :columns] = q[back].T
        blocks = Blocks(integers.reshape(start.q.shape), start.scales, start.zero_points, columns)
        parts.append(refit(blocks, rows, grid, hessian))
        out.copy_(steps[back].T).mul_(parts[-1].scales.repeat_interleave(grid.group, dim=1)[:, :columns])
    return concatenate(parts), latent


def _round_columns(
    columns: Tensor, start: Blocks, order: Tensor, factor: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """The integers uint8 [in, out] of the weight's columns in their order, which are changed, and the values
    they were rounded from, in steps from the zero point."""
    scales = start.scales.T.contiguous()  # [groups, out]
    steps, zeros = inverse(scales), grid.zeros(start.zero_points)
    centers = zeros[..., 0].T.contiguous() if isinstance(zeros, Tensor) else torch.full_like(scales, zeros)
    group = order // grid.group
    q, positions = torch.empty_like(columns), torch.empty_like(columns)
    errors = torch.empty_like(columns[:BLOCK])
    pivots = zip(group.tolist(), factor.diagonal().tolist())
    for first in range(0, len(order), BLOCK):
        last = min(first + BLOCK, len(order))
        for index, (g, pivot) in zip(range(first, last), pivots):
            values, error = columns[index], errors[index - first]
            torch.mul(values, steps[g], out=positions[index]).add_(centers[g])
            torch.round(positions[index], out=q[index]).clamp_(0, grid.highest)
            torch.sub(q[index], centers[g], out=error).mul_(scales[g])
            torch.sub(values, error, out=error).div_(pivot)
            rest = factor[index : index + 1, index + 1 : last].T
            columns[index + 1 : last].addmm_(rest, error[None], alpha=-1.0)
        columns[last:].addmm_(factor[first:last, last:].T, errors[: last - first], alpha=-1.0)
    positions = torch.clamp(positions, q - EDGE, q + EDGE).sub_(centers[group])
    return q.to(torch.uint8), positions


def refit(blocks: Blocks, weight: Tensor, grid: Grid, hessian: Tensor) -> Blocks:
    """The scales that minimize `(w - w') H (w - w')^T` under the given integers, row by row.

    With w' = s_1 z_1 + ... + s_G z_G (z_g: the row's integers less the zero point, in group g alone), the
    scales solve A s = b with A_gh = z_g H z_h and b_g = z_g H w. A row whose system cannot be solved, or
    whose error would rise, keeps its scales.
    """
    rows, groups = blocks.scales.shape
    unit = Blocks(blocks.q, torch.ones_like(blocks.scales), blocks.zero_points, blocks.columns)
    integers, values = (in_groups(x, grid.group) for x in (dequantize(unit, grid), weight))
    padding = groups * grid.group - blocks.columns
    metric = functional.pad(hessian, (0, padding, 0, padding)).split(grid.group)
    scales = blocks.scales.clone()

    def cost(s: Tensor) -> Tensor:
        """Each row's error up to a constant: s A s - 2 s b."""
        return torch.einsum("rg,rgh,rh->r", s, a, s) - 2 * (s * b).sum(1)

    for first in range(0, rows, REFITTED):
        part = slice(first, first + REFITTED)
        z, w = integers[part], values[part]
        a = z.new_empty(len(z), groups, groups, dtype=torch.double)
        b = z.new_empty(len(z), groups, dtype=torch.double)
        for group in range(groups):
            through = (z[:, group] @ metric[group]).reshape(z.shape)  # z_g H
            a[:, group] = (through * z).sum(-1)
            b[:, group] = (through * w).sum((1, 2))
        old = scales[part].double()
        ridge = a.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-20) * 1e-6
        a = a + ridge[:, None, None] * torch.eye(groups, dtype=a.dtype, device=a.device)
        b = b + ridge[:, None] * old
        solved, info = torch.linalg.solve_ex(a, b)
        solved = storable(solved.float()).double()
        better = (info == 0) & torch.isfinite(solved).all(1) & (cost(solved) < cost(old))
        scales[part] = torch.where(better[:, None], solved, old).float()
    return Blocks(blocks.q, scales, blocks.zero_points, blocks.columns)
