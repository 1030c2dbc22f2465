"""The mean over tasks: by hand, against simulation, and what it leaves out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edgedisp.evaluate.means import at_chance, mean_difference
from edgedisp.evaluate.result import TaskResult, compare_task, task_result
from edgedisp.evaluate.seeds import compare_tasks
from edgedisp.evaluate.statistics import ACCURACY, PERPLEXITY


def result(task: str, right: Any, chance: float | None = None) -> TaskResult:
    items = [
        {"id": k, "document": k, "accuracy": int(one), "nll": 3.0 + one, "tokens": 2}
        for k, one in enumerate(right)
    ]
    marks = [str(k) for k in range(len(items))]
    metric = PERPLEXITY if task == "loss" else ACCURACY
    return task_result(task, items, [metric], fingerprints=marks, chance=chance, bootstrap=200)


def means(before: dict[str, TaskResult], after: dict[str, TaskResult]) -> Any:
    compared = {task: compare_task(before[task], after[task], bootstrap=200) for task in before}
    return mean_difference(before, after, compared)


def some(rng: np.random.Generator, share: float, n: int = 60) -> Any:
    return rng.random(n) < share


def test_each_task_counts_once_and_the_intervals_add_as_squares() -> None:
    rng = np.random.default_rng(0)
    before = {"a": result("a", some(rng, 0.5, 20)), "b": result("b", some(rng, 0.6, 200))}
    after = {"a": result("a", some(rng, 0.5, 20)), "b": result("b", some(rng, 0.6, 200))}
    record = means(before, after)
    parts = [compare_task(before[task], after[task], bootstrap=200) for task in ("a", "b")]
    assert record["difference"] == pytest.approx(sum(one["difference"] for one in parts) / 2)
    low = math.hypot(*(one["difference"] - one["low"] for one in parts)) / 2
    assert record["low"] == pytest.approx(record["difference"] - low)
    assert record["tasks"] == ["a", "b"] and record["n"] == 220
    assert record["arm"] - record["baseline"] == pytest.approx(record["difference"])


def test_a_score_from_0_to_100_is_no_share() -> None:
    rng = np.random.default_rng(2)
    before, after = ({task: result(task, some(rng, 0.6)) for task in "ab"} for _ in range(2))
    for side in (before, after):
        items = [{**item, "accuracy": 40.0 * item["accuracy"]} for item in side["a"]["items"]]
        side["bleu"] = task_result("bleu", items, [ACCURACY], fingerprints=[str(k) for k in range(60)])
    assert means(before, after)["tasks"] == ["a", "b"]


def test_a_task_at_chance_for_both_and_a_loss_are_left_out() -> None:
    rng = np.random.default_rng(1)
    tasks = {"good": 0.7, "also": 0.8, "guessed": 0.24, "loss": 0.5}
    pair = [
        {task: result(task, some(rng, share), chance=0.25) for task, share in tasks.items()} for _ in range(2)
    ]
    record = means(*pair)
    assert record["tasks"] == ["good", "also"]
    assert record["left_out"] == {"guessed": "at chance"}
    assert at_chance(pair[0]["guessed"]) and not at_chance(pair[0]["guessed"], pair[0]["good"])


def test_one_task_has_no_mean() -> None:
    rng = np.random.default_rng(2)
    pair = [{"a": result("a", some(rng, 0.5)), "loss": result("loss", some(rng, 0.5))} for _ in range(2)]
    assert means(*pair) is None


def test_the_interval_covers_a_true_difference_of_zero() -> None:
    rng, repetitions = np.random.default_rng(5), 150
    covered = 0
    for _ in range(repetitions):
        pair: list[dict[str, TaskResult]] = [{}, {}]
        for task in "abcd":
            first = some(rng, 0.6, 80)
            second = np.where(rng.random(80) < 0.8, first, some(rng, 0.6, 80))
            pair[0][task], pair[1][task] = result(task, first), result(task, second)
        record = means(*pair)
        covered += record["low"] <= 0 <= record["high"]
    assert 0.90 < covered / repetitions <= 0.995


def test_the_luck_of_seeds_is_shared_by_the_tasks_and_widens_the_interval() -> None:
    rng = np.random.default_rng(6)
    first = {task: some(rng, 0.5, 200) for task in "ab"}
    before = {task: result(task, right) for task, right in first.items()}
    lucky = [0.0, 0.3, -0.3]  # a seed that is good at one task is good at the other

    def after(right: Any, luck: float) -> Any:
        return np.where(rng.random(200) < abs(luck), luck > 0, right)

    afters = [{task: result(task, after(first[task], luck)) for task in first} for luck in lucky]
    compared = {
        task: compare_tasks([(before[task], one[task]) for one in afters], bootstrap=200) for task in "ab"
    }
    record = mean_difference(before, afters[0], compared)
    assert record is not None
    spread = record["seeds"]["sd"]
    by_task = [compared[task]["seeds"]["sd"] for task in "ab"]
    assert record["seeds"]["n"] == 3 and spread > 0.8 * min(by_task)  # not divided by the root of two
    assert record["high"] - record["low"] > 2 * 4.30 * spread / math.sqrt(3) * 0.99
