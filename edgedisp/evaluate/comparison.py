"""Results of models on tasks, and what differs between two models: per task, over tasks, after quantization.

Only results over the very same items are compared: each carries a hash of what was asked. A comparison takes
one pair of results (baseline, other arm) for each training seed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from edgedisp.core.results import (
    Z80,
    Z95,
    Difference,
    Estimate,
    LossSurvival,
    MeanDifference,
    Score,
    TaskDifference,
    TaskScore,
)
from edgedisp.evaluate import statistics
from edgedisp.evaluate.statistics import DEFAULT, Metric, Parts, Resampling, combined, interval

WHOLE_TASK = "computed over the whole task, not as a mean of items"


@dataclass(frozen=True)
class TaskResult:
    """One model's result on one task.

    definitions: metric -> its parts, for metrics that have a part per item; the first is the main one. items:
    {id, document, asked, and the fields that the metrics name}; `asked` is a hash of the tokens or texts.
    """

    score: TaskScore
    definitions: dict[str, Metric]
    items: list[dict[str, Any]]

    @property
    def task(self) -> str:
        return self.score.task


Results = dict[str, TaskResult]
"""Task -> result of one model."""
Pair = tuple[TaskResult, TaskResult]
"""The baseline's result and another arm's, of one seed."""
Four = tuple[TaskResult, TaskResult, TaskResult, TaskResult]
"""One task's results of one seed: baseline and arm in full precision, then both quantized."""


def task_result(
    task: TaskScore,
    items: Sequence[Mapping[str, Any]],
    metrics: Sequence[Metric],
    resampling: Resampling = DEFAULT,
) -> TaskResult:
    """Sum up the items of one task; `task` gives its name, chance, truncated and the metrics that exist for
    the whole task only. Raises ValueError for no items."""
    scores = {}
    for metric in metrics:
        estimate = statistics.score([items], metric, resampling)
        is_share = metric.is_mean and metric.higher_is_better and 0 <= (estimate.value or 0.0) <= 1
        scores[metric.name] = Score(metric.name, estimate, metric.higher_is_better, is_share)
    questions = [[item["id"], item["document"], item["asked"]] for item in items]
    digest = hashlib.sha256(json.dumps(questions, ensure_ascii=False).encode()).hexdigest()
    score = replace(task, metrics=scores | task.metrics, items_sha256=digest)
    return TaskResult(score, {metric.name: metric for metric in metrics}, [dict(item) for item in items])


def average_task(results: Sequence[TaskResult], resampling: Resampling = DEFAULT) -> TaskScore:
    """One task's results of one arm with n seeds as one score; its estimates carry `seeds`. Raises ValueError
    when the results do not hold the same items."""
    first = results[0]
    if len(results) == 1:
        return first.score
    _check_same_items(results)
    metrics: dict[str, Score] = {}
    for name, score in first.score.metrics.items():
        if metric := first.definitions.get(name):
            estimate = statistics.score([result.items for result in results], metric, resampling)
        else:
            values = [result.score.metrics[name].estimate.value for result in results]
            finite = [value for value in values if value is not None]
            mean = fmean(finite) if len(finite) == len(values) else None
            estimate = replace(score.estimate, value=mean)
        metrics[name] = replace(score, estimate=estimate)
    return replace(first.score, metrics=metrics)


def compare_task(pairs: Sequence[Pair], resampling: Resampling = DEFAULT) -> TaskDifference:
    """second - first of every metric of one task, paired; one pair of results for each seed.

    A main metric without a part per item comes first all the same, without an interval and with `reason`.
    Raises ValueError when the results come from different tasks or different items.
    """
    _check_same_items([result for pair in pairs for result in pair])
    first = pairs[0][0]
    items = [(before.items, after.items) for before, after in pairs]
    metrics = {
        name: statistics.difference(items, metric, resampling) for name, metric in first.definitions.items()
    }
    main = first.score.main
    if main.metric not in metrics:
        before, after = (
            average_task([pair[side] for pair in pairs], resampling).main.estimate for side in (0, 1)
        )
        change = None if before.value is None or after.value is None else after.value - before.value
        estimate = Estimate(change, n=before.n, documents=before.documents, reason=WHOLE_TASK)
        whole = Difference(main.metric, before.value, after.value, estimate, main.higher_is_better)
        metrics = {main.metric: whole, **metrics}
    return TaskDifference(first.task, metrics)


