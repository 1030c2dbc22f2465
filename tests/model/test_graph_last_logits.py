"""The head for the last token alone gives the logits that the whole graph gives there."""

from __future__ import annotations

import shutil
from pathlib import Path

import graph_twins as twins
import numpy as np
import onnx_ir as ir
import pytest

from edgedisp.core.errors import BadInput
from edgedisp.graph import builder_fallback
from edgedisp.graph.device_graph import keep_last
from edgedisp.graph.export import export
from edgedisp.graph.session import OnnxModel
from edgedisp.graph.verify import GenaiModel
from edgedisp.quantize.rewrite import quantize_bundle


def with_last_logits(bundle: Path, out: Path) -> Path:
    shutil.copytree(bundle, out)
    model = ir.load(out / "model.onnx")
    keep_last(model)
    ir.save(model, out / "model.onnx")
    return out


def check_same_last_logits(whole: Path, last: Path) -> None:
    """Right-padded prefill of rows of unequal length, then two tokens decoded."""
    rows, started = twins.ragged([20, 3, 11]), [18, 1, 9]
    batch = twins.padded([row[:start] for row, start in zip(rows, started)])
    (all_logits, cache), (ours, own_cache) = (OnnxModel(b, 1).prefill(*batch) for b in (whole, last))
    assert ours.shape[:2] == (3, 1)
    for row, start in enumerate(started):
        np.testing.assert_allclose(ours[row, 0], all_logits[row, start - 1], atol=1e-5, rtol=1e-5)
    for step in range(2):
        seen = [row[: start + step + 1] for row, start in zip(rows, started)]
        tokens = np.array([[row[-1]] for row in seen], np.int64)
        mask = twins.padded(seen)[1]
        expected, cache = OnnxModel(whole, 1).decode(tokens, mask, cache)
        found, own_cache = OnnxModel(last, 1).decode(tokens, mask, own_cache)
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-5)


BENT = "gemma3_text, capped logits, biases, long rope"  # something stands between the head and the logits


@pytest.mark.parametrize("form", [*twins.FAMILIES, "llama, untied, biases, wide heads", BENT])
def test_the_last_tokens_logits_are_those_of_the_whole_graph(tmp_path: Path, form: str) -> None:
    twins.make(tmp_path / "model", form)
    (tmp_path / "whole").mkdir()
    export(tmp_path / "model", tmp_path / "whole", threads=1)
    last = with_last_logits(tmp_path / "whole", tmp_path / "last")
    check_same_last_logits(tmp_path / "whole", last)
    row = twins.ragged([15], seed=3)[0]
    expected = OnnxModel(tmp_path / "whole", 1).greedy(row, 12, frozenset())
    assert OnnxModel(last, 1).greedy(row, 12, frozenset()) == expected
    assert GenaiModel(last).greedy(row, 12) == expected


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_bundles_keep_theirs_too(tmp_path: Path, bits: int) -> None:
    twins.make(tmp_path / "model", "llama")
    for name in ("fp32", "whole"):
        (tmp_path / name).mkdir()
    export(tmp_path / "model", tmp_path / "fp32", threads=1)
    quantize_bundle(tmp_path / "fp32", tmp_path / "whole", bits=bits, accuracy_level=0)
    check_same_last_logits(tmp_path / "whole", with_last_logits(tmp_path / "whole", tmp_path / "last"))


def test_the_genai_builders_graph_keeps_its_too(tmp_path: Path) -> None:
    twins.make(tmp_path / "model", "llama")
    builder_fallback.build(tmp_path / "model", tmp_path / "whole", architecture="llama", threads=1)
    check_same_last_logits(tmp_path / "whole", with_last_logits(tmp_path / "whole", tmp_path / "last"))


def test_it_is_done_once_and_needs_a_head(tmp_path: Path) -> None:
    twins.make(tmp_path / "model", "llama")
    (tmp_path / "whole").mkdir()
    export(tmp_path / "model", tmp_path / "whole", threads=1)
    model = ir.load(tmp_path / "whole" / "model.onnx")
    keep_last(model)
    with pytest.raises(BadInput, match="already"):
        keep_last(model)
    model.graph.outputs.clear()
    with pytest.raises(BadInput, match="no logits"):
        keep_last(model)
