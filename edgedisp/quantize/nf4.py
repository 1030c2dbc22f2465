"""bitsandbytes' NF4 as ONNX Runtime reads it: the operator `MatMulBnb4` with `quant_type` 1.

NF4 (Dettmers et al. 2023, QLoRA) has no integers and no zero points: a value is one of 16 levels, the
quantiles of a normal distribution, times the largest magnitude of its block. That fits weights without
outliers well; a model that was trained over an NF4 base (QLoRA) and merged into that base, dequantized, comes
back to the very levels that it was trained over, as far as the adapter left it there.

Form: the weight [out, in] is flattened row by row and cut into blocks of `group` values, so a block can span
two rows. `data` holds two values a byte, the earlier one in the high bits (`MatMulNBits`: in the low ones);
`absmax` holds one fp32 for each block. The last byte and the last block may be partly empty.

ONNX Runtime's own quantizer does the rounding: bitsandbytes gives the same bytes, but takes no blocks of 16,
and its CPU dequantizing (0.50) is wrong where a row is no whole number of blocks. Left out: FP4 (`quant_type`
0), which nobody trains over, and double quantization of `absmax`, which the operator cannot read. On CPUs the
operator rounds no activations and unpacks the weight to fp32 for each product: slower than `MatMulNBits`.
There is no gather over NF4, so an embedding, and a head tied to it, stay on the block grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgedisp.core.errors import BadInput
from edgedisp.quantize.grid import GROUPS, check_weight

QUANT_TYPE = 1  # the operator's number for NF4

# Dettmers et al. 2023, appendix E: means of neighbouring quantiles of N(0, 1) for 2^4 bins, normalized to
# [-1, 1], with an exact zero.
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class Levels:
    """An NF4 weight as the operator stores it. data uint8 [ceil(out * in / 2)]; absmax fp32 [blocks]."""

    data: NDArray[np.uint8]
    absmax: NDArray[np.float32]
    rows: int
    columns: int
    group: int

    @property
    def size_bytes(self) -> int:
        return self.data.nbytes + self.absmax.nbytes


def check_group(group: int) -> None:
    """BadInput for a block size that the operator has no kernel for."""
    if group not in GROUPS:
        raise BadInput(f"group is {group}; MatMulBnb4 takes {', '.join(map(str, GROUPS))}")


def size_bytes(rows: int, columns: int, group: int) -> int:
    """What a weight [rows, columns] takes when it is stored."""
    values = rows * columns
    return -(-values // 2) + 4 * -(-values // group)


def quantize(weight: Tensor, group: int) -> Levels:
    """Round fp32 [out, in] to the nearest level, block by block. BadInput when a value is not finite."""
    from onnxruntime.quantization.matmul_bnb4_quantizer import MatMulBnb4Quantizer

    check_group(group)
    check_weight(weight)
    turned = weight.detach().cpu().float().numpy().T  # it takes [in, out], and turns it back
    data, absmax = MatMulBnb4Quantizer(onnx.ModelProto(), QUANT_TYPE, group).bnb4_block_quant(turned)
    return Levels(data, absmax, len(weight), weight.shape[1], group)


def dequantize(levels: Levels) -> Tensor:
    """The fp32 weight [out, in] that the operator computes with."""
    codes = torch.from_numpy(levels.data)
    values = torch.tensor(LEVELS)[torch.stack([codes >> 4, codes & 15], dim=-1).long()].flatten()
    count = levels.rows * levels.columns
    sizes = torch.from_numpy(levels.absmax).repeat_interleave(levels.group)[:count]
    return (values[:count] * sizes).reshape(levels.rows, levels.columns)
