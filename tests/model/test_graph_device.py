"""A bundle for a device computes within its context what it computed before, for the last token alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_twins import CONTEXT, FAMILIES, UNTIED, TwinStore, padded, ragged

from edgedisp.core.errors import BadInput
from edgedisp.graph import genai_config
from edgedisp.graph.device_graph import keep_last, position_tables
from edgedisp.graph.onnx_graph import to_bytes
from edgedisp.graph.runtime_layouts import for_device
from edgedisp.graph.session import OnnxModel
from edgedisp.graph.verify import GenaiModel

SHORT = 48
STAY_BEHIND = ("record.json", "manifest.json", "README.md", "weight_map.json")


def on_device(bundle: Path, out: Path, context: int) -> Path:
    out.mkdir()
    for_device(bundle, out, threads=3, context=context, last_logits=False)
    return out


@pytest.mark.parametrize("family", [*FAMILIES, "builder"])
def test_within_a_shorter_context_no_logit_changes_and_only_tables_are_cut(
    family: str, twins: TwinStore, bundles: Mapping[str, Path], tmp_path: Path
) -> None:
    bundle = bundles["int4"] if family == "builder" else twins.quantized(family)
    short = on_device(bundle, tmp_path / "short", SHORT)
    before, after = OnnxModel(bundle, 1), OnnxModel(short, 1)
    row = [token % before.vocab_size for token in ragged([SHORT])[0]]
    ids = np.array([row], np.int64)
    np.testing.assert_array_equal(after(ids, np.ones_like(ids)), before(ids, np.ones_like(ids)))
    assert after.greedy(row[:4], SHORT, frozenset()) == before.greedy(row[:4], SHORT - 4, frozenset())
    names = position_tables(ir.load(bundle / "model.onnx").graph)
    assert len(names) == {"gpt2": 1, "opt": 1, "gemma3_text": 4}.get(family, 2)
    shapes, cut = (
        {
            t.name: tuple(t.dims)
            for t in onnx.load(path / "model.onnx", load_external_data=False).graph.initializer
        }
        for path in (bundle, short)
    )
    context = genai_config.context_length(bundle)
    assert {shapes[name][0] for name in names} == {context} and context > SHORT
    assert cut == shapes | {name: (SHORT, shapes[name][1]) for name in names}
    config = json.loads((short / "genai_config.json").read_text())
    assert config["model"]["context_length"] == config["search"]["max_length"] == SHORT
    assert config["model"]["decoder"]["session_options"]["intra_op_num_threads"] == 3


def test_a_longer_context_leaves_the_weights_as_they_are(twins: TwinStore, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(twins.quantized("llama"), source)
    out.mkdir()
    for name in STAY_BEHIND:
        (source / name).write_text("{}")
    record = for_device(source, out, threads=1, context=10**6)
    assert record["context"] == genai_config.context_length(out) == CONTEXT
    assert (out / "model.onnx.data").read_bytes() == (source / "model.onnx.data").read_bytes()
    assert OnnxModel(out, 1).last_only
    assert {path.name for path in source.iterdir()} == {path.name for path in out.iterdir()} | {*STAY_BEHIND}


def test_what_cannot_be_is_refused(twins: TwinStore, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="context is 0"):
        for_device(twins.quantized("llama"), tmp_path / "out", threads=1, context=0)
    with pytest.raises(BadInput, match="no bundle"):
        for_device(tmp_path, tmp_path / "out", threads=1, context=8)
    model = ir.load(twins.fp32("llama") / "model.onnx")
    keep_last(model.graph)
    with pytest.raises(BadInput, match="already"):
        keep_last(model.graph)


def with_last_logits(bundle: Path, out: Path) -> Path:
    """A copy of the bundle with the last token's logits alone, compared with the bundle: a right-padded
    prefill of rows of unequal length, then two tokens decoded."""
    shutil.copytree(bundle, out)
    model = ir.load(out / "model.onnx")
    keep_last(model.graph)
    (out / "model.onnx").write_bytes(to_bytes(model))
    whole, last = OnnxModel(bundle, 1), OnnxModel(out, 1)
    rows, starts = ragged([20, 3, 11]), [18, 1, 9]
    batch = padded([row[:start] for row, start in zip(rows, starts)])
    (all_logits, cache), (logits, last_cache) = whole.decode(*batch), last.decode(*batch)
    expected = np.stack([all_logits[row, start - 1] for row, start in enumerate(starts)])
    np.testing.assert_allclose(logits, expected[:, None], atol=1e-5, rtol=1e-5)
    for step in (1, 2):
        prefixes = [row[: start + step] for row, start in zip(rows, starts)]
        tokens, mask = np.array([[row[-1]] for row in prefixes], np.int64), padded(prefixes)[1]
        expected, cache = whole.decode(tokens, mask, cache)
        logits, last_cache = last.decode(tokens, mask, last_cache)
        np.testing.assert_allclose(logits, expected, atol=1e-5, rtol=1e-5)
    return out


CAPPED = "gemma3_text, capped logits, biases, long rope"  # something stands between the head and the logits


@pytest.mark.parametrize("form", ["llama", "gpt2", "gpt_neox", "granite", UNTIED, CAPPED])
def test_the_last_logits_are_those_of_the_whole_graph(form: str, twins: TwinStore, tmp_path: Path) -> None:
    with_last_logits(twins.quantized(form, 8, accuracy_level=0), tmp_path / "quantized")
    last = with_last_logits(twins.fp32(form), tmp_path / "last")
    row = ragged([15], seed=3)[0]
    expected = OnnxModel(twins.fp32(form), 1).greedy(row, 12, frozenset())
    assert OnnxModel(last, 1).greedy(row, 12, frozenset()) == expected
    assert GenaiModel(last).greedy(row, 12) == expected
