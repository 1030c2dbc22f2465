"""What lm-evaluation-harness sums up, as metrics over our items.

Of lm-eval's aggregates four can be made of a part per item: means, two kinds of perplexity, bits per byte.
All others (F1, BLEU) exist for a whole task only, and are carried over as they are, without an interval.
A multiple choice also gives the log-likelihood of its right answer (`gold_nll`, `gold_bits_per_byte`): where
a small model guesses, as on MMLU, that moves before the accuracy does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.registry import AGGREGATION_REGISTRY

from edgedisp.core.results import Estimate, Score
from edgedisp.evaluate.statistics import GOLD_BITS_PER_BYTE, Metric
from edgedisp.evaluate.task_result import WHOLE_TASK

GOLD_NLL = Metric("gold_nll", "nll", None, "mean", higher_is_better=False)


def choice(task: Any, sample: dict[str, Any]) -> dict[str, Any]:
    """Fields of a multiple choice: the log-probability of every answer; loss and size of the right one."""
    logprobs = [float(answer[0]) for answer in sample["filtered_resps"]]
    fields: dict[str, Any] = {"logprobs": logprobs}
    choices = list(task.doc_to_choice(sample["doc"]))
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else task.doc_to_target(sample["doc"])
    if task.config.process_results is not None:
        gold = None
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    # Some tasks have several right answers or score choices in ways of their own; those give no gold.
    if isinstance(gold, int) and len(choices) == len(logprobs) and 0 <= gold < len(choices):
        size = len(str(sample["arguments"][gold][1]).encode())
        fields |= {"choices": len(choices), "nll": -logprobs[gold], "bytes": max(1, size)}
    return fields


def chance(metrics: Sequence[Metric], items: Sequence[Mapping[str, Any]]) -> float | None:
    """What guessing scores where the main metric is the accuracy of a multiple choice, else None."""
    main = metrics[0].name if metrics else ""
    if not main.startswith("acc") or not all("choices" in item and item[main] in (0, 1) for item in items):
        return None
    return float(np.mean([1 / item["choices"] for item in items]))


def metrics(
    task: Any, aggregates: dict[str, Any], items: list[dict[str, Any]]
) -> tuple[list[Metric], dict[str, Score]]:
    """Metrics that can be made from the items, and the scores that lm-eval alone can make."""
    paired: list[Metric] = []
    whole: dict[str, Score] = {}
    for key, value in aggregates.items():
        name, _, filtered = key.partition(",")
        if name not in task.aggregation() or not isinstance(value, int | float):
            continue
        named, better = label(name, filtered), bool(task.higher_is_better().get(name, True))
        made = _metric(named, aggregation(task, name), better)
        if made is not None and all(made.numerator in item for item in items):
            paired.append(made)
        else:
            known = float(value) if math.isfinite(value) else None
            estimate = Estimate(known, n=len(items), documents=len(items), reason=WHOLE_TASK)
            whole[named] = Score(named, estimate, better)
    paired.sort(key=lambda metric: not _is_share(metric, items))  # the main metric: LAMBADA has a loss first
    if paired and all("nll" in item for item in items):
        paired += [GOLD_NLL, GOLD_BITS_PER_BYTE]
    return paired, whole


def _is_share(metric: Metric, items: Sequence[Mapping[str, Any]]) -> bool:
    """Whether it counts right answers, or parts of them."""
    return (metric.may_be_share and metric.higher_is_better) and all(
        0 <= item[metric.numerator] <= 1 for item in items
    )


def label(metric: str, filtered: str) -> str:
    return metric if filtered in ("none", "") else f"{metric}/{filtered}"


def aggregation(task: Any, metric: str) -> str | None:
    """The name under which lm-eval knows the function that sums up a metric; None for a task's own."""
    function = task.aggregation().get(metric)
    return next((name for name, known in AGGREGATION_REGISTRY.items() if known is function), None)


def is_by_items(task: Any, metric: str) -> bool:
    """Whether a task's metric can be made of a part per item."""
    return _metric(metric, aggregation(task, metric), True) is not None


def parts(label: str, value: Any, aggregation: str | None) -> dict[str, float]:
    """What an item keeps of one metric: a number, or two for (log-likelihood, weight) pairs."""
    if aggregation == "perplexity":
        return {f"{label}:nll": -float(value)}
    if aggregation in ("weighted_perplexity", "bits_per_byte"):
        return {f"{label}:nll": -float(value[0]), f"{label}:weight": float(value[1])}
    number = isinstance(value, bool | int | float | np.number) and math.isfinite(value)
    return {label: float(value)} if number else {}


def _metric(label: str, aggregation: str | None, higher_is_better: bool) -> Metric | None:
    """The shape of an lm-eval aggregate, when it is one that can be made from items."""
    match aggregation:
        case "mean":
            return Metric(label, label, None, "mean", higher_is_better)
        case "perplexity":
            return Metric(label, f"{label}:nll", None, "exp", higher_is_better)
        case "weighted_perplexity":
            return Metric(label, f"{label}:nll", f"{label}:weight", "exp", higher_is_better)
        case "bits_per_byte":
            return Metric(label, f"{label}:nll", f"{label}:weight", "bits", higher_is_better)
    return None
