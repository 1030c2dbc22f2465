"""What may be claimed from a run, by written rules (`RULES`, printed in every report).

Why 0.02 nats: int8 costs less than 1 % of perplexity and int4 5 to 30 %, so 2 % is about the largest
difference that a user could ignore. Why 20 documents: a bootstrap over fewer clusters is too narrow. Why
three seeds: of simulated runs with one seed and no effect of dispersion, up to a third show a clear one.
This module decides; templates/verdict.j2 has the sentences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgedisp.core.results import AS_GIVEN, BASELINE, LOSS_TASK, PUBLISHED_POINTS, detectable
from edgedisp.core.run import Run
from edgedisp.report.comparisons import BETTER, MEAN, WORSE, Comparison, comparisons, headline, is_loss
from edgedisp.report.formatting import bits, label, plural, significant
from edgedisp.report.layout import TEXTS, template

HELPS, HURTS, NULL = "helps", "hurts", "no measurable difference"
CANNOT_TELL, SINGLE = "cannot tell at this size", "single arm"
SMALL = "Cannot tell at this size"
FEWEST_DOCUMENTS = 20
FEWEST_SEEDS = 3  # fewer say something about these models, nothing about dispersion
WIDEST_NULL = 0.02  # nats per token: a wider interval cannot support "no difference"
RULES = tuple(
    rule.format(nats=WIDEST_NULL, points=PUBLISHED_POINTS, documents=FEWEST_DOCUMENTS, seeds=FEWEST_SEEDS)
    for rule in TEXTS["lists"]["rules"]
)
NO_FLOOR = "Here the noise floor was not measured, and no difference is compared with it."


@dataclass(frozen=True)
class Verdict:
    """parts: the sentence in pieces, the first is the claim. per_precision: precision -> label."""

    label: str
    parts: list[str]
    rules: list[str]
    arm: str | None = None
    headline: Comparison | None = None
    supporting: list[Comparison] = field(default_factory=list)
    per_precision: dict[str, str] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        return " ".join(self.parts)

    @property
    def by_precision(self) -> str:
        """`torch fp32: helps; int4: no measurable difference`; empty for a single precision."""
        texts = [f"{label(name)}: {text}" for name, text in self.per_precision.items()]
        return "; ".join(texts) if len(texts) > 1 else ""


def verdict(run: Run) -> Verdict:
    """What this run shows about its main arm, by `RULES`."""
    arm, rows = run.main_arm, comparisons(run)
    has_noise = any(model.noise for models in run.measurements.values() for model in models.values())
    rules = [*RULES, *([] if has_noise else [NO_FLOOR])]
    if arm is None:
        return Verdict(SINGLE, _single(run), rules)
    first = headline(rows)
    supporting = [row for row in rows if row.arm == arm and not row.is_headline]
    decided, parts = _decide(run, first, supporting)
    return Verdict(decided, parts, rules, arm, first, supporting, _per_precision(run, arm, rows))


def _decide(run: Run, first: Comparison | None, supporting: Sequence[Comparison]) -> tuple[str, list[str]]:
    """The label and the sentence's parts, rule by rule."""
    reason = _too_small(run, first)
    if first is None or reason:
        return CANNOT_TELL, [reason, *([_evidence(run, first), *_points(run, first)] if first else [])]
    parts = [_evidence(run, first)]
    if smaller := [name for name in run.precisions if bits(name) < bits(first.precision)]:
        parts.append(f"{' and '.join(smaller)} was built, but its loss was not compared.")
    clear = [row for row in supporting if row.is_clear]
    survivors = [row for row in clear if row.counts]
    parts.append(_sentence("supporting", supporting, clear, survivors))
    luck = _sentence("luck", first)
    if first.counts:
        return _label(run, first), [_claim(run, first), *parts, luck]
    parts += [_sentence("visible", first), *_points(run, first), luck]
    if survivors:
        claim = f"{SMALL}: the headline shows no difference, but supporting tests do."
        return CANNOT_TELL, [claim, *parts]
    return NULL, [_sentence("null", first, bool(clear)), *parts]


def _too_small(run: Run, first: Comparison | None) -> str:
    """Why no claim is made at this size, or an empty string."""
    if run.smoke:
        return f"{SMALL}: a smoke run proves that the recipe works and says nothing about dispersion."
    # The arms of joined runs are no twins: their first losses may well differ.
    for before, after in [] if run.runs or first is None else run.first_losses(first.arm):
        if before != after:
            return (
                f"Cannot tell: the arms' losses before the first update differ ({before:.6f} and "
                f"{after:.6f}), so the machine did not compute both alike. Build again."
            )
    if first is None:
        return f"{SMALL}: neither a held-out loss nor a mean over tasks was compared."
    documents = first.estimate.documents
    if documents is not None and documents < FEWEST_DOCUMENTS:
        compared = plural(documents, "held-out document")
        return f"{SMALL}: {compared} compared, {FEWEST_DOCUMENTS} are needed."
    widest = {"nats": WIDEST_NULL, "share": PUBLISHED_POINTS / 100}.get(first.unit, math.inf)
    is_wide = not first.is_clear and first.half_width > widest
    return _sentence("too_wide", first, WIDEST_NULL) if is_wide else ""


def _per_precision(run: Run, arm: str, rows: Sequence[Comparison]) -> dict[str, str]:
    """The loss comparison of each precision under the same rules, most bits first."""
    losses = [row for row in rows if row.arm == arm and (row.unit == "nats" or is_loss(row.task))]
    labels: dict[str, str] = {}
    for row in sorted(losses, key=lambda loss: (-bits(loss.precision), loss.task != LOSS_TASK)):
        labels.setdefault(row.precision, CANNOT_TELL if _too_small(run, row) else _label(run, row))
    return labels


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


def _evidence(run: Run, row: Comparison) -> str:
    tokens = sorted({run.training[arm].tokens for arm in (BASELINE, row.arm) if arm in run.training})
    return _sentence("evidence", row, tokens, _is_general(run, row))


def _claim(run: Run, row: Comparison) -> str:
    pair = (
        run.means[row.arm][row.precision]
        if row.task == MEAN
        else run.comparisons[row.arm][row.precision][row.task].main
    )
    return _sentence("claim", row, _label(run, row), pair.first, pair.second, _is_general(run, row))


def _points(run: Run, row: Comparison) -> list[str]:
    """What the mean over tasks could have shown, and the items that the published gain would take."""
    mean = run.means.get(row.arm, {}).get(row.precision)
    if mean is None or not mean.estimate.half_width or not mean.estimate.n:
        return []
    points = 100 * detectable(mean.estimate.half_width)
    return [_sentence("points", row, mean, points, PUBLISHED_POINTS)]


def _single(run: Run) -> list[str]:
    """Without a comparison: the arm, and its loss at the fewest bits."""
    if len(run.arms) != 1:
        names = " and ".join(run.arms) or "nothing"
        return [f"No baseline was built beside {names}, so there is nothing to compare with."]
    arm = run.arms[0]
    parts = [f"Single arm: only {arm} was built, so there is nothing to compare."]
    for precision in reversed(run.precisions):
        for task, score in run.measured(arm, precision).scores.items():
            if is_loss(score.main.metric):
                value = significant(score.main.estimate.value)
                return [*parts, f"Its {task.replace('_', ' ')} at {label(precision)} is {value}."]
    return parts
