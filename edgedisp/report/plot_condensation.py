"""Condensation by layer: the curves of the arms, outliers, and the torch model of an arm beside its bundles.

The curves of precisions lie nearly on each other, so the change that quantization makes has panels of its
own, with paired intervals: the same sequences went through both models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from edgedisp.report.picture import INK, RULE, Panel, Plot, arm_color, slug
from edgedisp.report.plot_inside import Band, columns, layers, lines, series_words
from edgedisp.report.reading import BASELINE, Summary, arms, at, branch, label, number, precisions
from edgedisp.report.wording import signed

LAYERS, OUTLIERS, PRECISIONS = "condensation_layers", "condensation_outliers", "condensation_precisions"
SHOWN_ARMS = 2  # panels of absolute curves; the changes show every arm
DASHES = ("-", "--", "-.", ":")


def condensation_layers(summary: Summary) -> Plot | None:
    """Mean pairwise cosine by layer, three ways, and over how many directions the vectors spread."""
    kinds = {
        "cosine_raw": "mean cosine, raw",
        "cosine_sink_excluded": "mean cosine, sinks left out",
        "cosine_mean_removed": "mean cosine, mean vector removed",
        "effective_rank": "effective rank",
        "maximum_explainable_variance": "maximum explainable variance",
    }
    caption = (
        "Raw cosine counts the attention sinks (the first token, and any whose norm is over ten times the "
        "median); leaving them out, or removing the mean vector too, shows what the other tokens do. "
        "Effective rank, without sinks: in how many directions the token vectors spread; higher is less "
        "condensed. Maximum explainable variance, without sinks: the share of their squared lengths along "
        "one direction; lower is less condensed. Shaded: 95 % intervals over sequences."
    )
    plot = _by_layer(summary, LAYERS, "Condensation by layer", caption, kinds)
    against = [arm for arm in arms(summary) if at(summary, "condensation", arm, "change")]
    if plot is None or not against:
        return plot
    found, names = {arm: changes(summary, "condensation", arm) for arm in against}, arms(summary)
    reference = BASELINE if BASELINE in names else names[0]
    title = f"raw: {against[0] if len(against) == 1 else 'arm'} - {reference}"
    panels = (*plot.panels, _change_panel("change-arms", title, found, names))
    return replace(plot, panels=panels, caption=f"{caption} The last panel is paired by sequence.")


def condensation_outliers(summary: Summary) -> Plot | None:
    """How far single values stand out, by layer."""
    kinds = {
        "kurtosis": "kurtosis over features",
        "max_over_median": "largest / median value",
        "max_over_median_sink_excluded": "largest / median value, no sinks",
    }
    caption = (
        "Outliers are what few-bit activations suffer from. Kurtosis of each token's values, no sinks: 3 "
        "for normally distributed values, more where some features are always large. Largest / median: of "
        "the absolute values of all tokens and features of a layer. Shaded: 95 % intervals over sequences."
    )
    return _by_layer(summary, OUTLIERS, "Outliers by layer", caption, kinds, log=True)


def _by_layer(
    summary: Summary, name: str, title: str, caption: str, kinds: dict[str, str], log: bool = False
) -> Plot | None:
    """A panel for each figure, a line for each arm."""
    panels, names = [], arms(summary)
    for key, heading in kinds.items():
        series = {arm: columns(layers(summary, arm), "layer", key) for arm in names}
        series = {arm: points for arm, points in series.items() if points[0]}
        if series:
            bands = {arm: band(layers(summary, arm), key) for arm in series}
            draw = lines(series, names, "layer", bands, log)
            panels.append(Panel(key.replace("_", "-"), heading, series_words(series, "layer"), draw))
    return Plot(name, title, caption, tuple(panels), tuple(names)) if panels else None


def band(rows: Sequence[dict[str, Any]], key: str) -> Band:
    """(layers, low, high) of those that have an interval."""
    found = [(row.get("layer"), at(row, "intervals", key)) for row in rows]
    ends = [(number(x), number(pair[0]), number(pair[1])) for x, pair in found if isinstance(pair, list)]
    known = [(x, low, high) for x, low, high in ends if None not in (x, low, high)]
    x, low, high = ([one[part] or 0.0 for one in known] for part in range(3))
    return x, low, high


def bundle_layers(summary: Summary, arm: str, precision: str) -> list[dict[str, Any]]:
    """The measured layers of a bundle, in order; those of the arm itself for `torch`."""
    if precision == "torch":
        return layers(summary, arm)
    found = at(summary, "condensation_bundles", arm, precision, "layers")
    return [branch(row) for row in found] if isinstance(found, list) else []


def changes(summary: Summary, *path: str) -> Band:
    """(difference of the mean cosine, low, high) by layer; the ends repeat it where there are none."""
    rows = at(summary, *path, "change", "layers")
    found = [branch(row, "cosine_raw") for row in rows] if isinstance(rows, list) else []
    values = [number(one.get("difference")) or 0.0 for one in found]
    ends = [
        [value if (end := number(one.get(name))) is None else end for one, value in zip(found, values)]
        for name in ("low", "high")
    ]
    return values, ends[0], ends[1]


def measured_precisions(summary: Summary) -> list[str]:
    """The precisions whose bundles were measured, most bits first."""
    found = branch(summary, "condensation_bundles")
    measured = {name for by_precision in found.values() for name in branch(by_precision)}
    return [name for name in precisions(summary) if name in measured]


def condensation_precisions(summary: Summary) -> Plot | None:
    """Mean cosine by layer of the first arms' bundles, then what each quantized precision changes."""
    built = [arm for arm in arms(summary) if branch(summary, "condensation_bundles", arm)]
    found = measured_precisions(summary)
    if not built or not found:
        return None
    panels = [_curves_panel(summary, arm, ["torch", *found], built) for arm in built[:SHOWN_ARMS]]
    # The fp32 bundle is the torch model; its change is rounding, and is told in the table.
    for name in (name for name in found if name != "fp32"):
        bands = {arm: changes(summary, "condensation_bundles", arm, name) for arm in built}
        title = f"change of mean cosine, {label(name)} - torch"
        panels.append(_change_panel(f"change-{slug(name)}", title, bands, built))
    caption = (
        "Above: mean cosine of token pairs in the torch model of an arm and in its bundles, measured in the "
        "graph that ships. Then: what a precision changes against the torch model of the same arm, over the "
        "same sequences. Shaded: 95 % intervals."
    )
    return Plot(PRECISIONS, "Condensation of what ships", caption, tuple(panels), tuple(built))


