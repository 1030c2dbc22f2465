"""Items of made scores: right and wrong answers, and losses of two models over the same documents."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgedisp.core.results import TaskScore
from edgedisp.evaluate.comparison import TaskResult, task_result
from edgedisp.evaluate.statistics import Metric, Resampling

Items = list[dict[str, Any]]
FEW = Resampling(200)
VALUE = Metric("value", "value")


def items_of(values: Any, per_document: int = 1, field: str = "value") -> Items:
    ids = [{"id": f"i{k}", "document": f"d{k // per_document}"} for k in range(len(values))]
    return [{**item, field: float(value)} for item, value in zip(ids, values)]


def losses(
    rng: np.random.Generator, documents: int, per_document: int, shift: float, spread: float
) -> tuple[Items, Items]:
    """Two models over the same items; documents differ in difficulty and in how much the second gains."""
    hardness, gain = rng.normal(3, 0.3, documents), rng.normal(shift, spread, documents)
    first, second = [], []
    for document in range(documents):
        for index in range(per_document):
            tokens = int(rng.integers(20, 60))
            loss = hardness[document] + rng.normal(0, 0.2)
            other = loss + gain[document] + rng.normal(0, 0.03)
            item = {"id": f"{document}.{index}", "document": str(document)}
            item |= {"tokens": tokens, "bytes": 4 * tokens}
            first.append({**item, "nll": loss * tokens})
            second.append({**item, "nll": other * tokens})
    return first, second


def result(task: str, items: Items, metric: Metric, chance: float | None = None) -> TaskResult:
    rows = [{**item, "asked": str(item["id"])} for item in items]
    return task_result(TaskScore(task, {}, chance), rows, [metric], FEW)
