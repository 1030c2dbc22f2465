"""Intervals and tests against formulas, published examples and other ways to compute them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from score_items import VALUE, Items, items_of, losses

from edgedisp.core.files import to_json
from edgedisp.core.results import Difference, Estimate, Seeds
from edgedisp.evaluate.statistics import (
    ACCURACY,
    BITS_PER_BYTE,
    DEFAULT,
    PERPLEXITY,
    Metric,
    Resampling,
    combined,
    combined_p,
    difference,
    mcnemar,
    score,
    swap_test,
    tango,
    wilson,
)

SEEDS, ITEMS = 3, 60
Z = stats.norm.ppf(0.975)


def trainings(luck: float = 0.0, gain: float = 0.0) -> list[Items]:
    """The items of three trainings: two a document, 20 tokens each; `luck` moves all items of a training."""
    rng = np.random.default_rng(0)
    hard, shifts = rng.normal(3, 1, ITEMS), rng.normal(0, 1, SEEDS) * luck
    noise = np.random.default_rng([0, 7]).normal(0, 0.05, (SEEDS, ITEMS))
    table = 20 * (hard + shifts[:, None] - gain + noise)
    return [
        [{"id": f"i{i}", "document": f"d{i // 2}", "nll": row[i], "tokens": 20} for i in range(ITEMS)]
        for row in table
    ]


def pair_of(*sides: Items, metric: Metric = VALUE, resampling: Resampling = DEFAULT) -> Difference:
    return difference([(sides[0], sides[1])], metric, resampling)


# Shares of right answers


@given(n=st.integers(1, 300), share=st.floats(0, 1))
def test_wilson_equals_its_formula(n: int, share: float) -> None:
    k = round(share * n)
    centre, half = (k + Z * Z / 2) / (n + Z * Z), Z / (n + Z * Z) * math.sqrt(k * (n - k) / n + Z * Z / 4)
    assert wilson(k, n) == pytest.approx((max(0, centre - half), min(1, centre + half)), abs=1e-9)


@given(first=st.integers(0, 40), second=st.integers(0, 40))
def test_mcnemar_is_twice_the_binomial_tail(first: int, second: int) -> None:
    n = first + second
    tail = sum(math.comb(n, k) for k in range(min(first, second) + 1)) / 2**n
    assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail))


def test_tango_gives_the_published_interval_and_stays_open_when_no_item_differs() -> None:
    # Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014): of 21 pairs 1 and 7 disagree.
    assert tango(7, 1, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert tango(0, 0, 100) == pytest.approx((-Z * Z / (100 + Z * Z), Z * Z / (100 + Z * Z)), abs=1e-6)
    for second in (1, 7, 30):  # swapping the models mirrors the interval; one that holds 1 ends there
        low, high = tango(2, second, 30 + second)
        assert tango(second, 2, 30 + second) == pytest.approx((-high, -low), abs=1e-9)
    assert tango(0, 9, 9)[1] == 1.0 and tango(9, 0, 9)[0] == -1.0 and -1 < tango(9, 0, 9)[1] < 0


def test_accuracies_carry_wilsons_interval_the_exact_test_and_the_counts() -> None:
    first, second = items_of([1, 1, 1, 0, 0, 0, 0, 0, 1, 1]), items_of([1, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    estimate = score([first], VALUE)
    assert (estimate.value, (estimate.low, estimate.high)) == (0.5, wilson(5, 10))
    result: Any = pair_of(first, second)
    assert (result.only_first, result.only_second, result.test) == (1, 5, "mcnemar")
    assert result.estimate.p == mcnemar(1, 5)
    low, high = tango(1, 5, 10)
    assert result.estimate.low <= low < result.estimate.value < high <= result.estimate.high
    # Parts of an answer have neither counts nor Tango's interval.
    result = pair_of(items_of([0.5] * 4), items_of([0, 1, 1, 1]))
    assert (result.only_first, result.only_second, result.test) == (None, None, "document_swap")


def test_clustered_accuracies_are_tested_by_document_and_no_narrower_than_wilson() -> None:
    first, second = items_of([0] * 12, per_document=6), items_of([1] * 6 + [0] * 6, per_document=6)
    result = pair_of(first, second)
    assert mcnemar(0, 6) < 0.05
    assert result.test == "document_swap" and (result.estimate.p or 0) > 0.3
    alike: Any = score([items_of([1, 0] * 6, per_document=2)], VALUE)  # every document has the same share
    assert (alike.low, alike.high) == wilson(6, 12)


# Any metric


def test_perplexity_weighs_tokens_and_bits_weigh_bytes() -> None:
    items = [
        {"id": "a", "document": "a", "nll": 30.0, "tokens": 10, "bytes": 50},
        {"id": "b", "document": "b", "nll": 10.0, "tokens": 30, "bytes": 90},
    ]
    assert score([items], PERPLEXITY).value == pytest.approx(math.exp(40 / 40))
    assert score([items], BITS_PER_BYTE).value == pytest.approx(40 / 140 / math.log(2))
    assert score([items], Metric("tokens_per_byte", "tokens", "bytes")).value == 40 / 140


def test_the_bootstrap_of_a_mean_agrees_with_the_t_interval() -> None:
    for n, tolerance in ((8, 0.05), (60, 0.015)):
        sample = np.random.default_rng(3).normal(5, 2, n)
        # Four items a document: they do not count as independent.
        estimate = score([items_of(sample.repeat(4), per_document=4)], VALUE, Resampling(20_000))
        low, high = stats.t.interval(0.95, n - 1, sample.mean(), stats.sem(sample))
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=tolerance * (high - low))
        assert (estimate.n, estimate.documents, estimate.reason) == (4 * n, n, None)


def test_pairing_sees_what_two_separate_intervals_hide() -> None:
    first, second = losses(np.random.default_rng(1), 40, 2, -0.05, 0.02)
    result: Any = pair_of(first, second, metric=PERPLEXITY)
    means = [sum(i["nll"] for i in arm) / sum(i["tokens"] for i in arm) for arm in (first, second)]
    assert result.estimate.value == pytest.approx(math.exp(means[1]) - math.exp(means[0]))
    assert (result.first, result.second) == pytest.approx((math.exp(means[0]), math.exp(means[1])))
    assert result.nats.value == pytest.approx(means[1] - means[0])
    assert (result.estimate.n, result.estimate.documents, result.per) == (80, 40, "tokens")
    assert score([second], PERPLEXITY).high > score([first], PERPLEXITY).low  # type: ignore[operator]
    assert result.estimate.high < 0 and result.estimate.p < 0.01
    assert pair_of(first, second, metric=BITS_PER_BYTE).nats is None
    assert pair_of(first, second, metric=replace(PERPLEXITY, denominator=None)).per == "item"


def test_unlike_items_are_refused() -> None:
    items = items_of([0, 1, 1])
    moved = [items[0], {**items[1], "document": "other"}, items[2]]
    other = [{**item, "asked": "other"} for item in items]
    for pair in ((items, items[:2]), (items, moved), (items, items[::-1]), (items, other), ([], [])):
        with pytest.raises(ValueError, match="only the same items"):
            pair_of(*pair)
    with pytest.raises(ValueError, match="only the same items"):
        score([items, items[:2]], VALUE)


def test_the_swap_test_is_the_exact_permutation_test() -> None:
    deltas = np.random.default_rng(3).normal(-0.3, 0.5, 9)
    exact = stats.permutation_test((deltas,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert 0.02 < exact < 0.9
    assert swap_test(deltas, Resampling(50_000)) == pytest.approx(exact, abs=0.01)
    assert swap_test(np.zeros(5)) == 1.0
    first, second = losses(np.random.default_rng(3), 9, 1, -0.02, 0.05)
    by_document = np.array([b["nll"] - a["nll"] for a, b in zip(first, second)])
    result = pair_of(first, second, metric=PERPLEXITY, resampling=Resampling(500, 4))
    assert result.estimate.p == swap_test(by_document, Resampling(500, 4)) and result.test == "document_swap"
    for bootstrap, least in ((50, 9991), (1500, 15001)):  # a clear difference gets ten times the swaps
        assert swap_test(np.ones(60), Resampling(bootstrap)) == 1 / least


def test_degenerate_input_gives_no_nan() -> None:
    first, _ = losses(np.random.default_rng(0), 5, 2, 0, 0)
    equal = pair_of(first, first, metric=PERPLEXITY)
    assert [getattr(equal.estimate, name) for name in ("value", "low", "high", "p")] == [0, 0, 0, 1]
    same: Any = pair_of(items_of([1, 0, 1]), items_of([1, 0, 1]))
    assert same.estimate.low < 0 < same.estimate.high and same.estimate.p == 1
    single = pair_of(items_of([1]), items_of([0])).estimate
    assert not single.has_interval and "one document" in (single.reason or "")
    assert not score([first[:1]], PERPLEXITY).has_interval
    assert score([items_of([1])], VALUE).has_interval  # Wilson's needs no second document
    huge = score([[{"id": k, "document": k, "nll": 1e6, "tokens": 1} for k in range(3)]], PERPLEXITY)
    assert huge.value == math.exp(700)
    for result in (equal, same, single, huge):
        json.dumps(to_json(result), allow_nan=False)


# Several training seeds


def test_values_are_the_seeds_and_the_items_interval_is_that_of_the_items_means() -> None:
    before, after = trainings(luck=0.01), trainings(luck=0.03, gain=0.02)
    result: Any = difference(list(zip(before, after)), PERPLEXITY)
    each = [
        sum(b["nll"] - a["nll"] for a, b in zip(first, second)) / (20 * ITEMS)
        for first, second in zip(before, after)
    ]
    assert result.nats.seeds.values == pytest.approx(each)
    assert (result.nats.value, result.nats.seeds.sd) == pytest.approx((np.mean(each), np.std(each, ddof=1)))
    means = []
    for side in (before, after):
        table = np.array([[item["nll"] for item in items] for items in side]).mean(axis=0)
        means.append([{**item, "nll": nll} for item, nll in zip(side[0], table)])
    plain: Any = pair_of(*means, metric=PERPLEXITY)
    for estimate, alone in ((result.estimate, plain.estimate), (result.nats, plain.nats)):
        items_alone = (estimate.seeds.item_low, estimate.seeds.item_high)
        assert items_alone == pytest.approx((alone.low, alone.high))
    assert result.test == "items_and_seeds" and result.estimate.p == combined_p(result.nats)
    mean: Any = score(before, PERPLEXITY)
    assert mean.value == pytest.approx(np.exp(np.mean(np.log(mean.seeds.values))))  # losses are averaged


def test_the_spread_of_seeds_widens_both_sides_by_the_formula() -> None:
    estimate: Any = combined(Estimate(1.0, 0.7, 1.2, documents=30), [0.9, 1.0, 1.4])
    spread = stats.t.ppf(0.975, 2) * np.std([0.9, 1.0, 1.4], ddof=1) / math.sqrt(3)
    assert estimate.low == pytest.approx(1.0 - math.hypot(0.3, spread))
    assert estimate.high == pytest.approx(1.0 + math.hypot(0.2, spread))
    assert combined(Estimate(1.0, 0.7, 1.2), [1.0]) == Estimate(1.0, 0.7, 1.2)


@pytest.mark.parametrize(("n", "sd"), [(2, 0.3), (3, 1.0), (4, 0.0)])
def test_p_is_the_error_rate_at_which_the_interval_touches_zero(n: int, sd: float) -> None:
    def p_of(value: float, item_se: float = 1.0) -> Any:
        half = stats.t.ppf(0.975, 49) * item_se
        seeds = Seeds((0.0,) * n, sd, value - half, value + half)
        return combined_p(Estimate(value, documents=50, seeds=seeds))

    for value in (0.4, 1.7, 3.0):
        p = p_of(value)
        items, seeds = stats.t.isf(p / 2, 49), stats.t.isf(p / 2, n - 1) * sd / math.sqrt(n)
        assert math.hypot(items, seeds) == pytest.approx(value)
    assert p_of(0.0) == 1.0
    if sd == 0:
        assert p_of(1e9) == pytest.approx(1e-12) == p_of(1.0, item_se=0.0)


def test_right_and_wrong_answers_keep_tangos_interval_over_seeds() -> None:
    rng = np.random.default_rng(1)
    before, after = (
        [items_of(rng.random(ITEMS) < share, field="accuracy") for _ in range(SEEDS)] for share in (0.5, 0.9)
    )
    same: Any = difference(list(zip(before, before)), ACCURACY).estimate
    # No item differs in any seed: not "exactly zero".
    assert (same.seeds.item_low, same.seeds.item_high) == pytest.approx(tango(0, 0, ITEMS))
    assert same.value == 0 and same.p == 1.0
    other: Any = difference(list(zip(before, after)), ACCURACY)
    counts = [
        [sum(a["accuracy"] > b["accuracy"] for a, b in zip(*pair)) for pair in ((x, y), (y, x))]
        for x, y in zip(before, after)
    ]
    lows, highs = zip(*(tango(*pair, ITEMS) for pair in counts))
    assert other.estimate.seeds.item_low <= np.mean(lows) < np.mean(highs) <= other.estimate.seeds.item_high
    assert other.estimate.value > 0.2 and other.estimate.p < 0.05 and other.only_first is None
