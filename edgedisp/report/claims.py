"""What may be claimed from a before/after table, by written rules.

The rules (`RULES`, printed in every report):

1. One test is the headline, chosen before any figure is seen: the difference in held-out loss per token,
   dispersed - baseline, paired and clustered by document, at the precision that ships (the fewest bits).
   Without an arm `dispersed` it is the first arm with dispersion; other arms are never the headline.
2. helps / hurts: the headline's 95 % interval lies wholly below / above 0, and the difference is larger than
   what two scorings of the same model differ by (the noise floor, stages/noise.py).
3. no measurable difference: it contains 0 and is narrow enough (half-width at most 0.02 nats per token, 2 %
   of perplexity) to have shown a difference that matters; or it leaves 0 out by less than the noise floor.
4. cannot tell at this size: a smoke run, fewer than 20 held-out documents (a bootstrap over so few clusters
   is too narrow), a wider interval, no loss comparison, supporting tests that contradict a null headline, or
   arms whose losses before the first update differ: one model on one batch, so something was at fault.
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

from edgedisp.report.comparisons import Comparison, comparisons, headline, holm
from edgedisp.report.reading import (
    BASELINE,
    DISPERSED,
    Summary,
    arms,
    at,
    bits,
    compared,
    first_losses,
    focus,
    is_loss,
    label,
    number,
    precisions,
    seeds,
    tasks,
    whole,
)
from edgedisp.report.wording import count, decimals_for, figure, fixed, plural, signed, small

HELPS, HURTS, NULL = "helps", "hurts", "no measurable difference"
CANNOT_TELL, SINGLE = "cannot tell at this size", "single arm"

WIDEST_NULL = 0.02  # nats per token: an interval wider than +- this cannot support "no difference"
FEWEST_DOCUMENTS = 20
SEED_CAUTION = (
    "One training seed per arm: how much the luck of training matters is unknown, and not in the interval."
)

RULES = (
    "The headline test is fixed beforehand: the difference in held-out loss per token (dispersed - baseline, "
    "paired, clustered by document) at the precision that ships, the one with the fewest bits. Without an "
    "arm “dispersed” it is the first arm with dispersion.",
    "“helps” or “hurts”: its 95 % interval lies wholly below or wholly above 0, and the difference is larger "
    "than the noise floor, which is how far two scorings of the same model differ.",
    f"“no measurable difference”: the interval contains 0 and its half-width is at most {WIDEST_NULL} nats "
    "per token (2 % of perplexity); or the difference is below the noise floor.",
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
    first = headline(found)
    supporting = holm([one for one in found if one is not first])
    if arm:
        decided, parts = _decide(summary, arm, first, supporting)
    else:
        decided, parts = SINGLE, _single(summary, arms(summary))
    return {
        "label": decided,
        "sentence": " ".join(parts),
        "parts": parts,
        "rules": list(RULES),
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
        return CANNOT_TELL, [reason, *([_evidence(summary, first)] if first else [])]
    parts = [_evidence(summary, first), *_not_compared(summary, first), _others(supporting)]
    if first.clear:
        decided = HELPS if first.gain else HURTS
        return decided, [_claim(summary, first, decided), *parts, _luck(first)]
    if first.excludes_zero:
        return NULL, [
            "No measurable difference: the one found is no larger than what two scorings of the same model "
            f"differ by ({_amount(first, first.floor)}).",
            *parts,
            _luck(first),
        ]
    if any(one.survives for one in supporting):
        claim = "Cannot tell at this size: the headline loss shows no difference, but supporting tests do."
        return CANNOT_TELL, [claim, *parts, _seen(first), _luck(first)]
    if any(one.clear for one in supporting):
        claim = f"No measurable difference in held-out loss at {label(first.precision)}."
    else:
        claim = "No measurable difference at this budget."
    return NULL, [claim, *parts, _seen(first), _luck(first)]


def _luck(first: Comparison) -> str:
    """What is known of the luck of training."""
    if len(first.by_seed) < 2 or first.sd is None:
        return SEED_CAUTION
    decimals = decimals_for(first.half_width, 4)
    each = ", ".join(signed(value, decimals) for value in first.by_seed)
    return (
        f"The {len(first.by_seed)} seeds differ by {fixed(first.sd, decimals)} (standard deviation; {each}), "
        "which the interval includes."
    )


def _too_small(summary: Summary, arm: str, first: Comparison | None) -> str:
    """Why no claim is made at this size, or an empty string."""
    if at(summary, "smoke"):
        return (
            "Cannot tell at this size: a smoke run proves that the recipe works and says nothing about "
            "dispersion."
        )
    unlike = [pair for pair in first_losses(summary, arm) or () if pair[0] != pair[1]]
    if unlike:
        return (
            f"Cannot tell: the arms' losses before the first update differ ({unlike[0][0]:.6f} and "
            f"{unlike[0][1]:.6f}), so the machine did not compute both alike. Build again."
        )
    if first is None:
        return "Cannot tell at this size: no paired held-out loss was compared."
    if first.documents is not None and first.documents < FEWEST_DOCUMENTS:
        return (
            f"Cannot tell at this size: {plural(first.documents, 'held-out document')} compared, "
            f"{FEWEST_DOCUMENTS} needed before an interval can be trusted."
        )
    if first.unit == "nats" and not first.excludes_zero and first.half_width > WIDEST_NULL:
        return _too_wide(first)
    return ""


def _too_wide(first: Comparison) -> str:
    """The cost to know: an interval narrows with the square root of the number of documents."""
    missed = _amount(first, first.half_width)
    text = f"Cannot tell at this size: a difference of less than {missed} would not show."
    if first.more_luck_than_text:
        return f"{text} More of that is the luck of training than the choice of text: more seeds would tell."
    if first.documents:
        needed = math.ceil(first.documents * (first.half_width / WIDEST_NULL) ** 2)
        text += f" About {needed:,} held-out documents are needed to see {WIDEST_NULL} nats per token."
    return text


def _seen(first: Comparison) -> str:
    """What a null result could have shown."""
    if first.half_width == 0:
        return "Both arms gave the same loss on every document."
    return f"A difference of {_amount(first, first.detectable)} or more would be found 4 times out of 5."


def _amount(one: Comparison, size: float) -> str:
    """`0.0027 nats per token (0.27 % of perplexity)`, `1.3 points`, `0.4`."""
    if one.unit == "nats":
        return f"{size:.2g} nats per token ({100 * math.expm1(size):.2g} % of perplexity)"
    return f"{fixed(100 * size, 1)} points" if one.unit == "share" else small(size)


def _evidence(summary: Summary, one: Comparison) -> str:
    """The headline's figure, its interval, what it was measured on and after how much training."""
    found = {whole(at(summary, "midtrain", arm, "tokens")) for arm in (BASELINE, one.arm)} - {None}
    tokens = " or ".join(count(value) for value in sorted(found, key=str))
    what = "held-out loss" if one.task == "heldout_perplexity" else f"the loss of {one.task}"
    unit = " nats per token" if one.unit == "nats" else ""
    what = what if unit else f"{one.task} (a perplexity)"
    decimals = decimals_for(one.half_width, 4)
    value, low, high = (signed(x, decimals) for x in (one.difference, one.low, one.high))
    sizes = "".join(f"; {text}" for text in (_sizes(one),) if text)
    text = (
        f"{what} at {label(one.precision)} changes by {value}{unit} with {_cause(one.arm)} "
        f"(95 % interval {low} to {high}{sizes})."
    )
    return f"After {tokens} training tokens per arm, {text}" if tokens else text[0].upper() + text[1:]


