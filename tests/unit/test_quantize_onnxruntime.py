"""Our rounding against the quantizers that onnxruntime carries: on one grid no more error, and more forms."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from onnx_node import node_model, run

from edgedisp.quantize.grid import METHODS, Grid, dequantize

ROWS, COLUMNS = 96, 192
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    """onnxruntime's module of weight-only quantizers. Importing it sets up the root logger: undone here."""
    handlers, level = list(logging.root.handlers), logging.root.level
    module = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    yield module


def weight() -> torch.Tensor:
    """Heavy-tailed rows of different sizes."""
    rng = np.random.default_rng(3)
    values = rng.standard_t(4, size=(ROWS, COLUMNS)) * np.exp(rng.normal(size=(ROWS, 1)))
    return torch.from_numpy(values.astype(np.float32))


def by_onnxruntime(theirs: Any, config: Any, values: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The weight that onnxruntime computes with once its quantizer has changed a graph of one product."""
    unit = np.eye(values.shape[1], dtype=np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    model = node_model([node], {"w": np.ascontiguousarray(values.numpy().T)}, unit)
    with contextlib.redirect_stdout(io.StringIO()):
        quantizer = theirs.MatMulNBitsQuantizer(
            model, bits=grid.bits, block_size=grid.group, is_symmetric=grid.symmetric, algo_config=config
        )
        quantizer.process()
    return torch.from_numpy(run(quantizer.model.model, unit).T)


def error(rounded: torch.Tensor, values: torch.Tensor) -> float:
    return float((rounded - values).norm() / values.norm())


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_rounding_to_nearest_is_theirs(theirs: Any, symmetric: bool, bits: int) -> None:
    grid, values = Grid(bits, 32, symmetric), weight()
    config = theirs.DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, bits=bits)
    other = by_onnxruntime(theirs, config, values, grid)
    ours = dequantize(METHODS["rtn"](values, grid, None), grid)
    assert error(ours, values) <= error(other, values) * 1.001
    differs = ~torch.isclose(other, ours, rtol=1e-3, atol=1e-5)
    assert differs.float().mean() < 0.02  # a tie may go either way


def test_k_quant_leaves_no_more_error_than_theirs(theirs: Any) -> None:
    grid, values, config = Grid(4, 32, False), weight(), theirs.KQuantWeightOnlyQuantConfig()
    other = by_onnxruntime(theirs, config, values, grid)
    ours = dequantize(METHODS["k_quant"](values, grid, None), grid)
    cost = values.abs() + values.reshape(ROWS, -1, 32).square().mean(-1).sqrt().repeat_interleave(32, 1)
    assert (cost * (ours - values).square()).sum() <= 1.001 * (cost * (other - values).square()).sum()
    assert error(ours, values) <= 1.001 * error(other, values)
