"""Several seeds: their spread is put into the interval, and the interval holds what it says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from edgedisp.evaluate.result import compare_task, task_result
from edgedisp.evaluate.seeds import (
    average_task,
    averaged,
    combined,
    combined_p,
    compare_tasks,
    difference,
    score,
)
from edgedisp.evaluate.statistics import ACCURACY, PERPLEXITY, paired, single, tango

SEEDS, ITEMS = 3, 60


def losses(
    seeds: int = SEEDS, luck: float = 0.0, gain: float = 0.0, rng_seed: int = 0
) -> list[list[dict[str, Any]]]:
    """`seeds` trainings' items: two a document, 20 tokens each; `luck` moves all items of one training."""
    rng = np.random.default_rng(rng_seed)
    hard, shifts = rng.normal(3, 1, ITEMS), rng.normal(0, 1, seeds) * luck
    own = np.random.default_rng([rng_seed, 7]).normal(0, 0.05, (seeds, ITEMS))
    return [
        [
            {
                "id": f"i{i}",
                "document": f"d{i // 2}",
                "nll": 20 * (hard[i] + shift - gain + own[s, i]),
                "tokens": 20,
            }
            for i in range(ITEMS)
        ]
        for s, shift in enumerate(shifts)
    ]


def hits(seeds: int = SEEDS, share: float = 0.5, rng_seed: int = 0) -> list[list[dict[str, Any]]]:
    rng = np.random.default_rng(rng_seed)
    return [
        [
            {"id": f"i{i}", "document": f"d{i}", "accuracy": float(right)}
            for i, right in enumerate(rng.random(ITEMS) < share)
        ]
        for _ in range(seeds)
    ]


def test_one_seed_is_the_plain_paired_comparison() -> None:
    before, after = losses(1)[0], losses(1, gain=0.02, rng_seed=1)[0]
    assert difference([(before, after)], PERPLEXITY) == paired(before, after, PERPLEXITY)
    assert score([before], PERPLEXITY) == single(before, PERPLEXITY)


def test_the_difference_is_the_mean_over_seeds_of_the_seeds_differences() -> None:
    before, after = losses(luck=0.01), losses(luck=0.03, gain=0.02)
    found = difference(list(zip(before, after)), PERPLEXITY)["nll_difference"]
    each = [
        sum(a["nll"] - b["nll"] for a, b in zip(one, other)) / (20 * ITEMS)
        for other, one in zip(before, after)
    ]
    assert found["seeds"]["values"] == pytest.approx(each)
    assert found["difference"] == pytest.approx(np.mean(each))
    assert found["seeds"]["sd"] == pytest.approx(np.std(each, ddof=1))


def test_the_interval_over_items_is_that_of_the_items_means() -> None:
    """Second road: the items averaged by hand, and the plain paired interval."""
    before, after = losses(luck=0.01), losses(luck=0.02)
    means = []
    for trainings in (before, after):
        table = np.array([[item["nll"] for item in items] for items in trainings]).mean(axis=0)
        means.append([{**item, "nll": nll} for item, nll in zip(trainings[0], table)])
    expected = paired(*means, PERPLEXITY)
    found = difference(list(zip(before, after)), PERPLEXITY)
    assert found["difference"] == pytest.approx(expected["difference"])
    for part in (found, found["nll_difference"]):
        other = expected if part is found else expected["nll_difference"]
        assert part["seeds"]["item_low"] == pytest.approx(other["low"])
        assert part["seeds"]["item_high"] == pytest.approx(other["high"])


