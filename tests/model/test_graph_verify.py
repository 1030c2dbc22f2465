"""The check passes what works and names what does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph_twins import TEXTS, TwinStore, ragged
from onnx import helper

from edgedisp.core.errors import BuildFailed
from edgedisp.graph.session import OnnxModel
from edgedisp.graph.verify import check_bundle, relative_difference

PROMPTS = ragged([30, 7, 18])


@pytest.fixture(scope="module")
def bundle(twins: TwinStore) -> Path:
    return twins.fp32("gpt2")  # its positions depend on the mask, too


@pytest.fixture
def copied(bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def change_graph(bundle: Path, change: Callable[[Any], None]) -> None:
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    change(model.graph)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())


def test_a_good_bundle_passes_with_its_facts(bundle: Path) -> None:
    record = check_bundle(OnnxModel(bundle, 1), PROMPTS, texts=TEXTS)
    assert record["opened"] and record["stops"]
    assert record["layers"] == record["attention_fused"] == record["nodes"]["GroupQueryAttention"] == 2
    assert record["difference_limit"] == 1e-3
    assert max(record["padded_difference"], record["cached_difference"]) < 1e-5
    assert record["genai"] == {
        "opened": True,
        "greedy_agrees": "3/3",
        "stops": True,
        "tokenizer_agrees": "4/4",
        "round_trips": "4/4",
    }
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_bundle_passes_with_no_product_left(bits: int, twins: TwinStore) -> None:
    record = check_bundle(OnnxModel(twins.quantized("gpt2", bits, symmetric=bits == 8), 1), PROMPTS)
    assert record["products_unfused"] == 0 and record["nodes"]["MatMulNBits"] == 9
    assert record["difference_limit"] == 0.2


def test_a_cache_that_is_off_by_one_is_found(copied: Path) -> None:
    def forget_one(graph: Any) -> None:
        for node in graph.node:
            if node.output[0] == "cached_tokens":  # positions while decoding, never below 0 in a prefill
                node.input[0] = "one_less"
        less = helper.make_node("Sub", ["cached_or_negative", "index_1"], ["one_less"])
        place = next(i for i, node in enumerate(graph.node) if node.output[0] == "cached_tokens")
        graph.node.insert(place, less)

    change_graph(copied, forget_one)
    with pytest.raises(BuildFailed, match="decoding with the cache and computing in full disagree"):
        check_bundle(OnnxModel(copied, 1), PROMPTS)


def test_padding_that_leaks_into_real_rows_is_found(copied: Path) -> None:
    def mix_positions(graph: Any) -> None:
        for node in graph.node:  # the head gets the mean over all positions of all rows on top
            if node.op_type == "FusedMatMul":
                node.input[0] = "leaked"
        mean = helper.make_node("ReduceMean", ["model.norm"], ["leaked_mean"], keepdims=1)
        graph.node.insert(len(graph.node) - 1, mean)
        add = helper.make_node("Add", ["model.norm", "leaked_mean"], ["leaked"])
        graph.node.insert(len(graph.node) - 1, add)

    change_graph(copied, mix_positions)
    with pytest.raises(BuildFailed, match="a right-padded batch and single rows disagree"):
        check_bundle(OnnxModel(copied, 1), PROMPTS)


def test_attention_that_is_not_fused_fails(copied: Path) -> None:
    def add_caches(graph: Any) -> None:
        caches = ["past_key_values.9.key", "past_key_values.9.value"]
        shape = ["batch_size", 4, "past_sequence_length", 16]
        graph.input.extend(helper.make_tensor_value_info(name, 1, shape) for name in caches)

    change_graph(copied, add_caches)
    with pytest.raises(BuildFailed, match="attention was not fused"):
        check_bundle(OnnxModel(copied, 1), PROMPTS)


def test_a_layout_that_genai_does_not_open_fails_with_its_reason(copied: Path) -> None:
    path = copied / "genai_config.json"
    path.write_text(path.read_text().replace('"type": "decoder"', '"type": "made_up"'))
    with pytest.raises(BuildFailed, match=r"onnxruntime-genai cannot open it: .*made_up"):
        check_bundle(OnnxModel(copied, 1), PROMPTS)


def test_a_tokenizer_that_genai_reads_otherwise_fails(copied: Path) -> None:
    # genai does not know this normalizer's rule and goes on without it.
    rule = {"type": "Replace", "pattern": {"String": "o"}, "content": "0"}
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    (copied / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": rule}))
    with pytest.raises(BuildFailed, match="tokenizer gives other ids"):
        check_bundle(OnnxModel(copied, 1), PROMPTS, texts=TEXTS)


def test_prompts_too_short_or_too_long_to_check_are_refused(bundle: Path) -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        check_bundle(OnnxModel(bundle, 1), [[4]])
    with pytest.raises(ValueError, match="room for 16 tokens in the context of 128"):
        check_bundle(OnnxModel(bundle, 1), ragged([113]))


def test_the_relative_difference_is_the_worst_row_and_blind_to_a_shift() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(3, 50)).astype(np.float32)
    assert relative_difference(reference + 7, reference) < 1e-6
    off = reference.copy()
    noise = rng.normal(size=50)
    noise -= noise.mean()
    centred = reference[1] - reference[1].mean()
    off[1] += noise * 0.25 * np.sqrt((centred**2).mean() / (noise**2).mean())
    assert relative_difference(off, reference) == pytest.approx(0.25, rel=1e-4)
