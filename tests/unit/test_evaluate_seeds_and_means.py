"""Several seeds and several tasks: by hand, by the formula, and what is left out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from score_items import FEW, Items, binary, result

from edgedisp.core.results import Estimate, Score, Seeds, TaskScore
from edgedisp.evaluate import statistics
from edgedisp.evaluate.seeds_and_means import (
    at_chance,
    average_task,
    averaged,
    combined_p,
    compare_tasks,
    difference,
    mean_difference,
    score,
)
from edgedisp.evaluate.statistics import ACCURACY, PERPLEXITY, tango
from edgedisp.evaluate.task_result import TaskResult, compare_task, task_result

SEEDS, ITEMS = 3, 60


def trainings(seeds: int = SEEDS, luck: float = 0.0, gain: float = 0.0, rng_seed: int = 0) -> list[Items]:
    """`seeds` trainings' items: two a document, 20 tokens each; `luck` moves all items of one training."""
    rng = np.random.default_rng(rng_seed)
    hard, shifts = rng.normal(3, 1, ITEMS), rng.normal(0, 1, seeds) * luck
    noise = np.random.default_rng([rng_seed, 7]).normal(0, 0.05, (seeds, ITEMS))
    nll = 20 * (hard + shifts[:, None] - gain + noise)
    return [
        [{"id": f"i{i}", "document": f"d{i // 2}", "nll": one[i], "tokens": 20} for i in range(ITEMS)]
        for one in nll
    ]


def hits(share: float = 0.5, rng_seed: int = 0) -> list[Items]:
    rng = np.random.default_rng(rng_seed)
    return [binary(rng.random(ITEMS) < share, field="accuracy") for _ in range(SEEDS)]


def test_one_seed_is_the_plain_paired_comparison() -> None:
    before, after = trainings(1)[0], trainings(1, gain=0.02, rng_seed=1)[0]
    assert difference([(before, after)], PERPLEXITY) == statistics.difference(before, after, PERPLEXITY)
    assert score([before], PERPLEXITY) == statistics.score(before, PERPLEXITY)


def test_values_are_the_seeds_and_the_items_interval_is_that_of_the_items_means() -> None:
    before, after = trainings(luck=0.01), trainings(luck=0.03, gain=0.02)
    found = difference(list(zip(before, after)), PERPLEXITY)
    each = [
        sum(b["nll"] - a["nll"] for a, b in zip(one, other)) / (20 * ITEMS)
        for one, other in zip(before, after)
    ]
    assert found.nats is not None and found.nats.seeds is not None
    assert found.nats.seeds.values == pytest.approx(each) and found.nats.value == pytest.approx(np.mean(each))
    assert found.nats.seeds.sd == pytest.approx(np.std(each, ddof=1))
    means = []
    for side in (before, after):
        table = np.array([[item["nll"] for item in items] for items in side]).mean(axis=0)
        means.append([{**item, "nll": nll} for item, nll in zip(side[0], table)])
    expected = statistics.difference(*means, PERPLEXITY)
    for one, plain in ((found.estimate, expected.estimate), (found.nats, expected.nats)):
        assert one.seeds is not None and plain is not None
        assert (one.seeds.item_low, one.seeds.item_high) == pytest.approx((plain.low, plain.high))


