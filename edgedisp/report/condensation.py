"""The section on condensation: the pictures, a table of models with intervals, and every layer's figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from edgedisp.report.plot_condensation import LAYERS, OUTLIERS, PRECISIONS, measured_precisions
from edgedisp.report.plot_inside import HEATMAP, layers
from edgedisp.report.reading import Summary, arms, at, branch, label, number
from edgedisp.report.section import Grid, Section
from edgedisp.report.wording import MISSING, count, decimals_for, fixed, signed

LEAD = (
    "Embedding condensation: layer by layer the token vectors of one sequence point into an ever narrower "
    "cone, more so in small models. Dispersion loss works against it. Measured on held-out text, in torch in "
    "full precision and in the graph of every bundle."
)

# figure -> heading and decimals, in the order of the tables.
FIGURES = {
    "cosine_raw": ("mean cosine", 3),
    "cosine_sink_excluded": ("no sinks", 3),
    "cosine_mean_removed": ("mean removed", 3),
    "effective_rank": ("effective rank", 1),
    "maximum_explainable_variance": ("max. explainable variance", 3),
    "kurtosis": ("kurtosis", 1),
    "max_over_median": ("largest / median", 0),
    "max_over_median_sink_excluded": ("largest / median, no sinks", 1),
    "sinks": ("sinks", 1),
}


def condensation(summary: Summary, drawn: Collection[str]) -> Section:
    """The paper's heatmap, the layer curves, what quantization changes, and their numbers."""
    plots = tuple(name for name in (HEATMAP, LAYERS, PRECISIONS, OUTLIERS) if name in drawn)
    measured = {arm: branch(summary, "condensation", arm) for arm in arms(summary)}
    found = {arm: rows for arm in measured if (rows := layers(summary, arm))}
    grids = [grid for grid in (model_grid(summary), layer_grid(found)) if grid.rows]
    if not (grids or plots):
        return Section("condensation", "Condensation")
    said = {
        tuple(count(number(part.get(key))) for key in ("tokens", "sequences"))
        for part in measured.values()
        if part
    }
    notes = [f"Measured on {tokens} tokens in {sequences} sequences." for tokens, sequences in sorted(said)]
    if any("correlations" in part for part in measured.values()):
        notes.append(
            "Spearman and Kendall: rank correlation of a layer's mean cosine with its depth, the embedding "
            "counted and the last layer after the final norm, as in the paper; 1 is condensation at every "
            "step. Intervals: 95 %, from a bootstrap over sequences."
        )
    return Section("condensation", "Condensation", LEAD, plots=plots, grids=tuple(grids), notes=tuple(notes))


def model_grid(summary: Summary) -> Grid:
    """Every arm and precision: mean over layers, both correlations, and the change that quantization made."""
    rows = []
    for arm in arms(summary):
        for precision in ("torch", *measured_precisions(summary)):
            path = ("condensation", arm) if precision == "torch" else ("condensation_bundles", arm, precision)
            found = branch(summary, *path)
            if "mean_cosine" in found:
                rows.append((f"{arm}, {label(precision)}", *model_texts(found), change_text(found)))
    head = ("model", "mean cosine", "Spearman", "Kendall", "change of mean cosine")
    caption = (
        "Mean cosine over all layers, and its correlation with depth. Change: of an arm against the "
        "baseline, of a bundle against its own torch model, paired by sequence"
    )
    return Grid(head, tuple(rows), caption)


def model_texts(found: Mapping[str, Any]) -> tuple[str, str, str]:
    """Mean cosine, Spearman and Kendall of a measured model, each with its interval."""
    parts = (at(found, "mean_cosine"), *(at(found, "correlations", name) for name in ("spearman", "kendall")))
    mean, spearman, kendall = (with_interval(branch(part), "value", 3) for part in parts)
    return mean, spearman, kendall


def change_text(found: Mapping[str, Any]) -> str:
    """The paired change of the mean cosine; the dash for the baseline."""
    change = branch(found, "change", "mean_cosine")
    return with_interval(change, "difference", 4, signs=True) if change else MISSING


def with_interval(part: Mapping[str, Any], key: str, fallback: int, signs: bool = False) -> str:
    """`0.523 [0.511, 0.535]`, digits by the interval's width; the value alone without one."""
    value, low, high = (number(part.get(name)) for name in (key, "low", "high"))
    write = signed if signs else fixed
    if low is None or high is None:
        return write(value, fallback)
    decimals = decimals_for((high - low) / 2, fallback)
    decimals = max(2, min(decimals, fallback + 1))
    return f"{write(value, decimals)} [{write(low, decimals)}, {write(high, decimals)}]"


def layer_grid(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Grid:
    """Every figure of every layer, the models of one figure side by side."""
    by_model = {name: {str(row.get("layer")): row for row in rows} for name, rows in found.items()}
    names = list(dict.fromkeys(layer for rows in by_model.values() for layer in rows))
    known = {
        key: kind
        for key, kind in FIGURES.items()
        if any(key in row for rows in by_model.values() for row in rows.values())
    }
    head = ["layer"] + [f"{heading}, {name}" for heading, _ in known.values() for name in by_model]
    rows = [
        (
            layer,
            *(
                fixed(number(at(rows, layer, key)), decimals)
                for key, (_, decimals) in known.items()
                for rows in by_model.values()
            ),
        )
        for layer in names
    ]
    return Grid(tuple(head), tuple(rows), "Every figure of every layer", folded=True)
