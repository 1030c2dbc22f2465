"""The paired comparisons of a run, and the one rule that calls a difference better or worse.

A difference is clear where its 95 % interval leaves out 0, its test agrees (p at most 0.05: a bootstrap alone
gives 5 to 7 % false alarms on few documents), and it is larger than two scorings of one model differ by. All
but the headline are one family: they must also survive Holm's correction over it (Holm 1979).

Tables, plots, `compare` and the verdict take `Comparison.outcome`; nothing else decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgedisp.core.results import ANSWERS_TASK, LOSS_TASK, Difference, Estimate, TaskDifference
from edgedisp.core.run import Run
from edgedisp.report.formatting import bits, format_estimate

MEAN = "mean of tasks"
LEVEL = 0.05  # two-sided
BETTER, WORSE, NOT_CLEAR = "better", "worse", "not clear"


@dataclass(frozen=True)
class Comparison:
    """A difference arm - baseline.

    unit: `nats` (a loss per token), `share` (of right answers) or empty (the task's own). floor: how far two
    scorings of one model differ. p_holm: corrected over all but the headline, whose own p stands alone.
    """

    arm: str
    precision: str
    task: str
    estimate: Estimate
    unit: str
    higher_is_better: bool
    floor: float = 0.0
    p_holm: float | None = None
    is_headline: bool = False

    @property
    def p(self) -> float:
        p = self.estimate.test_p
        return 1.0 if p is None else p

    @property
    def value(self) -> float:
        return self.estimate.value or 0.0

    @property
    def half_width(self) -> float:
        return self.estimate.half_width or 0.0

    @property
    def scale(self) -> float:
        """Shares are shown as points."""
        return 100.0 if self.unit == "share" else 1.0

    @property
    def unit_text(self) -> str:
        return {"share": "points", "nats": "nats per token"}.get(self.unit, "")

    @property
    def is_clear(self) -> bool:
        """Clear by itself, before the correction."""
        return self.estimate.excludes_zero and self.p <= LEVEL and abs(self.value) > self.floor

    @property
    def counts(self) -> bool:
        """Whether it is called a difference: clear, and unless it is the headline after Holm's correction."""
        return self.is_clear and (self.is_headline or (self.p_holm is not None and self.p_holm <= LEVEL))

    @property
    def direction(self) -> str:
        return BETTER if (self.value > 0) == self.higher_is_better else WORSE

    @property
    def outcome(self) -> str:
        """`better`, `worse` or `not clear`, as every table and plot shows it."""
        return self.direction if self.counts else NOT_CLEAR

    @property
    def detectable(self) -> float:
        """The smallest difference that a comparison like this one detects with 80 % power."""
        beyond = (self.estimate.detectable or 0.0) - self.half_width
        return max(self.half_width, self.floor) + beyond

    @property
    def is_mostly_seeds(self) -> bool:
        """Whether the spread between seeds takes more of the interval than the choice of items."""
        items = self.estimate.over_items
        half_width = None if items is None else items.half_width
        return half_width is not None and self.half_width > math.sqrt(2) * half_width

    def text(self) -> str:
        return format_estimate(self.estimate, self.scale, signs=True)


def is_loss(metric: str) -> bool:
    return "perplexity" in metric


def is_share(metric: str) -> bool:
    return metric.startswith(("acc", "exact", "f1"))


def comparisons(run: Run) -> list[Comparison]:
    """Every comparison of every arm that has an interval, the headline among them, with corrected p.

    Per arm: fewest bits first, perplexities first in each. A perplexity is compared by its loss per token.
    """
    floors: dict[str, float] = {}
    for models in run.measurements.values():
        for precision, model in models.items():
            floors[precision] = max(floors.get(precision, 0.0), model.noise.floor if model.noise else 0.0)
    rows = [
        replace(row, floor=floors.get(row.precision, 0.0) if row.unit == "nats" else 0.0)
        for arm in run.compared_arms
        for row in _of_arm(arm, run.comparisons)
    ]
    first = _headline(run, rows)
    corrected = iter(holm([row for row in rows if row is not first]))
    ordered = [replace(row, is_headline=True) if row is first else next(corrected) for row in rows]
    if first is not None and first.task == MEAN:  # a headline that is none of the rows
        ordered.insert(0, replace(first, is_headline=True))
    return ordered


def gains(run: Run) -> list[Comparison]:
    """Every comparison arm - base that has an interval; they are no part of the verdict's family."""
    return [row for arm in run.arms for row in _of_arm(arm, run.gains)]


def _of_arm(arm: str, compared: Mapping[str, Mapping[str, Mapping[str, TaskDifference]]]) -> list[Comparison]:
    """The comparisons of an arm with an interval: fewest bits first, perplexities first in each."""
    rows = []
    for precision, tasks in sorted(compared.get(arm, {}).items(), key=lambda item: bits(item[0])):
        for task in sorted(tasks, key=lambda name: not is_loss(tasks[name].main.metric)):
            rows.append(comparison_of(arm, precision, task, tasks[task].main))
    return [row for row in rows if row.estimate.has_interval]


def comparison_of(arm: str, precision: str, task: str, difference: Difference) -> Comparison:
    """A difference as the rule sees it: a perplexity by its loss per token."""
    estimate, nats = difference.estimate, difference.nats
    if nats is not None and difference.per == "tokens" and is_loss(difference.metric):
        p = estimate.p if nats.p is None else nats.p
        nats = replace(nats, p=p, n=estimate.n, documents=estimate.documents)
        return Comparison(arm, precision, task, nats, "nats", False)
    unit = "share" if is_share(difference.metric) else ""
    return Comparison(arm, precision, task, estimate, unit, difference.higher_is_better)


def _headline(run: Run, rows: Sequence[Comparison]) -> Comparison | None:
    """The test fixed beforehand, of the main arm at the fewest bits: exact answers, else loss, else mean."""
    arm = run.main_arm or ""
    if answers := [row for row in rows if row.arm == arm and row.task == ANSWERS_TASK]:
        return min(answers, key=lambda row: bits(row.precision))
    if losses := [row for row in rows if row.arm == arm and row.unit == "nats"]:
        return min(losses, key=lambda row: (bits(row.precision), row.task != LOSS_TASK))
    means = {name: mean for name, mean in run.means.get(arm, {}).items() if mean.estimate.has_interval}
    precision = min(means, key=bits, default=None)
    if precision is None:
        return None
    return Comparison(arm, precision, MEAN, means[precision].estimate, "share", True)


def holm(rows: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons in the same order, with Holm's step-down corrected p."""
    largest, corrected = 0.0, {}
    for rank, index in enumerate(sorted(range(len(rows)), key=lambda index: rows[index].p)):
        largest = max(largest, min(1.0, rows[index].p * (len(rows) - rank)))
        corrected[index] = largest
    return [replace(row, p_holm=corrected[index]) for index, row in enumerate(rows)]
