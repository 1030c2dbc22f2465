"""Intervals and tests against formulas, published examples and other ways to compute them; power."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats
from score_items import binary, losses

from edgedisp.core.files import to_json
from edgedisp.evaluate.statistics import (
    BITS_PER_BYTE,
    PERPLEXITY,
    Metric,
    Resampling,
    detectable_accuracy,
    difference,
    items_for,
    mcnemar,
    power_factor,
    score,
    tango,
    wilson,
)


@given(n=st.integers(1, 300), share=st.floats(0, 1))
def test_wilson_equals_its_formula(n: int, share: float) -> None:
    k, z = round(share * n), stats.norm.ppf(0.975)
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    assert wilson(k, n) == pytest.approx((max(0, centre - half), min(1, centre + half)), abs=1e-9)


@given(first=st.integers(0, 40), second=st.integers(0, 40))
def test_mcnemar_is_twice_the_binomial_tail(first: int, second: int) -> None:
    n = first + second
    tail = sum(math.comb(n, k) for k in range(min(first, second) + 1)) / 2**n
    assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail))


def test_tango_gives_the_published_interval_and_stays_open_when_no_item_differs() -> None:
    # Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014): of 21 pairs 1 and 7 disagree.
    assert tango(7, 1, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    z = stats.norm.ppf(0.975)
    assert tango(0, 0, 100) == pytest.approx((-z * z / (100 + z * z), z * z / (100 + z * z)), abs=1e-6)


@given(n=st.integers(5, 80), data=st.data())
@settings(max_examples=40)
def test_tango_bounds_are_where_the_score_test_just_rejects(n: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, n - 1))
    second = data.draw(st.integers(0, n - first))
    for bound in tango(first, second, n):
        if abs(bound) < 0.999:

            def loss(q: float, delta: float = bound) -> float:  # -log likelihood at P(only first) = q
                terms = ((first, q), (second, q + delta), (n - first - second, 1 - 2 * q - delta))
                return -sum(count * math.log(max(p, 1e-300)) for count, p in terms if count)

            bounds = max(0.0, -bound), (1 - bound) / 2
            share = optimize.minimize_scalar(loss, bounds=bounds, options={"xatol": 1e-10}).x
            z = (second - first - n * bound) / math.sqrt(n * (2 * share + bound - bound * bound))
            assert abs(z) == pytest.approx(stats.norm.ppf(0.975), abs=2e-3)


def test_perplexity_weighs_tokens_and_bits_weigh_bytes() -> None:
    items = [
        {"id": "a", "document": "a", "nll": 30.0, "tokens": 10, "bytes": 50},
        {"id": "b", "document": "b", "nll": 10.0, "tokens": 30, "bytes": 90},
    ]
    assert score(items, PERPLEXITY).value == pytest.approx(math.exp(40 / 40))
    assert score(items, BITS_PER_BYTE).value == pytest.approx(40 / 140 / math.log(2))
    assert score(items, Metric("tokens_per_byte", "tokens", "bytes")).value == 40 / 140


def test_the_bootstrap_of_a_mean_agrees_with_the_t_interval() -> None:
    values = np.random.default_rng(3).normal(5, 2, 60)
    found = score(
        [{"id": k, "document": k, "value": v} for k, v in enumerate(values)], resampling=Resampling(20_000)
    )
    expected = stats.t.interval(0.95, 59, values.mean(), stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected, abs=0.05)


def test_items_of_one_document_do_not_count_as_independent() -> None:
    values = np.random.default_rng(0).normal(0, 1, 30)
    apart = [{"id": k, "document": k, "value": values[k // 10]} for k in range(300)]
    together = [{**item, "document": k // 10} for k, item in enumerate(apart)]
    assert (score(together).half_width or 0) > 2.5 * (score(apart).half_width or 1)


def test_pairing_aligns_items_by_id_and_sees_what_two_separate_intervals_hide() -> None:
    first, second = losses(np.random.default_rng(1), 40, 2, -0.05, 0.02)
    found = difference(first, second, PERPLEXITY)
    assert difference(first, second[::-1], PERPLEXITY) == found
    means = [sum(i["nll"] for i in arm) / sum(i["tokens"] for i in arm) for arm in (first, second)]
    assert found.estimate.value == pytest.approx(math.exp(means[1]) - math.exp(means[0]))
    assert found.nats is not None and found.nats.value == pytest.approx(means[1] - means[0])
    assert (found.estimate.n, found.estimate.documents, found.per) == (80, 40, "tokens")
    assert score(second, PERPLEXITY).high > score(first, PERPLEXITY).low  # type: ignore[operator]
    assert found.estimate.high < 0 and found.estimate.p < 0.01  # type: ignore[operator]


def test_unlike_items_are_refused_by_name() -> None:
    items = binary([0, 1, 1])
    with pytest.raises(ValueError, match="1 items are missing from the second list: i2"):
        difference(items, items[:2])
    with pytest.raises(ValueError, match="1 items are missing from the first list: i2"):
        difference(items[:2], items)
    with pytest.raises(ValueError, match="i1 belongs to different documents"):
        difference(items, [items[0], {**items[1], "document": "other"}, items[2]])
    with pytest.raises(ValueError, match="same id"):
        difference([*items, items[0]], items)
    with pytest.raises(ValueError, match="no items"):
        difference([], [])
    with pytest.raises(ValueError, match="not a finite number"):
        score([{"id": 1, "document": 1, "value": math.nan}])
    first, second = losses(np.random.default_rng(0), 3, 1, 0, 0)
    with pytest.raises(ValueError, match="weighs differently"):
        difference(first, [{**item, "tokens": 5} for item in second], PERPLEXITY)


def test_accuracies_carry_the_exact_test_and_the_counts() -> None:
    found = difference(binary([1, 1, 1, 0, 0, 0, 0, 0, 1, 1]), binary([1, 0, 1, 1, 1, 1, 1, 1, 1, 1]))
    assert (found.only_first, found.only_second, found.test) == (1, 5, "mcnemar")
    assert found.estimate.p == mcnemar(1, 5)
    low, high = tango(1, 5, 10)
    assert found.estimate.low <= low < found.estimate.value < high <= found.estimate.high  # type: ignore[operator]


def test_clustered_accuracies_are_tested_by_document() -> None:
    first, second = binary([0] * 12, per_document=6), binary([1] * 6 + [0] * 6, per_document=6)
    found = difference(first, second)
    assert mcnemar(0, 6) < 0.05
    assert found.test == "document_swap" and (found.estimate.p or 0) > 0.3


def test_the_swap_test_is_the_exact_permutation_test_and_can_be_very_sure() -> None:
    first, second = losses(np.random.default_rng(3), 9, 1, -0.02, 0.05)
    deltas = np.array([b["nll"] - a["nll"] for a, b in zip(first, second)])
    exact = stats.permutation_test((deltas,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert difference(first, second, PERPLEXITY, Resampling(50_000)).estimate.p == pytest.approx(
        exact, abs=0.01
    )
    nll = np.random.default_rng(5).normal(300, 30, 60)
    pair = [
        [{"id": k, "document": k, "nll": float(one), "tokens": 100} for k, one in enumerate(values)]
        for values in (nll, nll - 20)
    ]
    assert difference(*pair, PERPLEXITY, Resampling(50)).estimate.p < 1.1e-4  # type: ignore[operator]


def test_degenerate_input_gives_no_nan() -> None:
    first, _ = losses(np.random.default_rng(0), 5, 2, 0, 0)
    equal = difference(first, first, PERPLEXITY)
    assert [getattr(equal.estimate, name) for name in ("value", "low", "high", "p")] == [0, 0, 0, 1]
    same = difference(binary([1, 0, 1]), binary([1, 0, 1]))
    assert same.estimate.low < 0 < same.estimate.high and same.estimate.p == 1  # type: ignore[operator]
    one = difference(binary([1]), binary([0])).estimate
    assert not one.has_interval and "one document" in (one.reason or "")
    assert not score(first[:1], PERPLEXITY).has_interval and score(binary([1] * 4)).high == 1.0
    huge = score([{"id": k, "document": k, "nll": 1e6, "tokens": 1} for k in range(3)], PERPLEXITY)
    for found in (equal, same, one, huge):
        json.dumps(to_json(found), allow_nan=False)


def test_power_is_the_textbooks() -> None:
    assert power_factor() == pytest.approx(2.8016, abs=1e-4)
    assert 100 * detectable_accuracy(500) == pytest.approx(3.07, abs=0.01)
    assert items_for(0.007) == pytest.approx(9600, rel=0.01)
    assert items_for(detectable_accuracy(5000)) == pytest.approx(5000, abs=1)
