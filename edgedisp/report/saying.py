"""The words of the verdict: evidence, claims, what a result could have shown (its rules: claims.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgedisp.report.comparisons import MEAN, Comparison, detectable
from edgedisp.report.reading import (
    BASELINE,
    DISPERSED,
    GIVEN,
    Summary,
    at,
    bits,
    branch,
    compared,
    is_loss,
    label,
    number,
    precisions,
    tasks,
    whole,
)
from edgedisp.report.wording import (
    count,
    decimals_for,
    figure,
    fixed,
    p_value,
    percent,
    plural,
    signed,
    small,
)

WIDEST_NULL = 0.02  # nats per token: an interval wider than +- this cannot support "no difference"
PUBLISHED_POINTS = 0.7
"""The smallest published gain, in points of a mean over ten tasks: GPT-2, 34.95 to 35.61 (2602.00217)."""
SEED_CAUTION = (
    "One training seed per arm: how much the luck of training matters is unknown, and not in the interval."
)


def objection(first: Comparison) -> str:
    """Why an interval that leaves 0 out is no claim."""
    if abs(first.difference) <= first.floor:
        return (
            "the one found is no larger than what two scorings of the same model differ by "
            f"({_amount(first, first.floor)})"
        )
    return f"the interval just leaves 0 out, but the permutation test does not agree (p = {p_value(first.p)})"


def luck(first: Comparison) -> str:
    """What is known of the luck of training."""
    if first.precision == GIVEN:
        return (
            "How these models were trained is not known here: the interval covers the choice of items alone."
        )
    if len(first.by_seed) < 2 or first.sd is None:
        return SEED_CAUTION
    decimals = decimals_for(first.half_width, 4)
    each = ", ".join(signed(value, decimals) for value in first.by_seed)
    return (
        f"The {len(first.by_seed)} seeds differ by {fixed(first.sd, decimals)} (standard deviation; {each}), "
        "which the interval includes."
    )


def too_wide(first: Comparison) -> str:
    """The cost to know: an interval narrows with the square root of the number of documents."""
    missed = _amount(first, first.detectable)
    text = f"Cannot tell at this size: a difference of less than {missed} would not show."
    if first.more_luck_than_text:
        return f"{text} More of that is the luck of training than the choice of text: more seeds would tell."
    if first.unit == "nats" and first.documents:
        needed = math.ceil(first.documents * (first.detectable / WIDEST_NULL) ** 2)
        text += f" About {_about(needed)} held-out documents are needed to see {WIDEST_NULL} nats per token."
    return text


def seen(first: Comparison) -> str:
    """What a null result could have shown."""
    if first.half_width == 0:
        return f"Both arms gave the same {'answer' if first.task == MEAN else 'loss'} everywhere."
    return f"A difference of {_amount(first, first.detectable)} or more would be found 4 times out of 5."


def points(summary: Summary, first: Comparison) -> list[str]:
    """What the tasks that count right answers could have shown, and what the published gain would take."""
    found = branch(summary, "means", first.arm, first.precision)
    low, high, items = number(found.get("low")), number(found.get("high")), whole(found.get("n"))
    if low is None or high is None or not items or high <= low:
        return []
    seen = 100 * detectable((high - low) / 2)
    what = f"The mean of {len(found['tasks'])} tasks, {plural(items, 'item')}{where(first)},"
    text = f"{what} would show {fixed(seen, 1)} points or more"
    if seen <= PUBLISHED_POINTS:
        return [f"{text}."]
    ends = [number(at(found, "seeds", f"item_{end}")) for end in ("low", "high")]
    of_items = 100 * detectable(((ends[1] or 0.0) - (ends[0] or 0.0)) / 2) if None not in ends else seen
    if seen > math.sqrt(2) * of_items:
        return [f"{text}; more of that is the luck of training than the choice of items."]
    needed = math.ceil(items * (of_items / PUBLISHED_POINTS) ** 2)
    return [
        f"{text}; the smallest published gain, {PUBLISHED_POINTS} points, takes about {_about(needed)} items."
    ]


def _about(number_: int) -> str:
    """Two significant digits: more would pretend to a precision that nobody has."""
    digits = len(str(number_)) - 2
    return f"{round(number_, -digits) if digits > 0 else number_:,}"


def _amount(one: Comparison, size: float) -> str:
    """`0.0027 nats per token (0.27 % of perplexity)`, `1.3 points`, `0.4`."""
    if one.unit == "nats":
        return f"{size:.2g} nats per token ({100 * math.expm1(size):.2g} % of perplexity)"
    return f"{fixed(100 * size, 1)} points" if one.unit == "share" else small(size)


def evidence(summary: Summary, one: Comparison) -> str:
    """The headline's figure, its interval, what it was measured on and after how much training."""
    found = {whole(at(summary, "midtrain", arm, "tokens")) for arm in (BASELINE, one.arm)} - {None}
    tokens = " or ".join(count(value) for value in sorted(found, key=str))
    unit = {"nats": " nats per token", "share": " points"}.get(one.unit, "")
    scale = 100.0 if one.unit == "share" else 1.0
    what = measured(one) if unit else f"{one.task} (a perplexity)"
    decimals = decimals_for(scale * one.half_width, 4)
    value, low, high = (signed(scale * x, decimals) for x in (one.difference, one.low, one.high))
    sizes = "".join(f"; {text}" for text in (_sizes(one),) if text)
    interval = f"(95 % interval {low} to {high}{sizes})"
    text = f"{what}{where(one)} changes by {value}{unit} with {_cause(one.arm)} {interval}."
    if one.precision == GIVEN:
        text = f"{what} of {one.arm} - baseline is {value}{unit} {interval}."
    return f"After {tokens} training tokens per arm, {text}" if tokens else text[0].upper() + text[1:]


