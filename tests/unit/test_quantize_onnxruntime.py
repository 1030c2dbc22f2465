"""Ours against the quantizers that onnxruntime carries, on the same grid: no more error, and no fewer forms.

What they are good for is said in quantize/rounding_methods.py; here is what it rests on.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from edgedisp.quantize.grid import Grid, dequantize
from edgedisp.quantize.rounding_methods import METHODS

ROWS, COLUMNS = 96, 192


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    """onnxruntime's module of weight-only quantizers. Importing it sets up the root logger: undone here."""
    handlers, level = list(logging.root.handlers), logging.root.level
    found = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    yield found


def weight(columns: int = COLUMNS) -> torch.Tensor:
    """Heavy-tailed rows of different sizes."""
    rng = np.random.default_rng(3)
    values = rng.standard_t(4, size=(ROWS, columns)) * np.exp(rng.normal(size=(ROWS, 1)))
    return torch.from_numpy(values.astype(np.float32))


def quantized(theirs: Any, config: Any, values: torch.Tensor, grid: Grid) -> onnx.ModelProto:
    """A graph of one product as their quantizer leaves it."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", values.shape[1]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", len(values)])],
        [numpy_helper.from_array(np.ascontiguousarray(values.numpy().T), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with contextlib.redirect_stdout(io.StringIO()):
        quantizer = theirs.MatMulNBitsQuantizer(
            model, bits=grid.bits, block_size=grid.group, is_symmetric=grid.symmetric, algo_config=config
        )
        quantizer.process()
    found: onnx.ModelProto = quantizer.model.model
    return found


def held_by(model: onnx.ModelProto, columns: int = COLUMNS) -> torch.Tensor:
    """The weight that onnxruntime computes with, by a product with the identity."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": np.eye(columns, dtype=np.float32)})[0].T)


def error(found: torch.Tensor, values: torch.Tensor) -> float:
    return float((found - values).norm() / values.norm())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_to_nearest_is_theirs(theirs: Any, symmetric: bool, bits: int) -> None:
    grid, values = Grid(bits, 32, symmetric), weight()
    config = theirs.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, bits=bits)
    found = held_by(quantized(theirs, config, values, grid))
    ours = dequantize(METHODS["rtn"](values, grid, None), grid)
    assert error(ours, values) <= error(found, values) * 1.001
    assert (
        ~torch.isclose(found, ours, rtol=1e-3, atol=1e-5)
    ).float().mean() < 0.02  # a tie may go either way


@pytest.mark.filterwarnings("ignore")
def test_k_quant_leaves_no_more_error_than_theirs_and_takes_what_theirs_refuses(theirs: Any) -> None:
    grid, values = Grid(4, 32, False), weight()
    found = held_by(quantized(theirs, theirs.KQuantWeightOnlyQuantConfig(), values, grid))
    ours = dequantize(METHODS["k_quant"](values, grid, None), grid)
    cost = values.abs() + values.reshape(ROWS, -1, 32).square().mean(-1).sqrt().repeat_interleave(32, 1)
    assert (cost * (ours - values).square()).sum() <= 1.001 * (cost * (found - values).square()).sum()
    assert error(ours, values) <= 1.001 * error(found, values)
    odd = weight(160)  # 5 groups a row: their zero points do not fill bytes
    with pytest.raises(ValueError):
        quantized(theirs, theirs.KQuantWeightOnlyQuantConfig(), odd, grid)
    held = dequantize(METHODS["k_quant"](odd, grid, None), grid)
    assert error(held, odd) < error(dequantize(METHODS["rtn"](odd, grid, None), grid), odd)
