"""Intervals and tests against formulas, published examples, other ways to compute them, and simulation."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from edgedisp.evaluate.statistics import (
    BITS_PER_BYTE,
    PERPLEXITY,
    Metric,
    mcnemar,
    paired,
    single,
    tango,
    wilson,
)

Items = list[dict[str, Any]]


def binary(values: Any, per_document: int = 1) -> Items:
    return [
        {"id": f"i{k}", "document": f"d{k // per_document}", "value": int(value)}
        for k, value in enumerate(values)
    ]


def losses(
    rng: np.random.Generator, documents: int, per_document: int, shift: float, spread: float
) -> tuple[Items, Items]:
    """Two arms over the same items; documents differ in difficulty and in how much the arm helps them."""
    hardness, gain = rng.normal(3, 0.3, documents), rng.normal(shift, spread, documents)
    baseline, dispersed = [], []
    for document in range(documents):
        for index in range(per_document):
            tokens = int(rng.integers(20, 60))
            loss = hardness[document] + rng.normal(0, 0.2)
            other = loss + gain[document] + rng.normal(0, 0.03)
            name = {
                "id": f"{document}.{index}",
                "document": str(document),
                "tokens": tokens,
                "bytes": 4 * tokens,
            }
            baseline.append({**name, "nll": loss * tokens})
            dispersed.append({**name, "nll": other * tokens})
    return baseline, dispersed


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


def test_tango_gives_the_published_interval() -> None:
    # Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014): of 21 pairs 1 and 7 disagree.
    assert tango(7, 1, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


@given(n=st.integers(5, 80), data=st.data())
@settings(max_examples=60)
def test_tango_bounds_are_where_the_score_test_just_rejects(n: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, n - 1))
    second = data.draw(st.integers(0, n - first))
    for bound in tango(first, second, n):
        if abs(bound) < 0.999:

            def loss(q: float, delta: float = bound) -> float:  # -log likelihood at P(only first) = q
                rest = 1 - 2 * q - delta
                terms = ((first, q), (second, q + delta), (n - first - second, rest))
                return -sum(count * math.log(max(p, 1e-300)) for count, p in terms if count)

            lowest, highest = max(0.0, -bound), (1 - bound) / 2
            share = optimize.minimize_scalar(loss, bounds=(lowest, highest), options={"xatol": 1e-10}).x
            z = (second - first - n * bound) / math.sqrt(n * (2 * share + bound - bound * bound))
            assert abs(z) == pytest.approx(stats.norm.ppf(0.975), abs=2e-3)


def test_tango_stays_open_when_no_item_differs() -> None:
    z = stats.norm.ppf(0.975)
    assert tango(0, 0, 100) == pytest.approx((-z * z / (100 + z * z), z * z / (100 + z * z)), abs=1e-6)


def test_a_permutation_test_can_be_sure_enough_for_a_hundred_comparisons() -> None:
    rng = np.random.default_rng(5)
    nll = rng.normal(300, 30, 60)
    pair = [
        [{"id": k, "document": k, "nll": float(one), "tokens": 100} for k, one in enumerate(values)]
        for values in (nll, nll - 20)
    ]
    assert paired(*pair, PERPLEXITY, bootstrap=50)["p_value"] < 1.1e-4
    assert paired(*pair, PERPLEXITY, bootstrap=2000)["p_value"] <= 0.05 / 1000


def test_one_accuracy_has_wilsons_interval() -> None:
    record = single(binary([1] * 7 + [0] * 13))
    assert (record["value"], record["n"], record["interval"]) == (0.35, 20, "wilson")
    assert (record["low"], record["high"]) == wilson(7, 20)


def test_perplexity_weighs_tokens_and_bits_weigh_bytes() -> None:
    items = [
        {"id": "a", "document": "a", "nll": 30.0, "tokens": 10, "bytes": 50},
        {"id": "b", "document": "b", "nll": 10.0, "tokens": 30, "bytes": 90},
    ]
    assert single(items, PERPLEXITY)["value"] == pytest.approx(math.exp(40 / 40))
    assert single(items, BITS_PER_BYTE)["value"] == pytest.approx(40 / 140 / math.log(2))


def test_bootstrap_of_a_mean_agrees_with_the_t_interval() -> None:
    values = np.random.default_rng(3).normal(5, 2, 60)
    record = single([{"id": k, "document": k, "value": v} for k, v in enumerate(values)], bootstrap=20_000)
    expected = stats.t.interval(0.95, 59, values.mean(), stats.sem(values))
    assert (record["low"], record["high"]) == pytest.approx(expected, abs=0.05)


def test_items_of_one_document_do_not_count_as_independent() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, 30)
    apart = [{"id": k, "document": k, "value": values[k // 10]} for k in range(300)]
    together = [{**item, "document": k // 10} for k, item in enumerate(apart)]
    width = {
        name: single(items)["high"] - single(items)["low"] for name, items in (("a", apart), ("t", together))
    }
    assert width["t"] > 2.5 * width["a"]


def test_pairing_aligns_items_by_id() -> None:
    baseline, dispersed = losses(np.random.default_rng(0), 12, 2, -0.1, 0.02)
    record = paired(baseline, dispersed, PERPLEXITY)
    assert paired(baseline, dispersed[::-1], PERPLEXITY) == record
    total = {
        name: sum(i["nll"] for i in arm) / sum(i["tokens"] for i in arm)
        for name, arm in (("b", baseline), ("d", dispersed))
    }
    assert record["difference"] == pytest.approx(math.exp(total["d"]) - math.exp(total["b"]))
    assert record["nll_difference"]["difference"] == pytest.approx(total["d"] - total["b"])
    assert (record["n"], record["documents"]) == (24, 12)
    assert record["low"] < record["difference"] < record["high"] < 0
    assert record["p_value"] < 0.01


def test_pairing_sees_what_two_separate_intervals_hide() -> None:
    baseline, dispersed = losses(np.random.default_rng(1), 40, 2, -0.05, 0.02)
    separate = [single(arm, PERPLEXITY) for arm in (baseline, dispersed)]
    assert separate[1]["high"] > separate[0]["low"]
    assert paired(baseline, dispersed, PERPLEXITY)["high"] < 0


def test_unlike_items_are_refused_by_name() -> None:
    items = binary([0, 1, 1])
    with pytest.raises(ValueError, match="1 items are missing from dispersed: i2"):
        paired(items, items[:2])
    with pytest.raises(ValueError, match="1 items are missing from baseline: i2"):
        paired(items[:2], items)
    with pytest.raises(ValueError, match="i1 belongs to different documents"):
        paired(items, [items[0], {**items[1], "document": "other"}, items[2]])
    with pytest.raises(ValueError, match="same id"):
        paired([*items, items[0]], items)
    with pytest.raises(ValueError, match="no items"):
        paired([], [])
    with pytest.raises(ValueError, match="not a finite number"):
        single([{"id": 1, "document": 1, "value": math.nan}])


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    baseline, dispersed = losses(np.random.default_rng(0), 20, 1, 0.0, 0.1)
    assert paired(baseline, dispersed, PERPLEXITY, seed=4) == paired(baseline, dispersed, PERPLEXITY, seed=4)
    assert (
        paired(baseline, dispersed, PERPLEXITY, seed=4)["low"]
        != paired(baseline, dispersed, PERPLEXITY, seed=5)["low"]
    )


def test_accuracies_carry_the_exact_test_and_the_counts() -> None:
    record = paired(binary([1, 1, 1, 0, 0, 0, 0, 0, 1, 1]), binary([1, 0, 1, 1, 1, 1, 1, 1, 1, 1]))
    assert (record["only_baseline"], record["only_dispersed"]) == (1, 5)
    assert record["p_value"] == record["mcnemar_p"] == mcnemar(1, 5)
    assert record["test"] == "mcnemar"
    low, high = tango(1, 5, 10)
    assert record["low"] <= low < record["difference"] < high <= record["high"]


def test_clustered_accuracies_are_tested_by_document() -> None:
    baseline, dispersed = binary([0] * 12, per_document=6), binary([1] * 6 + [0] * 6, per_document=6)
    record = paired(baseline, dispersed)
    assert record["mcnemar_p"] < 0.05
    assert record["test"] == "document_swap"
    assert record["p_value"] > 0.3


def test_degenerate_input_gives_no_nan() -> None:
    baseline, _ = losses(np.random.default_rng(0), 5, 2, 0, 0)
    equal = paired(baseline, baseline, PERPLEXITY)
    assert (equal["difference"], equal["low"], equal["high"], equal["p_value"], equal["identical"]) == (
        0,
        0,
        0,
        1,
        True,
    )
    same = paired(binary([1, 0, 1]), binary([1, 0, 1]))
    assert same["low"] < 0 < same["high"]
    assert same["p_value"] == 1
    one = paired(binary([1]), binary([0]))
    assert (one["low"], one["high"]) == (None, None)
    assert "one document" in one["reason"]
    lonely = single(baseline[:1], PERPLEXITY)
    assert (lonely["low"], lonely["high"]) == (None, None)
    assert single(binary([1] * 4))["high"] == 1.0
    huge = single([{"id": k, "document": k, "nll": 1e6, "tokens": 1} for k in range(3)], PERPLEXITY)
    for record in (equal, same, one, lonely, huge):
        json.loads(json.dumps(record, allow_nan=False))


def test_a_metric_of_ones_own_needs_no_code() -> None:
    metric = Metric("tokens_per_byte", "tokens", "bytes")
    assert single([{"id": 1, "document": 1, "tokens": 3, "bytes": 12}], metric)["value"] == 0.25


@pytest.mark.parametrize(("documents", "per_document"), [(20, 3), (60, 1)])
def test_paired_intervals_cover_the_truth_95_times_in_100(documents: int, per_document: int) -> None:
    rng, repetitions = np.random.default_rng(7), 600
    covered = rejected = 0
    for repetition in range(repetitions):
        baseline, dispersed = losses(rng, documents, per_document, 0.0, 0.05)
        record = paired(baseline, dispersed, PERPLEXITY, bootstrap=300, seed=repetition)
        covered += record["nll_difference"]["low"] <= 0 <= record["nll_difference"]["high"]
        rejected += record["p_value"] <= 0.05
    # Three standard errors of a share of 600 are 2.7 points: 0.90 (too sure) and 0.99 (too wide) both fail.
    assert 0.923 < covered / repetitions < 0.977
    assert rejected / repetitions < 0.077


def test_accuracy_intervals_cover_and_the_exact_test_rarely_cries_wolf() -> None:
    rng, repetitions, n = np.random.default_rng(8), 500, 80
    covered = rejected = 0
    for repetition in range(repetitions):
        first = rng.random(n) < 0.6
        second = np.where(rng.random(n) < 0.7, first, rng.random(n) < 0.6)
        record = paired(binary(first), binary(second), bootstrap=300, seed=repetition)
        covered += record["low"] <= 0 <= record["high"]
        rejected += record["p_value"] <= 0.05
    assert 0.93 < covered / repetitions < 0.99
    assert rejected / repetitions < 0.05
