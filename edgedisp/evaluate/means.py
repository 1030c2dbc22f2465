"""The mean difference over tasks, with an interval of its own.

Published results are means over tasks, so a table without one invites the reader to make it up, without an
interval. Each task counts once, whatever its number of items. The interval is put together from those of the
tasks, whose items are others and so independent (MOVER: Zou and Donner, Statistics in Medicine 27, 2008):

    low = mean - sqrt(sum (difference_k - low_k)^2) / K,   high alike.

With several seeds the tasks share the luck of a training. So the intervals over items are combined in this
way, then the spread of the seeds' means over tasks is added as in seeds.py.

A task at chance in both models says nothing about either, and only dilutes: it is left out, and named. So are
losses and everything that is no share of items.
"""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Mapping
from typing import Any

from edgedisp.evaluate.seeds import combined
from edgedisp.evaluate.statistics import Record

FEWEST_TASKS = 2


def is_share(result: Mapping[str, Any]) -> bool:
    """Whether a task's main metric is a share of its items, such as an accuracy; no score from 0 to 100."""
    definition = result["definitions"].get(result["metric"])
    value = result["value"]
    return (
        definition is not None
        and value is not None
        and 0 <= value <= 1
        and definition["scale"] == "mean"
        and definition["denominator"] is None
        and result["higher_is_better"]
    )


def at_chance(*results: Mapping[str, Any]) -> bool:
    """Whether none of the results is above what guessing gives: each interval reaches down to it."""
    ends = [(one["chance"], one["low"]) for one in results]
    return all(chance is not None and low is not None and low <= chance for chance, low in ends)


def mean_difference(
    before: Mapping[str, Mapping[str, Any]],
    after: Mapping[str, Mapping[str, Any]],
    compared: Mapping[str, Record],
    confidence: float = 0.95,
) -> Record | None:
    """The mean over tasks of after - before.

    before, after: each task's result (`result.TaskResult`, or over seeds).
    compared: its paired comparison (`result.compare_task`, or over seeds).
    Returns {baseline, arm, difference, low, high, tasks [], left_out {task: why}, n, seeds}, values and ends
    in the metric's unit (0 to 1); None where fewer than two tasks are left.
    """
    shares = [task for task in compared if is_share(before[task]) and compared[task]["low"] is not None]
    left_out = {task: "at chance" for task in shares if at_chance(before[task], after[task])}
    tasks = [task for task in shares if task not in left_out]
    if len(tasks) < FEWEST_TASKS:
        return None
    chosen = [compared[task] for task in tasks]
    several = [one.get("seeds") for one in chosen]
    difference = plain.fmean(one["difference"] for one in chosen)

    def away(end: str) -> float:
        ends = [spread[f"item_{end}"] if spread else one[end] for one, spread in zip(chosen, several)]
        return math.hypot(*(one["difference"] - value for one, value in zip(chosen, ends))) / len(chosen)

    record: Record = {
        "baseline": plain.fmean(float(before[task]["value"] or 0) for task in tasks),
        "arm": plain.fmean(float(after[task]["value"] or 0) for task in tasks),
        "difference": difference,
        "low": difference - away("low"),
        "high": difference + away("high"),
        "tasks": tasks,
        "left_out": left_out,
        "n": sum(one["n"] for one in chosen),
    }
    if all(spread is not None for spread in several):
        values = [plain.fmean(each) for each in zip(*(spread["values"] for spread in several if spread))]
        record = combined(record, "difference", values, min(one["documents"] for one in chosen), confidence)
    return record
