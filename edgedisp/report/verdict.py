"""What may be claimed from a run, by written rules (`RULES`, printed in every report).

Why 0.02 nats: int8 costs less than 1 % of perplexity and int4 5 to 30 %, so 2 % is about the largest
difference that a user could ignore. Why 5 points of exact answers: 300 questions tell about as much. Why 20
documents: a bootstrap over fewer clusters is too narrow. Why three seeds: of simulated runs with one seed and
no effect of dispersion, up to a third show a clear one.
This module decides; templates/verdict.j2 has the sentences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgedisp.core.files import to_json
from edgedisp.core.results import ANSWERS_TASK, AS_GIVEN, BASELINE, LOSS_TASK, PUBLISHED_POINTS, Json
from edgedisp.core.run import Run
from edgedisp.report.comparisons import BETTER, MEAN, WORSE, Comparison, comparisons, gains
from edgedisp.report.formatting import bits, label, plural
from edgedisp.report.layout import TEXTS, Grid, template
from edgedisp.report.results_table import SIZE, SPEED, Metric, Row, Table, table

HELPS, HURTS, NULL = "helps", "hurts", "no measurable difference"
CANNOT_TELL, SINGLE = "cannot tell at this size", "single arm"
SMALL = "Cannot tell at this size"
FEWEST_DOCUMENTS = 20
FEWEST_SEEDS = 3  # fewer say something about these models, nothing about dispersion
WIDEST_NULL = 0.02  # nats per token: a wider interval cannot support "no difference"
WIDEST_ANSWERS = 0.05  # the same for the share of exact answers
NUMBERS = {"documents": FEWEST_DOCUMENTS, "seeds": FEWEST_SEEDS, "nats": WIDEST_NULL}
NUMBERS |= {"points": PUBLISHED_POINTS, "answers": round(100 * WIDEST_ANSWERS)}
RULES = [rule.format(**NUMBERS) for rule in TEXTS["lists"]["rules"]]


@dataclass(frozen=True)
class Verdict:
    """parts: the sentence in pieces, the first is the claim. per_precision: precision -> label."""

    label: str
    parts: list[str]
    arm: str | None = None
    headline: Comparison | None = None
    supporting: list[Comparison] = field(default_factory=list)
    per_precision: dict[str, str] = field(default_factory=dict)
    rules: list[str] = field(default_factory=lambda: [*RULES])

    def to_json(self) -> Json:
        """Plain JSON with the sentence."""
        return {**to_json(self), "sentence": self.sentence}

    @property
    def sentence(self) -> str:
        return " ".join(self.parts)


def verdict(run: Run) -> Verdict:
    """What this run shows about its main arm, by `RULES`."""
    arm, rows = run.main_arm, comparisons(run)
    if arm is None:
        text = f"No baseline was built beside {' and '.join(run.arms)}, so there is nothing to compare with."
        if len(run.arms) == 1:
            text = f"Single arm: only {run.arms[0]} was built, so there is nothing to compare."
        return Verdict(SINGLE, [text])
    first = next((row for row in rows if row.is_headline), None)
    supporting = [row for row in rows if row.arm == arm and not row.is_headline]
    decided, parts = _decide(run, first, supporting)
    parts = [part for part in parts if part]
    is_answers = first is not None and first.task == ANSWERS_TASK
    of_arm = [row for row in rows if row.arm == arm]
    alike = [row for row in of_arm if (row.task == ANSWERS_TASK if is_answers else row.unit == "nats")]
    labels: dict[str, str] = {}
    for row in sorted(alike, key=lambda row: (-bits(row.precision), row.task != LOSS_TASK)):
        labels.setdefault(row.precision, CANNOT_TELL if _too_small(run, row) else _label(run, row))
    return Verdict(decided, parts, arm, first, supporting, labels)


def _decide(run: Run, first: Comparison | None, supporting: Sequence[Comparison]) -> tuple[str, list[str]]:
    """The label and the sentence's parts, rule by rule."""
    reason = _too_small(run, first)
    if first is None:
        return CANNOT_TELL, [reason]
    is_general = _is_general(run, first)
    tokens = sorted({run.training[arm].tokens for arm in (BASELINE, first.arm) if arm in run.training})
    evidence = _sentence("evidence", first, tokens, is_general)
    mean = run.means.get(first.arm, {}).get(first.precision)
    points = "" if first.task == ANSWERS_TASK else _sentence("points", first, mean, PUBLISHED_POINTS)
    if reason:
        return CANNOT_TELL, [reason, evidence, points]
    clear = [row for row in supporting if row.is_clear]
    survivors = [row for row in clear if row.counts]
    parts = [evidence, _sentence("supporting", supporting, clear, survivors)]
    luck = _sentence("luck", first)
    if first.counts:
        tasks = run.comparisons.get(first.arm, {}).get(first.precision, {})
        pair = mean if first.task == MEAN else tasks[first.task].main
        claim = _sentence("claim", first, _label(run, first), pair, is_general)
        return _label(run, first), [claim, *parts, luck]
    parts = [_sentence("visible", first), *parts, points, luck]
    if survivors:
        claim = f"{SMALL}: the headline shows no difference, but supporting tests do."
        return CANNOT_TELL, [claim, *parts]
    return NULL, [_sentence("null", first, bool(clear)), *parts]


