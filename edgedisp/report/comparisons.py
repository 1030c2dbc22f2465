"""The paired comparisons of a summary, with p values and Holm's correction.

Intervals come with the summary (a paired bootstrap, clustered by document). p values are only for the
correction over many comparisons: the recorded one (`p_value`, which respects documents, before an exact
McNemar test), else read off the interval by the normal approximation, which needs no item-level data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgedisp.report.before_after import task_metric
from edgedisp.report.reading import (
    DISPERSED,
    Summary,
    at,
    bits,
    branch,
    compared,
    focus,
    is_loss,
    number,
    tasks,
    whole,
)

MEAN = "mean of tasks"
LEVEL = 0.05  # two-sided
Z95 = 1.959964  # half-width of a 95 % interval in standard errors
Z80 = 0.841621  # what is added to find a difference 4 times out of 5 (evaluate/power.py)


@dataclass(frozen=True)
class Comparison:
    """One paired comparison, arm - baseline.

    `unit`: "nats" (a loss per token), "share" (an accuracy in [0, 1]) or "" (the task's own unit).
    `gain`: whether the difference is in the better direction, None when that is unknown. With several seeds
    the interval holds their spread too; `by_seed` are their differences, `sd` is the standard deviation of
    those, `item_se` the standard error over items alone, `item_low` and `item_high` the interval of that.
    `floor`: how far two scorings of one model differ; a difference no larger is none.
    """

    precision: str
    task: str
    difference: float
    low: float
    high: float
    unit: str
    gain: bool | None
    n: int | None
    documents: int | None
    p: float
    p_holm: float = 1.0
    arm: str = DISPERSED
    by_seed: tuple[float, ...] = ()
    sd: float | None = None
    item_se: float | None = None
    item_low: float | None = None
    item_high: float | None = None
    floor: float = 0.0

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2

    @property
    def detectable(self) -> float:
        """The smallest difference that a comparison like this one finds 4 times out of 5."""
        return max(detectable(self.half_width), self.floor)

    @property
    def more_luck_than_text(self) -> bool:
        """Whether the spread between seeds takes more of the interval than the choice of items."""
        if self.item_low is None or self.item_high is None:
            return False
        return self.half_width > math.sqrt(2) * (self.item_high - self.item_low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0

    @property
    def clear(self) -> bool:
        """Excludes 0, its test agrees, and it is larger than what two scorings of one model differ by.

        The test holds the rate of false alarms at 5 % exactly; a bootstrap alone gives 5 to 7 % on few
        documents.
        """
        return self.excludes_zero and self.p <= LEVEL and abs(self.difference) > self.floor

    @property
    def survives(self) -> bool:
        """Clear, and holds after Holm's correction."""
        return self.clear and self.p_holm <= LEVEL


def comparisons(summary: Summary, arm: str | None = None) -> list[Comparison]:
    """Every paired comparison of an arm that has an interval: fewest bits first, perplexities first in each.

    Without `arm`, of the one that the verdict is about. A perplexity is compared by its loss per token where
    that was recorded: the logarithm is what was paired.
    """
    found = []
    chosen = arm or focus(summary)
    order = {task: index for index, task in enumerate(tasks(summary))}
    by_precision = compared(summary).get(chosen, {}) if chosen else {}
    for precision in sorted(by_precision, key=bits):
        by_task = branch(by_precision[precision])
        for task in sorted(by_task, key=lambda name: order.get(name, len(order))):
            noise = number(at(summary, "noise", precision, "floor")) or 0.0
            found += [
                replace(one, arm=str(chosen), floor=noise if one.unit == "nats" else 0.0)
                for one in _comparison(precision, task, branch(by_task[task]))
            ]
    return found


def mean_of_tasks(summary: Summary, arm: str) -> Comparison | None:
    """The mean over tasks at the fewest bits, as a comparison; for a summary without any loss."""
    by_precision = branch(summary, "means", arm)
    precision = min(by_precision, key=bits, default=None)
    if precision is None:
        return None
    found = branch(by_precision[precision])
    value, low, high = (number(found.get(key)) for key in ("difference", "low", "high"))
    if value is None or low is None or high is None:
        return None
    gain = None if value == 0 else value > 0
    p = normal_p(value, low, high)
    items = whole(found.get("n"))
    return Comparison(precision, MEAN, value, low, high, "share", gain, items, None, p, arm=arm)


def detectable(half_width: float) -> float:
    """What a comparison with a 95 % interval of such a half-width finds 4 times out of 5."""
    return half_width * (Z95 + Z80) / Z95


def _comparison(precision: str, task: str, entry: dict[str, Any]) -> list[Comparison]:
    loss = branch(entry, "nll_difference")
    per_token = loss.get("per", "tokens") == "tokens"  # LAMBADA's is per item, wikitext's per word
    in_nats = is_loss(entry) and per_token and number(loss.get("difference")) is not None
    source = loss if in_nats else entry
    value, low, high = (number(source.get(key)) for key in ("difference", "low", "high"))
    if value is None or low is None or high is None:
        return []
    metric = task_metric(task, entry)
    gain = None if metric.higher_is_better is None or value == 0 else (value > 0) == metric.higher_is_better
    recorded = [p for key in ("p_value", "mcnemar_p") if (p := number(entry.get(key))) is not None]
    p = recorded[0] if recorded else normal_p(value, low, high)
    unit = "nats" if in_nats else "share" if metric.unit == "%" else ""
    sizes = whole(entry.get("n")), whole(entry.get("documents"))
    one = Comparison(precision, task, value, low, high, unit, gain, *sizes, p)
    spread = branch(source, "seeds")
    return [replace(one, **_spread(spread))] if spread else [one]


def _spread(spread: dict[str, Any]) -> dict[str, Any]:
    listed = spread.get("values")
    values = [number(value) for value in listed] if isinstance(listed, list | tuple) else []
    figures = {key: number(spread.get(key)) for key in ("sd", "item_se", "item_low", "item_high")}
    return {"by_seed": tuple(value for value in values if value is not None), **figures}


def normal_p(value: float, low: float, high: float) -> float:
    """Two-sided p of a difference, its standard error read off its 95 % interval."""
    error = (high - low) / (2 * Z95)
    if error <= 0:
        return 1.0 if value == 0 else 0.0
    return math.erfc(abs(value) / error / math.sqrt(2))


def holm(found: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons in the same order, with Holm's step-down corrected p (Holm 1979)."""
    running = 0.0
    corrected = {}
    for rank, index in enumerate(sorted(range(len(found)), key=lambda index: found[index].p)):
        running = max(running, min(1.0, found[index].p * (len(found) - rank)))
        corrected[index] = running
    return [replace(one, p_holm=corrected[index]) for index, one in enumerate(found)]


def is_main_loss(one: Comparison) -> bool:
    """Whether it is of a loss per token, or of a task that is one in reports without losses."""
    return one.unit == "nats" or "perplexity" in one.task


def headline(compared: Sequence[Comparison]) -> Comparison | None:
    """The one test chosen beforehand: the loss at the fewest bits, `heldout_perplexity` before others."""
    losses = [one for one in compared if one.unit == "nats"]
    losses = losses or [one for one in compared if is_main_loss(one)]
    return min(losses, key=lambda one: (bits(one.precision), one.task != "heldout_perplexity"), default=None)
