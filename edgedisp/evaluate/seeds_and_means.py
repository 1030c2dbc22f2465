"""Several trainings of each arm, and the mean over tasks: intervals put together from independent parts.

Seeds. With n seeds a model's score on an item is the mean over its n trainings. The luck of training shows in
how the n differences (one per seed, same items) spread. Both are combined on each side, `items` being the
distance to that end of the items' interval (MOVER: Zou and Donner, Statistics in Medicine 27, 2008):

    half-width = sqrt(items^2 + seeds^2),   seeds = t(n - 1) * sd / sqrt(n)

Tasks. Each counts once; their items are independent: low = mean - sqrt(sum (d_k - low_k)^2) / K.
With seeds, which the tasks share, the items' intervals are combined so, then the seeds' spread is added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
from scipy import optimize, stats

from edgedisp.core.results import (
    Difference,
    Estimate,
    MeanDifference,
    Score,
    Seeds,
    TaskDifference,
    TaskScore,
)
from edgedisp.evaluate import statistics
from edgedisp.evaluate.statistics import DEFAULT, Item, Metric, Resampling, metric_of, no_narrower, tango
from edgedisp.evaluate.task_result import TaskResult, check_same_items, compare_task, with_main

Items = Sequence[Item]


def average_task(results: Sequence[TaskResult], resampling: Resampling = DEFAULT) -> TaskScore:
    """One task's results of one arm with n seeds as one score; its estimates carry `seeds`.

    Raises ValueError when the results do not hold the same items.
    """
    first = results[0].score
    if len(results) == 1:
        return first
    check_same_items(results)
    metrics: dict[str, Score] = {}
    for name, old in first.metrics.items():
        if metric := results[0].definitions.get(name):
            estimate = score([result.items for result in results], metric, resampling)
        else:
            values = [result.score.metrics[name].estimate.value for result in results]
            finite = [value for value in values if value is not None]
            mean = fmean(finite) if len(finite) == len(values) else None
            estimate = replace(old.estimate, value=mean)
        metrics[name] = replace(old, estimate=estimate)
    return replace(first, metrics=metrics)


def compare_tasks(
    pairs: Sequence[tuple[TaskResult, TaskResult]], resampling: Resampling = DEFAULT
) -> TaskDifference:
    """`compare_task` over n seeds: pairs of (baseline, other arm), one for each seed.

    With several, every estimate carries `seeds`. Raises ValueError for different tasks or items.
    """
    if len(pairs) == 1:
        return compare_task(*pairs[0], resampling)
    check_same_items([result for pair in pairs for result in pair])
    metrics = {
        name: difference([(before.items, after.items) for before, after in pairs], metric, resampling)
        for name, metric in pairs[0][0].definitions.items()
    }
    befores, afters = (average_task([pair[side] for pair in pairs], resampling) for side in (0, 1))
    return TaskDifference(befores.task, with_main(metrics, befores, afters))


def score(trainings: Sequence[Items], metric: Metric, resampling: Resampling = DEFAULT) -> Estimate:
    """`statistics.score` of the items' means over n trainings, combined with the seeds' spread.

    Raises ValueError when the trainings hold other items.
    """
    estimate = statistics.score(averaged(trainings, metric), metric, resampling)
    if len(trainings) == 1:
        return estimate
    return combined(estimate, [metric_of(items, metric) for items in trainings])


def difference(
    pairs: Sequence[tuple[Items, Items]], metric: Metric, resampling: Resampling = DEFAULT
) -> Difference:
    """`statistics.difference` of the items' means over n seeds, with the spread between seeds put in.

    p: the smallest error rate at which the combined interval leaves out 0 (the items' errors taken as
    t-distributed). Raises ValueError when two of the 2n lists do not hold the same items.
    """
    befores, afters = [before for before, _ in pairs], [after for _, after in pairs]
    result = statistics.difference(averaged(befores, metric), averaged(afters, metric), metric, resampling)
    if len(pairs) == 1:
        return result

    def by_seed(of: Metric) -> list[float]:
        return [metric_of(after, of) - metric_of(before, of) for before, after in pairs]

    estimate = combined(_no_narrower_than_tango(result.estimate, pairs, metric), by_seed(metric))
    nats = result.nats
    if nats is not None:
        nats = combined(nats, by_seed(replace(metric, scale="mean")))
    p, test = combined_p(estimate if nats is None else nats), "items_and_seeds"
    if p is None:
        p, test = result.estimate.p, result.test or ""
    return replace(result, estimate=replace(estimate, p=p), nats=nats, test=test)


def averaged(trainings: Sequence[Items], metric: Metric) -> list[dict[str, Any]]:
    """The items with the metric's numerator averaged over trainings, in the order of the first.

    Raises ValueError if an item is missing somewhere, or weighs differently.
    """
    tables = [{str(item["id"]): item for item in items} for items in trainings]
    if any(table.keys() != tables[0].keys() for table in tables):
        raise ValueError("some items are not in every training's results")
    weight = metric.denominator
    result = []
    for name, item in tables[0].items():
        same = [table[name] for table in tables]
        if weight is not None and any(other[weight] != item[weight] for other in same):
            raise ValueError(f"item {name} weighs differently in two trainings; score all with one tokenizer")
        result.append({**item, metric.numerator: fmean(other[metric.numerator] for other in same)})
    return result


def combined(estimate: Estimate, values: Sequence[float]) -> Estimate:
    """The estimate with its interval widened by the spread of the seeds' `values`."""
    sd, low, high, value = float(np.std(values, ddof=1)), estimate.low, estimate.high, estimate.value
    if low is None or high is None or value is None:
        return replace(estimate, seeds=Seeds(tuple(values), sd, low, high))
    spread = float(stats.t.ppf(0.975, len(values) - 1)) * sd / math.sqrt(len(values))
    item_se = (high - low) / (2 * float(stats.t.ppf(0.975, (estimate.documents or 2) - 1)))
    return replace(
        estimate,
        low=value - math.hypot(value - low, spread),
        high=value + math.hypot(high - value, spread),
        seeds=Seeds(tuple(values), sd, low, high, item_se),
    )