def test_both_ends_follow_the_formula() -> None:
    found = difference(list(zip(losses(luck=0.01), losses(luck=0.05))), PERPLEXITY)["nll_difference"]
    told, centre = found["seeds"], found["difference"]
    seeds = stats.t.ppf(0.975, SEEDS - 1) * told["sd"] / math.sqrt(SEEDS)
    assert found["low"] == pytest.approx(centre - math.sqrt((centre - told["item_low"]) ** 2 + seeds**2))
    assert found["high"] == pytest.approx(centre + math.sqrt((told["item_high"] - centre) ** 2 + seeds**2))
    assert told["item_se"] == pytest.approx(
        (told["item_high"] - told["item_low"]) / 2 / stats.t.ppf(0.975, ITEMS // 2 - 1)
    )


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_combined_interval_covers_at_least_what_it_promises(n: int) -> None:
    """20,000 builds: items' error 1, seeds' spread from none to far more; exact normal item intervals."""
    rng = np.random.default_rng(0)
    builds, documents = 20_000, 400
    half = stats.t.ppf(0.975, documents - 1)
    seeds_t = stats.t.ppf(0.975, n - 1)
    for luck in (0.0, 0.5, 2.0, 10.0):
        values = rng.normal(0, luck, (builds, n))
        centres = rng.normal(0, 1, builds) + values.mean(axis=1)
        sd = values.std(axis=1, ddof=1)
        record = {"difference": centres[0], "low": centres[0] - half, "high": centres[0] + half}
        one = combined(record, "difference", [*values[0]], documents, 0.95)
        wide = np.hypot(half, seeds_t * sd / math.sqrt(n))
        assert one["high"] - one["low"] == pytest.approx(2 * wide[0])
        covered = (np.abs(centres) < wide).mean()
        assert covered > 0.95 - 3 * math.sqrt(0.95 * 0.05 / builds)
        spread = sd / math.sqrt(n)
        free = (1 + spread**2) ** 2 / (1 / (documents - 1) + spread**4 / (n - 1))
        welch = (np.abs(centres) < stats.t.ppf(0.975, free) * np.sqrt(1 + spread**2)).mean()
        if n == 2 and luck == 10.0:
            assert welch < 0.9  # the narrower way that was left out
        if luck >= 2:
            assert (np.abs(centres) < half).mean() < 0.9  # items alone miss the luck of training


@pytest.mark.parametrize(("n", "sd"), [(2, 0.3), (3, 1.0), (4, 0.0)])
def test_p_is_the_error_rate_at_which_the_interval_touches_zero(n: int, sd: float) -> None:
    for value in (0.4, 1.7, 3.0):
        p = combined_p(value, 1.0, 50, sd, n)
        items = stats.t.isf(p / 2, 49)
        seeds = stats.t.isf(p / 2, n - 1) * sd / math.sqrt(n)
        assert math.hypot(items, seeds) == pytest.approx(value)
    assert combined_p(0.0, 1.0, 50, sd, n) == 1.0
    assert combined_p(1e9, 1.0, 50, 0.0, n) == pytest.approx(1e-12)
    assert combined_p(1.0, 0.0, 50, 0.0, n) == pytest.approx(1e-12)


def test_right_and_wrong_answers_keep_tangos_interval() -> None:
    before, after = hits(rng_seed=1), hits(rng_seed=1)
    found = difference(list(zip(before, after)), ACCURACY)
    ends = tango(0, 0, ITEMS)  # no item differs in any seed: not "exactly zero"
    assert (found["seeds"]["item_low"], found["seeds"]["item_high"]) == pytest.approx(ends)
    assert found["difference"] == 0 and found["p_value"] == 1.0
    other = difference(list(zip(before, hits(rng_seed=2, share=0.9))), ACCURACY)
    assert other["low"] <= other["seeds"]["item_low"] and other["high"] >= other["seeds"]["item_high"]
    assert other["difference"] > 0.2 and other["p_value"] < 0.05


def test_an_arms_own_score_carries_its_seeds() -> None:
    trainings = losses(luck=0.05)
    found = score(trainings, PERPLEXITY)
    each = [single(items, PERPLEXITY)["value"] for items in trainings]
    assert found["seeds"]["values"] == pytest.approx(each)
    assert found["value"] == pytest.approx(math.exp(np.mean(np.log(each))))  # losses are averaged
    assert found["low"] < found["seeds"]["item_low"] and found["high"] > found["seeds"]["item_high"]


def results(trainings: list[list[dict[str, Any]]]) -> list[Any]:
    marks = [str(i) for i in range(ITEMS)]
    return [task_result("t", items, [PERPLEXITY], fingerprints=marks, bootstrap=100) for items in trainings]


def test_task_results_are_averaged_and_compared_over_seeds() -> None:
    before, after = results(losses(luck=0.01)), results(losses(luck=0.02, gain=0.05))
    compared = compare_tasks(list(zip(before, after)), bootstrap=100)
    assert compared["seeds"]["n"] == SEEDS and compared["metrics"]["perplexity"]["seeds"]["n"] == SEEDS
    mean = average_task(after, bootstrap=100)
    assert mean["value"] == pytest.approx(compared["dispersed"]) and "items" not in mean
    assert mean["metrics"]["perplexity"]["seeds"]["n"] == SEEDS
    alone = compare_tasks([(before[0], after[0])], bootstrap=100)
    assert alone == compare_task(before[0], after[0], bootstrap=100)
    assert average_task(before[:1]) == {k: v for k, v in before[0].items() if k != "items"}


def test_a_metric_of_the_whole_task_is_averaged_without_an_interval() -> None:
    bare = [{"id": "a", "document": "a"}, {"id": "b", "document": "b"}]
    made = [
        task_result(
            "t", bare, [], fingerprints=["x", "y"],
            unpaired={"f1": {"metric": "f1", "value": v, "low": None, "high": None, "n": 2, "documents": 2,
                             "higher_is_better": True}},
        )
        for v in (0.5, 0.7, 0.6, 0.6)
    ]  # fmt: skip
    assert average_task(made)["value"] == pytest.approx(0.6) and average_task(made)["low"] is None
    compared = compare_tasks([(made[0], made[1]), (made[2], made[3])])
    assert compared["difference"] == pytest.approx(0.1) and compared["low"] is None


def test_other_items_are_refused() -> None:
    before = losses()
    with pytest.raises(ValueError, match="not in every training's results"):
        averaged([before[0], before[1][1:]], PERPLEXITY)
    with pytest.raises(ValueError, match="weighs differently"):
        averaged([before[0], [{**item, "tokens": 3} for item in before[1]]], PERPLEXITY)
    made = results(before)
    made[1]["items_sha256"] = "other"
    for call in (lambda: average_task(made), lambda: compare_tasks([(made[0], made[2]), (made[1], made[1])])):
        with pytest.raises(ValueError, match="do not all hold the same items"):
            call()


def test_one_document_has_a_spread_and_no_interval() -> None:
    lists = [[{**item, "document": "d"} for item in items] for items in losses(luck=0.1)]
    found = difference(list(zip(lists, reversed(lists))), PERPLEXITY)
    assert found["low"] is None and found["seeds"]["sd"] > 0 and found["seeds"]["item_se"] is None
