"""The block grid of ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized`.

A weight [out, in] is cut along `in` into groups of `group` values. Each group has one scale and, when
asymmetric, one zero point:

    value = (q - zero_point) * scale          zero_point = 2^(bits-1) when symmetric (not stored)

Scales are fp16 numbers (`storable`): fp32 scales would be a fifth of a 4-bit file. The last group of a row
may be partly padding (q = zero point). All functions take torch tensors on any device; `pack` returns numpy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edgedisp.core.errors import BadInput

LARGEST = float(torch.finfo(torch.float16).max)
GROUPS = (16, 32, 64, 128, 256)
BITS = (4, 8)


@dataclass(frozen=True)
class Grid:
    """Bits a value, values a group, and whether zero sits in the middle of the range."""

    bits: int
    group: int
    symmetric: bool

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise BadInput(f"bits is {self.bits}; ONNX Runtime's block grid has {', '.join(map(str, BITS))}")
        if self.group not in GROUPS:
            raise BadInput(f"group is {self.group}; ONNX Runtime takes {', '.join(map(str, GROUPS))}")

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


def check_weight(weight: Tensor) -> None:
    """BadInput for values that are not finite, or larger than fp16 scales reach."""
    lowest, highest = torch.aminmax(weight)
    largest = float(torch.maximum(-lowest, highest))  # NaN stays NaN
    if not math.isfinite(largest):
        raise BadInput("the weight holds values that are not finite; quantizing it would hide a broken model")
    if largest > LARGEST:
        raise BadInput(
            f"the weight holds {largest:.3g}, beyond what scales in fp16 reach ({LARGEST:,.0f}); "
            "is the model damaged?"
        )


def quantize(weight: Tensor, grid: Grid) -> Blocks:
    """`weight` fp32 [out, in] rounded to nearest over the range of each group. BadInput as `check_weight`."""
    check_weight(weight)
    values = in_groups(weight, grid.group)
    return round_to(values, *ranges(values, grid), grid, weight.shape[1])


def ranges(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scales fp32 and zero points uint8 (None when symmetric), [out, groups], of values [out, groups, n].

    Symmetric: the value of largest magnitude lands on q = 0, the end with one step more, so its sign is the
    opposite of the scale's. Asymmetric: [min(0, lowest), max(0, highest)] over 2^bits - 1 steps; zero stays
    exact. ONNX Runtime's quantizer makes the same two choices.
    """
    lowest, highest = torch.aminmax(values, dim=-1)
    if grid.symmetric:
        extreme = torch.where(-lowest > highest, lowest, highest)
        return storable(extreme / -float(grid.middle)), None
    lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
    scales = storable((highest - lowest) / float(grid.highest))
    zero_points = torch.round(-lowest * inverse(scales)).clamp(0, grid.highest).to(torch.uint8)
    return scales, zero_points


def storable(scales: Tensor) -> Tensor:
    """The nearest scales that fp16 has, as fp32; below 2^-14, where fp16 has fixed steps of 2^-24, the next
    larger, so that no value is cut off. The largest is 65,504."""
    sizes = scales.abs()
    small = torch.ceil(sizes * 2.0**24) * 2.0**-24
    rounded = torch.where(sizes < 2.0**-14, small, sizes.clamp(max=LARGEST)).half().float()
    return torch.copysign(rounded, scales)


def round_to(values: Tensor, scales: Tensor, zero_points: Tensor | None, grid: Grid, columns: int) -> Blocks:
    """The nearest integers to [out, groups, group] under given scales and zero points."""
    q = torch.round(values * inverse(scales)[..., None] + grid.zeros(zero_points)).clamp(0, grid.highest)
    return Blocks(q.to(torch.uint8), scales, zero_points, columns)


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
    values = functional.pad(values.cpu(), (0, -values.shape[-1] % (8 // bits)))
    lanes = values.reshape(*values.shape[:-1], -1, 8 // bits)
    joined = lanes[..., 0].clone()
    for lane in range(1, 8 // bits):
        joined |= lanes[..., lane] << (bits * lane)
    return joined


def _split(joined: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    lanes = (joined[..., None] >> shifts) & ((1 << bits) - 1)
    return lanes.reshape(*joined.shape[:-1], -1)
