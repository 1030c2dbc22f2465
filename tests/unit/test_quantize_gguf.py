"""Blocks of the ONNX grid as GGUF types: llama.cpp's own reader (package gguf) gives the same weights."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantize_grids import grids

from edgedisp.quantize.gguf_file import ggml_blocks, unfit
from edgedisp.quantize.grid import Grid, dequantize, quantize


@given(grids, st.integers(1, 5), st.integers(1, 9), st.integers(0, 9))
def test_a_block_of_gguf_is_a_group_of_the_bundle(grid: Grid, rows: int, blocks: int, seed: int) -> None:
    weight = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed))
    rounded = quantize(weight, grid)
    if reason := unfit(grid, weight.shape[1]):
        assert grid.group == 16 or (grid.bits == 8 and not grid.symmetric)
        with pytest.raises(ValueError, match=reason[:20]):
            ggml_blocks(rounded, grid)
        return
    data, kind = ggml_blocks(rounded, grid)
    read, expected = gguf.quants.dequantize(data, kind), dequantize(rounded, grid).numpy()
    minimum = np.abs(expected).max() * 2.0**-10 if kind == gguf.GGMLQuantizationType.Q4_1 else 0.0
    np.testing.assert_allclose(read, expected, rtol=0, atol=minimum)


def test_rows_that_are_no_whole_blocks_do_not_fit() -> None:
    assert "40 values" in unfit(Grid(4, 32, True), 40)