def _too_small(run: Run, first: Comparison | None) -> str:
    """Why no claim is made at this size, or an empty string."""
    if run.smoke:
        return f"{SMALL}: a smoke run proves that the recipe works and says nothing about dispersion."
    # The arms of joined runs are no twins: their first losses may well differ.
    losses = [] if run.runs or first is None else run.first_losses(first.arm)
    for before, after in (pair for pair in losses if pair[0] != pair[1]):
        return (
            f"Cannot tell: the arms' losses before the first update differ ({before:.6f} and {after:.6f}), "
            "so the machine did not compute both alike. Build again."
        )
    if first is None:
        return f"{SMALL}: neither a held-out loss nor a mean over tasks was compared."
    documents = first.estimate.documents
    if documents is not None and documents < FEWEST_DOCUMENTS:
        compared = plural(documents, "held-out document")
        return f"{SMALL}: {compared} compared, {FEWEST_DOCUMENTS} are needed."
    widest = {"nats": WIDEST_NULL, "share": PUBLISHED_POINTS / 100}.get(first.unit, math.inf)
    widest = WIDEST_ANSWERS if first.task == ANSWERS_TASK else widest
    is_wide = not first.is_clear and first.half_width > widest
    return _sentence("too_wide", first, widest) if is_wide else ""


def _label(run: Run, row: Comparison) -> str:
    """`helps` and `hurts` are about the technique, `better` and `worse` about these models."""
    if not row.counts:
        return NULL
    return {BETTER: HELPS, WORSE: HURTS}[row.outcome] if _is_general(run, row) else row.outcome


def _is_general(run: Run, row: Comparison) -> bool:
    """Whether a claim is about the technique, not about two models alone."""
    return len(run.seeds) >= FEWEST_SEEDS and row.precision != AS_GIVEN


def _sentence(name: str, *values: Any) -> str:
    """A sentence of templates/verdict.j2."""
    text = " ".join(getattr(template("verdict.j2").module, name)(*values).split())
    return text[:1].upper() + text[1:]


# The first screen of a report, for people who read no statistics


@dataclass(frozen=True)
class Question:
    """answer: the claim; more: what it rests on; details: the rest, folded. chart: `grid` as bars."""

    key: str
    title: str
    answer: str
    more: str = ""
    details: str = ""
    grid: Grid | None = None
    chart: Table | None = None


def summary(run: Run) -> list[Question]:
    """Does it work, what does quantization cost, did dispersion help: as far as the run can tell."""
    whole = table(run, all_arms=True)
    metric = whole.metrics[0] if whole.metrics and whole.metrics[0].kind != "cost" else None
    rows = [row for row in whole.rows if metric and metric.key in row.cells]
    if any(row.precision == "fp32" for row in rows):  # the same weights in what ships
        rows = [row for row in rows if row.precision != "torch"]
    questions = []
    if metric is not None:
        chart = Table(whole.arms, (metric,), tuple(rows))
        answer = _sentence("works", run, chart, _gained(run, metric, rows[-1]))
        grid = _grid(rows, {arm: (metric, arm) for arm in whole.arms})
        more = _sentence("basis", run, chart)
        questions.append(Question("works", "Does it work?", answer, more, grid=grid, chart=chart))
    if metric is not None and len(rows) > 1:
        arm = run.main_arm or run.arms[-1]
        answer = _sentence("cost", arm, (metric, SIZE, SPEED), rows[0], rows[-1])
        cost = _grid(rows, {each.heading: (each, arm) for each in (metric, SIZE, SPEED)})
        questions.append(Question("cost", _sentence("cost_title", rows[-1].precision), answer, grid=cost))
    result = verdict(run)
    claim, more, *rest = *result.parts, ""
    labels = [f"{label(precision)}: {text}" for precision, text in result.per_precision.items()]
    rest += [f"By precision: {'; '.join(labels)}."] if len(labels) > 1 else []
    texts = claim, more, " ".join(filter(None, rest))
    return [*questions, Question(result.label, _sentence("helps_title", run), *texts)]


def summary_text(run: Run) -> str:
    """The questions and answers for a terminal."""
    texts = [(each.title, each.answer, each.more, each.details) for each in summary(run)]
    return "\n\n".join(" ".join(filter(None, text)) for text in texts)


def _gained(run: Run, metric: Metric, row: Row) -> str:
    """Whether the arms are better than the base; empty where it was not measured, or a smoke run was."""
    rows = [gain for gain in gains(run) if (gain.task, gain.precision) == (metric.key, row.precision)]
    better = [gain.is_clear and gain.direction == BETTER for gain in rows]
    if run.smoke or not rows:
        return ""
    return "Yes" if all(better) else "In part" if any(better) else "No"


def _grid(rows: Sequence[Row], columns: dict[str, tuple[Metric, str]]) -> Grid:
    texts = [(row.precision, *(row.text(*column) for column in columns.values())) for row in rows]
    return Grid(("", *columns), tuple(texts)).without_empty_columns()
