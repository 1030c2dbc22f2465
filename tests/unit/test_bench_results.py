"""Intervals, drift and differences of a handful of timings, against scipy, numpy and arithmetic; warnings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from edgedisp.bench.results import (
    clock_drop_percent,
    compare_speeds,
    coverage,
    drift_percent,
    median_interval,
    slow_causes,
    slower_with_fewer_bits,
    twin_pairs,
)
from edgedisp.core.results import Estimate, Timing

speeds = st.floats(0.1, 1e4)


@given(st.lists(speeds, min_size=1, max_size=40))
def test_the_interval_is_made_of_order_statistics_with_exact_coverage(values: list[float]) -> None:
    median, low, high = median_interval(values)
    ordered, n = sorted(values), len(values)
    fitting = [k for k in range(1, n // 2 + 1) if 1 - 2 * stats.binom.cdf(k - 1, n, 0.5) >= 0.95]
    rank = max(fitting, default=1)
    assert (median, low, high) == (pytest.approx(np.median(values)), ordered[rank - 1], ordered[n - rank])
    assert coverage(n) == pytest.approx(max(0.0, 1 - 2 * stats.binom.cdf(rank - 1, n, 0.5)))


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).lognormal(size=(2000, 7))
    intervals = [median_interval(row.tolist()) for row in draws]
    share = np.mean([low <= 1.0 <= high for _, low, high in intervals])  # the median of a log-normal is 1
    assert share == pytest.approx(coverage(7), abs=0.015)


def test_drift_is_the_change_along_the_line() -> None:
    assert drift_percent([100.0, 95.0, 90.0, 85.0, 80.0]) == pytest.approx(100 * -20 / 90)
    assert drift_percent([90.0] * 4) == 0.0
    assert drift_percent([1.0, 2.0]) is None
    assert drift_percent([100.0, 100.0, 100.0, 100.0, 20.0]) == 0.0  # one bad repetition
    assert clock_drop_percent([{"clock_mhz": 2000.0}, {"clock_mhz": 9.0}, {"clock_mhz": 1500.0}]) == 25.0
    assert clock_drop_percent([{"clock_mhz": None}, {"clock_mhz": 1500.0}]) is None


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


X86 = {"architecture": "x86_64", "features": ["avx2", "fma"], "physical_cores": 4}
VNNI = {**X86, "features": ["avx2", "fma", "avx512_vnni"]}


def timing(label: str, bits: int = 4, low: float = 20.0, high: float = 30.0, **changes: Any) -> Timing:
    speed = Estimate((low + high) / 2, low, high)
    row = Timing(label, 4, 128, 128, 5, weight_bits=bits, decode_tokens_per_s=speed)
    return replace(row, **changes)


def test_all_known_causes_of_slow_products_are_named() -> None:
    causes = slow_causes(timing("a", threads=1, drift_percent=-20.0), 30.0, X86)
    for cause in ("avx512_vnni", "too few threads: 1 on 4 cores", "throttling: the clock fell by 30 %"):
        assert cause in causes
    assert "neither dotprod nor i8mm" in slow_causes(timing("a"), None, {**X86, "features": ["asimd"]})
    slow = slow_causes(timing("a", drift_percent=-20.0), None, VNNI)
    assert slow.startswith("throttling is likely: decode slowed down by 20 %")
    for machine in (VNNI, {"features": ["asimd", "asimddp"]}, {}):
        assert slow_causes(timing("a"), None, machine).startswith("look for a missing kernel")


def test_arms_of_one_precision_are_compared_with_the_baseline() -> None:
    labels = ["baseline/int4", "dispersed/int4", "dispersed/int8", "other", "neftune/int4"]
    assert twin_pairs(labels) == (("baseline/int4", "dispersed/int4"), ("baseline/int4", "neftune/int4"))


def test_fewer_bits_that_are_slower_get_a_warning_unless_intervals_overlap() -> None:
    rows = [timing("fp32", 32, 50, 55), timing("int8", 8, 90, 99), timing("int4", 4, 20, 30)]
    warnings = [list(slower_with_fewer_bits(row, rows, "why")) for row in rows]
    assert [len(texts) for texts in warnings] == [0, 0, 2]
    expected = "4-bit weights decode slower than the 8-bit ones of int8 (25.0 against 94.5 tokens/s): why"
    assert warnings[2][1] == expected
    rows = [timing("a", 32, 50, 55), timing("b", 4, 40, 51)]
    assert not list(slower_with_fewer_bits(rows[1], rows, ""))
