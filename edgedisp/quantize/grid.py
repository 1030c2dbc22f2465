"""The block grid of ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized`, and rounding to it.

A weight [out, in] is cut along `in` into groups of `group` values. Each group has one scale and, when
asymmetric, one zero point:

    value = (q - zero_point) * scale          zero_point = 2^(bits-1) when symmetric (not stored)

Scales are fp16 numbers (`storable`): fp32 scales would be a fifth of a 4-bit file. The last group of a row
may be partly padding (q = zero point). All functions take torch tensors on any device; `pack` returns numpy.

`METHODS` choose scales and integers from the weight alone. onnxruntime's quantizers work on graphs alone, and
its `k_quant` finds nothing better than rounding on SmolLM2-135M (relative error 0.082; here 0.070).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

LARGEST = float(torch.finfo(torch.float16).max)
K_STARTS = 8  # starting scales that k_quant tries; 20, as in llama.cpp, leave no lower KL
ROUNDED_VALUES = 1 << 18  # values rounded at a time: a MB, so that a method works in the cache


@dataclass(frozen=True)
class Grid:
    """Bits a value (4, 8), values a group (16, 32, ... 256); whether zero is in the middle of the range."""

    bits: int
    group: int
    symmetric: bool

    @property
    def middle(self) -> int:
        """The zero point of a symmetric group."""
        return 1 << (self.bits - 1)

    @property
    def highest(self) -> int:
        return (1 << self.bits) - 1

    def zeros(self, zero_points: Tensor | None) -> Tensor | float:
        """The integers that stand for 0.0: [out, groups, 1], or the middle of every symmetric group."""
        return float(self.middle) if zero_points is None else zero_points[..., None].float()

    def array_bytes(self, rows: int, columns: int) -> list[int]:
        """Bytes of each array that `pack` returns for a weight [rows, columns]."""
        groups = -(-columns // self.group)
        zero_points = 0 if self.symmetric else -(-groups * self.bits // 8)
        each = (groups * self.group * self.bits // 8, 2 * groups, zero_points)
        return [rows * count for count in each if count]

    def size_bytes(self, rows: int, columns: int) -> int:
        """Stored bytes of a weight [rows, columns]."""
        return sum(self.array_bytes(rows, columns))


def uniform_grids(bits: int, group: int, symmetric: bool, head_bits: int) -> tuple[Grid, Grid]:
    """Of the layers, and of embedding and head: at 8 bits these need no zero points, which would be 1 % of a
    4-bit file."""
    return Grid(bits, group, symmetric), Grid(head_bits, group, symmetric or head_bits == 8)


class Scales(NamedTuple):
    """Of a weight [out, in]: scales fp32 and zero points uint8 (None: symmetric), each [out, groups]."""

    scales: Tensor
    zero_points: Tensor | None

    def rows(self, index: slice) -> Scales:
        return Scales(self.scales[index], None if self.zero_points is None else self.zero_points[index])


@dataclass(frozen=True)
class Blocks:
    """A quantized weight, unpacked: q uint8 [out, groups, group], scales fp32 and zero points uint8
    [out, groups]."""

    q: Tensor
    scales: Tensor
    zero_points: Tensor | None
    columns: int  # `in` before padding

    def rows(self, index: slice | Tensor) -> Blocks:
        """Some rows, in the order of `index`."""
        zero_points = None if self.zero_points is None else self.zero_points[index]
        return Blocks(self.q[index], self.scales[index], zero_points, self.columns)


@dataclass(frozen=True)
class Packed:
    """A quantized weight as a file stores it. data: uint8 [out, groups, group * bits / 8]."""

    data: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zero_points: NDArray[np.uint8] | None
    columns: int


def in_groups(weight: Tensor, group: int) -> Tensor:
    """[out, in] -> [out, ceil(in / group), group], each row padded with zeros at its end."""
    if padding := -weight.shape[1] % group:
        weight = functional.pad(weight, (0, padding))
    return weight.reshape(len(weight), -1, group)


def quantize(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Blocks:
    """`weight` fp32 [out, in] rounded to nearest over the range of each group."""
    values = in_groups(weight, grid.group)
    return round_to(values, ranges(values, grid), grid, weight.shape[1])


def ranges(values: Tensor, grid: Grid) -> Scales:
    """The scales that cover the range of each group of values [out, groups, n].

    Symmetric: the value of largest magnitude lands on q = 0, the end with one step more, so its sign is the
    opposite of the scale's. Asymmetric: [min(0, lowest), max(0, highest)] over 2^bits - 1 steps; zero stays
    exact. ONNX Runtime's quantizer makes the same two choices.
    """
    return _covering(*torch.aminmax(values, dim=-1), grid)


def _covering(lowest: Tensor, highest: Tensor, grid: Grid) -> Scales:
    """As of `ranges`, for the least and the largest value of each group."""
    if grid.symmetric:
        extreme = torch.where(-lowest > highest, lowest, highest)
        return Scales(storable(extreme / -float(grid.middle)), None)
    lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
    scales = storable((highest - lowest) / float(grid.highest))
    zero_points = torch.round(-lowest * inverse(scales)).clamp(0, grid.highest).to(torch.uint8)
    return Scales(scales, zero_points)


def storable(scales: Tensor) -> Tensor:
    """The nearest scales that fp16 has, as fp32; below 2^-14, where fp16 has fixed steps of 2^-24, the next
    larger, so that no value is cut off. The largest is 65,504."""
    sizes = scales.abs()
    small = torch.ceil(sizes * 2.0**24) * 2.0**-24
    rounded = torch.where(sizes < 2.0**-14, small, sizes.clamp(max=LARGEST)).half().float()
    return torch.copysign(rounded, scales)


def round_to(values: Tensor, scales: Scales, grid: Grid, columns: int) -> Blocks:
    """The nearest integers to values [out, groups, group] under given scales and zero points."""
    return Blocks(_nearest(values, scales, grid).to(torch.uint8), *scales, columns)


def _nearest(values: Tensor, scales: Scales, grid: Grid) -> Tensor:
    """The integers of `round_to` as fp32."""
    q = values * inverse(scales.scales)[..., None]
    return q.add_(grid.zeros(scales.zero_points)).round_().clamp_(0, grid.highest)


def inverse(scales: Tensor) -> Tensor:
    """1 / scale, and 0 for a group of zeros (its scale is 0: every q is the zero point)."""
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(scales.abs() > tiny, 1.0 / scales, torch.zeros_like(scales))


def dequantize(blocks: Blocks, grid: Grid) -> Tensor:
    """The fp32 weight [out, in] that the operators compute with."""
    values = blocks.q.to(torch.float32, copy=True).sub_(grid.zeros(blocks.zero_points))
    values.mul_(blocks.scales[..., None])
    return values.reshape(len(values), -1)[:, : blocks.columns]


def concatenate(parts: list[Blocks]) -> Blocks:
    """Weights of the same columns, one above the other."""
    zero_points = [part.zero_points for part in parts if part.zero_points is not None]
    return Blocks(
        torch.cat([part.q for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat(zero_points) if zero_points else None,
        parts[0].columns,
    )


def pack(blocks: Blocks, grid: Grid) -> Packed:
    """`8 / bits` values to a byte, the first in the low bits. ValueError for scales that fp16 lacks."""
    zero_points = None if blocks.zero_points is None else _join(blocks.zero_points, grid.bits).numpy()
    scales = blocks.scales.cpu().half()
    if not torch.equal(scales.float(), blocks.scales.cpu()):
        raise ValueError("the scales are not fp16 numbers; `storable` rounds them")
    return Packed(_join(blocks.q, grid.bits).numpy(), scales.numpy(), zero_points, blocks.columns)


def unpack(packed: Packed, grid: Grid) -> Blocks:
    """The inverse of `pack`."""
    scales, zero_points = torch.from_numpy(packed.scales).float(), None
    if packed.zero_points is not None:
        zero_points = _split(torch.from_numpy(packed.zero_points), grid.bits)[:, : scales.shape[1]]
    return Blocks(_split(torch.from_numpy(packed.data), grid.bits), scales, zero_points, packed.columns)


def _join(values: Tensor, bits: int) -> Tensor:
    values = values.cpu()
    if bits == 8:
        return values
    values = functional.pad(values, (0, values.shape[-1] % 2))
    return values[..., ::2] | values[..., 1::2] << 4


def _split(joined: Tensor, bits: int) -> Tensor:
    return joined if bits == 8 else torch.stack([joined & 15, joined >> 4], dim=-1).flatten(-2)


# ---------------------------------------------------------------- methods


def k_quant(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Blocks:
    """The least weighted squared error over starting scales around the range's own, each followed by the
    least-squares scale (and minimum) under its integers. This is llama.cpp's k-quants' search.

    importance: float32 [in], positive: what an error in an input column costs (the mean of its squared
    activations); None: larger values count more, as in llama.cpp.
    """
    values = in_groups(weight, grid.group)
    cost = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance
    cost = in_groups(cost[None], grid.group)  # 0 for padding
    if importance is None:
        cost = cost * (values.abs() + values.square().mean(-1, keepdim=True).sqrt())

    def error(scales: Scales) -> Tensor:
        rounded = _nearest(values, scales, grid).sub_(grid.zeros(scales.zero_points))
        return rounded.mul_(scales.scales[..., None]).sub_(values).square_().mul_(cost).sum(-1)

    lowest, highest = torch.aminmax(values, dim=-1)
    scales, zero_points = _covering(lowest, highest, grid)
    least = error(Scales(scales, zero_points))
    for step in range(K_STARTS):
        share = 0.75 + 0.4 * step / (K_STARTS - 1)
        start = _covering(lowest * share, highest * share, grid)
        fitted = _least_squares(values, cost, start, grid)
        new_error = error(fitted)
        better = new_error < least
        least = torch.where(better, new_error, least)
        scales = torch.where(better, fitted.scales, scales)
        if zero_points is not None and fitted.zero_points is not None:
            zero_points = torch.where(better, fitted.zero_points, zero_points)
    return round_to(values, Scales(scales, zero_points), grid, weight.shape[1])


def _least_squares(values: Tensor, cost: Tensor, scales: Scales, grid: Grid) -> Scales:
    """The scale (and zero point) that fit best under the integers of the given ones."""
    q = _nearest(values, scales, grid)
    if scales.zero_points is None:
        q = q.sub_(float(grid.middle))
        return Scales(storable((cost * values * q).sum(-1) / (cost * q * q).sum(-1).clamp(min=1e-30)), None)
    total, weighted = cost.sum(-1), cost * q
    sum_q, sum_v = weighted.sum(-1), (cost * values).sum(-1)
    sum_qq, sum_qv = (weighted * q).sum(-1), (weighted * values).sum(-1)
    determinant = total * sum_qq - sum_q * sum_q
    fitted = (total * sum_qv - sum_q * sum_v) / determinant
    is_valid = (determinant > 0) & torch.isfinite(fitted) & (fitted > 0)
    fitted = storable(torch.where(is_valid, fitted, scales.scales))
    minimum = (sum_v - fitted * sum_q) / total.clamp(min=1e-30)
    return Scales(fitted, torch.round(-minimum * inverse(fitted)).clamp(0, grid.highest).to(torch.uint8))


METHODS: dict[str, Callable[[Tensor, Grid, Tensor | None], Blocks]] = {"rtn": quantize, "k_quant": k_quant}


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
