"""The section on what quantization leaves of training: in the weights, and in the loss."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgedisp.report.plot_survival import REFERENCES, SURVIVAL
from edgedisp.report.reading import Summary, arms, at, branch, label, number, precisions
from edgedisp.report.section import Grid, Section
from edgedisp.report.wording import MISSING, count, decimals_for, fixed, percent, signed, small

LEAD = (
    "A short training moves a weight by a fraction of a quantization step. A change of more than half a step "
    "more likely than not lands on another integer. A smaller one now and then moves an integer by a whole "
    "step: it is there on average over many weights, but under rounding noise, which the cosine shows."
)
WORDS = {
    "nothing": "nothing measurable to survive",
    "kept": "still there",
    "weaker": "there, but weaker",
    "stronger": "there, and stronger",
    "reversed": "reversed",
    "unclear": "no longer clear",
}
FIGURES = {
    "rms_steps": "change, rms in steps",
    "beyond_half_step": "over half a step",
    "integers_moved": "integers moved",
    "slope": "slope",
    "cosine": "cosine",
}


def survival(summary: Summary, drawn: Collection[str]) -> Section:
    """Two tables, the layers' picture, and what could not be compared."""
    grids = tuple(grid for grid in (_loss(summary), _weights(summary), _components(summary)) if grid.rows)
    plots = (SURVIVAL,) if SURVIVAL in drawn else ()
    lead = LEAD if grids else ""
    title = "What quantization leaves of training"
    return Section("survival", title, lead, plots=plots, grids=grids, notes=tuple(_notes(summary)))


def _each(summary: Summary) -> list[tuple[str, str, dict[str, Any]]]:
    """(precision, arm, its record) in the order of the tables."""
    return [
        (precision, arm, found)
        for precision in precisions(summary)
        for arm in arms(summary)
        if (found := branch(summary, "survival", arm, precision))
    ]


def _loss(summary: Summary) -> Grid:
    """Each difference in loss from the baseline, in full precision and quantized."""
    rows = []
    for precision, arm, found in _each(summary):
        for task, record in branch(found, "loss").items():
            parts = [
                _interval(branch(record, name), "difference") for name in ("full", "quantized", "change")
            ]
            parts += [_interval(branch(record, name), "value") for name in ("correlation", "slope", "kept")]
            said = WORDS.get(str(record.get("verdict")), MISSING)
            rows.append((f"{task}, {label(precision)}, {arm}", said, *parts))
    head = (
        "loss",
        "the difference is",
        "full precision",
        "quantized",
        "change",
        "correlation",
        "slope",
        "kept",
    )
    caption = (
        "Difference of the loss from the baseline, nats per token, before and after quantization, on the "
        "same documents, with 95 % intervals. Change: quantized - full precision. Correlation and slope: of "
        "the two differences over documents. Kept: quantized / full, where full precision is clear"
    )
    return Grid(head, tuple(rows), caption, (0, 1))


def _interval(part: Mapping[str, Any], key: str) -> str:
    """`-0.012 [-0.020, -0.004]`, digits by the interval's width; a dash where it could not be taken."""
    value, low, high = (number(part.get(name)) for name in (key, "low", "high"))
    write = signed if key == "difference" else fixed
    if low is None or high is None:
        return write(value, 4)
    decimals = max(2, decimals_for((high - low) / 2, 4))
    return f"{write(value, decimals)} [{write(low, decimals)}, {write(high, decimals)}]"


def _weights(summary: Summary) -> Grid:
    """Every bundle's packed weights against the base, and against the baseline's, apart by bits: an int4
    bundle has an embedding of 8 bits, whose steps are 16 times finer."""
    rows = []
    for precision, arm, found in _each(summary):
        for reference in REFERENCES:
            by_bits = branch(found, "weights", "references", reference, "bits")
            for bits, figures in by_bits.items():
                weights = number(at(figures, "weights"))
                name = f"{label(precision)}, {arm} - {reference}"
                rows.append((name, bits, count(weights), *_figures(branch(figures))))
    head = ("change", "bits", "weights", *FIGURES.values())
    caption = (
        "Change of the quantized weights, in steps of the grid that ships. Slope: of the rounded change upon "
        "the change, 1 where it is all there on average. Cosine: between both; what it lacks of 1 is noise"
    )
    return Grid(head, tuple(rows), caption)


def _components(summary: Summary) -> Grid:
    rows = []
    for precision, arm, found in _each(summary):
        for reference in REFERENCES:
            parts = branch(found, "weights", "references", reference, "components")
            for part, figures in parts.items():
                rows.append((f"{label(precision)}, {arm} - {reference}, {part}", *_figures(branch(figures))))
    return Grid(("change", *FIGURES.values()), tuple(rows), "The same by component", folded=True)


def _figures(found: Mapping[str, Any]) -> tuple[str, ...]:
    known = {key: number(found.get(key)) for key in FIGURES}
    shares = [percent(known[key], 2) for key in ("beyond_half_step", "integers_moved")]
    ratios = [fixed(known[key], 3) for key in ("slope", "cosine")]
    return (small(known["rms_steps"]), *shares, *ratios)


def _notes(summary: Summary) -> list[str]:
    notes = []
    for precision, arm, found in _each(summary):
        weights, name = branch(found, "weights"), f"{label(precision)}, {arm}"
        unmatched = weights.get("unmatched")
        if isinstance(unmatched, list) and unmatched:
            notes.append(
                f"{name}: {len(unmatched)} packed tensors were not found in the torch models, and are "
                "not counted."
            )
        if "base" in branch(weights, "references") and at(weights, "references", "base", "total") is None:
            notes.append(f"{name}: no weight is stored on a block grid that the change could be set beside.")
        nearest = number(weights.get("nearest"))
        if nearest is not None and nearest < 0.9999:
            notes.append(
                f"{name}: {percent(nearest)} of the shipped integers are the nearest ones; the method moved "
                "the others on purpose, and integers moved are counted as if all were rounded to nearest."
            )
    for arm in {arm: None for _, arm, _ in _each(summary)}:
        if at(summary, "midtrain", arm, "merge_audit", "chosen") == "dequantized":
            notes.append(f"{arm}: merged into the dequantized base, so its change holds that rounding too.")
    return notes
