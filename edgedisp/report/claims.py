"""What may be claimed from a before/after table, by written rules.

The rules (`RULES`, printed in every report):

1. One test is the headline, chosen before any figure is seen: the difference in held-out loss per token,
   dispersed - baseline, paired and clustered by document, at the precision that ships (the fewest bits).
   Without an arm `dispersed` it is the first arm with dispersion; other arms are never the headline. Where no
   loss was compared, it is the mean over the tasks that count right answers.
2. helps / hurts: the headline's 95 % interval lies wholly below / above 0, the permutation test agrees
   (p at most 0.05), and the difference is larger than what two scorings of the same model differ by (the
   noise floor, stages/noise.py).
3. no measurable difference: it contains 0, or leaves it out but test or floor objects; and it is narrow
   enough (half-width at most 0.02 nats per token, 2 % of perplexity; for a mean over tasks 0.7 points, the
   smallest published gain) to have shown a difference that matters.
4. cannot tell at this size: a smoke run, fewer than 20 held-out documents (a bootstrap over so few clusters
   is too narrow), a wider interval, no loss comparison, supporting tests that contradict a null headline, or
   arms whose losses before the first update differ: one model on one batch, so something was at fault (within
   a run; arms of joined runs are no twins).
5. All other tasks and precisions are supporting. Their number is told, and one counts only if its interval
   excludes 0 AND it survives Holm's correction at 5 %. By chance alone one in twenty excludes 0.
6. A null result tells what could have been seen: the difference that would be found 4 times out of 5 (1.43
   half-widths), and what it would cost to see the smallest published gain.
7. No baseline, or nothing beside it: nothing is claimed.
8. With several seeds the intervals hold their spread as well (evaluate/seeds.py). With one, how much the luck
   of training matters is unknown, and the report says so: the interval covers the choice of test text alone.

Where 0.02 comes from: int8 costs less than 1 % of perplexity and int4 5-30 %, so 2 % is about the largest
difference that someone could shrug off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from edgedisp.report import saying
from edgedisp.report.comparisons import (
    Comparison,
    comparisons,
    headline,
    holm,
    is_main_loss,
    mean_of_tasks,
)
from edgedisp.report.reading import (
    Summary,
    arms,
    at,
    bits,
    first_losses,
    focus,
    label,
    seeds,
)
from edgedisp.report.saying import PUBLISHED_POINTS, WIDEST_NULL
from edgedisp.report.wording import plural

HELPS, HURTS, NULL = "helps", "hurts", "no measurable difference"
CANNOT_TELL, SINGLE = "cannot tell at this size", "single arm"

FEWEST_DOCUMENTS = 20

RULES = (
    "The headline test is fixed beforehand: the difference in held-out loss per token (dispersed - baseline, "
    "paired, clustered by document) at the precision that ships, the one with the fewest bits. Without an "
    "arm “dispersed” it is the first arm with dispersion. Where no loss was compared, it is the mean over "
    "the tasks that count right answers.",
    "“helps” or “hurts”: its 95 % interval lies wholly below or wholly above 0, the permutation test agrees "
    "(p at most 0.05), and the difference is larger than the noise floor, which is how far two scorings of "
    "the same model differ.",
    "“no measurable difference”: the interval contains 0, or leaves it out but the test or the noise floor "
    f"objects; and its half-width is at most {WIDEST_NULL} nats per token (2 % of perplexity; for a mean "
    f"over tasks {PUBLISHED_POINTS} points).",
    f"“cannot tell at this size”: a smoke run, fewer than {FEWEST_DOCUMENTS} held-out documents, a wider "
    "interval, no loss comparison, supporting tests that contradict a null headline, or arms whose losses "
    "before the first update differ (the same model on the same batch: a fault of the computing).",
    "Every other task and precision is supporting: one counts only if its interval excludes 0 and it "
    "survives Holm's correction at 5 % over all of them. By chance alone one in twenty excludes 0.",
    "A null result says what could have been seen: the difference that would be found 4 times out of 5, 1.43 "
    "half-widths of the interval.",
    "With several training seeds, intervals cover the choice of test text and the luck of training (the "
    "spread between seeds). With one seed they cover the text alone, and how much luck matters is unknown.",
)
NO_FLOOR = "Here the noise floor was not measured, and no difference is held against it."


def verdict(summary: Summary) -> dict[str, Any]:
    """What this build shows.

    Returns {label, sentence, parts (the sentence in pieces, the first is the claim), rules, arm (compared
    with the baseline, or None), seeds (how many), headline (a comparison or None), supporting (comparisons
    with p and Holm-corrected p), comparisons (how many in all), per_precision {precision: {label,
    sentence}}}.
    JSON-able.
    """
    arm = focus(summary)
    found = comparisons(summary, arm) if arm else []
    first = headline(found) or (mean_of_tasks(summary, arm) if arm else None)
    supporting = holm([one for one in found if one is not first])
    if arm:
        decided, parts = _decide(summary, arm, first, supporting)
    else:
        decided, parts = SINGLE, saying.single(summary, arms(summary))
    return {
        "label": decided,
        "sentence": " ".join(parts),
        "parts": parts,
        "rules": [*RULES, *([] if at(summary, "noise") else [NO_FLOOR])],
        "arm": arm,
        "seeds": seeds(summary),
        "headline": None if first is None else asdict(first),
        "supporting": [asdict(one) for one in supporting],
        "comparisons": len(found),
        "per_precision": _per_precision(summary, arm, first, supporting) if arm else {},
    }


def _decide(
    summary: Summary, arm: str, first: Comparison | None, supporting: Sequence[Comparison]
) -> tuple[str, list[str]]:
    """The label and the sentence's parts, rule by rule."""
    reason = _too_small(summary, arm, first)
    if first is None or reason:
        shown = [saying.evidence(summary, first), *saying.points(summary, first)] if first else []
        return CANNOT_TELL, [reason, *shown]
    parts = [saying.evidence(summary, first), *saying.not_compared(summary, first), saying.others(supporting)]
    if first.clear:
        decided = HELPS if first.gain else HURTS
        return decided, [saying.claim(summary, first, decided), *parts, saying.luck(first)]
    shown = [saying.seen(first), *saying.points(summary, first), saying.luck(first)]
    if any(one.survives for one in supporting):
        claim = "Cannot tell at this size: the headline shows no difference, but supporting tests do."
        return CANNOT_TELL, [claim, *parts, *shown]
    if first.excludes_zero:
        return NULL, [f"No measurable difference: {saying.objection(first)}.", *parts, *shown]
    if any(one.clear for one in supporting):
        claim = f"No measurable difference in {saying.measured(first)}{saying.where(first)}."
    else:
        claim = "No measurable difference at this budget."
    return NULL, [claim, *parts, *shown]


