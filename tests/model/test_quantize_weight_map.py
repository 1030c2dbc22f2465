"""Weights rounded on the torch model reach the graph, whatever joins, transposes and names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_twins import FAMILIES, FORMS, UNTIED, VOCABULARY, TwinStore, ragged, torch_logits

from edgedisp.graph.session import OnnxModel
from edgedisp.quantize import calibration
from edgedisp.quantize.calibration import gptq_model
from edgedisp.quantize.grid import Grid, dequantize, quantize
from edgedisp.quantize.onnx_rewrite import quantize_bundle
from edgedisp.quantize.onnx_weights import read_weight_map

GRID = Grid(4, 16, False)
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (6, 40)).astype(np.uint16)
CASES = [(form, 8) for form in FORMS] + [(form, 4) for form in (*FAMILIES, UNTIED)]


@pytest.mark.parametrize(("form", "head_bits"), CASES)
def test_the_graph_agrees_with_the_model(form: str, head_bits: int, twins: TwinStore, tmp_path: Path) -> None:
    """A head of 4 bits is calibrated, and a tied embedding with it; one of 8 bits is rounded to nearest."""
    model, fp32, outer_grid = twins.model(form), twins.fp32(form), Grid(head_bits, 16, False)
    by_parameter = gptq_model(model, TOKENS, GRID, head=GRID if head_bits == 4 else None)
    origins = read_weight_map(fp32)
    options: dict[str, Any] = {"bits": 4, "group": 16, "head_bits": head_bits, "symmetric": False}
    options["blocks"] = lambda name: origins[name].blocks(by_parameter)
    quantize_bundle(fp32, tmp_path, accuracy_level=0, **options)
    head = model.get_output_embeddings().weight
    for weight in {id(w): w for w in (model.get_input_embeddings().weight, head)}.values():
        if head_bits == 8 or weight is not head:
            weight.data.copy_(dequantize(quantize(weight.data, outer_grid), outer_grid))
    shipped = OnnxModel(tmp_path, 1)
    for row in ragged([5, 30]):
        logits = shipped(np.array([row]), np.ones((1, len(row)), np.int64))[0]
        np.testing.assert_allclose(logits, torch_logits(model, row), rtol=1e-3, atol=2e-3)


def test_a_tied_head_spares_the_rows_of_the_lookup(twins: TwinStore, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, errors = Grid(4, 32, False), []
    for share in (0.0, calibration.TIED):
        monkeypatch.setattr(calibration, "TIED", share)
        model = twins.model("llama")
        rows = model.get_input_embeddings().weight.data.clone()
        gptq_model(model, TOKENS, GRID, head=grid)
        errors.append(float((model.get_input_embeddings().weight.data - rows).norm() / rows.norm()))
    nearest = float((dequantize(quantize(rows, grid), grid) - rows).norm() / rows.norm())
    assert errors[1] < errors[0] and errors[1] < 1.1 * nearest
