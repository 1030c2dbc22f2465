"""The sections that hold results: scores by precision, condensation, training.

Each function takes the summary and the names of the plots that exist, and gives a `Section`; a section with
nothing in it is left out of the report.
"""

from __future__ import annotations

from collections.abc import Collection

from edgedisp.report.adapters import merge_audit
from edgedisp.report.comparisons import comparisons, holm
from edgedisp.report.condensation import condensation
from edgedisp.report.divergence import divergence
from edgedisp.report.every_arm import every_arm, wanted
from edgedisp.report.means import mean_grid
from edgedisp.report.mixed import mixed
from edgedisp.report.on_devices import on_devices
from edgedisp.report.plot_inside import TRAINING
from edgedisp.report.plot_scores import DIFFERENCES, SCORES
from edgedisp.report.reading import (
    BASELINE,
    DISPERSED,
    Summary,
    arms,
    at,
    branch,
    focus,
    label,
    number,
    precisions,
    trainings,
)
from edgedisp.report.reading import seeds as several_seeds
from edgedisp.report.section import Grid, Section
from edgedisp.report.shipped import latency, sizes, verify
from edgedisp.report.survival import survival
from edgedisp.report.wording import (
    MISSING,
    count,
    decimals_for,
    figure,
    fixed,
    megabytes,
    p_value,
    percent,
    seconds,
    signed,
)


def result_sections(summary: Summary, drawn: Collection[str]) -> list[Section]:
    """All result sections that have content, in reading order."""
    found = [
        every_arm(summary, _existing(drawn, DIFFERENCES)),
        scores(summary, drawn),
        divergence(summary, drawn),
        condensation(summary, drawn),
        training(summary, drawn),
        merge_audit(summary),
        survival(summary, drawn),
        latency(summary, drawn),
        on_devices(summary),
        mixed(summary, drawn),
        verify(summary),
        sizes(summary),
    ]
    return [section for section in found if not section.empty]


def _existing(drawn: Collection[str], *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name in drawn)


def scores(summary: Summary, drawn: Collection[str]) -> Section:
    """What quantization costs each arm, and every paired comparison with its corrected p."""
    found = (_comparison_grid, mean_grid, _right_answers_grid, _bits_grid)
    grids = [grid for grid in (made(summary) for made in found) if grid.rows]
    lead = (
        "The same items scored on the torch model and on every bundle that ships, through the same scorer. "
        "Absolute scores have wide intervals because texts differ in difficulty; the paired difference takes "
        "that out."
    )
    plots = _existing(drawn, *(() if wanted(summary) else (DIFFERENCES,)), SCORES)
    return Section("scores", "Scores and quantization", lead, plots=plots, grids=tuple(grids))


def _comparison_grid(summary: Summary) -> Grid:
    """Every comparison; p corrected over all of them, the headline included here (the stricter way)."""
    rows = []
    for one in holm(comparisons(summary)):
        scale, unit = (100.0, "points") if one.unit == "share" else (1.0, one.unit and "nats per token")
        decimals = decimals_for(one.half_width * scale, 3)
        value, low, high = (signed(scale * x, decimals) for x in (one.difference, one.low, one.high))
        way = {True: "better", False: "worse", None: MISSING}[one.gain] if one.clear else "not clear"
        sizes_ = count(one.n), count(one.documents)
        texts = (f"{one.task}, {label(one.precision)}", value, f"{low}, {high}", unit, *sizes_)
        rows.append((*texts, p_value(one.p), p_value(one.p_holm), way))
    arm = focus(summary) or DISPERSED
    head = ("comparison", "difference", "95 % interval", "unit", "items", "documents", "p", "p (Holm)")
    return Grid((*head, f"{arm} is"), tuple(rows), f"All paired comparisons ({arm} - baseline)", (0, 3, 8))


