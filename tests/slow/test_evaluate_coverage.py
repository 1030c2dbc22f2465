"""Simulations: intervals hold the truth 95 times in 100, tests rarely cry wolf, power is what it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import statistics_coverage as simulation
from scipy import stats

from edgedisp.core.results import Estimate
from edgedisp.evaluate.comparison import detectable_accuracy
from edgedisp.evaluate.statistics import combined, mcnemar, with_power


@pytest.mark.parametrize("name", simulation.ROWS)
def test_intervals_hold_the_truth_and_tests_rarely_cry_wolf(name: str) -> None:
    """Rows of benchmarks/statistics_coverage.py. Three standard errors of a share of 300 are 3.8 points."""
    simulate, *arguments = simulation.ROWS[name]
    rng = np.random.default_rng(7)
    outcomes = [simulate(rng, *arguments) for _ in range(300)]
    shares = {key: np.mean([outcome[key] for outcome in outcomes]) for key in outcomes[0]}
    assert 0.91 < shares.get("holds", 0.95) < (1.01 if "seeds" in name else 0.995)  # nor are they too wide
    assert shares.get("rejects", 0) < 0.07 and shares.get("claims", 0) < 0.09


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


def test_the_detectable_difference_is_found_four_times_out_of_five() -> None:
    items, differing, repetitions = 2000, 0.1, 2000
    effect = detectable_accuracy(items, differing)
    rng = np.random.default_rng(3)
    better, worse = (differing + effect) / 2, (differing - effect) / 2
    counts = rng.multinomial(items, [better, worse, 1 - differing], size=repetitions)
    power = np.mean([mcnemar(int(first), int(second)) <= 0.05 for first, second, _ in counts])
    assert power == pytest.approx(0.8, abs=0.02 + 3 * math.sqrt(0.16 / repetitions))


def test_the_detectable_difference_of_a_comparison_is_found_four_times_out_of_five() -> None:
    """Another sample of 20 documents and 3 seeds is tested at what the first says is detectable."""
    rng, documents, seeds, builds = np.random.default_rng(2), 20, 3, 4000
    for luck in (0.0, 1.0, 5.0):
        estimates = []
        for _ in range(2 * builds):
            error = math.sqrt(rng.chisquare(documents - 1) / (documents - 1))
            values = rng.normal(0, luck, seeds)
            value, half = rng.normal() + values.mean(), stats.t.ppf(0.975, documents - 1) * error
            estimate = Estimate(value, value - half, value + half, documents=documents)
            estimates.append(with_power(combined(estimate, [*values])))
        pairs = zip(estimates[:builds], estimates[builds:])
        share = np.mean([abs(new.value + old.detectable) > new.half_width for old, new in pairs])
        assert 0.77 < share < 0.88
