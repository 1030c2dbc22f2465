"""The graphs that are written compute what the torch models compute, in every family and form."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from edgedisp.core.errors import BadInput
from edgedisp.graph.architectures import READERS
from edgedisp.graph.export import export
from edgedisp.graph.session import OnnxModel
from edgedisp.graph.verify import GenaiModel

Exported = tuple[Any, Path, dict[str, Any]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """form -> (torch model, bundle, record), each made once."""
    made: dict[str, Exported] = {}

    def get(form: str) -> Exported:
        if form not in made:
            root = tmp_path_factory.mktemp("twin")
            model = twins.make(root / "model", form)
            (root / "bundle").mkdir()
            made[form] = (model, root / "bundle", export(root / "model", root / "bundle", threads=1))
        return made[form]

    return get


@pytest.mark.parametrize("form", twins.FORMS)
def test_logits_of_a_ragged_batch_equal_torch(form: str, exported: Callable[[str], Exported]) -> None:
    model, bundle, _ = exported(form)
    rows = twins.ragged([70, 5, 33, 1])  # the window of the sliding layers is 16
    logits = OnnxModel(bundle, 1)(*twins.padded(rows))
    for row, ours in zip(rows, logits):
        np.testing.assert_allclose(ours[: len(row)], twins.torch_logits(model, row), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", twins.FORMS)
def test_decoding_with_a_ragged_cache_equals_torch(form: str, exported: Callable[[str], Exported]) -> None:
    model, bundle, _ = exported(form)
    rows, started = twins.ragged([44, 9, 25]), [38, 3, 19]
    opened = OnnxModel(bundle, 1)
    _, cache = opened.prefill(*twins.padded([row[:start] for row, start in zip(rows, started)]))
    references = [twins.torch_logits(model, row) for row in rows]
    for step in range(6):
        seen = [row[: start + step + 1] for row, start in zip(rows, started)]
        tokens = np.array([[row[-1]] for row in seen], np.int64)
        logits, cache = opened.decode(tokens, twins.padded(seen)[1], cache)
        for row, ours, reference in zip(seen, logits, references):
            np.testing.assert_allclose(ours[0], reference[len(row) - 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", [*twins.FAMILIES, "mistral, window", "qwen2, window in one layer"])
def test_greedy_tokens_equal_torch_in_onnxruntime_and_in_genai(
    form: str, exported: Callable[[str], Exported]
) -> None:
    model, bundle, _ = exported(form)
    row = twins.ragged([21], seed=3)[0]
    expected = twins.torch_greedy(model, row, 24)
    assert len(set(expected)) > 3  # a twin that repeats one token would prove little
    assert 0 not in expected and 2 not in expected  # the end-of-text ids
    assert OnnxModel(bundle, 1).greedy(row, 24, frozenset()) == expected
    assert GenaiModel(bundle).greedy(row, 24) == expected


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_genai_builders_graph_gives_the_same_logits(
    family: str, exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    from edgedisp.graph import builder_fallback

    _, bundle, _ = exported(family)
    builder_fallback.build(bundle.parent / "model", tmp_path, architecture=family, threads=1)
    batch = twins.padded(twins.ragged([40, 13]))
    real = batch[1].astype(bool)
    ours, theirs = OnnxModel(bundle, 1)(*batch), OnnxModel(tmp_path, 1)(*batch)
    np.testing.assert_allclose(ours[real], theirs[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", twins.FORMS)
def test_attention_is_fused_and_nothing_is_turned_at_run_time(
    form: str, exported: Callable[[str], Exported]
) -> None:
    model, _, record = exported(form)
    nodes, is_tied = record["nodes"], model.config.tie_word_embeddings
    assert nodes["GroupQueryAttention"] == 2
    assert "Transpose" not in nodes
    assert nodes["MatMul"] == (8 if is_tied else 9)  # 4 products a layer, and the head


def test_a_tied_embedding_is_stored_once(exported: Callable[[str], Exported]) -> None:
    model, bundle, record = exported("llama")
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    sizes = {t.name: int(np.prod(t.dims)) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    tables = sum(size for name, size in sizes.items() if name.endswith("_cache"))
    assert sum(sizes.values()) - tables == sum(p.numel() for p in model.parameters())
    read = {name for node in graph.node for name in node.input}
    assert {t.name for t in graph.initializer} <= read
    assert record["size_bytes"] == sum((bundle / f"model.onnx{end}").stat().st_size for end in ("", ".data"))


def test_large_tensors_start_at_a_page_so_that_they_can_be_mapped(
    exported: Callable[[str], Exported],
) -> None:
    graph = onnx.load(exported("gpt2")[1] / "model.onnx", load_external_data=False).graph
    offsets = [int(e.value) for t in graph.initializer for e in t.external_data if e.key == "offset"]
    assert offsets and not any(offset % 4096 for offset in offsets)


def test_the_interface_is_the_genai_builders_with_a_static_head_dimension(
    exported: Callable[[str], Exported],
) -> None:
    graph = onnx.load(exported("qwen3")[1] / "model.onnx", load_external_data=False).graph

    def shapes(values: Any) -> dict[str, list[Any]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    past = ["batch_size", 2, "past_sequence_length", 32]
    assert shapes(graph.input) == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        **{f"past_key_values.{i}.{part}": past for i in range(2) for part in ("key", "value")},
    }
    present = ["batch_size", 2, "total_sequence_length", 32]
    assert shapes(graph.output) == {
        "logits": ["batch_size", "sequence_length", twins.VOCABULARY],
        **{f"present.{i}.{part}": present for i in range(2) for part in ("key", "value")},
    }


@pytest.mark.parametrize("form", ["llama", "gpt2", "opt", "gpt_neox"])
def test_the_context_can_be_capped(form: str, tmp_path: Path) -> None:
    model = twins.make(tmp_path / "model", form)
    (tmp_path / "bundle").mkdir()
    record = export(tmp_path / "model", tmp_path / "bundle", threads=1, max_context=32)
    opened = OnnxModel(tmp_path / "bundle", 1)
    assert record["context"] == opened.context == 32
    row = twins.ragged([32])[0]
    ours = opened(*twins.padded([row]))[0]
    np.testing.assert_allclose(ours, twins.torch_logits(model, row), atol=1e-4, rtol=1e-4)


def test_dynamic_rope_keeps_to_the_positions_its_table_is_right_for(tmp_path: Path) -> None:
    rope = {
        "rope_type": "dynamic",
        "factor": 4.0,
        "rope_theta": 100.0,
        "original_max_position_embeddings": 48,
    }
    model = twins.make(tmp_path / "model", "llama", rope_parameters=rope, max_position_embeddings=128)
    (tmp_path / "bundle").mkdir()
    assert export(tmp_path / "model", tmp_path / "bundle", threads=1)["context"] == 48
    row = twins.ragged([48])[0]
    ours = OnnxModel(tmp_path / "bundle", 1)(*twins.padded([row]))[0]
    np.testing.assert_allclose(ours, twins.torch_logits(model, row), atol=1e-4, rtol=1e-4)


def test_an_unknown_family_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    with pytest.raises(BadInput, match="'bloom' cannot be exported") as error:
        export(tmp_path, tmp_path, threads=1)
    assert all(family in str(error.value) for family in [*READERS, "granite"])


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"config\.json is missing"):
        export(tmp_path, tmp_path, threads=1)


def test_a_checkpoint_with_a_missing_weight_is_refused(tmp_path: Path) -> None:
    twins.make(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        BadInput, match=r"1 weights are not in the files: model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        export(tmp_path, tmp_path, threads=1)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    twins.make(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"there is no model\.safetensors"):
        export(tmp_path, tmp_path, threads=1)


@pytest.mark.parametrize("family", ["llama", "granite"])  # granite goes through the genai builder
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float, family: str, tmp_path: Path) -> None:
    model = twins.make(tmp_path / "model", family)
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = value
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "bundle").mkdir()
    with pytest.raises(BadInput, match=r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 values"):
        export(tmp_path / "model", tmp_path / "bundle", threads=1)
    assert not any((tmp_path / "bundle").iterdir())


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "both directions"),
        ("llama", {"hidden_act": "tanh"}, "activation 'tanh' has no counterpart"),
        ("opt", {"do_layer_norm_before": False}, "norms after each part"),
        ("opt", {"_remove_final_layer_norm": True}, "has no final norm"),
        ("opt", {"word_embed_proj_dim": 32}, "embedding of width 32 for layers of 64"),
        ("llama", {"head_dim": 24}, "heads of 24 dimensions"),
        ("gpt_neox", {"num_attention_heads": 8}, "heads of 8 dimensions"),
    ],
)
def test_forms_that_are_not_written_are_refused(
    form: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    twins.make(tmp_path / "model", form, **changes)
    with pytest.raises(BadInput, match=message):
        export(tmp_path / "model", tmp_path, threads=1)
