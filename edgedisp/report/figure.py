"""From panels to pictures: PNG files, and SVG inside the page, one image a panel: a phone stacks them.

Figures use matplotlib's object API (no pyplot, no global state). The same data give the same bytes: fixed
hash salt, no dates, no version strings, matplotlib's own font.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from edgedisp.core.results import BASE, BASELINE, DISPERSED, Estimate
from edgedisp.report.layout import FOLDER

# Grey-blue and orange stay apart for every common kind of colour blindness; lightness differs as well.
INK, MUTED = "#1f2933", "#66727f"
HEAT = LinearSegmentedColormap.from_list("heat", ["#3f7fb500", "#3f7fb5ff"])
ARM_COLORS = {BASE: "#8d877e", BASELINE: "#5f7f9f", DISPERSED: "#d9771f"}
OTHER_COLORS = ("#2f8f83", "#8a63a8", "#b04a5a", "#7d7a2f", "#3f6fc4", "#7a5640")
MARKERS = "os^Dvp"
PANEL_INCHES = (4.6, 3.1)
PNG_DPI = 120
with as_file(FOLDER.joinpath("plots.mplstyle")) as path:
    STYLE = matplotlib.rc_params_from_file(path, use_default_template=False)


@dataclass(frozen=True)
class Series:
    """Estimates by x: points with bars where there is a marker, else a line with shaded intervals.

    width: of the line that joins them. is_open: which points are drawn white inside. names: beside points.
    """

    x: Sequence[float] | NDArray[np.float64]
    y: Sequence[Estimate | None]
    color: str
    width: float = 0.0
    marker: str = ""
    alpha: float = 1.0
    is_open: Sequence[bool] = ()
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Panel:
    """One drawing on its own axes; `scale` multiplies y. groups: names of x = 0, 1, ... guides: levels of
    horizontal lines. image: opacity [bins, layers] of cosines from -1 to 1, which is shown from `bottom`."""

    title: str
    series: Sequence[Series]
    xlabel: str = ""
    ylabel: str = ""
    scale: float = 1.0
    groups: Sequence[str] = ()
    guides: Sequence[float] = ()
    image: NDArray[np.float64] | None = None
    bottom: float | None = None


@dataclass(frozen=True)
class Plot:
    """Panels that belong together; `arms` are those in the legend. Title and caption are in texts.toml."""

    name: str
    panels: list[Panel]
    arms: Sequence[str] = ()


def arm_color(arm: str, arms: Sequence[str]) -> str:
    """The colour of an arm, the same in every plot and in the page."""
    other_arms = [name for name in arms if name not in ARM_COLORS]
    return ARM_COLORS.get(arm) or OTHER_COLORS[other_arms.index(arm) % len(OTHER_COLORS)]


def points_panel(title: str, groups: Sequence[str], series: Sequence[Series], **form: Any) -> Panel:
    """Groups across, series side by side at each, with a marker each. form: fields of `Panel`."""
    gap, middle = min(0.22, 0.8 / max(1, len(series))), (len(series) - 1) / 2
    moved = []
    for index, row in enumerate(series):
        x = [group + (index - middle) * gap for group in range(len(groups))]
        moved.append(replace(row, x=x, marker=MARKERS[index % len(MARKERS)]))
    return Panel(title, moved, groups=groups, **form)


def _draw(ax: Axes, panel: Panel) -> None:
    ax.set_title(panel.title)
    ax.set_xlabel(panel.xlabel)
    ax.set_ylabel(panel.ylabel)
    if panel.image is not None:
        extent = (-0.5, panel.image.shape[1] - 0.5, -1.0, 1.0)
        picture = ax.imshow(panel.image, HEAT, extent=extent, origin="lower", aspect="auto", vmin=0, vmax=1)
        picture.set(interpolation="none", zorder=0.5)
        ax.grid(False)
    for level in panel.guides:
        ax.axhline(level, color=MUTED, linewidth=1, linestyle="--" if level else "-")
    for series in panel.series:
        _draw_series(ax, series, panel.scale)
    if panel.groups:
        ax.set_xticks(range(len(panel.groups)), panel.groups)
        ax.set_xlim(-0.5, len(panel.groups) - 0.5)
        ax.grid(False, axis="x")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=panel.xlabel in ("layer", "step")))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
    if panel.bottom is not None:
        ax.set_ylim(bottom=panel.bottom)
    if any(series.names for series in panel.series):
        ax.margins(x=0.24, y=0.1)


def _draw_series(ax: Axes, series: Series, scale: float) -> None:
    x, color = np.array(series.x), series.color
    y, low, high = (  # None becomes NaN, which is not drawn
        scale * np.array([getattr(estimate, field, None) for estimate in series.y], dtype=np.float64)
        for field in ("value", "low", "high")
    )
    if series.marker:
        ax.vlines(x, low, high, color=color, linewidth=1.8)
        faces = ["white" if is_open else color for is_open in series.is_open] or color
        ax.scatter(x, y, s=38, marker=series.marker, facecolors=faces, edgecolors=color, zorder=3)
    else:
        ax.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
    if series.width:
        ax.plot(x, y, color=color, linewidth=series.width, alpha=series.alpha)
    for position, estimate in zip(x, series.y):
        if estimate is not None and estimate.seeds:
            dots = [scale * value for value in estimate.seeds.values]
            ax.plot([position + 0.06] * len(dots), dots, ".", color=color, markersize=4)
    for name, *point in zip(series.names, x, y):
        if np.isfinite(point).all():
            ax.annotate(name, (point[0], point[1]), xytext=(6, 5), textcoords="offset points", color=MUTED)


def data_urls(plot: Plot) -> list[tuple[str, str]]:
    """(title, `data:` URL of an SVG) for each panel."""
    urls = []
    for panel in plot.panels:
        out = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            _figure([panel], ()).savefig(out, format="svg", metadata=metadata)
        urls.append((panel.title, f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"))
    return urls


def save(plot: Plot, folder: Path) -> None:
    """Write `<name>.png` into an existing folder: all panels side by side with a legend."""
    path = folder / f"{plot.name}.png"
    with matplotlib.rc_context(STYLE):
        _figure(plot.panels, plot.arms).savefig(path, dpi=PNG_DPI, metadata={"Software": None})


def _figure(panels: Sequence[Panel], arms: Sequence[str]) -> Figure:
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines + 0.35 * bool(arms))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, ax in zip(panels, axes):
        _draw(ax, panel)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    if arms:
        marks = [Line2D([], [], color=arm_color(arm, arms), linewidth=4) for arm in arms]
        figure.legend(marks, list(arms), loc="outside upper right", ncols=2 * columns, fontsize="medium")
    return figure
