"""Intervals, drift and differences of a handful of timings, against scipy, numpy and arithmetic; warnings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from edgedisp.bench.results import (
    clock_drop_percent,
    compare_speeds,
    drift_percent,
    median_interval,
    slow_causes,
    twin_pairs,
    warn_about_bits,
)

speeds = st.floats(0.1, 1e4)


@given(st.lists(speeds, min_size=1, max_size=40))
def test_the_interval_is_made_of_order_statistics_with_exact_coverage(values: list[float]) -> None:
    found = median_interval(values)
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
    found = median_interval([5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found["low"], found["high"], found["coverage"]) == (1.0, 5.0, 0.9375)


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).lognormal(size=(2000, 7))
    found = [median_interval(row.tolist()) for row in draws]
    held = np.mean([f["low"] <= 1.0 <= f["high"] for f in found])  # the median of a log-normal is 1
    assert held == pytest.approx(found[0]["coverage"], abs=0.015)


def test_drift_is_the_change_along_the_line() -> None:
    assert drift_percent([100.0, 95.0, 90.0, 85.0, 80.0]) == pytest.approx(100 * -20 / 90)
    assert drift_percent([90.0] * 4) == 0.0
    assert drift_percent([1.0, 2.0]) is None


def test_one_bad_repetition_is_no_drift() -> None:
    assert drift_percent([100.0, 100.0, 100.0, 100.0, 20.0]) == 0.0


def test_a_difference_is_told_only_when_the_whole_interval_is_on_one_side() -> None:
    a = [100.0, 90.0, 110.0, 95.0, 105.0]
    assert compare_speeds(a, [v * 0.9 for v in a])["differs"] is True
    assert compare_speeds(a, [v * 0.9 for v in a])["ratio"] == pytest.approx(0.9)
    assert compare_speeds(a, [v * 0.98 for v in a])["differs"] is False  # real but too small to matter
    assert compare_speeds(a, [90.0, 95.0, 90.0, 105.0, 92.0])["differs"] is False
    assert compare_speeds(a[:2], [50.0, 45.0])["differs"] is None  # two repetitions cannot tell


def test_pairing_takes_out_what_disturbs_both() -> None:
    weather = [1.0, 0.3, 0.8, 0.5, 0.9]
    found = compare_speeds([100 * w for w in weather], [94 * w for w in weather])
    assert found["differs"] is True
    assert found["high"] - found["low"] == pytest.approx(0.0, abs=1e-12)


X86 = {"architecture": "x86_64", "features": ["avx2", "fma"], "physical_cores": 4}
VNNI = {**X86, "features": ["avx2", "fma", "avx512_vnni"]}


def test_all_known_causes_of_slow_products_are_named() -> None:
    row = {"threads": 1, "clock_fell_percent": 30.0, "drift_percent": -20.0}
    said = slow_causes(row, X86)
    assert "no VNNI" in said or "avx512_vnni" in said
    assert "too few threads: 1 on 4 cores" in said and "throttling: the clock fell by 30 %" in said
    assert "neither dotprod nor i8mm" in slow_causes({"threads": 4}, {**X86, "features": ["asimd"]})
    slow = {"threads": 4, "clock_fell_percent": None, "drift_percent": -20.0}
    assert slow_causes(slow, VNNI) == "throttling is likely: decode slowed down by 20 % over the repetitions"
    for machine in (VNNI, {"features": ["asimd", "asimddp"]}, {}):
        assert slow_causes({"threads": 4}, machine).startswith("look for a missing kernel")


def test_the_fall_of_the_clock_is_that_from_first_to_last() -> None:
    assert clock_drop_percent([{"clock_mhz": 2000.0}, {"clock_mhz": 9.0}, {"clock_mhz": 1500.0}]) == 25.0
    assert clock_drop_percent([{"clock_mhz": None}, {"clock_mhz": 1500.0}]) is None


def test_arms_of_one_precision_are_compared_with_the_baseline() -> None:
    labels = ["baseline/int4", "dispersed/int4", "dispersed/int8", "other", "neftune/int4"]
    assert twin_pairs(labels) == (("baseline/int4", "dispersed/int4"), ("baseline/int4", "neftune/int4"))


def row(label: str, bits: int, low: float, high: float, layers: int = 2) -> dict[str, Any]:
    speed = {"median": (low + high) / 2, "low": low, "high": high}
    shape = {"layers": layers}
    spread = {"decode_tokens_per_s": speed}
    return {"label": label, "weight_bits": bits, "shape": shape, "spread": spread, "warnings": []}


def test_fewer_bits_that_are_slower_get_a_warning_unless_intervals_overlap_or_models_differ() -> None:
    rows = [
        row("fp32", 32, 50, 55),
        row("int8", 8, 90, 99),
        row("int4", 4, 20, 30),
        row("x", 4, 1, 2, layers=9),
    ]
    warn_about_bits(rows, {})
    assert [len(one["warnings"]) for one in rows] == [0, 0, 2, 0]
    assert (
        "4-bit weights decode slower than the 8-bit ones of int8 (25.0 against 94.5" in rows[2]["warnings"][1]
    )
    rows = [row("a", 32, 50, 55), row("b", 4, 40, 51)]
    warn_about_bits(rows, {})
    assert [one["warnings"] for one in rows] == [[], []]
