"""One model's result on one task: its scores, and every item, so that two results can be paired.

A hash of what was asked goes with the scores: results are compared only when they come from the same items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgedisp.core.results import Difference, Estimate, Score, TaskDifference, TaskScore
from edgedisp.evaluate import statistics
from edgedisp.evaluate.statistics import DEFAULT, Metric, Resampling

WHOLE_TASK = "computed over the whole task, not as a mean of items"


@dataclass(frozen=True)
class TaskResult:
    """One model's result on one task.

    definitions: metric -> its parts, for metrics that have a part per item. items: {id, document, asked, and
    the fields that the metrics name}; `asked` is a hash of the tokens or texts that were asked.
    """

    score: TaskScore
    definitions: dict[str, Metric]
    items: list[dict[str, Any]]

    @property
    def task(self) -> str:
        return self.score.task


Results = dict[str, TaskResult]
"""Task -> result of one model."""


def task_result(
    task: TaskScore,
    items: Sequence[Mapping[str, Any]],
    metrics: Sequence[Metric],
    resampling: Resampling = DEFAULT,
) -> TaskResult:
    """Sum up the items of one task.

    `task` gives name, chance and truncated, and the metrics that exist for the whole task only. The first of
    `metrics` is the main one. Raises ValueError for no items.
    """
    scores = {metric.name: _score(metric, items, resampling) for metric in metrics}
    named = [[item["id"], item["document"], item["asked"]] for item in items]
    digest = hashlib.sha256(json.dumps(named, ensure_ascii=False).encode()).hexdigest()
    return TaskResult(
        replace(task, metrics=scores | task.metrics, items_sha256=digest),
        {metric.name: metric for metric in metrics},
        [dict(item) for item in items],
    )


def _score(metric: Metric, items: Sequence[Mapping[str, Any]], resampling: Resampling) -> Score:
    estimate = statistics.score(items, metric, resampling)
    is_share = metric.may_be_share and metric.higher_is_better and 0 <= (estimate.value or 0.0) <= 1
    return Score(metric.name, estimate, metric.higher_is_better, is_share)


def compare_task(first: TaskResult, second: TaskResult, resampling: Resampling = DEFAULT) -> TaskDifference:
    """Pair two results of one task, second - first of every metric.

    A main metric without a part per item gets no interval, and a `reason`. Raises ValueError when the results
    come from different tasks or different items.
    """
    check_same_items([first, second])
    metrics = {
        name: statistics.difference(first.items, second.items, metric, resampling)
        for name, metric in first.definitions.items()
    }
    return TaskDifference(first.task, with_main(metrics, first.score, second.score))


def with_main(
    metrics: Mapping[str, Difference], first: TaskScore, second: TaskScore
) -> dict[str, Difference]:
    """The differences of a task with its main metric's first, without interval where it cannot be paired."""
    main = first.main
    if main.metric in metrics:
        return dict(metrics)
    before, after = main.estimate, second.main.estimate
    change = None if before.value is None or after.value is None else after.value - before.value
    estimate = Estimate(change, n=before.n, documents=before.documents, reason=WHOLE_TASK)
    unpaired = Difference(main.metric, before.value, after.value, estimate, main.higher_is_better)
    return {main.metric: unpaired, **metrics}


def check_same_items(results: Sequence[TaskResult]) -> None:
    """Raise ValueError when results come from different tasks or different items."""
    first = results[0]
    for other in results[1:]:
        if (first.task, first.score.items_sha256) != (other.task, other.score.items_sha256):
            raise ValueError(
                f"{first.task} ({len(first.items)} items) and {other.task} ({len(other.items)} items) do not "
                "hold the same items and cannot be paired; score both with one recipe, tokenizer and seed"
            )


def common_items(results: Sequence[TaskResult]) -> list[TaskResult]:
    """The results of one task, each cut to the items that all of them hold and summed up again.

    Raises ValueError when they hold no item in common, belong to different tasks, or would have to be cut and
    their main metric exists for the whole task only.
    """
    first = results[0]
    if any(result.task != first.task for result in results):
        raise ValueError(f"results of {' and '.join(result.task for result in results)} cannot be paired")
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