def combined_p(estimate: Estimate) -> float | None:
    """Two-sided p at which the combined interval would just touch 0, from 1e-12 to 1; None without one."""
    seeds, value = estimate.seeds, estimate.value
    if seeds is None or seeds.item_se is None or seeds.sd is None or value is None:
        return None
    n, sd, item_se, freedom = len(seeds.values), seeds.sd, seeds.item_se, (estimate.documents or 2) - 1

    def beyond(log_p: float) -> float:
        tail = math.exp(log_p) / 2
        spread = stats.t.isf(tail, n - 1) * sd / math.sqrt(n)
        return float(value**2 - (stats.t.isf(tail, freedom) * item_se) ** 2 - spread**2)

    least = math.log(1e-12)
    if value == 0:
        return 1.0
    return 1e-12 if beyond(least) >= 0 else math.exp(optimize.brentq(beyond, least, 0.0))


def _no_narrower_than_tango(
    estimate: Estimate, pairs: Sequence[tuple[Items, Items]], metric: Metric
) -> Estimate:
    """For 0/1 items: at least as wide as the mean of the seeds' Tango intervals, which is what would hold if
    the seeds shared all of their luck with the items."""
    if not metric.may_be_share:
        return estimate
    ends = []
    for pair in pairs:
        first, second = ({str(item["id"]): item[metric.numerator] for item in items} for items in pair)
        if not {*first.values(), *second.values()} <= {0, 1}:
            return estimate
        only_first = sum(first[name] > second[name] for name in first)
        only_second = sum(second[name] > first[name] for name in first)
        ends.append(tango(only_first, only_second, len(first)))
    lows, highs = zip(*ends)
    return no_narrower(estimate, fmean(lows), fmean(highs))


def at_chance(*scores: TaskScore) -> bool:
    """Whether the interval of every score reaches down to what guessing gives."""
    ends = [(score.chance, score.main.estimate.low) for score in scores]
    return all(chance is not None and low is not None and low <= chance for chance, low in ends)


def mean_difference(
    first: Mapping[str, TaskScore],
    second: Mapping[str, TaskScore],
    compared: Mapping[str, TaskDifference],
) -> MeanDifference | None:
    """The mean over tasks of second - first, in the metric's unit (0 to 1).

    Left out are tasks at chance in both models (named in `left_out`: they only dilute), and everything that
    is no share. None where fewer than two tasks are left.
    """
    shares = [
        task
        for task, change in compared.items()
        if first[task].main.is_share and change.main.estimate.low is not None
    ]
    left_out = {task: "at chance" for task in shares if at_chance(first[task], second[task])}
    tasks = [task for task in shares if task not in left_out]
    if len(tasks) < 2:
        return None
    estimates = [compared[task].main.estimate for task in tasks]
    value = fmean(estimate.value or 0.0 for estimate in estimates)

    def distance(end: str) -> float:
        ends = [getattr(one.seeds, f"item_{end}") if one.seeds else getattr(one, end) for one in estimates]
        return math.hypot(*((one.value or 0.0) - at for one, at in zip(estimates, ends))) / len(estimates)

    mean = Estimate(
        value,
        value - distance("low"),
        value + distance("high"),
        n=sum(estimate.n or 0 for estimate in estimates),
        documents=min(estimate.documents or 2 for estimate in estimates),
    )
    seeds = [estimate.seeds for estimate in estimates if estimate.seeds is not None]
    if len(seeds) == len(estimates):
        mean = combined(mean, [fmean(values) for values in zip(*(one.values for one in seeds))])
    means = [fmean(scores[task].main.estimate.value or 0.0 for task in tasks) for scores in (first, second)]
    return MeanDifference(means[0], means[1], mean, tuple(tasks), left_out)