def test_both_ends_follow_the_formula() -> None:
    found = difference(list(zip(trainings(luck=0.01), trainings(luck=0.05))), PERPLEXITY).nats
    assert found is not None and found.seeds is not None
    seeds: Any = found.seeds
    value: Any = found.value
    spread = stats.t.ppf(0.975, SEEDS - 1) * seeds.sd / math.sqrt(SEEDS)
    assert found.low == pytest.approx(value - math.hypot(value - seeds.item_low, spread))
    assert found.high == pytest.approx(value + math.hypot(seeds.item_high - value, spread))
    width = (seeds.item_high - seeds.item_low) / 2
    assert seeds.item_se == pytest.approx(width / stats.t.ppf(0.975, ITEMS // 2 - 1))


@pytest.mark.parametrize(("n", "sd"), [(2, 0.3), (3, 1.0), (4, 0.0)])
def test_p_is_the_error_rate_at_which_the_interval_touches_zero(n: int, sd: float) -> None:
    def p_of(value: float, item_se: float = 1.0) -> Any:
        return combined_p(Estimate(value, documents=50, seeds=Seeds((0.0,) * n, sd, item_se=item_se)))

    for value in (0.4, 1.7, 3.0):
        p = p_of(value)
        items, seeds = stats.t.isf(p / 2, 49), stats.t.isf(p / 2, n - 1) * sd / math.sqrt(n)
        assert math.hypot(items, seeds) == pytest.approx(value)
    assert p_of(0.0) == 1.0
    if sd == 0:
        assert p_of(1e9) == pytest.approx(1e-12) == p_of(1.0, item_se=0.0)


def test_right_and_wrong_answers_keep_tangos_interval() -> None:
    before, after = hits(rng_seed=1), hits(rng_seed=1)
    found = difference(list(zip(before, after)), ACCURACY).estimate
    ends = tango(0, 0, ITEMS)  # no item differs in any seed: not "exactly zero"
    assert found.seeds is not None and (found.seeds.item_low, found.seeds.item_high) == pytest.approx(ends)
    assert found.value == 0 and found.p == 1.0
    other: Any = difference(list(zip(before, hits(0.9, rng_seed=2))), ACCURACY).estimate
    assert other.low <= other.seeds.item_low < other.seeds.item_high <= other.high
    assert other.value > 0.2 and other.p < 0.05


def test_task_results_are_averaged_and_compared_over_seeds() -> None:
    before, after = (
        [result("t", items, PERPLEXITY) for items in side]
        for side in (trainings(luck=0.01), trainings(luck=0.02, gain=0.05))
    )
    compared, mean = compare_tasks(list(zip(before, after)), FEW), average_task(after, FEW)
    each: Any = [one.score.main.estimate.value for one in after]
    assert mean.main.estimate.value == pytest.approx(math.exp(np.mean(np.log(each))))  # losses are averaged
    assert compared.main.second == pytest.approx(mean.main.estimate.value)
    assert compared.main.estimate.seeds and mean.main.estimate.seeds
    assert compare_tasks([(before[0], after[0])], FEW) == compare_task(before[0], after[0], FEW)
    assert average_task(before[:1]) == before[0].score


def test_a_metric_of_the_whole_task_is_averaged_without_an_interval() -> None:
    items = [{"id": k, "document": k, "asked": k} for k in "ab"]
    made = [
        task_result(TaskScore("t", {"f1": Score("f1", Estimate(value, n=2), True)}), items, [])
        for value in (0.5, 0.7, 0.6, 0.6)
    ]
    mean = average_task(made).main.estimate
    assert mean.value == pytest.approx(0.6) and mean.low is None
    compared = compare_tasks([(made[0], made[1]), (made[2], made[3])]).main.estimate
    assert (
        compared.value == pytest.approx(0.1)
        and compared.low is None
        and "whole task" in (compared.reason or "")
    )


def test_other_items_are_refused_and_one_document_has_no_interval() -> None:
    before = trainings(luck=0.1)
    with pytest.raises(ValueError, match="not in every training's results"):
        averaged([before[0], before[1][1:]], PERPLEXITY)
    with pytest.raises(ValueError, match="weighs differently"):
        averaged([before[0], [{**item, "tokens": 3} for item in before[1]]], PERPLEXITY)
    made = [result("t", items, PERPLEXITY) for items in before]
    made[1] = replace(made[1], score=replace(made[1].score, items_sha256="other"))
    with pytest.raises(ValueError, match="do not hold the same items"):
        average_task(made)
    lists = [[{**item, "document": "d"} for item in items] for items in before]
    found = difference(list(zip(lists, reversed(lists))), PERPLEXITY).estimate
    assert found.low is None and found.seeds is not None and found.seeds.sd and found.seeds.item_se is None


# ---------------------------------------------------------------- means over tasks


def task(name: str, right: Any, chance: float | None = None) -> TaskResult:
    items = [
        {"id": k, "document": k, "accuracy": float(one), "nll": 3.0 + one, "tokens": 2}
        for k, one in enumerate(right)
    ]
    return result(name, items, PERPLEXITY if name == "loss" else ACCURACY, chance)


def means(before: dict[str, TaskResult], after: dict[str, TaskResult]) -> Any:
    compared = {name: compare_task(before[name], after[name], FEW) for name in before}
    return mean_difference(
        *({name: one.score for name, one in side.items()} for side in (before, after)), compared
    )


def test_each_task_counts_once_and_the_intervals_add_as_squares() -> None:
    rng = np.random.default_rng(0)
    before, after = (
        {"a": task("a", rng.random(20) < 0.5), "b": task("b", rng.random(200) < 0.6)} for _ in range(2)
    )
    found = means(before, after)
    parts: Any = [compare_task(before[name], after[name], FEW).main.estimate for name in ("a", "b")]
    assert found.estimate.value == pytest.approx(sum(one.value for one in parts) / 2)
    low = math.hypot(*(one.value - one.low for one in parts)) / 2
    assert found.estimate.low == pytest.approx(found.estimate.value - low)
    assert found.tasks == ("a", "b") and found.estimate.n == 220
    assert found.second - found.first == pytest.approx(found.estimate.value)


def test_losses_scores_to_100_and_tasks_at_chance_are_left_out() -> None:
    rng = np.random.default_rng(1)
    shares = {"good": 0.7, "also": 0.8, "guessed": 0.2, "loss": 0.5, "bleu": 0.6}
    scale = {"bleu": 40.0}
    pair = [
        {
            name: task(name, (rng.random(60) < share) * scale.get(name, 1.0), 0.25)
            for name, share in shares.items()
        }
        for _ in range(2)
    ]
    found = means(*pair)
    assert found.tasks == ("good", "also") and found.left_out == {"guessed": "at chance"}
    assert at_chance(pair[0]["guessed"].score)
    assert not at_chance(pair[0]["guessed"].score, pair[0]["good"].score)
    assert means(*({"good": side["good"], "loss": side["loss"]} for side in pair)) is None


def test_the_luck_of_seeds_is_shared_by_the_tasks_and_widens_the_interval() -> None:
    rng = np.random.default_rng(6)
    first = {name: rng.random(200) < 0.5 for name in "ab"}
    before = {name: task(name, right) for name, right in first.items()}
    lucky = [0.0, 0.3, -0.3]  # a seed that is good at one task is good at the other
    afters = [
        {name: task(name, np.where(rng.random(200) < abs(luck), luck > 0, first[name])) for name in first}
        for luck in lucky
    ]
    compared: Any = {name: compare_tasks([(before[name], one[name]) for one in afters], FEW) for name in "ab"}
    scores = [{name: side[name].score for name in "ab"} for side in (before, afters[0])]
    found: Any = mean_difference(*scores, compared)
    spread = found.estimate.seeds.sd
    by_task = [compared[name].main.estimate.seeds.sd for name in "ab"]
    assert spread > 0.8 * min(by_task)  # not divided by the root of two
    assert found.estimate.half_width > 4.30 * spread / math.sqrt(3) * 0.99
