"""Weights rounded on the torch model are found in the graph, whoever joined, turned and named them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgedisp import models
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.graph.export import export
from edgedisp.graph.session import OnnxModel
from edgedisp.quantize import calibrated
from edgedisp.quantize.calibrated import gptq_model
from edgedisp.quantize.grid import Blocks, Grid, dequantize, quantize
from edgedisp.quantize.made import Made
from edgedisp.quantize.rewrite import quantize_bundle

GRID = Grid(4, 16, False)
TOKENS = np.random.default_rng(0).integers(0, twins.VOCABULARY, (6, 40)).astype(np.uint16)


def bundles(folder: Path, form: str) -> tuple[Any, Path, dict[str, Any]]:
    """The torch model as gptq left it, and the int4 bundle made of the same blocks, in exact arithmetic."""
    twins.make(folder / "model", form)
    for name in ("fp32", "int4"):
        (folder / name).mkdir()
    export(folder / "model", folder / "fp32", threads=1)
    opened = models.load(folder / "model")
    made = gptq_model(opened, decoder_layers(opened), TOKENS, GRID)
    record = quantize_bundle(
        folder / "fp32", folder / "int4", bits=4, group=16, symmetric=False, accuracy_level=0, made=made
    )
    return opened, folder / "int4", record


@pytest.mark.parametrize("form", twins.FORMS)
def test_the_graph_computes_what_the_calibrated_model_computes(tmp_path: Path, form: str) -> None:
    opened, bundle, record = bundles(tmp_path, form)
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
    assert record["calibrated_tensors"] == record["tensors"] - len(ends)


@pytest.mark.parametrize("form", [*twins.FAMILIES, "llama, untied, biases, wide heads"])
def test_a_calibrated_head_is_the_one_in_the_graph_and_a_tied_embedding_with_it(
    tmp_path: Path, form: str
) -> None:
    twins.make(tmp_path / "model", form)
    for name in ("fp32", "int4"):
        (tmp_path / name).mkdir()
    export(tmp_path / "model", tmp_path / "fp32", threads=1)
    opened, ends = models.load(tmp_path / "model"), GRID
    made = gptq_model(opened, decoder_layers(opened), TOKENS, GRID, head=ends)
    options: dict[str, Any] = {"bits": 4, "group": 16, "head_bits": 4, "symmetric": False}
    record = quantize_bundle(tmp_path / "fp32", tmp_path / "int4", accuracy_level=0, made=made, **options)
    assert record["calibrated_tensors"] == record["tensors"] - (not record["tied"])
    if not record["tied"]:
        embedding = opened.get_input_embeddings().weight.data
        embedding.copy_(dequantize(quantize(embedding, ends), ends))
    row = twins.ragged([30])[0]
    shipped = OnnxModel(tmp_path / "int4", 1)(np.array([row]), np.ones((1, len(row)), np.int64))[0]
    np.testing.assert_allclose(shipped, twins.torch_logits(opened, row), rtol=1e-3, atol=2e-3)


def test_a_calibrated_head_makes_less_error_in_the_logits_than_a_rounded_one(tmp_path: Path) -> None:
    twins.make(tmp_path / "model", "llama, untied, biases, wide heads")
    ends, errors = Grid(4, 32, False), {}
    plain = models.load(tmp_path / "model")
    gptq_model(plain, decoder_layers(plain), TOKENS, GRID)
    head = plain.lm_head.weight.data.clone()
    seen: list[torch.Tensor] = []
    plain.lm_head.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 64)))
    with torch.no_grad():
        plain(input_ids=torch.from_numpy(TOKENS.astype(np.int64)))
    rounded = models.load(tmp_path / "model")
    gptq_model(rounded, decoder_layers(rounded), TOKENS, GRID, head=ends)
    heads = {"rtn": dequantize(quantize(head, ends), ends), "gptq": rounded.lm_head.weight.data}
    for name, held in heads.items():
        errors[name] = float((seen[0] @ (held - head).T).square().mean())
    assert errors["gptq"] < 0.7 * errors["rtn"]


def test_a_tied_head_spares_the_rows_that_the_lookup_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twins.make(tmp_path / "model", "llama")
    ends, errors = Grid(4, 32, False), []
    for share in (0.0, calibrated.TIED):
        monkeypatch.setattr(calibrated, "TIED", share)
        opened = models.load(tmp_path / "model")
        rows = opened.get_input_embeddings().weight.data.clone()
        gptq_model(opened, decoder_layers(opened), TOKENS, GRID, head=ends)
        errors.append(float((opened.get_input_embeddings().weight.data - rows).norm() / rows.norm()))
    nearest = float((dequantize(quantize(rows, ends), ends) - rows).norm() / rows.norm())
    assert errors[1] < errors[0] and errors[1] < 1.1 * nearest


def test_parts_on_different_grids_are_no_weight() -> None:
    made, other = Made(), Grid(8, 16, False)
    weights = [torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    for weight, grid in zip(weights, (GRID, other)):
        made.add(weight, quantize(weight, grid), grid)
    assert made.grids == {GRID, other}
    with pytest.raises(ValueError, match="different grids"):
        made.find(torch.cat(weights))


def test_joined_weights_are_found_in_their_order_and_others_are_not() -> None:
    weights = [torch.randn(rows, 32, generator=torch.Generator().manual_seed(rows)) for rows in (3, 5, 3)]
    weights[2][0] = weights[0][0]  # a first row does not tell two weights apart
    made = Made()
    for weight in weights:
        made.add(weight, quantize(weight, GRID), GRID)
    for joined in (weights[:1], weights[::-1], [weights[1], weights[0], weights[2]]):
        found = made.find(torch.cat(joined))
        assert found is not None and found[1] == GRID
        assert torch.equal(
            dequantize(*found), torch.cat([dequantize(quantize(w, GRID), GRID) for w in joined])
        )
    assert made.find(weights[0][:2]) is None
    assert made.find(torch.cat([weights[0], weights[1][:4]])) is None
    assert made.find(weights[0] + 1) is None


@given(st.lists(st.integers(2, 6), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_rows_of_whole_weights_are_found_in_any_order(heights: list[int], chance: random.Random) -> None:
    generator = torch.Generator().manual_seed(len(heights))
    weights = [torch.randn(rows, 40, generator=generator) for rows in heights]
    made = Made()
    for number, weight in enumerate(weights):  # blocks that tell which weight and row they belong to
        groups = torch.zeros(len(weight), 3, 16, dtype=torch.uint8)
        scales = torch.arange(3 * len(weight)).reshape(-1, 3) + 100.0 * number
        made.add(weight, Blocks(groups, scales, scales.to(torch.uint8), 40), GRID)
    order = list(range(sum(heights)))
    chance.shuffle(order)
    there = made.find(torch.cat(weights)[order])
    assert there is not None and there[0].columns == 40 and there[1] == GRID
    found = there[0]
    rows = [100.0 * number + 3 * row for number, height in enumerate(heights) for row in range(height)]
    assert found.scales[:, 0].tolist() == [rows[place] for place in order]
    assert found.zero_points is not None
    assert torch.equal(found.zero_points, found.scales.to(torch.uint8))
    joined = torch.cat(weights)[order]
    assert made.find(joined[1:]) is None  # a part of a weight is none
    assert made.find(torch.cat([joined, weights[0][:1]])) is None  # nor is one of its rows twice


def test_a_bundle_of_another_model_is_refused(tmp_path: Path) -> None:
    bundles(tmp_path, "llama")
    other = models.load(tmp_path / "model")
    for parameter in other.parameters():
        parameter.data += 0.01
    made = gptq_model(other, decoder_layers(other), TOKENS, GRID)
    (tmp_path / "again").mkdir()
    with pytest.raises(BuildFailed, match="no weight of the model that was calibrated"):
        quantize_bundle(tmp_path / "fp32", tmp_path / "again", bits=4, group=16, symmetric=False, made=made)
    same = models.load(tmp_path / "model")
    made = gptq_model(same, decoder_layers(same), TOKENS, GRID)
    with pytest.raises(ValueError, match="the bundle is made of"):
        quantize_bundle(tmp_path / "fp32", tmp_path / "again", bits=8, group=16, symmetric=False, made=made)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    opened = twins.make(tmp_path / "model", "llama")
    opened.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.down_proj: .*not finite"):
        gptq_model(opened, decoder_layers(opened), TOKENS, GRID)
    for name in ("fp32", "int4"):
        (tmp_path / name).mkdir()
    export(tmp_path / "model", tmp_path / "fp32", threads=1)
    graph = onnx.load(tmp_path / "fp32" / "model.onnx", load_external_data=False).graph
    down = next(t for t in graph.initializer if t.name == "model.layers.1.mlp.down_proj.weight")
    offset = next(int(entry.value) for entry in down.external_data if entry.key == "offset")
    np.memmap(tmp_path / "fp32" / "model.onnx.data", np.float32, "r+", offset, (1,))[0] = np.nan
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.down_proj\.weight: .*not finite"):
        quantize_bundle(tmp_path / "fp32", tmp_path / "int4", bits=4)
