"""Divergence against scipy, batch by batch, and where it would go wrong in float32."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import rel_entr, softmax

from edgedisp.core.errors import BuildFailed
from edgedisp.evaluate import divergence
from edgedisp.evaluate.divergence import Divergence, compare


def two_models(
    tokens: int = 60, vocab: int = 23, seed: int = 0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    reference = rng.normal(0, 3, (tokens, vocab)).astype(np.float32)
    return reference, (reference + rng.normal(0, 0.5, reference.shape)).astype(np.float32)


def test_kl_equals_scipys_relative_entropy() -> None:
    reference, logits = two_models()
    kl = rel_entr(softmax(reference.astype(np.float64), -1), softmax(logits.astype(np.float64), -1)).sum(-1)
    record = compare(reference, logits)
    assert record["tokens"] == 60
    assert record["mean_kl"] == pytest.approx(kl.mean(), rel=1e-12)
    assert record["median_kl"] == pytest.approx(np.median(kl), rel=1e-12)
    assert record["p90_kl"] == pytest.approx(np.quantile(kl, 0.9), rel=1e-12)
    assert record["p99_kl"] == pytest.approx(np.quantile(kl, 0.99), rel=1e-12)
    assert record["max_kl"] == pytest.approx(kl.max(), rel=1e-12)
    assert record["max_abs_difference"] == pytest.approx(
        np.abs(reference.astype(float) - logits).max(), rel=1e-12
    )


def test_agreement_equals_a_plain_count() -> None:
    reference, logits = two_models()
    record = compare(reference, logits)
    tops = [[set(np.argsort(row)[-5:]) for row in part] for part in (reference, logits)]
    assert record["top1_agreement"] == np.mean(reference.argmax(-1) == logits.argmax(-1))
    assert 0 < record["top1_agreement"] < 1
    assert record["top5_overlap"] == pytest.approx(np.mean([len(a & b) / 5 for a, b in zip(*tops)]))


def test_a_model_does_not_diverge_from_itself() -> None:
    reference, _ = two_models()
    record = compare(reference, reference)
    assert (record["max_abs_difference"], record["max_kl"]) == (0.0, 0.0)
    assert (record["top1_agreement"], record["top5_overlap"]) == (1.0, 1.0)


def test_batches_and_chunks_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, logits = two_models()
    whole = compare(reference, logits)
    monkeypatch.setattr(divergence, "_CELLS", 7 * 23)
    parts = Divergence()
    for start in range(0, 60, 25):
        parts.add(reference[start : start + 25], logits[start : start + 25])
    assert parts.record() == pytest.approx(whole)


def test_padding_is_not_counted() -> None:
    reference, logits = two_models()
    mask = np.ones((4, 15), dtype=np.int64)
    mask[1, 9:] = mask[3, 2:] = 0
    spoiled = logits.reshape(4, 15, 23).copy()
    spoiled[mask == 0] = np.nan
    kept = mask.reshape(-1).astype(bool)
    assert compare(reference.reshape(4, 15, 23), spoiled, mask) == compare(reference[kept], logits[kept])


def test_sure_and_wrong_is_large_but_finite() -> None:
    reference, logits = np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32)
    reference[0, 0] = logits[0, 1] = 2000.0
    assert compare(reference, logits)["max_kl"] == pytest.approx(2000.0)


def test_a_shift_of_all_logits_changes_the_logits_but_no_probability() -> None:
    reference, _ = two_models()
    record = compare(reference.astype(np.float64), reference.astype(np.float64) + 5)
    assert record["max_abs_difference"] == pytest.approx(5.0)
    assert record["max_kl"] < 1e-12


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_fail_the_build_and_name_the_model(value: float) -> None:
    reference, logits = two_models()
    logits[3, 4] = value
    with pytest.raises(BuildFailed, match="the other model"):
        compare(reference, logits)
    with pytest.raises(BuildFailed, match="the reference model"):
        compare(logits, reference)


def test_unlike_shapes_are_refused() -> None:
    reference, logits = two_models()
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(reference, logits[:, :-1])
    with pytest.raises(ValueError, match="does not fit"):
        compare(reference, logits, np.ones(59, dtype=np.int64))


def test_nothing_added_gives_no_number() -> None:
    assert Divergence().record() == {"tokens": 0} | dict.fromkeys(
        (
            "max_abs_difference",
            "mean_kl",
            "median_kl",
            "p90_kl",
            "p99_kl",
            "max_kl",
            "top1_agreement",
            "top5_overlap",
        )
    )


def test_fewer_than_five_entries_overlap_fully() -> None:
    assert compare(np.array([[1.0, 2.0, 3.0]]), np.array([[3.0, 2.0, 1.0]]))["top5_overlap"] == 1.0


def test_positions_and_blocks_are_those_of_the_batches() -> None:
    reference, logits = two_models(tokens=48)
    kl = rel_entr(softmax(reference.astype(np.float64), -1), softmax(logits.astype(np.float64), -1)).sum(-1)
    found = Divergence()
    found.add(reference[:16].reshape(2, 8, -1), logits[:16].reshape(2, 8, -1))
    found.add(reference[16:24][None], logits[16:24][None])
    found.add(reference[24:].reshape(3, 8, -1), logits[24:].reshape(3, 8, -1))
    by_block = kl.reshape(6, 8)
    told = [(one["start"], one["end"], one["tokens"]) for one in found.by_position()]
    assert told == [(0, 1, 6), (1, 2, 6), (2, 4, 12), (4, 8, 24)]
    for one in found.by_position():
        assert one["mean_kl"] == pytest.approx(by_block[:, one["start"] : one["end"]].mean(), rel=1e-12)
    worst = found.worst()
    order = np.argsort(-kl)[:10]
    assert [(one["block"], one["position"]) for one in worst] == [(k // 8, k % 8) for k in order.tolist()]
    for one, k in zip(worst, order):
        assert one["kl"] == pytest.approx(kl[k], rel=1e-12)
        assert (one["reference_token"], one["other_token"]) == (reference[k].argmax(), logits[k].argmax())
        assert one["reference_probability"] == pytest.approx(softmax(reference[k].astype(float)).max())
        assert one["other_probability"] == pytest.approx(softmax(logits[k].astype(float)).max())


def test_padding_has_no_position() -> None:
    reference, logits = two_models(tokens=12)
    mask = np.array([[1] * 6, [1, 1, 1, 0, 0, 0]])
    found = Divergence()
    found.add(reference.reshape(2, 6, -1), logits.reshape(2, 6, -1), mask)
    assert sum(one["tokens"] for one in found.by_position()) == 9
    assert all(one["block"] == 0 or one["position"] < 3 for one in found.worst())


def test_nothing_added_has_no_positions() -> None:
    assert Divergence().by_position() == Divergence().worst() == []
