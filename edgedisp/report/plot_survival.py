"""By layer: how much of the change that training made is still there in the quantized weights."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from edgedisp.report.picture import Panel, Plot, Series, arm_color, slug
from edgedisp.report.plot_inside import columns, series_words
from edgedisp.report.reading import Summary, arms, at, branch, label, precisions

SURVIVAL = "survival"
REFERENCES = ("base", "baseline")


def survival(summary: Summary) -> Plot | None:
    """A panel for each precision and model compared with: integers moved, and changes over half a step."""
    found = [
        panel
        for precision in precisions(summary)
        for reference in REFERENCES
        if (panel := _panel(summary, precision, reference)) is not None
    ]
    caption = (
        "Line: share of a layer's quantized weights whose integer is another one than the same grid gives "
        "the model compared with. Dashed: share whose change is more than half a step. Against the base: "
        "what training changed; against the baseline: what the arm changed beyond its twin."
    )
    built = tuple(arms(summary))
    return (
        Plot(SURVIVAL, "What is left of the change, by layer", caption, tuple(found), built)
        if found
        else None
    )


def _panel(summary: Summary, precision: str, reference: str) -> Panel | None:
    names = arms(summary)
    moved: Series = {}
    beyond: Series = {}
    for arm in names:
        rows = _layers(summary, arm, precision, reference)
        for series, key in ((moved, "integers_moved"), (beyond, "beyond_half_step")):
            points = columns(rows, "layer", key)
            if points[0]:
                series[arm] = points
    if not moved:
        return None

    def draw(ax: Axes) -> None:
        for index, arm in enumerate(moved):
            width = 3.0 if index == 0 and len(moved) > 1 else 1.6
            for series, dash in ((moved, "-"), (beyond, "--")):
                ax.plot(*series[arm], dash, color=arm_color(arm, names), linewidth=width)
        ax.set_ylim(bottom=0.0)
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))

    words = (
        f"integers moved: {series_words(moved, 'layer')} Over half a step: {series_words(beyond, 'layer')}"
    )
    title = f"{label(precision)}, against the {reference}"
    return Panel(f"{slug(precision)}-{reference}", title, words, draw)


def _layers(summary: Summary, arm: str, precision: str, reference: str) -> list[dict[str, Any]]:
    rows = at(summary, "survival", arm, precision, "weights", "references", reference, "layers")
    return [branch(row) for row in rows] if isinstance(rows, list) else []
