"""Divergence against scipy, block by block, and where it would go wrong in float32."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import rel_entr, softmax

from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import silent
from edgedisp.core.results import Divergence
from edgedisp.evaluate import loglikelihood
from edgedisp.evaluate.loglikelihood import compare_logits


def two_models(tokens: int = 60, vocab: int = 23) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    reference = rng.normal(0, 3, (tokens, vocab)).astype(np.float32)
    return reference, (reference + rng.normal(0, 0.5, reference.shape)).astype(np.float32)


def compare(reference: NDArray[Any], logits: NDArray[Any], blocks: int = 1) -> Divergence:
    """Two models that give these logits [tokens, vocab]: position i of the text is token i."""
    models = [lambda ids, mask, table=table: table[ids] for table in (reference, logits)]
    text = np.arange(len(logits)).reshape(blocks, -1)
    return compare_logits({"other": models[0]}, models[1], text, silent)["other"]


def test_kl_and_agreement_equal_scipys_entropy_and_a_plain_count() -> None:
    reference, logits = two_models()
    kl = rel_entr(softmax(reference.astype(np.float64), -1), softmax(logits.astype(np.float64), -1)).sum(-1)
    tops = [[set(np.argsort(row)[-5:]) for row in part] for part in (reference, logits)]
    result = compare(reference, logits)
    names = ("mean_kl", "median_kl", "p90_kl", "p99_kl", "max_kl")
    expected = [kl.mean(), *np.quantile(kl, [0.5, 0.9, 0.99, 1.0])]
    assert [getattr(result, name) for name in names] == pytest.approx(expected, rel=1e-12)
    assert result.tokens == 60
    assert result.top1_agreement == np.mean(reference.argmax(-1) == logits.argmax(-1)) < 1
    assert result.top5_overlap == pytest.approx(np.mean([len(a & b) / 5 for a, b in zip(*tops)]))
    assert result.max_abs_difference == np.abs(reference.astype(float) - logits).max()


def test_blocks_and_chunks_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare(*two_models())
    monkeypatch.setattr(loglikelihood, "_CELLS", 7 * 23)
    assert compare(*two_models(), blocks=3) == whole


def test_sure_and_wrong_is_finite_equal_models_do_not_diverge_and_shifts_do_not_count() -> None:
    reference, logits = np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32)
    reference[0, 0] = logits[0, 1] = 2000.0
    assert compare(reference, logits).max_kl == pytest.approx(2000.0)
    reference, _ = two_models()
    assert compare(reference, reference).max_kl == 0.0
    wide = reference.astype(np.float64)
    assert compare(wide, wide + 5).max_kl < 1e-12
    assert compare(np.array([[1.0, 2.0, 3.0]]), np.array([[3.0, 2.0, 1.0]])).top5_overlap == 1.0


def test_logits_that_are_not_finite_fail_the_build() -> None:
    reference, logits = two_models()
    logits[3, 4] = math.inf
    with pytest.raises(BuildFailed, match="not finite"):
        compare(reference, logits)
