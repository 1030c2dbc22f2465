"""Intervals, drift and differences of a handful of timings, against scipy, numpy and arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from edgedisp.bench.results import (
    compare_speeds,
    coverage,
    drift_percent,
    median_interval,
    twin_pairs,
)

speeds = st.floats(0.1, 1e4)


@given(st.lists(speeds, min_size=1, max_size=40))
def test_the_interval_is_made_of_order_statistics_with_exact_coverage(values: list[float]) -> None:
    median, low, high = median_interval(values)
    ordered, n = sorted(values), len(values)
    fitting = [k for k in range(1, n // 2 + 1) if 1 - 2 * stats.binom.cdf(k - 1, n, 0.5) >= 0.95]
    rank = max(fitting, default=1)
    assert (median, low, high) == (pytest.approx(np.median(values)), ordered[rank - 1], ordered[n - rank])
    assert coverage(n) == pytest.approx(max(0.0, 1 - 2 * stats.binom.cdf(rank - 1, n, 0.5)))


def test_drift_is_the_change_along_the_line() -> None:
    assert drift_percent([100.0, 95.0, 90.0, 85.0, 80.0]) == pytest.approx(100 * -20 / 90)
    assert drift_percent([90.0] * 4) == 0.0
    assert drift_percent([1.0, 2.0]) is None
    assert drift_percent([100.0, 100.0, 100.0, 100.0, 20.0]) == 0.0  # one bad repetition


def test_a_difference_is_told_only_when_the_whole_interval_is_on_one_side() -> None:
    a = [100.0, 90.0, 110.0, 95.0, 105.0]
    slower = compare_speeds(a, [v * 0.9 for v in a])
    assert slower["differs"] is True and slower["ratio"] == pytest.approx(0.9)
    assert compare_speeds(a, [v * 0.98 for v in a])["differs"] is False  # real but too small to matter
    assert compare_speeds(a, [90.0, 95.0, 90.0, 105.0, 92.0])["differs"] is False
    assert compare_speeds(a[:2], [50.0, 45.0])["differs"] is None  # two repetitions cannot tell


def test_pairing_takes_out_what_disturbs_both() -> None:
    weather = [1.0, 0.3, 0.8, 0.5, 0.9]
    ratio = compare_speeds([100 * w for w in weather], [94 * w for w in weather])
    assert ratio["differs"] is True
    assert ratio["high"] - ratio["low"] == pytest.approx(0.0, abs=1e-12)


def test_arms_of_one_precision_are_compared_with_the_baseline() -> None:
    labels = ["baseline/int4", "dispersed/int4", "dispersed/int8", "other", "neftune/int4"]
    assert twin_pairs(labels) == (("baseline/int4", "dispersed/int4"), ("baseline/int4", "neftune/int4"))