def where(one: Comparison) -> str:
    """` at int4`; nothing for models that were handed over as they are."""
    return "" if one.precision == GIVEN else f" at {label(one.precision)}"


def measured(one: Comparison) -> str:
    """What a comparison is of."""
    if one.task == MEAN:
        return "the mean over tasks"
    return "held-out loss" if one.task == "heldout_perplexity" else f"the loss of {one.task}"


def _cause(arm: str) -> str:
    return "dispersion" if arm == DISPERSED else f"the arm {arm}"


def _sizes(one: Comparison) -> str:
    known = ((one.n, "item"), (one.documents, "document"))
    sizes = " from ".join(plural(number_, word) for number_, word in known if number_)
    over = f"{len(one.by_seed)} seeds" if len(one.by_seed) > 1 else ""
    return ", ".join(text for text in (sizes, over) if text)


def claim(summary: Summary, one: Comparison, decided: str) -> str:
    """`Dispersion helps at int4: perplexity 15.52 -> 15.40 (-0.8 %).`"""
    if one.task == MEAN:
        found = branch(summary, "means", one.arm, one.precision)
        before, after = (percent(number(found.get(key))) for key in (BASELINE, "arm"))
        return f"{_start(one, decided)}: {before} -> {after} right on average."
    entry = at(compared(summary), one.arm, one.precision, one.task)
    after = at(entry, "arm") if at(entry, DISPERSED) is None else at(entry, DISPERSED)
    values = [number(at(entry, BASELINE)), number(after)]
    share = 100 * math.expm1(one.difference)
    change = f"{signed(share, max(1, decimals_for(share and abs(share), 1)))} %" if one.unit == "nats" else ""
    if None not in values:
        moved = f"perplexity {figure(values[0])} -> {figure(values[1])}"
        change = f"{moved} ({change})" if change else moved
    return f"{_start(one, decided)}: {change or signed(one.difference, 3)}."


def _start(one: Comparison, decided: str) -> str:
    """`Dispersion helps at int4`; of two models, `B is better than the baseline`."""
    if one.precision == GIVEN:
        return f"{one.arm} is {'better' if one.gain else 'worse'} than the baseline"
    cause = _cause(one.arm)
    return f"{cause[0].upper()}{cause[1:]} {decided}{where(one)}"


def not_compared(summary: Summary, first: Comparison) -> list[str]:
    """Precisions with fewer bits than the headline's: they ship, but no loss was compared there."""
    missing = [name for name in precisions(summary) if bits(name) < bits(first.precision)]
    return [f"{' and '.join(missing)} was built, but its loss was not compared."] if missing else []


def others(supporting: Sequence[Comparison]) -> str:
    """The supporting comparisons: how many, how many are clear alone, what survives the correction."""
    total = len(supporting)
    outside = [one for one in supporting if one.clear]
    survivors = [one for one in supporting if one.survives]
    if not outside:
        none = f"None of the {total} other comparisons shows a difference." if total > 1 else ""
        return none or ("The other comparison shows none either." if total else "Nothing else was compared.")
    text = f"Of {plural(total, 'other comparison')}, {len(outside)} {_verb(outside, 'show')} a difference"
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
    words = [f"{one.task}{where(one)} {ways[one.gain]}" for one in found]
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def single(summary: Summary, built: Sequence[str]) -> list[str]:
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
