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

from edgedisp.core.files import to_json
from edgedisp.core.results import AS_GIVEN, BASELINE, LOSS_TASK, PUBLISHED_POINTS, Json
from edgedisp.core.run import Run
from edgedisp.report.comparisons import BETTER, MEAN, WORSE, Comparison, comparisons, headline
from edgedisp.report.formatting import bits, label, plural
from edgedisp.report.layout import TEXTS, template

HELPS, HURTS, NULL = "helps", "hurts", "no measurable difference"
CANNOT_TELL, SINGLE = "cannot tell at this size", "single arm"
SMALL = "Cannot tell at this size"
FEWEST_DOCUMENTS = 20
FEWEST_SEEDS = 3  # fewer say something about these models, nothing about dispersion
WIDEST_NULL = 0.02  # nats per token: a wider interval cannot support "no difference"
RULES = [
    rule.format(nats=WIDEST_NULL, points=PUBLISHED_POINTS, documents=FEWEST_DOCUMENTS, seeds=FEWEST_SEEDS)
    for rule in TEXTS["lists"]["rules"]
]


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

    @property
    def by_precision(self) -> str:
        """`torch fp32: helps; int4: no measurable difference`; empty for a single precision."""
        texts = [f"{label(name)}: {text}" for name, text in self.per_precision.items()]
        return "; ".join(texts) if len(texts) > 1 else ""


def verdict(run: Run) -> Verdict:
    """What this run shows about its main arm, by `RULES`."""
    arm, rows = run.main_arm, comparisons(run)
    if arm is None:
        text = f"No baseline was built beside {' and '.join(run.arms)}, so there is nothing to compare with."
        if len(run.arms) == 1:
            text = f"Single arm: only {run.arms[0]} was built, so there is nothing to compare."
        return Verdict(SINGLE, [text])
    first = headline(rows)
    supporting = [row for row in rows if row.arm == arm and not row.is_headline]
    decided, parts = _decide(run, first, supporting)
    parts = [part for part in parts if part]
    losses = [row for row in rows if row.arm == arm and row.unit == "nats"]
    labels: dict[str, str] = {}
    for row in sorted(losses, key=lambda loss: (-bits(loss.precision), loss.task != LOSS_TASK)):
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
    points = _sentence("points", first, mean, PUBLISHED_POINTS)
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
    parts += [_sentence("visible", first), points, luck]
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
    is_wide = not first.is_clear and first.half_width > widest
    return _sentence("too_wide", first, WIDEST_NULL) if is_wide else ""


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
