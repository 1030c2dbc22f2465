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
from edgedisp.quantize.grid import Blocks, Grid, dequantize, quantize
from edgedisp.quantize.onnx_rewrite import quantize_bundle
from edgedisp.quantize.onnx_weights import read_weight_map

GRID = Grid(4, 16, False)
TOKENS = np.random.default_rng(0).integers(0, twins.VOCABULARY, (6, 40)).astype(np.uint16)


def in_graph(bundle: Path, by_parameter: dict[str, Blocks]) -> Any:
    origins = read_weight_map(bundle)
    return lambda name: origins[name].blocks(by_parameter)


@pytest.mark.parametrize("form", twins.FORMS)
def test_the_graph_computes_what_the_calibrated_model_computes(
    store: SharedStore, tmp_path: Path, form: str
) -> None:
    stored = twins.TwinStore(store)
    opened, fp32, bundle = stored.model(form), stored.fp32(form), tmp_path
    options: dict[str, Any] = {"bits": 4, "group": 16, "symmetric": False, "accuracy_level": 0}
    blocks = in_graph(fp32, gptq_model(opened, TOKENS, GRID))
    quantize_bundle(fp32, bundle, blocks=blocks, **options)
    outer = (opened.get_input_embeddings(), opened.get_output_embeddings())
    ends = {id(part.weight): part.weight for part in outer}
    for weight in ends.values():
        weight.data.copy_(dequantize(quantize(weight.data, Grid(8, 16, False)), Grid(8, 16, False)))
    shipped = OnnxModel(bundle, 1)
    for row in twins.ragged([5, 17]):
        ids = np.array([row])
        np.testing.assert_allclose(
            shipped(ids, np.ones_like(ids))[0], twins.torch_logits(opened, row), rtol=1e-3, atol=2e-3
        )


@pytest.mark.parametrize("form", [*twins.FAMILIES, "llama, untied, biases, wide heads"])
def test_a_calibrated_head_is_the_one_in_the_graph_and_a_tied_embedding_with_it(
    store: SharedStore, tmp_path: Path, form: str
) -> None:
    stored = twins.TwinStore(store)
    opened, fp32, ends = stored.model(form), stored.fp32(form), GRID
    blocks = in_graph(fp32, gptq_model(opened, TOKENS, GRID, head=ends))
    options: dict[str, Any] = {"bits": 4, "group": 16, "head_bits": 4, "symmetric": False}
    quantize_bundle(fp32, tmp_path, accuracy_level=0, blocks=blocks, **options)
    embedding = opened.get_input_embeddings().weight
    if embedding is not opened.get_output_embeddings().weight:  # gptq rounded the head alone
        embedding.data.copy_(dequantize(quantize(embedding.data, ends), ends))
    row = twins.ragged([30])[0]
    shipped = OnnxModel(tmp_path, 1)(np.array([row]), np.ones((1, len(row)), np.int64))[0]
    np.testing.assert_allclose(shipped, twins.torch_logits(opened, row), rtol=1e-3, atol=2e-3)


def test_a_tied_head_spares_the_rows_that_the_lookup_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins.make(tmp_path / "model", "llama")
    ends, errors = Grid(4, 32, False), []
    for share in (0.0, calibration.TIED):
        monkeypatch.setattr(calibration, "TIED", share)
        opened = models.load(tmp_path / "model")
        rows = opened.get_input_embeddings().weight.data.clone()
        gptq_model(opened, TOKENS, GRID, head=ends)
        errors.append(float((opened.get_input_embeddings().weight.data - rows).norm() / rows.norm()))
    nearest = float((dequantize(quantize(rows, ends), ends) - rows).norm() / rows.norm())
    assert errors[1] < errors[0] and errors[1] < 1.1 * nearest