def _cause(arm: str) -> str:
    return "dispersion" if arm == DISPERSED else f"the arm {arm}"


def _sizes(one: Comparison) -> str:
    known = ((one.n, "item"), (one.documents, "document"))
    sizes = " from ".join(plural(number_, word) for number_, word in known if number_)
    over = f"{len(one.by_seed)} seeds" if len(one.by_seed) > 1 else ""
    return ", ".join(text for text in (sizes, over) if text)


def _claim(summary: Summary, one: Comparison, decided: str) -> str:
    """`Dispersion helps at int4: perplexity 15.52 -> 15.40 (-0.8 %).`"""
    entry = at(compared(summary), one.arm, one.precision, one.task)
    after = at(entry, "arm") if at(entry, DISPERSED) is None else at(entry, DISPERSED)
    values = [number(at(entry, BASELINE)), number(after)]
    share = 100 * math.expm1(one.difference)
    change = f"{signed(share, max(1, decimals_for(share and abs(share), 1)))} %" if one.unit == "nats" else ""
    if None not in values:
        moved = f"perplexity {figure(values[0])} -> {figure(values[1])}"
        change = f"{moved} ({change})" if change else moved
    cause = _cause(one.arm)
    start = f"{cause[0].upper()}{cause[1:]} {decided} at {label(one.precision)}"
    return f"{start}: {change or signed(one.difference, 3)}."