def _check_same_items(results: Sequence[TaskResult]) -> None:
    first = results[0]
    for other in results[1:]:
        if (first.task, first.score.items_sha256) != (other.task, other.score.items_sha256):
            raise ValueError(
                f"{first.task} ({len(first.items)} items) and {other.task} ({len(other.items)} items) do not "
                "hold the same items and cannot be paired; score both with one recipe, tokenizer and seed"
            )


def common_items(results: Sequence[TaskResult]) -> list[TaskResult]:
    """The results of one task, each cut to the items that all of them hold and summed up again. Raises
    ValueError where no item is left, or items differ and the main metric exists for the whole task only."""
    first = results[0]
    if len({result.score.items_sha256 for result in results}) == 1:
        return [*results]
    if first.score.main.metric not in first.definitions:
        raise ValueError(f"{first.task}: {first.score.main.metric} is made of all items, and these differ")
    tables = [{(item["id"], item["asked"]): item for item in result.items} for result in results]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    if not shared:
        raise ValueError(f"{first.task}: no item in common")
    return [
        task_result(
            replace(result.score, metrics={}), [table[key] for key in shared], [*result.definitions.values()]
        )
        for result, table in zip(results, tables)
    ]


def at_chance(*scores: TaskScore) -> bool:
    """Whether the interval of every score reaches down to what guessing gives."""
    lows = [(score.chance, score.main.estimate.low) for score in scores]
    return all(chance is not None and low is not None and low <= chance for chance, low in lows)


def mean_difference(
    first: Mapping[str, TaskScore],
    second: Mapping[str, TaskScore],
    compared: Mapping[str, TaskDifference],
) -> MeanDifference | None:
    """The mean over tasks of second - first, in the metric's unit (0 to 1); each task counts once.

    Items of different tasks are independent: low = mean - sqrt(sum (d_k - low_k)^2) / K. The trainings, which
    the tasks share, have their spread added after that. Left out are tasks at chance in both models (named in
    `left_out`: they only dilute), and everything that is no share. None where fewer than two tasks are left.
    """
    shares = [
        task
        for task in compared
        if first[task].main.is_share and compared[task].main.estimate.low is not None
    ]
    left_out = {task: "at chance" for task in shares if at_chance(first[task], second[task])}
    tasks = [task for task in shares if task not in left_out]
    if len(tasks) < 2:
        return None
    estimates = [compared[task].main.estimate for task in tasks]
    value = fmean(estimate.value or 0.0 for estimate in estimates)

    def distance(bound: str) -> float:
        """To a bound of the mean's interval over items alone."""
        bounds = [getattr(e.seeds, f"item_{bound}") if e.seeds else getattr(e, bound) for e in estimates]
        return math.hypot(*((e.value or 0.0) - at for e, at in zip(estimates, bounds))) / len(estimates)

    mean = Estimate(
        value,
        value - distance("low"),
        value + distance("high"),
        n=sum(estimate.n or 0 for estimate in estimates),
        documents=min(estimate.documents or 2 for estimate in estimates),
    )
    seeds = [estimate.seeds.values for estimate in estimates if estimate.seeds is not None]
    if len(seeds) == len(estimates):
        mean = combined(mean, [fmean(values) for values in zip(*seeds)])
    means = [fmean(scores[task].main.estimate.value or 0.0 for task in tasks) for scores in (first, second)]
    return MeanDifference(means[0], means[1], mean, tuple(tasks), left_out)


