"""Results of models on tasks, and what differs between two models: per task, over tasks, after quantization.

Only results over the very same items are compared: each carries a hash of what was asked. A comparison takes
one pair of results (baseline, other arm) for each training seed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize, stats

from edgedisp.core.results import Estimate, LossSurvival, MeanDifference, Score, TaskDifference, TaskScore
from edgedisp.evaluate import statistics
from edgedisp.evaluate.statistics import DEFAULT, POWER, Items, Metric, PairedItems, Resampling


@dataclass(frozen=True)
class TaskResult:
    """One model's result on one task.

    definitions: metric -> its parts. items: {id, document, asked, and the fields that the metrics name};
    `asked` is a hash of the tokens or texts.
    """

    score: TaskScore
    definitions: dict[str, Metric]
    items: list[dict[str, Any]]

    @property
    def main(self) -> Metric:
        return self.definitions[self.score.main.metric]


Results = dict[str, TaskResult]
"""Task -> result of one model."""
Pair = tuple[TaskResult, TaskResult]
"""The baseline's result and another arm's, of one seed."""


def task_result(
    task: TaskScore, items: Items, metrics: Sequence[Metric], resampling: Resampling = DEFAULT
) -> TaskResult:
    """Sum up the items of one task, shares first (LAMBADA lists a loss before its accuracy); `task` gives its
    name, chance and truncated. ValueError for no items."""
    scores = []
    for metric in metrics:
        estimate = statistics.score([items], metric, resampling)
        is_share = metric.is_mean and metric.higher_is_better and 0 <= (estimate.value or 0.0) <= 1
        scores.append(Score(metric.name, estimate, metric.higher_is_better, is_share))
    scores.sort(key=lambda score: not score.is_share)
    questions = [[item["id"], item["document"], item["asked"]] for item in items]
    digest = hashlib.sha256(json.dumps(questions, ensure_ascii=False).encode()).hexdigest()
    score = replace(task, metrics={score.metric: score for score in scores}, items_sha256=digest)
    return TaskResult(score, {metric.name: metric for metric in metrics}, [dict(item) for item in items])


def average_task(results: Sequence[TaskResult], resampling: Resampling = DEFAULT) -> TaskScore:
    """One task's results of one arm with n seeds as one score; its estimates carry `seeds`."""
    first, trainings = results[0], [result.items for result in results]
    if len(results) == 1:
        return first.score
    metrics = {
        name: replace(score, estimate=statistics.score(trainings, first.definitions[name], resampling))
        for name, score in first.score.metrics.items()
    }
    return replace(first.score, metrics=metrics)


def compare_task(pairs: Sequence[Pair], resampling: Resampling = DEFAULT) -> TaskDifference:
    """second - first of every metric of one task, paired; one pair of results for each seed. Raises
    ValueError where the results do not hold the same items."""
    first, items = pairs[0][0], [(before.items, after.items) for before, after in pairs]
    metrics = {
        name: statistics.difference(items, first.definitions[name], resampling)
        for name in first.score.metrics
    }
    return TaskDifference(first.score.task, metrics)


def common_items(results: Sequence[TaskResult]) -> list[TaskResult]:
    """The results of one task, each cut to the items that all of them hold and summed up again. Raises
    ValueError where no item is left."""
    if len({result.score.items_sha256 for result in results}) == 1:
        return [*results]
    tables = [{(item["id"], item["asked"]): item for item in result.items} for result in results]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    if not shared:
        raise ValueError(f"{results[0].score.task}: no item in common")
    return [
        task_result(result.score, [table[key] for key in shared], [*result.definitions.values()])
        for result, table in zip(results, tables)
    ]


def common_pairs(
    first: Sequence[Results], second: Sequence[Results]
) -> tuple[dict[str, list[Pair]], list[str]]:
    """task -> both results of each seed, cut to their common items; and why tasks or items are missing."""
    tasks, other_tasks = first[0].keys(), second[0].keys()
    reasons = [f"{task}: scored in one of the two alone" for task in sorted(tasks ^ other_tasks)]
    fewest, most = sorted((len(first), len(second)))
    if fewest < most:
        reasons.append(f"{fewest} of {most} trainings have one to be paired with")
    pairs = {}
    for task in (name for name in tasks if name in other_tasks):
        results = [result[task] for pair in zip(first, second) for result in pair]
        try:
            cut = common_items(results)
        except ValueError as problem:
            reasons.append(f"{problem} (other text, tokenizer, context or seed)")
            continue
        if len(cut[0].items) < (items := max(len(result.items) for result in results)):
            reasons.append(f"{task}: {len(cut[0].items)} items in common of {items}")
        pairs[task] = list(zip(cut[::2], cut[1::2]))
    return pairs, reasons