def _curves_panel(summary: Summary, arm: str, names: Sequence[str], built: Sequence[str]) -> Panel:
    rows = {name: columns(bundle_layers(summary, arm, name), "layer", "cosine_raw") for name in names}
    series = {label(name): curve for name, curve in rows.items() if curve[0]}

    def draw(ax: Axes) -> None:
        for place, (name, (x, y)) in enumerate(series.items()):
            color = INK if place == 0 else arm_color(arm, built)
            width = 2.6 if place == 0 else 1.5
            ax.plot(x, y, DASHES[place % len(DASHES)], color=color, linewidth=width, label=name)
        ax.legend(fontsize=8.5, loc="lower right")
        _axes(ax)

    return Panel(f"curves-{slug(arm)}", f"mean cosine, {arm}", series_words(series, "layer"), draw)


def _change_panel(name: str, title: str, bands: dict[str, Band], names: Sequence[str]) -> Panel:
    """Differences around a line at 0, shaded intervals."""
    found = {arm: band for arm, band in bands.items() if band[0]}

    def draw(ax: Axes) -> None:
        ax.axhline(0.0, color=RULE, linewidth=1.2)
        for arm, (values, low, high) in found.items():
            x, color = range(len(values)), arm_color(arm, names)
            ax.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
            ax.plot(x, values, color=color, linewidth=1.6)
        _axes(ax)

    words = "; ".join(f"{arm} {_extreme(*band)}" for arm, band in found.items())
    return Panel(name, title, f"{words or 'not measured'}.", draw)


def _axes(ax: Axes) -> None:
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _extreme(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> str:
    """The largest change in words."""
    layer = max(range(len(values)), key=lambda place: abs(values[place]))
    return (
        f"at most {signed(values[layer], 4)} (95 % interval {signed(low[layer], 4)}, "
        f"{signed(high[layer], 4)}) at layer {layer}"
    )
