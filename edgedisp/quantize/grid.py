"""The block grid of ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized`, in numpy.

A weight [out, in] is cut along `in` into groups of `group` values. Each group keeps one fp32 scale and, when
asymmetric, one zero point; its values are unsigned integers of `bits` bits:

    value = (q - zero_point) * scale          zero_point = 2^(bits-1) when symmetric (not stored)

Rounding to nearest. Symmetric: the value of largest magnitude lands exactly on the end of the range that
has one step more (q = 0, that is -2^(bits-1) steps), so its sign decides the sign of the scale. A positive
scale would waste that step or clip. Asymmetric: the range [min(0, lowest), max(0, highest)] over 2^bits - 1
steps; zero stays exact, which padding and dead weights need. ONNX Runtime's own quantizer makes the same
two choices.

Packed form, as the two operators read it: `data` [out, groups, group * bits / 8] with the first value in
the low bits of a byte; `scales` [out, groups]; `zero_points` [out, ceil(groups * bits / 8)], packed along
the row. The last group of a row may be partly padding (q = zero point); both operators were checked to
accept that, the second through a reshape to the padded width and a slice.

Left out: 2 bits (the packing here is general, but no kernel was tried), fp16 scales (no CPU kernels).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgedisp import BadInput

Float = NDArray[np.float32]
Bytes = NDArray[np.uint8]

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
            raise BadInput(f"bits is {self.bits}; ONNX Runtime's block grid is used here with 4 or 8")
        if self.group not in GROUPS:
            raise BadInput(f"group is {self.group}; ONNX Runtime takes {', '.join(map(str, GROUPS))}")

    @property
    def middle(self) -> int:
        """The zero point of a symmetric group."""
        return 1 << (self.bits - 1)

    @property
    def highest(self) -> int:
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class Blocks:
    """A quantized weight, unpacked: q uint8 [out, groups, group], scales and zero points [out, groups]."""

    q: Bytes
    scales: Float
    zero_points: Bytes | None
    columns: int  # `in` before padding


@dataclass(frozen=True)
class Packed:
    """The same as the operators store it. data uint8 [out, groups, group * bits / 8]."""

    data: Bytes
    scales: Float
    zero_points: Bytes | None
    columns: int

    @property
    def size_bytes(self) -> int:
        zero_points = 0 if self.zero_points is None else self.zero_points.nbytes
        return self.data.nbytes + self.scales.nbytes + zero_points


def in_groups(weight: Float, group: int) -> Float:
    """[out, in] -> [out, ceil(in / group), group], padded with zeros at the end of each row."""
    rows, columns = weight.shape
    padding = -columns % group
    if padding:
        weight = np.pad(weight, ((0, 0), (0, padding)))
    return weight.reshape(rows, -1, group)


def quantize(weight: Float, grid: Grid) -> Blocks:
    """Round `weight` fp32 [out, in] to the grid. BadInput when a value is not finite."""
    if weight.ndim != 2:
        raise BadInput(f"a weight of shape {weight.shape} cannot be quantized: two dimensions are needed")
    if not np.isfinite(weight).all():
        raise BadInput("the weight holds values that are not finite; quantizing it would hide a broken model")
    values = in_groups(np.asarray(weight, np.float32), grid.group)
    lowest, highest = values.min(axis=-1), values.max(axis=-1)
    if grid.symmetric:
        extreme = np.where(-lowest > highest, lowest, highest)
        scales = extreme / np.float32(-grid.middle)
        zero_points = None
        center = np.float32(grid.middle)
    else:
        lowest, highest = np.minimum(lowest, 0), np.maximum(highest, 0)
        scales = (highest - lowest) / np.float32(grid.highest)
        zero_points = np.rint(-lowest * _inverse(scales)).clip(0, grid.highest).astype(np.uint8)
        center = zero_points[..., None].astype(np.float32)
    steps = values * _inverse(scales)[..., None]
    q = np.rint(steps + center).clip(0, grid.highest).astype(np.uint8)
    return Blocks(q, scales.astype(np.float32), zero_points, weight.shape[1])


def _inverse(scales: Float) -> Float:
    """1 / scale, and 0 for a group of zeros (its scale is 0: every q is the zero point)."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.where(np.abs(scales) > np.finfo(np.float32).tiny, np.float32(1) / scales, np.float32(0))


def dequantize(blocks: Blocks, grid: Grid) -> Float:
    """The fp32 weight [out, in] that the operators compute with."""
    center = grid.middle if blocks.zero_points is None else blocks.zero_points[..., None].astype(np.float32)
    values = (blocks.q.astype(np.float32) - np.float32(center)) * blocks.scales[..., None]
    return values.reshape(len(values), -1)[:, : blocks.columns]


def pack(blocks: Blocks, grid: Grid) -> Packed:
    """Join `8 / bits` values to a byte, the first in the low bits."""
    zero_points = None if blocks.zero_points is None else _join(blocks.zero_points, grid.bits)
    return Packed(_join(blocks.q, grid.bits), blocks.scales, zero_points, blocks.columns)


def unpack(packed: Packed, grid: Grid) -> Blocks:
    """The inverse of `pack`."""
    groups = packed.scales.shape[1]
    zero_points = None if packed.zero_points is None else _split(packed.zero_points, grid.bits)[:, :groups]
    return Blocks(_split(packed.data, grid.bits), packed.scales, zero_points, packed.columns)


def _join(values: Bytes, bits: int) -> Bytes:
    each = 8 // bits
    padding = -values.shape[-1] % each
    if padding:
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, padding)])
    lanes = values.reshape(*values.shape[:-1], -1, each)
    joined = lanes[..., 0].copy()
    for lane in range(1, each):
        joined |= lanes[..., lane] << (bits * lane)
    return joined


def _split(joined: Bytes, bits: int) -> Bytes:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    lanes = (joined[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return lanes.reshape(*joined.shape[:-1], -1)
