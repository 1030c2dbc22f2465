"""What may be claimed from a before/after table, by written rules.

The rules (`RULES`, printed in every report):

1. One test is the headline, chosen before any figure is seen: the difference in held-out loss per token,
   dispersed - baseline, paired and clustered by document, at the precision that ships (the fewest bits built).
2. helps / hurts: the headline's 95 % interval lies wholly below / above 0.
3. no measurable difference: it contains 0 and is narrow enough (half-width at most 0.02 nats per token, 2 % of
   perplexity) to have shown a difference that matters.
4. cannot tell at this size: a smoke run, fewer than 20 held-out documents (a bootstrap over so few clusters is too
   narrow), a wider interval, no loss comparison, or supporting tests that contradict a null headline.
5. All other tasks and precisions are supporting. Their number is told, and one counts only if its interval excludes 0
   AND it survives Holm's correction at 5 %. By chance alone one in twenty excludes 0.
6. A null result tells what could have been seen: the interval's half-width.
7. One arm alone: nothing is claimed.

Where 0.02 comes from: published gains of dispersion are 0.7-1.5 points of accuracy, int8 costs less than
1 % of perplexity and int4 20-30 %, so 2 % is the largest difference that someone could shrug off.

Known limit: one training seed per arm. The interval covers the choice of test text, not the luck of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgedisp.report.reading import (
    BASELINE,
    DISPERSED,
    Summary,
    arms,
    at,
    bits,
    branch,
    is_loss,
    label,
    number,
    precisions,
    tasks,
    whole,
)
from edgedisp.report.table import Metric, task_metric
from edgedisp.report.wording import count, decimals_for, figure, fixed, plural, signed, small

HELPS, HURTS, NULL = "helps", "hurts", "no measurable difference"
CANNOT_TELL, SINGLE = "cannot tell at this size", "single arm"

WIDEST_NULL = 0.02  # nats per token: an interval wider than +- this cannot support "no difference"
FEWEST_DOCUMENTS = 20
LEVEL = 0.05  # two-sided
Z95 = 1.959964  # half-width of a 95 % interval in standard errors

RULES = (
    "The headline test is fixed beforehand: the difference in held-out loss per token (dispersed - "
    "baseline, paired, "
    "clustered by document) at the precision that ships, the one with the fewest bits.",
    "“helps” or “hurts”: its 95 % interval lies wholly below or wholly above 0.",
    f"“no measurable difference”: it contains 0 and its half-width is at most {WIDEST_NULL} nats per token "
    "(2 % of perplexity).",
    f"“cannot tell at this size”: a smoke run, fewer than {FEWEST_DOCUMENTS} held-out documents, a wider "
    "interval, no "
    "loss comparison, or supporting tests that contradict a null headline.",
    "Every other task and precision is supporting: one counts only if its interval excludes 0 and it "
    "survives Holm's "
    "correction at 5 % over all of them. By chance alone one in twenty excludes 0.",
    "A null result says what could have been seen: the half-width of the interval.",
    "One training seed per arm: intervals cover the choice of test text, not the luck of training.",
)


@dataclass(frozen=True)
class Comparison:
    """One paired comparison. `difference`, `low`, `high` in nats per token (unit "nats") or in the task's unit."""

    precision: str
    task: str
    difference: float
    low: float
    high: float
    unit: str  # "nats", "share" or "" (the task's own)
    gain: bool | None  # whether the difference is in the better direction
    n: int | None
    documents: int | None
    p: float
    p_holm: float = 1.0

    @property
    def half_width(self) -> float:
        """What could have been seen."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside the interval."""
        return self.low > 0 or self.high < 0

    @property
    def survives(self) -> bool:
        """Excludes 0 and holds after Holm's correction."""
        return self.excludes_zero and self.p_holm <= LEVEL


def verdict(summary: Summary) -> dict[str, Any]:
    """What this build shows.

    Returns {label, sentence, parts (the sentence in pieces, the first is the shortest), rules, headline (a
    comparison or None), supporting (comparisons with p and Holm-corrected p), comparisons (how many in all),
    per_precision {precision: {label, sentence}}}.
    """
    built = arms(summary)
    if not {BASELINE, DISPERSED} <= set(built):
        return _report(SINGLE, _single(summary, built), None, [], {})
    compared = comparisons(summary)
    headline = _headline(compared)
    supporting = holm([one for one in compared if one is not headline])
    decided, parts = _decide(summary, headline, supporting)
    per_precision = _per_precision(summary, headline, supporting)
    return _report(decided, parts, headline, supporting, per_precision)


def _report(
    decided: str,
    parts: list[str],
    headline: Comparison | None,
    supporting: Sequence[Comparison],
    per_precision: dict[str, Any],
) -> dict[str, Any]:
    return {
        "label": decided,
        "sentence": " ".join(parts),
        "parts": parts,
        "rules": list(RULES),
        "headline": None if headline is None else asdict(headline),
        "supporting": [asdict(one) for one in supporting],
        "comparisons": len(supporting) + (headline is not None),
        "per_precision": per_precision,
    }