RIGHT_ANSWERS = {"gold_bits_per_byte": "bits per byte", "gold_nll": "nats", "word_nll": "nats"}
"""Metrics of the right answer's log-likelihood, the first that a task has, and their units."""


def _right_answers_grid(summary: Summary) -> Grid:
    """The log-likelihood of right answers, which moves before they become the likeliest ones."""
    rows = []
    arm = focus(summary) or DISPERSED
    for precision in precisions(summary):
        for task, entry in branch(summary, "comparison", arm, precision).items():
            metrics = branch(entry, "metrics")
            name = next((one for one in RIGHT_ANSWERS if one in metrics), None)
            found = branch(metrics, name) if name else {}
            value, low, high = (number(found.get(key)) for key in ("difference", "low", "high"))
            if name is None or value is None or low is None or high is None:
                continue
            decimals = decimals_for((high - low) / 2, 3)
            sides = (fixed(number(found.get(key)), 3) for key in (BASELINE, "arm"))
            ends = f"{signed(low, decimals)}, {signed(high, decimals)}"
            shown = (signed(value, decimals), ends, RIGHT_ANSWERS[name])
            rows.append((f"{task}, {label(precision)}", *sides, *shown))
    head = ("task", "baseline", arm, "difference", "95 % interval", "unit")
    caption = "Right answers' negative log-likelihood: it moves before accuracy does (lower is better)"
    return Grid(head, tuple(rows), caption, (0, 5), folded=True)


def _bits_grid(summary: Summary) -> Grid:
    """Bits per byte: perplexity made comparable between tokenizers."""
    rows = []
    for arm in arms(summary):
        for precision in precisions(summary):
            for result in branch(summary, "accuracy", arm, precision).values():
                found = at(result, "metrics", "bits_per_byte")
                found = at(result, "extra", "bits_per_byte") if found is None else found
                value = number(found) if not isinstance(found, dict) else number(found.get("value"))
                if value is not None:
                    ends = [number(at(found, end)) for end in ("low", "high")]
                    interval = "" if None in ends else ", ".join(fixed(end, 4) for end in ends)
                    rows.append((f"{arm}, {label(precision)}", fixed(value, 4), interval or MISSING))
    head = ("model", "bits per byte", "95 % interval")
    return Grid(head, tuple(rows), "Held-out bits per byte", folded=True)


def training(summary: Summary, drawn: Collection[str]) -> Section:
    """The curves and, per training, what it took."""
    rows = []
    for arm in arms(summary):
        for name, part in trainings(summary, arm).items():
            if not part:
                continue
            log = part.get("log")
            last = branch(log[-1]) if isinstance(log, list) and log else {}
            texts = [count(number(part.get(key))) for key in ("steps", "tokens")]
            texts += [seconds(number(part.get("seconds"))), figure(number(part.get("tokens_per_s")))]
            texts += [megabytes(number(part.get("peak_memory_bytes"))), fixed(number(last.get("loss")), 3)]
            rows.append((name, *texts, fixed(number(last.get("dispersion")), 4)))
    head = ("arm", "steps", "tokens", "time", "tokens/s", "peak memory, MB", "last loss", "last dispersion")
    grids = (Grid(head, tuple(rows)),) if rows else ()
    plots = _existing(drawn, TRAINING)
    lead = "The curves are those of the first seed." if rows and several_seeds(summary) > 1 else ""
    return Section("training", "Training", lead, plots=plots, grids=grids, notes=_overhead(summary))


def _overhead(summary: Summary) -> tuple[str, ...]:
    """What each arm costs in training time."""
    before = number(at(summary, "midtrain", BASELINE, "tokens_per_s"))
    notes = []
    for arm in arms(summary):
        after = number(at(summary, "midtrain", arm, "tokens_per_s"))
        if arm != BASELINE and before and after:
            name = "dispersed arm" if arm == DISPERSED else f"arm {arm}"
            notes.append(f"The {name} trained at {percent(after / before)} of the baseline's speed.")
    return tuple(notes)
