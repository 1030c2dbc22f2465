"""What may be claimed from a run, by written rules (`RULES`, printed in every report).

Where 0.02 nats comes from: int8 costs less than 1 % of perplexity and int4 5 to 30 %, so 2 % is about the
largest difference that someone could shrug off. Fewer than 20 documents: a bootstrap over so few clusters is
too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from edgedisp.core.results import AS_GIVEN, BASELINE, DISPERSED, PUBLISHED_POINTS, detectable
from edgedisp.core.run import Run
from edgedisp.report.comparisons import LOSS, MEAN, Comparison, comparisons, headline, is_loss
from edgedisp.report.formatting import (
    bits,
    count,
    decimals_for,
    estimate_texts,
    fixed,
    label,
    p_value,
    percent,
    plural,
    signed,
    significant,
    small,
)
from edgedisp.report.layout import TEXTS

HELPS, HURTS, NULL = "helps", "hurts", "no measurable difference"
CANNOT_TELL, SINGLE = "cannot tell at this size", "single arm"
SMALL = "Cannot tell at this size"
FEWEST_DOCUMENTS = 20
WIDEST_NULL = 0.02  # nats per token: a wider interval cannot support "no difference"
RULES = tuple(
    rule.format(nats=WIDEST_NULL, points=PUBLISHED_POINTS, documents=FEWEST_DOCUMENTS)
    for rule in TEXTS["lists"]["rules"]
)
NO_FLOOR = "Here the noise floor was not measured, and no difference is held against it."


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
    has_noise = any(one.noise for by_precision in run.measurements.values() for one in by_precision.values())
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
        return CANNOT_TELL, [reason, *([evidence(run, first), *_points(run, first)] if first else [])]
    parts = [evidence(run, first), *_not_compared(run, first), _others(supporting)]
    if first.counts:
        decided = HELPS if first.outcome == "better" else HURTS
        return decided, [_claim(run, first, decided), *parts, _luck(first)]
    visible = [_visible(first), *_points(run, first), _luck(first)]
    if any(row.counts for row in supporting):
        claim = f"{SMALL}: the headline shows no difference, but supporting tests do."
        return CANNOT_TELL, [claim, *parts, *visible]
    if first.estimate.excludes_zero:
        return NULL, [f"No measurable difference: {_objection(first)}.", *parts, *visible]
    claim = "No measurable difference at this budget."
    if any(row.is_clear for row in supporting):
        claim = f"No measurable difference in {_measured(first)}{_where(first)}."
    return NULL, [claim, *parts, *visible]


def _too_small(run: Run, first: Comparison | None) -> str:
    """Why no claim is made at this size, or an empty string."""
    if run.smoke:
        return f"{SMALL}: a smoke run proves that the recipe works and says nothing about dispersion."
    # The arms of joined runs are no twins: their first losses may well differ.
    pairs = [] if run.runs or first is None else run.first_losses(first.arm)
    unlike = [pair for pair in pairs if pair[0] != pair[1]]
    if unlike:
        return (
            f"Cannot tell: the arms' losses before the first update differ ({unlike[0][0]:.6f} and "
            f"{unlike[0][1]:.6f}), so the machine did not compute both alike. Build again."
        )
    if first is None:
        return f"{SMALL}: neither a held-out loss nor a mean over tasks was compared."
    documents = first.estimate.documents
    if documents is not None and documents < FEWEST_DOCUMENTS:
        return f"{SMALL}: {plural(documents, 'held-out document')} compared, {FEWEST_DOCUMENTS} are needed."
    widest = {"nats": WIDEST_NULL, "share": PUBLISHED_POINTS / 100}.get(first.unit, math.inf)
    return _too_wide(first) if not first.is_clear and first.half_width > widest else ""


def _per_precision(run: Run, arm: str, rows: Sequence[Comparison]) -> dict[str, str]:
    """The loss comparison of each precision under the same rules, most bits first."""
    losses = [row for row in rows if row.arm == arm and (row.unit == "nats" or is_loss(row.task))]
    labels: dict[str, str] = {}
    for row in sorted(losses, key=lambda loss: (-bits(loss.precision), loss.task != LOSS)):
        claim = {"better": HELPS, "worse": HURTS}.get(row.outcome, NULL)
        labels.setdefault(row.precision, CANNOT_TELL if _too_small(run, row) else claim)
    return labels


# Sentences


def evidence(run: Run, row: Comparison) -> str:
    """The figure, its interval, what it was measured on and after how much training."""
    tokens = sorted({run.training[arm].tokens for arm in (BASELINE, row.arm) if arm in run.training})
    estimate = row.estimate
    value, low_high, _ = estimate_texts(estimate, row.scale, signs=True)
    sizes = [plural(n, word) for n, word in ((estimate.n, "item"), (estimate.documents, "document")) if n]
    parts = [f"95 % interval {low_high.replace(', ', ' to ')}", *([" from ".join(sizes)] if sizes else [])]
    what = f"{_measured(row) if row.unit_text else f'{row.task} (a perplexity)'}{_where(row)}"
    figure = " ".join(text for text in (value, row.unit_text, f"({'; '.join(parts)})") if text)
    if row.precision == AS_GIVEN:
        text = f"{what} of {row.arm} - baseline is {figure}."
    else:
        text = f"{what} changes by {figure} with {_cause(row.arm)}."
    if not tokens:
        return text[0].upper() + text[1:]
    return f"After {' or '.join(map(count, tokens))} training tokens per arm, {text}"


def _claim(run: Run, row: Comparison, decided: str) -> str:
    """`Dispersion helps at int4: perplexity 15.52 -> 15.40 (-0.8 %).`"""
    cause = _cause(row.arm)
    start = f"{cause[0].upper()}{cause[1:]} {decided}{_where(row)}"
    if row.precision == AS_GIVEN:
        start = f"{row.arm} is {row.outcome} than the baseline"
    if row.task == MEAN:
        mean = run.means[row.arm][row.precision]
        return f"{start}: {percent(mean.first)} -> {percent(mean.second)} right on average."
    main = run.comparisons[row.arm][row.precision][row.task].main
    share = 100 * math.expm1(row.value)
    relative = f" ({signed(share, max(1, decimals_for(abs(share), 1)))} %)" if row.unit == "nats" else ""
    return f"{start}: perplexity {significant(main.first)} -> {significant(main.second)}{relative}."


def _objection(row: Comparison) -> str:
    """Why an interval that leaves 0 out is no claim."""
    if abs(row.value) <= row.floor:
        size = _amount(row, row.floor)
        return f"the one found is no larger than what two scorings of the same model differ by ({size})"
    return f"the interval just leaves 0 out, but the permutation test does not agree (p = {p_value(row.p)})"


def _luck(row: Comparison) -> str:
    """What is known of the luck of training."""
    seeds = row.estimate.seeds
    if row.precision == AS_GIVEN:
        return "How these models were trained is not known: the interval covers the choice of items alone."
    if seeds is None or seeds.sd is None:
        return "One training seed per arm: the luck of training is unknown, and not in the interval."
    decimals = decimals_for(row.half_width, 4)
    each = ", ".join(signed(value, decimals) for value in seeds.values)
    sd = fixed(seeds.sd, decimals)
    return f"The {len(seeds.values)} seeds differ by {sd} (standard deviation; {each}), within the interval."


def _too_wide(row: Comparison) -> str:
    """What could be seen, and the documents to see more: an interval narrows with their square root."""
    size = _amount(row, row.detectable)
    text = f"{SMALL}: a difference of less than {size} would not show."
    if row.is_mostly_seeds:
        return f"{text} More of that is the luck of training than the choice of text: more seeds would tell."
    if row.unit == "nats" and row.estimate.documents:
        needed = _about(row.estimate.documents * (row.detectable / WIDEST_NULL) ** 2)
        text += f" About {needed} held-out documents are needed to see {WIDEST_NULL} nats per token."
    return text


def _visible(row: Comparison) -> str:
    """What a null result could have shown."""
    if row.half_width == 0 and row.value == 0:
        return f"Both arms gave the same {'answer' if row.task == MEAN else 'loss'} everywhere."
    return f"A difference of {_amount(row, row.detectable)} or more would be found 4 times out of 5."


def _points(run: Run, row: Comparison) -> list[str]:
    """What the mean over tasks could have shown, and the items that the published gain would take."""
    mean = run.means.get(row.arm, {}).get(row.precision)
    if mean is None or not mean.estimate.half_width or not mean.estimate.n:
        return []
    points = 100 * detectable(mean.estimate.half_width)
    what = f"The mean of {len(mean.tasks)} tasks, {plural(mean.estimate.n, 'item')}{_where(row)},"
    text = f"{what} would show {fixed(points, 1)} points or more"
    if points <= PUBLISHED_POINTS:
        return [f"{text}."]
    if mean.estimate.seeds is not None:
        return [f"{text}; the smallest published gain is {PUBLISHED_POINTS} points."]
    needed = _about(mean.estimate.n * (points / PUBLISHED_POINTS) ** 2)
    return [f"{text}; the smallest published gain, {PUBLISHED_POINTS} points, takes about {needed} items."]


def _not_compared(run: Run, row: Comparison) -> list[str]:
    """Precisions with fewer bits than the headline's: they ship, but no loss was compared there."""
    names = [name for name in run.precisions if bits(name) < bits(row.precision)]
    return [f"{' and '.join(names)} was built, but its loss was not compared."] if names else []