def comparisons(summary: Summary) -> list[Comparison]:
    """Every paired comparison that has an interval, fewest bits first, losses before tasks.

    A perplexity is compared by its loss per token where that was recorded, because its logarithm is what was
    paired and averaged.
    """
    found = []
    order = {task: index for index, task in enumerate(tasks(summary))}
    for precision in sorted(branch(summary, "comparison"), key=bits):
        by_task = branch(summary, "comparison", precision)
        for task in sorted(by_task, key=lambda name: order.get(name, len(order))):
            found += _comparison(precision, task, branch(by_task[task]))
    return found


def _comparison(precision: str, task: str, entry: dict[str, Any]) -> list[Comparison]:
    loss = branch(entry, "nll_difference")
    in_nats = is_loss(entry) and number(loss.get("difference")) is not None
    source = loss if in_nats else entry
    value, low, high = (number(source.get(key)) for key in ("difference", "low", "high"))
    if value is None or low is None or high is None:
        return []
    metric = task_metric(task, entry)
    better = None if metric.higher_is_better is None or value == 0 else (value > 0) == metric.higher_is_better
    exact = number(entry.get("mcnemar_p"))
    p = exact if exact is not None else normal_p(value, low, high)
    unit = "nats" if in_nats else "share" if metric.unit == "%" else ""
    sizes = whole(entry.get("n")), whole(entry.get("documents"))
    return [Comparison(precision, task, value, low, high, unit, better, *sizes, p)]


def normal_p(value: float, low: float, high: float) -> float:
    """Two-sided p of a difference, its standard error read off its 95 % interval (normal approximation)."""
    error = (high - low) / (2 * Z95)
    if error <= 0:
        return 1.0 if value == 0 else 0.0
    return math.erfc(abs(value) / error / math.sqrt(2))


def holm(found: Sequence[Comparison]) -> list[Comparison]:
    """The same comparisons, in the same order, with Holm's step-down corrected p (Holm 1979)."""
    ranked = sorted(range(len(found)), key=lambda index: found[index].p)
    corrected, running = dict.fromkeys(ranked, 1.0), 0.0
    for rank, index in enumerate(ranked):
        running = max(running, min(1.0, found[index].p * (len(found) - rank)))
        corrected[index] = running
    return [Comparison(**{**asdict(one), "p_holm": corrected[i]}) for i, one in enumerate(found)]


def _headline(compared: Sequence[Comparison]) -> Comparison | None:
    """The loss at the fewest bits; `heldout_perplexity` before any other perplexity."""
    losses = [one for one in compared if one.unit == "nats"]
    losses = losses or [one for one in compared if "perplexity" in one.task]
    return min(losses, key=lambda one: (bits(one.precision), one.task != "heldout_perplexity"), default=None)


def _decide(
    summary: Summary, headline: Comparison | None, supporting: Sequence[Comparison]
) -> tuple[str, list[str]]:
    """The label and the sentence's parts, rule by rule."""
    reason = _too_small(summary, headline)
    if headline is None or reason:
        return CANNOT_TELL, [reason, *([_evidence(summary, headline)] if headline else [])]
    parts = [_evidence(summary, headline), _others(supporting)]
    survivors = [one for one in supporting if one.survives]
    if headline.excludes_zero:
        decided = HELPS if headline.gain else HURTS
        return decided, [_claim(summary, headline, decided), *parts, _seed_caution()]
    seen = f"A difference of {_amount(headline, headline.half_width)} or more could have been seen."
    if survivors:
        first = "Cannot tell at this size: the headline loss shows no difference, but supporting tests do."
        return CANNOT_TELL, [first, *parts, seen, _seed_caution()]
    if any(one.excludes_zero for one in supporting):
        first = f"No measurable difference in held-out loss at {label(headline.precision)}."
    else:
        first = "No measurable difference at this budget."
    return NULL, [first, *parts, seen]


def _too_small(summary: Summary, headline: Comparison | None) -> str:
    """Why no claim is made at this size, or an empty string."""
    if at(summary, "smoke"):
        return "Cannot tell at this size: a smoke run proves that the recipe works and says nothing about dispersion."
    if headline is None:
        return "Cannot tell at this size: no paired held-out loss was compared."
    if headline.documents is not None and headline.documents < FEWEST_DOCUMENTS:
        return (
            f"Cannot tell at this size: {plural(headline.documents, 'held-out document')} compared, "
            f"{FEWEST_DOCUMENTS} needed for an interval to be trusted."
        )
    limit = WIDEST_NULL if headline.unit == "nats" else math.inf
    if not headline.excludes_zero and headline.half_width > limit:
        return _too_wide(headline)
    return ""


def _too_wide(headline: Comparison) -> str:
    """The cost to know: an interval narrows with the square root of the number of documents."""
    text = f"Cannot tell at this size: a difference below {_amount(headline, headline.half_width)} would not show."
    if headline.documents:
        needed = math.ceil(headline.documents * (headline.half_width / WIDEST_NULL) ** 2)
        text += f" About {needed:,} held-out documents are needed for ±{WIDEST_NULL} nats per token."
    return text


