"""A bundle for a device computes within its context what it computed before, for the last token alone."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_twins import CONTEXT, FAMILIES, TwinStore, padded, ragged
from shared_store import SharedStore
from tiny_bundle import tiny_bundles

from edgedisp.core.errors import BadInput
from edgedisp.graph import genai_config
from edgedisp.graph.device_graph import for_device, keep_last, position_tables
from edgedisp.graph.session import OnnxModel
from edgedisp.graph.verify import GenaiModel

SHORT = 48
Bundles = Callable[[str], Path]


@pytest.fixture(scope="module")
def bundles(twins: TwinStore, store: SharedStore) -> Bundles:
    """Family -> int4 bundle of its twin, for all of its 128 positions; `builder`: onnxruntime-genai's."""

    def bundle(family: str) -> Path:
        if family == "builder":
            return tiny_bundles(store)["int4"]
        return twins.quantized(family)

    return bundle


def on_device(bundle: Path, out: Path, context: int) -> Path:
    out.mkdir()
    for_device(bundle, out, threads=3, context=context, last_logits=False)
    return out


@pytest.mark.parametrize("family", [*FAMILIES, "builder"])
def test_within_the_shorter_context_no_logit_changes(family: str, bundles: Bundles, tmp_path: Path) -> None:
    own, short = bundles(family), on_device(bundles(family), tmp_path / "short", SHORT)
    before, after = OnnxModel(own, 1), OnnxModel(short, 1)
    row = [token % before.vocab_size for token in ragged([SHORT])[0]]
    ids = np.array([row], np.int64)
    ones = np.ones_like(ids)
    np.testing.assert_array_equal(after(ids, ones), before(ids, ones))
    assert after.greedy(row[:4], SHORT, frozenset()) == before.greedy(row[:4], SHORT - 4, frozenset())


@pytest.mark.parametrize("family", [*FAMILIES, "builder"])
def test_tables_keep_one_row_for_each_position_and_nothing_else_goes(
    family: str, bundles: Bundles, tmp_path: Path
) -> None:
    own, short = bundles(family), on_device(bundles(family), tmp_path / "short", SHORT)
    graphs = [onnx.load(one / "model.onnx", load_external_data=False).graph for one in (own, short)]
    names = position_tables(ir.load(own / "model.onnx").graph)
    assert len(names) == {"gpt2": 1, "opt": 1, "gemma3_text": 4}.get(family, 2)
    rows = [{t.name: t.dims[0] for t in graph.initializer if t.name in names} for graph in graphs]
    assert set(rows[1].values()) == {SHORT}
    assert set(rows[0].values()) == {genai_config.context_length(own)}
    values = [sum(math.prod(t.dims) for t in graph.initializer) for graph in graphs]
    columns = {t.name: t.dims[1] for t in graphs[0].initializer if t.name in names}
    assert values[0] - values[1] == sum(columns[name] * (rows[0][name] - SHORT) for name in names) > 0
    config = json.loads((short / "genai_config.json").read_text())
    assert config["model"]["context_length"] == config["search"]["max_length"] == SHORT
    assert config["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 3


def test_a_longer_context_than_the_bundles_leaves_the_weights_as_they_are(
    bundles: Bundles, tmp_path: Path
) -> None:
    record = for_device(bundles("llama"), tmp_path, threads=1, context=10**6)
    assert record["context"] == genai_config.context_length(tmp_path) == CONTEXT
    assert (tmp_path / "model.onnx.data").read_bytes() == (bundles("llama") / "model.onnx.data").read_bytes()
    assert OnnxModel(tmp_path, 1).last_only


def test_records_and_cards_of_the_source_stay_behind(bundles: Bundles, tmp_path: Path) -> None:
    source = on_device(bundles("llama"), tmp_path / "source", SHORT)
    for name in ("record.json", "manifest.json", "README.md", "weight_map.json"):
        (source / name).write_text("{}")
    out = on_device(source, tmp_path / "out", SHORT)
    assert {path.name for path in source.iterdir()} - {path.name for path in out.iterdir()} == {
        "record.json", "manifest.json", "README.md", "weight_map.json",
    }  # fmt: skip


def test_what_cannot_be_is_refused(bundles: Bundles, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="context is 0"):
        for_device(bundles("llama"), tmp_path / "out", threads=1, context=0)
    with pytest.raises(BadInput, match="no bundle"):
        for_device(tmp_path, tmp_path / "out", threads=1, context=8)
    source = on_device(bundles("llama"), tmp_path / "source", CONTEXT)
    model = onnx.load(source / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere.data"
    (source / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadInput, match="points outside the bundle"):
        for_device(source, tmp_path / "out", threads=1, context=8)


def with_last_logits(bundle: Path, out: Path) -> Path:
    shutil.copytree(bundle, out)
    model = ir.load(out / "model.onnx")
    keep_last(model)
    ir.save(model, out / "model.onnx")
    return out


def check_same_last_logits(whole: Path, last: Path) -> None:
    """Right-padded prefill of rows of unequal length, then two tokens decoded."""
    rows, started = ragged([20, 3, 11]), [18, 1, 9]
    batch = padded([row[:start] for row, start in zip(rows, started)])
    (all_logits, cache), (ours, own_cache) = (OnnxModel(b, 1).prefill(*batch) for b in (whole, last))
    assert ours.shape[:2] == (3, 1)
    for row, start in enumerate(started):
        np.testing.assert_allclose(ours[row, 0], all_logits[row, start - 1], atol=1e-5, rtol=1e-5)
    for step in range(2):
        seen = [row[: start + step + 1] for row, start in zip(rows, started)]
        tokens = np.array([[row[-1]] for row in seen], np.int64)
        mask = padded(seen)[1]
        expected, cache = OnnxModel(whole, 1).decode(tokens, mask, cache)
        found, own_cache = OnnxModel(last, 1).decode(tokens, mask, own_cache)
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


CAPPED = "gemma3_text, capped logits, biases, long rope"  # something stands between the head and the logits


@pytest.mark.parametrize("form", [*FAMILIES, "granite", "llama, untied, biases, wide heads", CAPPED])
def test_the_last_tokens_logits_are_those_of_the_whole_graph(
    form: str, twins: TwinStore, tmp_path: Path
) -> None:
    quantized = twins.quantized(form, 8, accuracy_level=0)
    check_same_last_logits(quantized, with_last_logits(quantized, tmp_path / "quantized"))
    whole = twins.fp32(form)
    last = with_last_logits(whole, tmp_path / "last")
    check_same_last_logits(whole, last)
    row = ragged([15], seed=3)[0]
    expected = OnnxModel(whole, 1).greedy(row, 12, frozenset())
    assert OnnxModel(last, 1).greedy(row, 12, frozenset()) == expected
    assert GenaiModel(last).greedy(row, 12) == expected


def test_it_is_done_once_and_needs_a_head(twins: TwinStore) -> None:
    model = ir.load(twins.fp32("llama") / "model.onnx")
    keep_last(model)
    with pytest.raises(BadInput, match="already"):
        keep_last(model)
    model.graph.outputs.clear()
    with pytest.raises(BadInput, match="no logits"):
        keep_last(model)
