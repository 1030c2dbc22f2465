"""Differences of differences against direct formulas, and the words for them."""

from __future__ import annotations

import numpy as np
import pytest
from score_items import result

from edgedisp.core.results import Estimate
from edgedisp.evaluate.quantization_survival import Four, is_loss, loss_survival, verdict
from edgedisp.evaluate.statistics import ACCURACY, PERPLEXITY, Resampling, difference
from edgedisp.evaluate.task_result import TaskResult

DOCUMENTS, WINDOWS = 40, 3


def of_losses(losses: np.ndarray, tokens: np.ndarray) -> TaskResult:
    """losses: nats per token, [documents, windows]."""
    items = [
        {
            "id": f"{d}#{w}",
            "document": f"d{d}",
            "nll": float(losses[d, w] * tokens[d, w]),
            "tokens": int(tokens[d, w]),
        }
        for d in range(losses.shape[0])
        for w in range(losses.shape[1])
    ]
    return result("loss", items, PERPLEXITY)


def four(full: float, quantized: float, seed: int = 0) -> tuple[Four, np.ndarray, np.ndarray]:
    """Four results with these mean differences; the losses [4, documents, windows] and the tokens."""
    rng, size = np.random.default_rng(seed), (DOCUMENTS, WINDOWS)
    hard, cost = 3 + rng.normal(size=size), 0.2 + 0.05 * rng.normal(size=size)
    noise, tokens = 0.002 * rng.normal(size=(2, *size)), rng.integers(20, 200, size)
    losses = np.stack([hard, hard + full + noise[0], hard + cost, hard + cost + quantized + noise[1]])
    a, b, c, d = (of_losses(one, tokens) for one in losses)
    return (a, b, c, d), losses, tokens


def test_the_differences_are_the_direct_formula_with_the_intervals_of_the_paired_comparison() -> None:
    results, losses, tokens = four(-0.03, -0.02)
    resampling = Resampling(500, 3)
    found = loss_survival([results], resampling)
    means = (losses * tokens).sum(axis=(1, 2)) / tokens.sum()
    assert found.change.value == pytest.approx((means[3] - means[2]) - (means[1] - means[0]))
    for one, place in ((found.full, 0), (found.quantized, 2)):
        alone = difference(results[place].items, results[place + 1].items, PERPLEXITY, resampling).nats
        assert alone is not None
        assert (one.value, one.low, one.high) == pytest.approx((alone.value, alone.low, alone.high))
    assert found.change.n == DOCUMENTS * WINDOWS and found.change.documents == DOCUMENTS


def test_the_words_follow_the_intervals() -> None:
    cases = {
        "nothing": (0.0, -0.03), "kept": (-0.03, -0.03), "weaker": (-0.03, -0.01),
        "stronger": (-0.03, -0.06), "reversed": (-0.03, 0.03), "unclear": (-0.03, 0.0),
    }  # fmt: skip
    for word, (full, quantized) in cases.items():
        assert loss_survival([four(full, quantized, seed=2)[0]]).verdict == word
    assert loss_survival([four(0.03, 0.01, seed=2)[0]]).verdict == "weaker"
    clear, around = Estimate(0.15, 0.1, 0.2), Estimate(0.1, -0.1, 0.2)
    assert verdict(clear, clear, around) == "kept" and verdict(around, clear, clear) == "nothing"


def test_one_document_gives_no_interval_and_no_difference_nothing_to_survive() -> None:
    a, _, c, _ = four(0.0, 0.0)[0]
    same = loss_survival([(a, a, c, c)])
    assert same.verdict == "nothing" and same.change.value == 0.0
    a, b, c, d = (of_losses(np.full((1, 2), 3.0 + place), np.full((1, 2), 50)) for place in range(4))
    found = loss_survival([(a, b, c, d)])
    assert not found.change.has_interval and found.change.reason and found.verdict == "nothing"


def test_seeds_widen_the_interval_by_their_spread() -> None:
    seeds = [four(-0.03 + shift, -0.03 + 2 * shift, seed=7)[0] for shift in (-0.01, 0.0, 0.01)]
    found, alone = loss_survival(seeds), loss_survival(seeds[1:2])
    for name, spread in (("full", 0.01), ("quantized", 0.02), ("change", 0.01)):
        one, other = getattr(found, name), getattr(alone, name)
        assert one.seeds.sd == pytest.approx(spread) and one.value == pytest.approx(other.value)
        assert one.half_width > other.half_width


def test_other_items_are_refused_and_accuracies_are_no_losses() -> None:
    a, b, c, _ = four(0.0, 0.0)[0]
    with pytest.raises(ValueError, match="same items"):
        loss_survival([(a, b, c, of_losses(np.full((3, 2), 2.0), np.full((3, 2), 9)))])
    right = result("cloze", [{"id": "a", "document": "a", "accuracy": 1}], ACCURACY)
    assert is_loss(a) and not is_loss(right)
    with pytest.raises(ValueError, match="no loss per token"):
        loss_survival([(right, right, right, right)])