def _amount(one: Comparison, size: float) -> str:
    """`0.0027 nats per token (0.27 % of perplexity)`, `1.3 points`, `0.4`."""
    if one.unit == "nats":
        return f"{small(float(f'{size:.2g}'))} nats per token ({float(f'{100 * math.expm1(size):.2g}'):g} % of perplexity)"
    return f"{fixed(100 * size, 1)} points" if one.unit == "share" else small(size)


def _evidence(summary: Summary, one: Comparison) -> str:
    """The headline's figure, its interval, what it was measured on and after how much training."""
    tokens = {whole(at(summary, "midtrain", arm, "tokens")) for arm in (BASELINE, DISPERSED)} - {None}
    after = (
        f"After {' or '.join(map(count, sorted(tokens, key=str)))} training tokens per arm, "
        if tokens
        else ""
    )
    what = "held-out loss" if one.task == "heldout_perplexity" else f"the loss of {one.task}"
    what = what if one.unit == "nats" else f"{one.task} (perplexity)"
    unit = " nats per token" if one.unit == "nats" else ""
    text = f"{what} at {label(one.precision)} differs by {_with_interval(one, unit)} between the arms"
    text = f"{after}{text}" if after else text[0].upper() + text[1:]
    return f"{text}{_sizes(one)}."


def _with_interval(one: Comparison, unit: str) -> str:
    scale = 100.0 if one.unit == "share" else 1.0
    decimals = decimals_for(one.half_width * scale, 4)
    value, low, high = (signed(scale * x, decimals) for x in (one.difference, one.low, one.high))
    return f"{value}{unit} (dispersed - baseline, 95 % interval {low} to {high})"


def _sizes(one: Comparison) -> str:
    known = [
        plural(number, word) for number, word in ((one.n, "item"), (one.documents, "document")) if number
    ]
    return f", on {' from '.join(known)}" if known else ""


def _claim(summary: Summary, one: Comparison, decided: str) -> str:
    """`Dispersion helps at int4: perplexity 15.52 -> 15.40 (-0.8 %).`"""
    values = [
        number(at(summary, "comparison", one.precision, one.task, arm)) for arm in (BASELINE, DISPERSED)
    ]
    change = f"{signed(100 * math.expm1(one.difference), 1)} %" if one.unit == "nats" else ""
    if None not in values:
        moved = f"perplexity {figure(values[0])} -> {figure(values[1])}"
        change = f"{moved} ({change})" if change else moved
    return f"Dispersion {decided} at {label(one.precision)}: {change or signed(one.difference, 3)}."


def _others(supporting: Sequence[Comparison]) -> str:
    """The supporting comparisons with their number and what survives the correction."""
    total = len(supporting)
    if not total:
        return "It is the only comparison."
    outside = [one for one in supporting if one.excludes_zero]
    survivors = [one for one in supporting if one.survives]
    if not outside:
        return (
            f"None of the other {plural(total, 'paired interval')} excludes 0."
            if total > 1
            else ("The other paired interval contains 0 too.")
        )
    text = f"Of {plural(total, 'other comparison')} {len(outside)} {'excludes' if len(outside) == 1 else 'exclude'} 0"
    if not survivors:
        return f"{text} ({_named(outside)}) and none survives Holm's correction, so no claim rests on them."
    return f"{text} and {len(survivors)} {'survives' if len(survivors) == 1 else 'survive'} Holm's correction: {_named(survivors)}."


def _named(found: Sequence[Comparison]) -> str:
    """The first four by task and precision, with their direction."""
    ways = {True: "better", False: "worse", None: "changed"}
    words = [f"{one.task} at {label(one.precision)} {ways[one.gain]}" for one in found]
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def _seed_caution() -> str:
    return "One training seed per arm: the luck of training is not in the interval."


def _single(summary: Summary, built: Sequence[str]) -> list[str]:
    name = built[0] if built else "no arm"
    parts = [f"Single arm: only {name} was built, so there is nothing to compare."]
    for precision in reversed(precisions(summary)):
        for task, result in tasks(summary).items():
            value = number(at(summary, "accuracy", name, precision, task, "value"))
            if is_loss(result) and value is not None:
                return [*parts, f"Its {task.replace('_', ' ')} at {label(precision)} is {figure(value)}."]
    return parts


def _per_precision(
    summary: Summary, headline: Comparison | None, supporting: Sequence[Comparison]
) -> dict[str, dict[str, str]]:
    """The loss comparison of each precision under the same rules; supporting ones after Holm's correction."""
    out = {}
    losses = [one for one in [*([headline] if headline else []), *supporting] if "perplexity" in one.task]
    for one in sorted(losses, key=lambda loss: (-bits(loss.precision), loss.task != "heldout_perplexity")):
        claimed = one.excludes_zero if one is headline else one.survives
        if _too_small(summary, one):
            decided = CANNOT_TELL
        else:
            decided = (HELPS if one.gain else HURTS) if claimed else NULL
        out.setdefault(one.precision, {"label": decided, "sentence": _evidence(summary, one)})
    return out


def metric_of(summary: Summary, task: str) -> Metric:
    """How a task's figures are shown."""
    return task_metric(task, tasks(summary).get(task, {}))
