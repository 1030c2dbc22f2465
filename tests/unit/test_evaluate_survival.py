"""Differences of differences against direct formulas, and the words for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgedisp.evaluate.result import TaskResult, task_result
from edgedisp.evaluate.statistics import ACCURACY, BITS_PER_BYTE, PERPLEXITY, paired
from edgedisp.evaluate.survival import is_measured_by, loss_survival, verdict

DOCUMENTS, WINDOWS = 40, 3


def result(losses: np.ndarray, tokens: np.ndarray) -> TaskResult:
    """losses: nats per token, [documents, windows]."""
    items: list[dict[str, Any]] = [
        {
            "id": f"{d}#{w}",
            "document": f"d{d}",
            "nll": float(losses[d, w] * tokens[d, w]),
            "tokens": int(tokens[d, w]),
            "bytes": 4 * int(tokens[d, w]),
        }
        for d in range(losses.shape[0])
        for w in range(losses.shape[1])
    ]
    marks = [str(item["id"]) for item in items]
    return task_result("loss", items, (PERPLEXITY, BITS_PER_BYTE), fingerprints=marks, bootstrap=50)


def four(
    full: float, quantized: float, *, noise: float = 0.002, seed: int = 0, shared: float = 0.0
) -> tuple[tuple[TaskResult, ...], np.ndarray, np.ndarray]:
    """Four results with these mean differences; `shared` is the spread of what both differences have in
    common. Also the losses [4, documents, windows] and the tokens."""
    rng = np.random.default_rng(seed)
    size = (DOCUMENTS, WINDOWS)
    hard, cost = 3 + rng.normal(size=size), 0.2 + 0.05 * rng.normal(size=size)
    common = shared * rng.normal(size=(DOCUMENTS, 1))
    tokens = rng.integers(20, 200, size)
    losses = np.stack(
        [
            hard,
            hard + full + common + noise * rng.normal(size=size),
            hard + cost,
            hard + cost + quantized + common + noise * rng.normal(size=size),
        ]
    )
    return tuple(result(one, tokens) for one in losses), losses, tokens


def test_the_differences_are_the_direct_formula() -> None:
    results, losses, tokens = four(-0.03, -0.02)
    found = loss_survival([results])  # type: ignore[list-item]
    means = (losses * tokens).sum(axis=(1, 2)) / tokens.sum()
    assert found["full"]["difference"] == pytest.approx(means[1] - means[0])
    assert found["quantized"]["difference"] == pytest.approx(means[3] - means[2])
    assert found["change"]["difference"] == pytest.approx((means[3] - means[2]) - (means[1] - means[0]))
    assert found["kept"]["value"] == pytest.approx((means[3] - means[2]) / (means[1] - means[0]))
    assert found["n"] == DOCUMENTS * WINDOWS and found["documents"] == DOCUMENTS


def test_correlation_and_slope_are_those_of_documents_weighted_by_tokens() -> None:
    results, losses, tokens = four(0.0, 0.0, shared=0.01)
    found = loss_survival([results])  # type: ignore[list-item]
    by_document = (losses * tokens).sum(axis=2) / tokens.sum(axis=1)
    x, y, w = by_document[1] - by_document[0], by_document[3] - by_document[2], tokens.sum(axis=1)
    covariance = np.cov(x, y, aweights=w)
    assert found["correlation"]["value"] == pytest.approx(
        covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    )
    assert found["slope"]["value"] == pytest.approx(covariance[0, 1] / covariance[0, 0])
    assert found["correlation"]["low"] > 0.9


def test_each_difference_has_the_interval_of_the_paired_comparison() -> None:
    results, _, _ = four(-0.03, -0.02)
    found = loss_survival([results], bootstrap=500, seed=3)  # type: ignore[list-item]
    for name, place in (("full", 0), ("quantized", 2)):
        before, after = results[place], results[place + 1]
        alone = paired(before["items"], after["items"], PERPLEXITY, bootstrap=500, seed=3)
        assert alone["nll_difference"].pop("per") == "tokens"
        assert found[name] == pytest.approx(alone["nll_difference"])


def test_the_interval_of_the_change_covers_the_truth_19_times_in_20() -> None:
    hits = 0
    for seed in range(200):
        results, _, _ = four(-0.010, -0.004, noise=0.02, seed=seed)
        change = loss_survival([results], bootstrap=300, seed=seed)["change"]  # type: ignore[list-item]
        hits += change["low"] <= 0.006 <= change["high"]
    assert 183 <= hits <= 199


def test_the_words_follow_the_intervals() -> None:
    cases = {
        "nothing": (0.0, -0.03),
        "kept": (-0.03, -0.03),
        "weaker": (-0.03, -0.01),
        "stronger": (-0.03, -0.06),
        "reversed": (-0.03, 0.03),
        "unclear": (-0.03, 0.0),
    }
    for word, (full, quantized) in cases.items():
        found = loss_survival([four(full, quantized, seed=1)[0]])  # type: ignore[list-item]
        assert found["verdict"] == word, found
        assert (found["kept"] is None) == (word == "nothing")
    flipped = loss_survival([four(0.03, 0.01, seed=1)[0]])  # type: ignore[list-item]
    assert flipped["verdict"] == "weaker"


def test_arms_that_do_not_differ_have_nothing_to_survive() -> None:
    results, _, _ = four(0.0, 0.0)
    same = (results[0], results[0], results[2], results[2])
    found = loss_survival([same])
    assert found["verdict"] == "nothing" and found["change"]["difference"] == 0.0
    assert found["correlation"] is None and found["slope"] is None and found["kept"] is None


def test_one_document_gives_no_interval() -> None:
    tokens = np.full((1, 2), 50)
    results = [result(np.full((1, 2), 3.0 + place), tokens) for place in range(4)]
    found = loss_survival([tuple(results)])  # type: ignore[list-item]
    assert found["change"] == {"difference": pytest.approx(0.0), "low": None, "high": None}
    assert found["verdict"] == "nothing" and found["reason"]


def test_seeds_widen_the_interval_by_their_spread() -> None:
    seeds = [four(-0.03 + shift, -0.03 + 2 * shift, seed=7)[0] for shift in (-0.01, 0.0, 0.01)]
    found = loss_survival(seeds)  # type: ignore[arg-type]
    alone = loss_survival(seeds[1:2])  # type: ignore[arg-type]
    for name, spread in (("full", 0.01), ("quantized", 0.02), ("change", 0.01)):
        told = found[name]["seeds"]
        assert told["n"] == 3 and told["sd"] == pytest.approx(spread)
        assert found[name]["difference"] == pytest.approx(alone[name]["difference"])
        assert found[name]["high"] - found[name]["low"] > alone[name]["high"] - alone[name]["low"]


def test_other_items_are_refused_and_accuracies_are_not_measured() -> None:
    results, _, _ = four(0.0, 0.0)
    other = result(np.full((3, 2), 2.0), np.full((3, 2), 9))
    with pytest.raises(ValueError, match="same items"):
        loss_survival([(*results[:3], other)])  # type: ignore[list-item]
    assert is_measured_by(results[0])
    right = [{"id": "a", "document": "a", "accuracy": 1}]
    assert not is_measured_by(task_result("cloze", right, (ACCURACY,), fingerprints=["a"]))


def test_the_word_needs_no_more_than_the_intervals() -> None:
    clear, around = {"low": 0.1, "high": 0.2}, {"low": -0.1, "high": 0.2}
    assert verdict({"full": clear, "quantized": clear, "change": around}) == "kept"
    assert verdict({"full": around, "quantized": clear, "change": clear}) == "nothing"
