"""The graphs that are written compute what the torch models compute, in every architecture and form."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graph_twins import (
    FAMILIES,
    FORMS,
    LLAMA3_ROPE,
    TwinStore,
    make,
    padded,
    ragged,
    torch_greedy,
    torch_logits,
)
from onnx import numpy_helper

from edgedisp.core.errors import BadInput
from edgedisp.graph.export import export
from edgedisp.graph.session import OnnxModel
from edgedisp.graph.verify import GenaiModel

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
POSITIONS = re.compile("positions|wpe")


def graph_of(bundle: Path) -> onnx.GraphProto:
    return onnx.load(bundle / "model.onnx", load_external_data=False).graph


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_ragged_prefill_and_decoding_equal_torch(form: str, twins: TwinStore) -> None:
    model, bundle = twins.model(form), OnnxModel(twins.fp32(form), 1)
    rows = ragged([70, 5, 33, 1])  # the window of the sliding layers is 16
    for row, ours in zip(rows, bundle(*padded(rows))):
        np.testing.assert_allclose(ours[: len(row)], torch_logits(model, row), **CLOSE)
    rows, starts = ragged([44, 9, 25]), [38, 3, 19]
    _, cache = bundle.decode(*padded([row[:start] for row, start in zip(rows, starts)]))
    references = [torch_logits(model, row) for row in rows]
    for step in range(6):
        prefixes = [row[: start + step + 1] for row, start in zip(rows, starts)]
        tokens = np.array([[row[-1]] for row in prefixes], np.int64)
        logits, cache = bundle.decode(tokens, padded(prefixes)[1], cache)
        for row, ours, reference in zip(prefixes, logits, references):
            np.testing.assert_allclose(ours[0], reference[len(row) - 1], **CLOSE)


@pytest.mark.parametrize("form", [*FAMILIES, "mistral, window"])
def test_greedy_tokens_equal_torch_in_onnxruntime_and_in_genai(form: str, twins: TwinStore) -> None:
    bundle, row = twins.fp32(form), ragged([21], seed=3)[0]
    expected = torch_greedy(twins.model(form), row, 24)
    assert len(set(expected)) > 3  # a twin that repeats one token would prove little
    assert 0 not in expected and 2 not in expected  # the end-of-text ids
    assert OnnxModel(bundle, 1).greedy(row, 24, frozenset()) == expected
    assert GenaiModel(bundle).greedy(row, 24) == expected


@pytest.mark.parametrize("form", ["llama", "gemma3_text", "gpt2", "mistral, window"])
def test_many_prompts_side_by_side_get_the_answer_of_each_alone(form: str, twins: TwinStore) -> None:
    bundle, random = OnnxModel(twins.fp32(form), 1), np.random.default_rng(1)
    for shared in (0, 3, 40):  # a few tokens are read for all prompts at once, many prompt by prompt
        system, lengths = ragged([shared])[0], [*random.integers(1, 12, 6), *random.integers(60, 72, 6)]
        prompts = [system + row for row in ragged([*lengths, 87], seed=shared)]
        alone = [bundle.greedy(prompt, 12, frozenset()) for prompt in prompts]
        assert bundle.greedy_batch(prompts, 12, frozenset()) == alone
        stop = alone[4][5]
        ended = [bundle.greedy(prompt, 12, frozenset({stop})) for prompt in prompts]
        assert len({len(answer) for answer in ended}) > 1
        assert bundle.greedy_batch(prompts, 12, frozenset({stop})) == ended


@pytest.mark.parametrize("form", [*FORMS, "phi", "phi3"])
def test_weight_map_names_the_torch_parameters_of_every_matrix(form: str, twins: TwinStore) -> None:
    model, bundle = twins.model(form), twins.fp32(form)
    weight_map = json.loads((bundle / "weight_map.json").read_text())
    graph = onnx.load(bundle / "model.onnx").graph
    parameters = dict(model.named_parameters())
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for name, entry in weight_map.items():
        expected = torch.cat([parameters[parameter] for parameter in entry["torch"]]).detach()
        expected = expected[entry["rows"]] if "rows" in entry else expected
        expected = expected.T if entry["transposed"] else expected
        np.testing.assert_array_equal(numpy_helper.to_array(stored[name]), expected.numpy(), err_msg=name)
    read = {node.input[1] for node in graph.node if node.op_type in ("MatMul", "FusedMatMul")}
    read |= {node.input[0] for node in graph.node if node.op_type == "Gather" and "input_ids" in node.input}
    assert set(weight_map) == read & set(stored)
    matrices = {name for name, p in parameters.items() if p.ndim == 2 and not POSITIONS.search(name)}
    assert {name for entry in weight_map.values() for name in entry["torch"]} == matrices
    tied = [entry for entry in weight_map.values() if entry.get("tied_head")]
    assert len(tied) == bool(model.config.tie_word_embeddings)


@pytest.mark.parametrize("form", FAMILIES)
def test_a_graph_holds_nothing_twice_and_weights_start_at_pages(form: str, twins: TwinStore) -> None:
    graph, model = graph_of(twins.fp32(form)), twins.model(form)
    operators = [node.op_type for node in graph.node]
    assert operators.count("GroupQueryAttention") == 2 and "Transpose" not in operators
    is_tied = model.config.tie_word_embeddings
    assert operators.count("MatMul") == (8 if is_tied else 9)  # 4 products a layer, and the head
    sizes = {t.name: int(np.prod(t.dims)) for t in graph.initializer if len(t.dims) == 2}
    tables = sum(size for name, size in sizes.items() if name.endswith("_cache") or "position" in name)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and not POSITIONS.search(n)]
    assert sum(sizes.values()) - tables == sum(p.numel() for p in matrices)
    assert {t.name for t in graph.initializer} <= {name for node in graph.node for name in node.input}
    offsets = [int(e.value) for t in graph.initializer for e in t.external_data if e.key == "offset"]
    assert offsets and not any(offset % 4096 for offset in offsets)  # so that a phone can map them


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 48}


@pytest.mark.parametrize(("form", "max_context", "changes", "expected"), [
    ("opt", 32, {}, 32),
    ("gpt_neox", 32, {}, 32),
    ("llama", None, {"rope_parameters": DYNAMIC}, 48),  # its table is right only below that
])  # fmt: skip
def test_the_context_can_be_capped(
    form: str, max_context: int | None, changes: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    model = make(tmp_path / "model", form, **changes)
    (tmp_path / "bundle").mkdir()
    record = export(tmp_path / "model", tmp_path / "bundle", threads=1, max_context=max_context)
    bundle, row = OnnxModel(tmp_path / "bundle", 1), ragged([expected])[0]
    assert record["context"] == bundle.context == expected
    assert record["size_bytes"] == sum(p.stat().st_size for p in (tmp_path / "bundle").glob("model.onnx*"))
    np.testing.assert_allclose(bundle(*padded([row]))[0], torch_logits(model, row), **CLOSE)


@pytest.mark.parametrize(("form", "changes", "message"), [
    ("gemma3_text", {"use_bidirectional_attention": True}, "both directions"),
    ("llama", {"hidden_act": "tanh"}, "activation 'tanh' has no counterpart"),
    ("opt", {"do_layer_norm_before": False}, "norms after each part"),
    ("opt", {"_remove_final_layer_norm": True}, "has no final norm"),
    ("opt", {"word_embed_proj_dim": 32}, "embedding of width 32 for layers of 64"),
    ("llama", {"head_dim": 24}, "heads of 24 dimensions"),
    ("gpt_neox", {"num_attention_heads": 8}, "heads of 8 dimensions"),
    ("granite", {"head_dim": 24}, "heads of 24 dimensions"),
    ("granite", {"rope_parameters": LLAMA3_ROPE}, "rotary positions of type 'llama3'"),
])  # fmt: skip
def test_other_forms_are_refused(form: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    make(tmp_path, form, **changes)
    with pytest.raises(BadInput, match=message):
        export(tmp_path, tmp_path, threads=1)
