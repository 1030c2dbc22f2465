"""The sections that hold results: scores by precision, condensation, training.

Each function takes the summary and the names of the plots that exist, and gives a `Section`; a section with
nothing in it is left out of the report.
"""

from __future__ import annotations

from collections.abc import Collection

from edgedisp.report.comparisons import comparisons, holm
from edgedisp.report.plot_inside import HEATMAP, LAYERS, TRAINING, layers
from edgedisp.report.plot_scores import DIFFERENCES, SCORES
from edgedisp.report.reading import BASELINE, DISPERSED, Summary, arms, at, branch, label, number, precisions
from edgedisp.report.section import Grid, Section
from edgedisp.report.shipped import latency, sizes, verify
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
        scores(summary, drawn),
        condensation(summary, drawn),
        training(summary, drawn),
        latency(summary, drawn),
        verify(summary),
        sizes(summary),
    ]
    return [section for section in found if not section.empty]


def _existing(drawn: Collection[str], *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name in drawn)


def scores(summary: Summary, drawn: Collection[str]) -> Section:
    """What quantization costs each arm, and every paired comparison with its corrected p."""
    grids = [grid for grid in (_comparison_grid(summary), _bits_grid(summary)) if grid.rows]
    lead = (
        "The same items scored on the torch model and on every bundle that ships, through the same scorer. "
        "Absolute scores have wide intervals because texts differ in difficulty; the paired difference takes "
        "that out."
    )
    plots = _existing(drawn, DIFFERENCES, SCORES)
    return Section("scores", "Scores and quantization", lead, plots=plots, grids=tuple(grids))


def _comparison_grid(summary: Summary) -> Grid:
    """Every comparison; p corrected over all of them, the headline included here (the stricter way)."""
    rows = []
    for one in holm(comparisons(summary)):
        scale, unit = (100.0, "points") if one.unit == "share" else (1.0, one.unit and "nats per token")
        decimals = decimals_for(one.half_width * scale, 3)
        value, low, high = (signed(scale * x, decimals) for x in (one.difference, one.low, one.high))
        way = {True: "better", False: "worse", None: MISSING}[one.gain] if one.excludes_zero else "not clear"
        sizes_ = count(one.n), count(one.documents)
        texts = (f"{one.task}, {label(one.precision)}", value, f"{low}, {high}", unit, *sizes_)
        rows.append((*texts, p_value(one.p), p_value(one.p_holm), way))
    head = ("comparison", "difference", "95 % interval", "unit", "items", "documents", "p", "p (Holm)")
    return Grid(
        (*head, "dispersed is"), tuple(rows), "All paired comparisons (dispersed - baseline)", (0, 3, 8)
    )


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


def condensation(summary: Summary, drawn: Collection[str]) -> Section:
    """The paper's heatmap, the layer curves, and their numbers."""
    lead = (
        "Embedding condensation: layer by layer the token vectors of one sequence point into an ever "
        "narrower cone, more so in small models. Dispersion loss works against it. Measured in torch, in "
        "full precision."
    )
    grid, plots = _layer_grid(summary), _existing(drawn, HEATMAP, LAYERS)
    if not (grid.rows or plots):
        return Section("condensation", "Condensation")
    measured = [branch(summary, "condensation", arm) for arm in arms(summary)]
    said = {
        tuple(count(number(part.get(key))) for key in ("tokens", "sequences")) for part in measured if part
    }
    notes = tuple(
        f"Measured on {tokens} tokens in {sequences} sequences." for tokens, sequences in sorted(said)
    )
    return Section("condensation", "Condensation", lead, plots=plots, grids=(grid,), notes=notes)


def _layer_grid(summary: Summary) -> Grid:
    kinds = {
        "cosine_raw": "raw",
        "cosine_sink_excluded": "no first token",
        "cosine_mean_removed": "mean removed",
        "effective_rank": "effective rank",
    }
    measured = {arm: layers(summary, arm) for arm in arms(summary)}
    by_arm = {
        arm: {str(layer.get("layer")): layer for layer in rows} for arm, rows in measured.items() if rows
    }
    names = list(dict.fromkeys(name for found in by_arm.values() for name in found))
    head = ["layer"] + [f"{title}, {arm}" for title in kinds.values() for arm in by_arm]
    rows = []
    for name in names:
        values = [number(at(found, name, key)) for key in kinds for found in by_arm.values()]
        rows.append((name, *(fixed(value, 3) for value in values)))
    return Grid(
        tuple(head), tuple(rows), "Mean pairwise cosine and effective rank of every layer", folded=True
    )


def training(summary: Summary, drawn: Collection[str]) -> Section:
    """The curves and, per arm, what training took."""
    rows = []
    for arm in arms(summary):
        part = branch(summary, "midtrain", arm)
        if not part:
            continue
        log = part.get("log")
        last = branch(log[-1]) if isinstance(log, list) and log else {}
        texts = [count(number(part.get(key))) for key in ("steps", "tokens")]
        texts += [seconds(number(part.get("seconds"))), figure(number(part.get("tokens_per_s")))]
        texts += [megabytes(number(part.get("peak_memory_bytes"))), fixed(number(last.get("loss")), 3)]
        rows.append((arm, *texts, fixed(number(last.get("dispersion")), 4)))
    head = ("arm", "steps", "tokens", "time", "tokens/s", "peak memory, MB", "last loss", "last dispersion")
    grids = (Grid(head, tuple(rows)),) if rows else ()
    plots = _existing(drawn, TRAINING)
    return Section("training", "Training", plots=plots, grids=grids, notes=_overhead(summary))


def _overhead(summary: Summary) -> tuple[str, ...]:
    """What the dispersion term costs in training time."""
    before, after = (number(at(summary, "midtrain", arm, "tokens_per_s")) for arm in (BASELINE, DISPERSED))
    if not before or not after:
        return ()
    return (f"The dispersed arm trained at {percent(after / before)} of the baseline's speed.",)