def _not_compared(summary: Summary, first: Comparison) -> list[str]:
    """Precisions with fewer bits than the headline's: they ship, but no loss was compared there."""
    missing = [name for name in precisions(summary) if bits(name) < bits(first.precision)]
    return [f"{' and '.join(missing)} was built, but its loss was not compared."] if missing else []


def _others(supporting: Sequence[Comparison]) -> str:
    """The supporting comparisons: how many, how many exclude 0, what survives the correction."""
    total = len(supporting)
    outside = [one for one in supporting if one.clear]
    survivors = [one for one in supporting if one.survives]
    if not outside:
        none = f"None of the {total} other paired intervals excludes 0." if total > 1 else ""
        return none or (
            "The other paired interval contains 0 too." if total else "Nothing else was compared."
        )
    text = f"Of {plural(total, 'other comparison')}, {len(outside)} {_verb(outside, 'exclude')} 0"
    if not survivors:
        return f"{text} ({_named(outside)}); none survives Holm's correction, so no claim rests on them."
    return (
        f"{text} and {len(survivors)} {_verb(survivors, 'survive')} Holm's correction: {_named(survivors)}."
    )


def _verb(found: Sequence[Comparison], verb: str) -> str:
    return f"{verb}s" if len(found) == 1 else verb


def _named(found: Sequence[Comparison]) -> str:
    """The first four by task and precision, with their direction."""
    ways = {True: "better", False: "worse", None: "changed"}
    words = [f"{one.task} at {label(one.precision)} {ways[one.gain]}" for one in found]
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def _single(summary: Summary, built: Sequence[str]) -> list[str]:
    """What there is to say without a twin: the arm and its loss at the precision that ships."""
    if not built:
        return ["No arm was built."]
    if len(built) > 1:
        return [f"No baseline was built beside {' and '.join(built)}, so there is nothing to compare with."]
    parts = [f"Single arm: only {built[0]} was built, so there is nothing to compare."]
    for precision in reversed(precisions(summary)):
        for task, result in tasks(summary).items():
            value = number(at(summary, "accuracy", built[0], precision, task, "value"))
            if is_loss(result) and value is not None:
                return [*parts, f"Its {task.replace('_', ' ')} at {label(precision)} is {figure(value)}."]
    return parts


def _per_precision(
    summary: Summary, arm: str, first: Comparison | None, supporting: Sequence[Comparison]
) -> dict[str, dict[str, str]]:
    """The loss comparison of each precision under the same rules; supporting ones after Holm's correction."""
    out: dict[str, dict[str, str]] = {}
    losses = [one for one in (first, *supporting) if one is not None and "perplexity" in one.task]
    for one in sorted(losses, key=lambda loss: (-bits(loss.precision), loss.task != "heldout_perplexity")):
        claimed = one.clear if one is first else one.survives
        if _too_small(summary, arm, one):
            decided = CANNOT_TELL
        else:
            decided = (HELPS if one.gain else HURTS) if claimed else NULL
        out.setdefault(one.precision, {"label": decided, "sentence": _evidence(summary, one)})
    return out
