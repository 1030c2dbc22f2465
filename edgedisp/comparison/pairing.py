"""Results of several trainings, paired with those of the first, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgedisp.evaluate.seeds_and_means import average_task, compare_tasks, mean_difference
from edgedisp.evaluate.task_result import Results, TaskResult, common_items
from edgedisp.summary import differences_record, mean_record, scores_record

Pair = tuple[TaskResult, TaskResult]


@dataclass(frozen=True)
class Scored:
    """One arm of one run: its name in the joint summary, and its results by precision and seed."""

    label: str
    run: int
    arm: str
    by_precision: dict[str, list[Results]]


def averaged(one: Scored) -> dict[str, Any]:
    return {
        precision: scores_record(
            {task: average_task([results[task] for results in by_seed]) for task in by_seed[0]}
        )
        for precision, by_seed in one.by_precision.items()
    }


def paired_with_first(found: Sequence[Scored]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The comparisons of all others with the first, the means over their tasks, and what was left out."""
    first, *others = found
    comparison: dict[str, Any] = {}
    means: dict[str, Any] = {}
    apart: list[str] = []
    for other in others:
        for precision in (name for name in first.by_precision if name in other.by_precision):
            before_all, after_all = first.by_precision[precision], other.by_precision[precision]
            seeds = list(zip(before_all, after_all))
            pairs, why = _alike(seeds)
            if len(before_all) != len(after_all):
                most = max(len(before_all), len(after_all))
                why.append(f"{len(seeds)} of {most} trainings have one to be paired with")
            apart += [f"{other.label}, {reason}" for reason in why]
            if not pairs:
                continue
            entries = {task: compare_tasks(pair) for task, pair in pairs.items()}
            comparison.setdefault(other.label, {})[precision] = differences_record(entries)
            before, after = (
                {task: average_task([one[side] for one in pair]) for task, pair in pairs.items()}
                for side in (0, 1)
            )
            if (mean := mean_difference(before, after, entries)) is not None:
                means.setdefault(other.label, {})[precision] = mean_record(mean)
    return comparison, means, list(dict.fromkeys(apart))


def _alike(seeds: Sequence[tuple[Results, Results]]) -> tuple[dict[str, list[Pair]], list[str]]:
    """task -> for each seed both results, cut to the items that all were asked; and why tasks are missing."""
    pairs: dict[str, list[Pair]] = {}
    why: list[str] = []
    first, second = seeds[0]
    why += [f"{task}: scored in one of the two alone" for task in sorted(first.keys() ^ second.keys())]
    for task in (name for name in first if name in second):
        every = [results[task] for pair in seeds for results in pair]
        try:
            cut = common_items(every)
        except ValueError as problem:
            why.append(f"{problem} (other text, tokenizer, context or seed)")
            continue
        if len(cut[0].items) < max(len(one.items) for one in every):
            why.append(
                f"{task}: {len(cut[0].items)} items in common of {max(len(one.items) for one in every)}"
            )
        pairs[task] = list(zip(cut[::2], cut[1::2]))
    return pairs, why
