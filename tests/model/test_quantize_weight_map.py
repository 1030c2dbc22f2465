"""Weights rounded on the torch model are found in the graph, whoever joined, turned and named them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import pytest
from shared_store import SharedStore

from edgedisp import models
from edgedisp.graph.session import OnnxModel
from edgedisp.quantize import calibration
from edgedisp.quantize.calibration import gptq_model
from edgedisp.quantize.grid import Grid, dequantize, quantize
from edgedisp.quantize.onnx_rewrite import quantize_bundle
from edgedisp.quantize.onnx_weights import read_weight_map

GRID = Grid(4, 16, False)
TOKENS = np.random.default_rng(0).integers(0, twins.VOCABULARY, (6, 40)).astype(np.uint16)


CASES = [(form, 8) for form in twins.FORMS] + [(form, 4) for form in (*twins.FAMILIES, twins.UNTIED)]


@pytest.mark.parametrize(("form", "head_bits"), CASES)
def test_the_graph_computes_what_the_calibrated_model_computes(
    form: str, head_bits: int, store: SharedStore, tmp_path: Path
) -> None:
    """A head of 4 bits is calibrated, and a tied embedding with it; one of 8 bits is rounded to nearest."""
    stored = twins.TwinStore(store)
    model, fp32, outer_grid = stored.model(form), stored.fp32(form), Grid(head_bits, 16, False)
    by_parameter = gptq_model(model, TOKENS, GRID, head=GRID if head_bits == 4 else None)
    origins = read_weight_map(fp32)
    options: dict[str, Any] = {"bits": 4, "group": 16, "head_bits": head_bits, "symmetric": False}
    blocks = lambda name: origins[name].blocks(by_parameter)  # noqa: E731
    quantize_bundle(fp32, tmp_path, accuracy_level=0, blocks=blocks, **options)
    head = model.get_output_embeddings().weight
    for weight in {id(w): w for w in (model.get_input_embeddings().weight, head)}.values():
        if head_bits == 8 or weight is not head:
            weight.data.copy_(dequantize(quantize(weight.data, outer_grid), outer_grid))
    shipped = OnnxModel(tmp_path, 1)
    for row in twins.ragged([5, 30]):
        logits = shipped(np.array([row]), np.ones((1, len(row)), np.int64))[0]
        np.testing.assert_allclose(logits, twins.torch_logits(model, row), rtol=1e-3, atol=2e-3)


def test_a_tied_head_spares_the_rows_that_the_lookup_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins.make(tmp_path / "model", "llama")
    grid, errors = Grid(4, 32, False), []
    for share in (0.0, calibration.TIED):
        monkeypatch.setattr(calibration, "TIED", share)
        opened = models.load(tmp_path / "model")
        rows = opened.get_input_embeddings().weight.data.clone()
        gptq_model(opened, TOKENS, GRID, head=grid)
        errors.append(float((opened.get_input_embeddings().weight.data - rows).norm() / rows.norm()))
    nearest = float((dequantize(quantize(rows, grid), grid) - rows).norm() / rows.norm())
    assert errors[1] < errors[0] and errors[1] < 1.1 * nearest
