"""The grid computes what ONNX Runtime's kernels compute from the same packed bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx_node import node_model, run
from quantize_grids import grids
from torch import Tensor

from edgedisp.quantize.grid import (
    Grid,
    Packed,
    concatenate,
    dequantize,
    pack,
    quantize,
    storable,
    unpack,
)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Matrices of odd shapes with rows and stretches of zeros, constants, one-sided values and outliers."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 300))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = rng.normal(size=(rows, columns)) * 10.0 ** rng.uniform(-9, 1, size=(rows, 1))
    for row in range(rows):
        kind = draw(st.sampled_from(["plain", "zeros", "zero stretch", "constant", "positive", "outlier"]))
        if kind == "zeros":
            weight[row] = 0
        elif kind == "zero stretch":
            weight[row, : columns // 2] = 0
        elif kind == "constant":
            weight[row] = weight[row, 0]
        elif kind == "positive":
            weight[row] = np.abs(weight[row]) + 1
        elif kind == "outlier":
            weight[row, rng.integers(columns)] *= 1000
    return torch.from_numpy(weight.astype(np.float32))


def computed(op: str, data: np.ndarray, packed: Packed, x: np.ndarray, **attributes: Any) -> np.ndarray:
    """What ONNX Runtime's operator makes of `x` and the packed weight."""
    tensors = {"data": data, "scales": packed.scales}
    if packed.zero_points is not None:
        tensors["zero_points"] = packed.zero_points
    inputs = ["x", "data"] if op == "MatMulNBits" else ["data", "x"]
    inputs += ["cast", *list(tensors)[2:]]
    cast = helper.make_node("Cast", ["scales"], ["cast"], to=TensorProto.FLOAT)
    node = helper.make_node(op, inputs, ["y"], domain="com.microsoft", **attributes)
    return run(node_model([cast, node], tensors, x), x)


@settings(max_examples=60, deadline=None)
@given(weight=weights(), grid=grids)
def test_dequantized_equals_what_both_operators_read(weight: Tensor, grid: Grid) -> None:
    packed = pack(quantize(weight, grid), grid)
    expected = dequantize(unpack(packed, grid), grid).numpy()
    rows, columns = weight.shape
    shape = {"bits": grid.bits, "block_size": grid.group}
    product_shape, axes = (
        {"K": columns, "N": rows, "accuracy_level": 0},
        {"gather_axis": 0, "quantize_axis": 1},
    )
    identity = np.eye(columns, dtype=np.float32)
    product = computed("MatMulNBits", packed.data, packed, identity, **shape, **product_shape)
    np.testing.assert_array_equal(product.T, expected)
    data = packed.data.reshape(rows, -1)
    looked_up = computed("GatherBlockQuantized", data, packed, np.arange(rows)[::-1], **shape, **axes)
    np.testing.assert_array_equal(looked_up[::-1, :columns], expected)
    assert not looked_up[:, columns:].any()  # padding comes out as zeros


@given(weight=weights(), grid=grids)
def test_unpacking_undoes_packing(weight: Tensor, grid: Grid) -> None:
    blocks = quantize(weight, grid)
    packed = pack(blocks, grid)
    groups = -(-weight.shape[1] // grid.group)
    assert packed.data.shape == (len(weight), groups, grid.group * grid.bits // 8)
    assert packed.scales.shape == (len(weight), groups)
    arrays = [array for array in (packed.data, packed.scales, packed.zero_points) if array is not None]
    assert grid.array_bytes(*weight.shape) == [array.nbytes for array in arrays]
    assert grid.size_bytes(*weight.shape) == sum(array.nbytes for array in arrays)
    back = unpack(packed, grid)
    np.testing.assert_array_equal(back.q, blocks.q)
    np.testing.assert_array_equal(back.scales, blocks.scales)
    assert (back.zero_points is None) == (packed.zero_points is None) == grid.symmetric
    if back.zero_points is not None:
        np.testing.assert_array_equal(back.zero_points, blocks.zero_points)
    last_first = torch.arange(len(weight) - 1, -1, -1)
    turned = dequantize(blocks.rows(last_first), grid)
    np.testing.assert_array_equal(turned, dequantize(blocks, grid).flip(0))
    both = concatenate([blocks.rows(slice(0, 1)), blocks.rows(slice(1, None))])
    np.testing.assert_array_equal(dequantize(both, grid), dequantize(blocks, grid))


@given(weight=weights(), grid=grids)
def test_the_error_is_half_a_step_or_one_at_a_symmetric_grids_short_end(weight: Tensor, grid: Grid) -> None:
    blocks = quantize(weight, grid)
    error = (dequantize(blocks, grid) - weight).abs()
    steps = blocks.scales.abs().repeat_interleave(grid.group, dim=1)[:, : weight.shape[1]]
    cut = steps * grid.highest * 2.0**-11  # by the scale, which is rounded to fp16's 11 bits
    assert (error <= steps * (1.0 if grid.symmetric else 0.5) * 1.0001 + cut).all()
    # The short end is the one opposite the extreme that decides the sign of the scale.
    signs = blocks.scales.sign().repeat_interleave(grid.group, dim=1)[:, : weight.shape[1]]
    short = weight.sign() == signs
    assert (error[~short] <= steps[~short] * 0.5001 + cut[~short]).all()
    assert not error[weight == 0].any()


def test_scales_of_nothing_of_too_much_and_below_what_fp16_resolves() -> None:
    assert storable(torch.tensor([0.0, 1e9, -1e9])).tolist() == [0.0, 65504.0, -65504.0]
    # The step of fp16 below 2^-14: the next larger one, so that no value is cut off; above, the nearest.
    step = 2.0**-24
    small = torch.tensor([1.3, 7.0, -8.2, 2.0**9 + 0.3, 2.0**10 + 0.3]) * step
    assert (storable(small) / step).tolist() == [2.0, 7.0, -9.0, 513.0, 1024.0]


def test_four_bit_values_by_hand() -> None:
    # Range -6..9 in 15 steps of 1: zero point 6. Two values to a byte, the first in the low half.
    weight = torch.zeros(1, 16)
    weight[0, :4] = torch.tensor([-6.0, 9, 0, 3])
    packed = pack(quantize(weight, Grid(4, 16, symmetric=False)), Grid(4, 16, symmetric=False))
    assert packed.scales.tolist() == [[1.0]]
    assert packed.zero_points is not None and packed.zero_points.tolist() == [[6]]
    assert packed.data[0, 0, :2].tolist() == [0 | 15 << 4, 6 | 9 << 4]
    # Symmetric: 9 has the largest magnitude, so it is -8 steps of -9/8, and 0 is the middle.
    blocks = quantize(weight, Grid(4, 16, symmetric=True))
    assert blocks.scales.tolist() == [[-1.125]]
    assert blocks.q[0, 0, :4].tolist() == [13, 0, 8, 5]
