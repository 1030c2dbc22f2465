"""What a task leaves behind: its metrics with intervals, and every item, so that two results can be paired.

A result is plain JSON. Beside the numbers it says from which fields of the items each metric is made
(`definitions`), so that anyone can compute it again, and carries a hash of the items' contents: results are
compared only when they come from the very same items.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypedDict

from edgedisp.evaluate import statistics
from edgedisp.evaluate.statistics import Metric


class TaskResult(TypedDict):
    """metric, value, low ... n, documents repeat the first of `metrics`, which is the task's main one.

    chance: the main metric's value for a model that guesses, where that is known. items: {id, document,
    value, weight, ...}; value and weight belong to the main metric. truncated: items whose context was cut
    on the left to fit the model. An item's `asked` names what was asked of the model, so that items of two
    results can be told to be the same.
    """

    task: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    documents: int
    higher_is_better: bool
    chance: float | None
    metrics: dict[str, dict[str, Any]]
    definitions: dict[str, dict[str, Any]]
    items: list[dict[str, Any]]
    items_sha256: str
    truncated: int


def task_result(
    task: str,
    items: Sequence[Mapping[str, Any]],
    metrics: Sequence[Metric],
    *,
    fingerprints: Sequence[str],
    chance: float | None = None,
    truncated: int = 0,
    bootstrap: int = 2000,
    seed: int = 0,
    unpaired: Mapping[str, dict[str, Any]] | None = None,
) -> TaskResult:
    """Sum up the items of one task.

    fingerprints: one text per item that says what was asked (hashed into items_sha256). unpaired: further
    metrics that exist for the whole task only, with no part per item. Raises ValueError for no items.
    """
    records = {
        metric.name: statistics.single(items, metric, bootstrap=bootstrap, seed=seed) for metric in metrics
    } | dict(unpaired or {})
    main = records[next(iter(records))]
    return TaskResult(
        task=task,
        metric=main["metric"],
        value=main["value"],
        low=main["low"],
        high=main["high"],
        n=main["n"],
        documents=main["documents"],
        higher_is_better=main["higher_is_better"],
        chance=chance,
        metrics=records,
        definitions={metric.name: asdict(metric) for metric in metrics},
        items=[
            {**_with_value(item, metrics[0] if metrics else None), "asked": mark}
            for item, mark in zip(items, fingerprints, strict=True)
        ],
        items_sha256=_hash(items, fingerprints),
        truncated=truncated,
    )


def compare_task(
    baseline: TaskResult, dispersed: TaskResult, *, bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Pair two results of one task: `statistics.paired` of the main metric, and of every one under `metrics`.

    A main metric that has no part per item cannot be paired: its low and high are None, with `reason`.
    Raises ValueError when the results come from different tasks or different items.
    """
    if baseline["task"] != dispersed["task"] or baseline["items_sha256"] != dispersed["items_sha256"]:
        raise ValueError(
            f"{baseline['task']} ({baseline['n']} items) and {dispersed['task']} ({dispersed['n']} items) do "
            "not hold the same items and cannot be paired; score both with one recipe, tokenizer and seed"
        )
    metrics = {
        name: statistics.paired(
            baseline["items"], dispersed["items"], Metric(**definition), bootstrap=bootstrap, seed=seed
        )
        for name, definition in baseline["definitions"].items()
    }
    before, after = baseline["value"], dispersed["value"]
    main = metrics.get(baseline["metric"]) or {
        "metric": baseline["metric"],
        "baseline": before,
        "dispersed": after,
        "difference": None if before is None or after is None else after - before,
        "low": None,
        "high": None,
        "n": baseline["n"],
        "documents": baseline["documents"],
        "higher_is_better": baseline["higher_is_better"],
        "reason": "computed over the whole task, so the two cannot be paired",
    }
    return {**main, "metrics": metrics}


def common(results: Sequence[TaskResult]) -> list[TaskResult]:
    """The results of one task, each cut to the items that all of them hold and summed up again.

    Raises ValueError when they hold no item in common, belong to different tasks, or would have to be cut and
    their main metric exists for the whole task only.
    """
    first = results[0]
    if any(one["task"] != first["task"] for one in results):
        raise ValueError(f"results of {' and '.join(one['task'] for one in results)} cannot be paired")
    if len({one["items_sha256"] for one in results}) == 1:
        return [*results]
    if first["metric"] not in first["definitions"]:
        raise ValueError(f"{first['task']}: {first['metric']} is made of all items, and these differ")
    # Results written before items told what was asked match no other's.
    tables = [
        {(item["id"], item.get("asked", f"result {place}")): item for item in one["items"]}
        for place, one in enumerate(results)
    ]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    if not shared:
        raise ValueError(f"{first['task']}: no item in common")
    return [
        task_result(
            one["task"],
            [table[key] for key in shared],
            [Metric(**definition) for definition in one["definitions"].values()],
            fingerprints=[str(asked) for _, asked in shared],
            chance=one["chance"],
            truncated=one["truncated"],
        )
        for one, table in zip(results, tables)
    ]


def _with_value(item: Mapping[str, Any], metric: Metric | None) -> dict[str, Any]:
    """The item with `value` (its part of the main metric, per unit of weight) and `weight`."""
    if metric is None:
        return {**item, "value": None, "weight": 1}
    weight = item[metric.denominator] if metric.denominator is not None else 1
    return {**item, "value": item[metric.numerator] / weight, "weight": weight}


def _hash(items: Sequence[Mapping[str, Any]], fingerprints: Sequence[str]) -> str:
    if len(fingerprints) != len(items):
        raise ValueError(f"{len(items)} items but {len(fingerprints)} fingerprints")
    named = [[item["id"], item["document"], mark] for item, mark in zip(items, fingerprints)]
    return hashlib.sha256(json.dumps(named, ensure_ascii=False).encode()).hexdigest()