def _too_small(summary: Summary, arm: str, first: Comparison | None) -> str:
    """Why no claim is made at this size, or an empty string."""
    if at(summary, "smoke"):
        return (
            "Cannot tell at this size: a smoke run proves that the recipe works and says nothing about "
            "dispersion."
        )
    # Arms of two runs are no twins: their first losses may well differ.
    pairs = [] if at(summary, "runs") else first_losses(summary, arm) or []
    unlike = [pair for pair in pairs if pair[0] != pair[1]]
    if unlike:
        return (
            f"Cannot tell: the arms' losses before the first update differ ({unlike[0][0]:.6f} and "
            f"{unlike[0][1]:.6f}), so the machine did not compute both alike. Build again."
        )
    if first is None:
        return "Cannot tell at this size: neither a held-out loss nor a mean over tasks was compared."
    if first.documents is not None and first.documents < FEWEST_DOCUMENTS:
        return (
            f"Cannot tell at this size: {plural(first.documents, 'held-out document')} compared, "
            f"{FEWEST_DOCUMENTS} needed before an interval can be trusted."
        )
    widest = {"nats": WIDEST_NULL, "share": PUBLISHED_POINTS / 100}.get(first.unit, math.inf)
    if not first.clear and first.half_width > widest:
        return saying.too_wide(first)
    return ""


def by_precision(said: dict[str, Any]) -> str:
    """`torch fp32: helps; int4: no measurable difference`; empty for a single precision."""
    found = said["per_precision"]
    told = "; ".join(f"{label(name)}: {one['label']}" for name, one in found.items())
    return told if len(found) > 1 else ""


def _per_precision(
    summary: Summary, arm: str, first: Comparison | None, supporting: Sequence[Comparison]
) -> dict[str, dict[str, str]]:
    """The loss comparison of each precision under the same rules; supporting ones after Holm's correction."""
    out: dict[str, dict[str, str]] = {}
    losses = [one for one in (first, *supporting) if one is not None and is_main_loss(one)]
    for one in sorted(losses, key=lambda loss: (-bits(loss.precision), loss.task != "heldout_perplexity")):
        claimed = one.clear if one is first else one.survives
        if _too_small(summary, arm, one):
            decided = CANNOT_TELL
        else:
            decided = (HELPS if one.gain else HURTS) if claimed else NULL
        out.setdefault(one.precision, {"label": decided, "sentence": saying.evidence(summary, one)})
    return out