def _others(supporting: Sequence[Comparison]) -> str:
    """The supporting comparisons: how many, how many are clear alone, what survives the correction."""
    if not supporting:
        return "Nothing else was compared."
    clear = [row for row in supporting if row.is_clear]
    survivors = [row for row in clear if row.counts]
    text = f"Of {plural(len(supporting), 'other comparison')}, {len(clear) or 'none'} alone "
    text += f"{'shows' if len(clear) < 2 else 'show'} a difference"
    if not clear:
        return f"{text}."
    if not survivors:
        return f"{text} ({_named(clear)}); none survives Holm's correction, so no claim rests on them."
    return f"{text}; after Holm's correction there remain {len(survivors)}: {_named(survivors)}."


def _named(rows: Sequence[Comparison]) -> str:
    """The first four by task and precision, with their direction."""
    words = [f"{row.task}{_where(row)} {row.direction}" for row in rows]
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def _single(run: Run) -> list[str]:
    """What there is to say without a comparison: the arm and its loss at the fewest bits."""
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


def _where(row: Comparison) -> str:
    return "" if row.precision == AS_GIVEN else f" at {label(row.precision)}"


def _measured(row: Comparison) -> str:
    if row.task == MEAN:
        return "the mean over tasks"
    return "held-out loss" if row.task == LOSS else f"the loss of {row.task}"


def _cause(arm: str) -> str:
    return "dispersion" if arm == DISPERSED else f"the arm {arm}"


def _amount(row: Comparison, size: float) -> str:
    """`0.0027 nats per token (0.27 % of perplexity)`, `1.3 points`, `0.4`."""
    if row.unit == "nats":
        return f"{size:.2g} nats per token ({100 * math.expm1(size):.2g} % of perplexity)"
    return f"{fixed(100 * size, 1)} points" if row.unit == "share" else small(size)


def _about(number: float) -> str:
    """A count rounded up, with two significant digits."""
    whole = math.ceil(number)
    return f"{round(whole, min(0, 2 - len(str(whole)))):,}"