def mean_difference(
    first: Mapping[str, TaskScore], second: Mapping[str, TaskScore], compared: Mapping[str, TaskDifference]
) -> MeanDifference | None:
    """The mean over tasks of second - first, in the metric's unit (0 to 1); each task counts once.

    Items of different tasks are independent: low = mean - sqrt(sum (d_k - low_k)^2) / K. The trainings, which
    the tasks share, have their spread added after that. Left out are tasks at chance in both models (named in
    `left_out`: they only dilute), and everything that is no share. None where fewer than two tasks are left.
    """
    changes = {task: difference.main.estimate for task, difference in compared.items()}
    shares = [task for task in changes if first[task].main.is_share and changes[task].has_interval]
    left_out = {
        task: "at chance" for task in shares if first[task].is_at_chance and second[task].is_at_chance
    }
    tasks = [task for task in shares if task not in left_out]
    if len(tasks) < 2:
        return None
    estimates = [changes[task] for task in tasks]
    over_items = [estimate.over_items or estimate for estimate in estimates]
    values, lows, highs = np.array([(each.value, each.low, each.high) for each in over_items], float).T
    value = float(values.mean())
    mean = Estimate(
        value,
        value - float(np.linalg.norm(values - lows)) / len(tasks),
        value + float(np.linalg.norm(highs - values)) / len(tasks),
        n=sum(estimate.n or 0 for estimate in estimates),
        documents=min(estimate.documents or 2 for estimate in estimates),
    )
    seeds = [estimate.seeds.values for estimate in estimates if estimate.seeds is not None]
    if seeds:  # all tasks have the same trainings
        mean = statistics.combined(mean, np.mean(seeds, axis=0).tolist())
    means = [np.mean([scores[task].main.estimate.value for task in tasks]) for scores in (first, second)]
    mean = statistics.with_power(mean)
    return MeanDifference(float(means[0]), float(means[1]), mean, tuple(tasks), left_out)


def loss_survival(models: Sequence[Sequence[TaskResult]], resampling: Resampling = DEFAULT) -> LossSurvival:
    """What quantization leaves of the difference in loss, nats per token. models: baseline, arm, and both
    quantized, each with its result of every seed.

    full = arm - baseline, quantized = Q(arm) - Q(baseline) and change = quantized - full are ratios of sums
    over documents that are resampled together, so what makes a document hard, and what rounding costs both
    alike, cancels. Raises ValueError where the results do not hold the same items.
    """
    items = [[result.items for result in trainings] for trainings in models]
    losses = PairedItems(items, replace(models[0][0].main, scale="mean"))
    full = losses.contrast((-1, 1, 0, 0), resampling)
    quantized = losses.contrast((0, 0, -1, 1), resampling)
    change = losses.contrast((1, -1, -1, 1), resampling)
    return LossSurvival(full, quantized, change, verdict(full, quantized, change))


def verdict(full: Estimate, quantized: Estimate, change: Estimate) -> str:
    """`nothing` (full is not clear), `unclear` (quantized is not), `reversed`, `kept` (the change is not
    clear), `weaker` or `stronger`. An estimate whose interval leaves 0 out is clear."""
    if not full.excludes_zero:
        return "nothing"
    if not quantized.excludes_zero:
        return "unclear"
    before, after, moved = ((estimate.low or 0.0) > 0 for estimate in (full, quantized, change))
    if before != after:
        return "reversed"
    if not change.excludes_zero:
        return "kept"
    return "stronger" if moved == before else "weaker"


# Power: for many items a two-sided test at 5 % finds a true difference of 2.80 standard errors 4 times out of
# 5 (Miller, Adding Error Bars to Evals, arXiv 2411.00640); for few, what the tests used here find.

DIFFERING = 0.06
"""Share of 0/1 items that two models trained alike answer differently: a high one of the 0.5 to 7 % measured
on SmolLM2-135M and the text of the recipe wikipedia (benchmarks/results/before_after.json)."""
DIFFERING_ANSWERS = 0.1
"""The same of exact answers after fine-tuning: at most 0.10 in the runs of benchmarks/function_calls.py."""
DOCUMENT_SD = {"fp32": 0.0023, "int8": 0.0105, "int4": 0.052}
"""Standard deviation over documents of 100 tokens of the arms' difference in loss, nats per token, measured
in the same study. At int4 most of it is rounding, which falls differently in each arm."""


def detectable_accuracy(items: int, differing: float = DIFFERING) -> float:
    """The difference between two accuracies, in [0, 1], that McNemar's exact test finds with 80 % power in so
    many paired items; 1 where it finds none. differing: share of the items that the models answer
    differently, at least."""

    def power(effect: float) -> float:
        share = max(differing, effect)
        better = (share + effect) / 2 / share
        least, most = stats.binom.ppf((1e-6, 1 - 1e-6), items, share)
        counts = np.arange(least, most + 1)  # of items that differ
        few = stats.binom.ppf(0.025, counts, 0.5) - 1  # the test rejects up to so many of the rarer kind
        rejects = stats.binom.cdf(few, counts, better) + stats.binom.cdf(few, counts, 1 - better)
        return float(stats.binom.pmf(counts, items, share) @ rejects)

    return float(optimize.brentq(lambda effect: power(effect) - POWER, 0.0, 1.0)) if power(1) > POWER else 1.0


def detectable_loss(documents: int, precision: str) -> float:
    """The difference in held-out loss, nats per token, that a t-test finds with 80 % power in so many
    documents."""
    freedom = max(1, documents - 1)
    t = stats.t.ppf(0.975, freedom)
    errors = optimize.brentq(lambda errors: stats.nct.sf(t, freedom, errors) - POWER, 1.0, 20.0)
    return float(errors * DOCUMENT_SD[precision] / math.sqrt(documents))
