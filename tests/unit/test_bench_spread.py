"""Intervals, drift and differences of a handful of timings, against scipy, numpy and arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from edgedisp.bench.spread import compare, drift_percent, percentile, spread

speeds = st.floats(0.1, 1e4)


@given(st.lists(speeds, min_size=1, max_size=40))
def test_the_interval_is_made_of_order_statistics_with_exact_coverage(values: list[float]) -> None:
    found = spread(values)
    ordered = sorted(values)
    n = len(values)
    k = next(k for k in range(1, n + 1) if ordered[k - 1] == found["low"] and ordered[n - k] == found["high"])
    assert found["low"] <= found["median"] <= found["high"]
    assert found["coverage"] == pytest.approx(max(0.0, 1 - 2 * stats.binom.cdf(_rank(n) - 1, n, 0.5)))
    assert k <= max(1, _rank(n))
    assert found["median"] == pytest.approx(np.median(values))


def _rank(n: int) -> int:
    """The largest k with coverage of at least 95 %, or 1."""
    fitting = [k for k in range(1, n // 2 + 1) if 1 - 2 * stats.binom.cdf(k - 1, n, 0.5) >= 0.95]
    return max(fitting, default=1)


def test_five_repetitions_give_smallest_to_largest_at_93_75_percent() -> None:
    found = spread([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found["low"], found["high"], found["coverage"]) == (1.0, 5.0, 0.9375)


def test_ten_repetitions_leave_out_the_outermost() -> None:
    found = spread([float(v) for v in range(10)])
    assert (found["low"], found["high"]) == (1.0, 8.0)
    assert found["coverage"] == pytest.approx(0.978515625)


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).lognormal(size=(2000, 7))
    found = [spread(row.tolist()) for row in draws]
    held = np.mean([f["low"] <= 1.0 <= f["high"] for f in found])  # the median of a log-normal is 1
    assert held == pytest.approx(found[0]["coverage"], abs=0.015)


@given(st.lists(speeds, min_size=1, max_size=30), st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], share: float) -> None:
    assert percentile(values, share) == pytest.approx(np.percentile(values, 100 * share))


def test_drift_is_the_change_along_the_line() -> None:
    assert drift_percent([100.0, 95.0, 90.0, 85.0, 80.0]) == pytest.approx(100 * -20 / 90)
    assert drift_percent([90.0] * 4) == 0.0
    assert drift_percent([1.0, 2.0]) is None


def test_one_bad_repetition_is_no_drift() -> None:
    assert drift_percent([100.0, 100.0, 100.0, 100.0, 20.0]) == 0.0


def test_a_difference_is_told_only_when_the_whole_interval_is_on_one_side() -> None:
    a = [100.0, 90.0, 110.0, 95.0, 105.0]
    assert compare(a, [v * 0.9 for v in a])["differs"] is True
    assert compare(a, [v * 0.9 for v in a])["ratio"] == pytest.approx(0.9)
    assert compare(a, [v * 0.98 for v in a])["differs"] is False  # real but too small to matter
    assert compare(a, [90.0, 95.0, 90.0, 105.0, 92.0])["differs"] is False
    assert compare(a[:2], [50.0, 45.0])["differs"] is None  # two repetitions cannot tell


def test_pairing_takes_out_what_disturbs_both() -> None:
    weather = [1.0, 0.3, 0.8, 0.5, 0.9]
    found = compare([100 * w for w in weather], [94 * w for w in weather])
    assert found["differs"] is True
    assert found["high"] - found["low"] == pytest.approx(0.0, abs=1e-12)