def is_loss(result: TaskResult) -> bool:
    """Whether a task is a loss per token, the only kind that differences are fine enough for."""
    metric = result.definitions.get(result.score.main.metric)
    return metric is not None and metric.scale == "exp" and metric.denominator is not None


def loss_survival(results: Sequence[Four], resampling: Resampling = DEFAULT) -> LossSurvival:
    """What quantization leaves of the difference in loss, nats per token; results: one four for each seed.

    full = arm - baseline, quantized = Q(arm) - Q(baseline) and change = quantized - full are ratios of sums
    over documents that are resampled together, so what makes a document hard, and what rounding costs both
    alike, cancels. Raises ValueError when the results do not hold the same items.
    """
    _check_same_items([result for four in results for result in four])
    first = results[0][0]
    metric = first.definitions[first.score.main.metric]

    def sums(fours: Sequence[Four]) -> statistics.Sums:
        """Losses by document of the four models, then the tokens, which are the same for all."""
        parts = [Parts([result.items for result in model], metric).by_document for model in zip(*fours)]
        return (*(losses for losses, _ in parts), parts[0][1])

    together, by_seed = sums(results), [sums([four]) for four in results]

    def estimate(statistic: Callable[..., Any]) -> Estimate:
        value, *values = (float(statistic(*(part.sum() for part in each))) for each in (together, *by_seed))
        items_alone = interval(together, statistic, value, resampling)
        return combined(replace(items_alone, n=len(first.items)), values)

    full = estimate(lambda base, arm, q_base, q_arm, tokens: (arm - base) / tokens)
    quantized = estimate(lambda base, arm, q_base, q_arm, tokens: (q_arm - q_base) / tokens)
    change = estimate(lambda base, arm, q_base, q_arm, tokens: ((q_arm - q_base) - (arm - base)) / tokens)
    return LossSurvival(full, quantized, change, verdict(full, quantized, change))


def verdict(full: Estimate, quantized: Estimate, change: Estimate) -> str:
    """`nothing` (full is not clear), `unclear` (quantized is not), `reversed`, `kept` (the change is not
    clear), `weaker` or `stronger`. An estimate whose interval leaves 0 out is clear."""
    before, after, moved = (
        0 if not estimate.excludes_zero else 1 if (estimate.low or 0) > 0 else -1
        for estimate in (full, quantized, change)
    )
    if not before or not after:
        return "unclear" if before else "nothing"
    if after != before:
        return "reversed"
    return "kept" if not moved else "stronger" if moved == before else "weaker"


# Power: a two-sided test at 5 % finds a true difference of 2.80 standard errors 4 times out of 5 (Miller,
# Adding Error Bars to Evals, arXiv 2411.00640). Of paired 0/1 items one is sqrt(share / n), share being those
# that one of the two models alone gets right.

POWER_FACTOR = Z95 + Z80
DIFFERING = 0.06
"""Share of 0/1 items that two models trained alike answer differently: a high one of the 0.5 to 7 % measured
on SmolLM2-135M and the quickstart's text (benchmarks/results/before_after.json)."""
DOCUMENT_SD = {"fp32": 0.0023, "int8": 0.0105, "int4": 0.052}
"""Standard deviation over documents of 100 tokens of the arms' difference in loss, nats per token, measured
in the same study. At int4 most of it is rounding, which falls differently in each arm."""


def detectable_accuracy(items: int, differing: float = DIFFERING) -> float:
    """The difference between two accuracies, in [0, 1], that so many paired items show."""
    return min(1.0, POWER_FACTOR * math.sqrt(differing / items))


def detectable_loss(documents: int, precision: str) -> float:
    """The difference in held-out loss, nats per token, that so many documents show."""
    return POWER_FACTOR * DOCUMENT_SD[precision] / math.sqrt(documents)


def items_for(effect: float, differing: float = DIFFERING) -> int:
    """Paired 0/1 items that it takes to see a difference of `effect`."""
    return math.ceil(differing * (POWER_FACTOR / effect) ** 2)
