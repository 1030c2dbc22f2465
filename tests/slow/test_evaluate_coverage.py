"""Simulations: intervals hold the truth 95 times in 100, tests rarely cry wolf, power is what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from score_items import FEW, items_of, losses, result

from edgedisp.core.results import Estimate
from edgedisp.evaluate.comparison import compare_task, detectable_accuracy, loss_survival, mean_difference
from edgedisp.evaluate.statistics import ACCURACY, PERPLEXITY, Resampling, combined, difference, mcnemar


@pytest.mark.parametrize(("documents", "per_document"), [(20, 3), (60, 1)])
def test_paired_intervals_cover_the_truth_95_times_in_100(documents: int, per_document: int) -> None:
    rng, repetitions = np.random.default_rng(7), 600
    covered = rejected = 0
    for repetition in range(repetitions):
        pair = losses(rng, documents, per_document, 0.0, 0.05)
        change = difference([pair], PERPLEXITY, Resampling(300, repetition))
        covered += change.nats.low <= 0 <= change.nats.high
        rejected += change.estimate.p <= 0.05
    # Three standard errors of a share of 600 are 2.7 points: 0.90 (too sure) and 0.99 (too wide) both fail.
    assert 0.923 < covered / repetitions < 0.977
    assert rejected / repetitions < 0.077


def test_accuracy_intervals_cover_and_the_exact_test_rarely_cries_wolf() -> None:
    rng, repetitions, n = np.random.default_rng(8), 500, 80
    covered = rejected = 0
    for repetition in range(repetitions):
        first = rng.random(n) < 0.6
        second = np.where(rng.random(n) < 0.7, first, rng.random(n) < 0.6)
        pair = items_of(first), items_of(second)
        change = difference([pair], resampling=Resampling(300, repetition)).estimate
        covered += change.low <= 0 <= change.high
        rejected += change.p <= 0.05
    assert 0.93 < covered / repetitions < 0.99
    assert rejected / repetitions < 0.05


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_interval_over_seeds_covers_at_least_what_it_promises(n: int) -> None:
    """20,000 builds: items' error 1, seeds' spread from none to far more; exact normal item intervals."""
    rng, builds, documents = np.random.default_rng(0), 20_000, 400
    half, seeds_t = stats.t.ppf(0.975, documents - 1), stats.t.ppf(0.975, n - 1)
    for luck in (0.0, 0.5, 2.0, 10.0):
        values = rng.normal(0, luck, (builds, n))
        centres = rng.normal(0, 1, builds) + values.mean(axis=1)
        sd = values.std(axis=1, ddof=1)
        estimate = Estimate(centres[0], centres[0] - half, centres[0] + half, documents=documents)
        wide = np.hypot(half, seeds_t * sd / math.sqrt(n))
        assert combined(estimate, [*values[0]]).half_width == pytest.approx(wide[0])
        assert (np.abs(centres) < wide).mean() > 0.95 - 3 * math.sqrt(0.95 * 0.05 / builds)
        if luck >= 2:
            assert (np.abs(centres) < half).mean() < 0.9  # items alone miss the luck of training


def test_the_mean_over_tasks_covers_a_true_difference_of_zero() -> None:
    rng, repetitions = np.random.default_rng(5), 150
    covered = 0
    for _ in range(repetitions):
        pair = [{}, {}]
        for task in "abcd":
            first = rng.random(80) < 0.6
            second = np.where(rng.random(80) < 0.8, first, rng.random(80) < 0.6)
            for side, right in zip(pair, (first, second)):
                side[task] = result(task, items_of(right, field="accuracy"), ACCURACY)
        compared = {task: compare_task([(pair[0][task], pair[1][task])], FEW) for task in "abcd"}
        scores = [{task: result.score for task, result in side.items()} for side in pair]
        mean = mean_difference(*scores, compared).estimate
        covered += mean.low <= 0 <= mean.high
    assert 0.90 < covered / repetitions <= 0.995


def test_the_interval_of_what_quantization_changes_covers_the_truth() -> None:
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        hard, tokens = 3 + rng.normal(size=40), rng.integers(20, 200, 40)
        noise = 0.02 * rng.normal(size=(2, 40))
        four = [hard, hard - 0.010 + noise[0], hard + 0.2, hard + 0.196 + noise[1]]
        items = [
            [{"id": k, "document": k, "nll": loss[k] * n, "tokens": n} for k, n in enumerate(tokens)]
            for loss in four
        ]
        results = tuple(result("loss", side, PERPLEXITY) for side in items)
        change = loss_survival([results], Resampling(300, seed)).change
        hits += change.low <= 0.006 <= change.high
    assert 183 <= hits <= 199


def test_the_detectable_difference_is_found_four_times_out_of_five() -> None:
    items, differing, repetitions = 2000, 0.1, 2000
    effect = detectable_accuracy(items, differing)
    rng = np.random.default_rng(3)
    better, worse = (differing + effect) / 2, (differing - effect) / 2
    counts = rng.multinomial(items, [better, worse, 1 - differing], size=repetitions)
    power = np.mean([mcnemar(int(first), int(second)) <= 0.05 for first, second, _ in counts])
    assert power == pytest.approx(0.8, abs=0.02 + 3 * math.sqrt(0.16 / repetitions))
