"""From drawings to pictures: PNG files, and SVG inside the page, one image a panel: a phone stacks them.

Figures use matplotlib's object API (no pyplot, no global state). The same data give the same bytes: fixed
hash salt, no dates, no version strings, matplotlib's own font.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from edgedisp.core.results import BASELINE, DISPERSED, Condensation, Estimate
from edgedisp.report.layout import FOLDER, TEXTS

# Grey-blue and orange stay apart for every common kind of colour blindness; lightness differs as well.
INK, MUTED, RULE, HEAT = "#1f2933", "#66727f", "#d5dbe1", "#3f7fb5"
ARM_COLORS = {BASELINE: "#5f7f9f", DISPERSED: "#d9771f"}
OTHER_COLORS = ("#2f8f83", "#8a63a8", "#b04a5a", "#7d7a2f", "#3f6fc4", "#7a5640")
MARKERS = "os^Dvp"
PANEL_INCHES = (4.6, 3.1)
PNG_DPI = 120
with as_file(FOLDER.joinpath("plots.mplstyle")) as path:
    STYLE = matplotlib.rc_params_from_file(path, use_default_template=False)


@dataclass(frozen=True)
class Panel:
    """One drawing on its own axes."""

    title: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Plot:
    """Panels that belong together; `arms` are those shown in the legend. Its title is in texts.toml."""

    name: str
    panels: list[Panel]
    arms: Sequence[str] = ()

    @property
    def title(self) -> str:
        return str(TEXTS["plots"][self.name][0])

    @property
    def caption(self) -> str:
        return str(TEXTS["plots"][self.name][1])


@dataclass(frozen=True)
class Curve:
    """A line. width None: shaded intervals, and thick for the first of a panel, to show under others."""

    x: Sequence[float]
    y: Sequence[Estimate]
    color: str
    dash: str = "-"
    width: float | None = None
    alpha: float = 1.0
    label: str | None = None


@dataclass(frozen=True)
class Points:
    """Points with the intervals of both coordinates; line: width of the line that joins them."""

    x: Sequence[Estimate]
    y: Sequence[Estimate]
    color: str
    marker: str = "o"
    size: float = 5
    line: float = 0
    labels: Sequence[str] = ()


def arm_color(arm: str, arms: Sequence[str]) -> str:
    """The colour of an arm, the same in every plot and in the page."""
    other_arms = [name for name in arms if name not in ARM_COLORS]
    return ARM_COLORS.get(arm) or OTHER_COLORS[other_arms.index(arm) % len(OTHER_COLORS)]


def arm_marker(arm: str, arms: Sequence[str]) -> str:
    """The marker of an arm's points: circle, square, triangle, ..."""
    return MARKERS[list(arms).index(arm) % len(MARKERS)]


def line_panel(title: str, curves: Sequence[Curve], xlabel: str, scale: str = "linear") -> Panel:
    """Curves over integers. scale: `linear`, `log`, `change` (line at 0) or `share` (from 0 %)."""

    def draw(ax: Axes) -> None:
        if scale == "change":
            ax.axhline(0.0, color=RULE, linewidth=1.2)
        widths = iter([3.4 if len(curves) > 1 else 1.7])
        for curve in curves:
            width = curve.width or next(widths, 1.7)
            if curve.width is None and all(estimate.has_interval for estimate in curve.y):
                low, high = zip(*(limits(estimate) for estimate in curve.y))
                ax.fill_between(curve.x, low, high, color=curve.color, alpha=0.16, linewidth=0)
            style: dict[str, Any] = {"color": curve.color, "alpha": curve.alpha, "label": curve.label}
            marker = "o" if len(curve.x) < 3 else None
            ax.plot(curve.x, numbers(curve.y), curve.dash, linewidth=width, marker=marker, **style)
        ax.set_xlabel(xlabel)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if scale == "log":
            log_axis(ax)
        elif scale == "share":
            ax.set_ylim(bottom=0.0)
            ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        if any(curve.label for curve in curves):
            ax.legend(loc="best")

    return Panel(title, draw)


def histogram(profile: Condensation) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Shares of token pairs, float64 [bins, layers], cosine -1 to 1 upwards; 0 where there are no pairs."""
    bins = max(len(row.histogram) for row in profile.layers)
    counts = np.array([row.histogram or (0,) * bins for row in profile.layers], dtype=np.float64)
    total = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, total, out=np.zeros_like(counts), where=total > 0).T


def lowest_cosine(shares: Any) -> float:
    """Where the picture begins: the lower edge of the first bin with 0.1 % of a layer's pairs, at most 0."""
    full = np.flatnonzero((shares > 1e-3).any(axis=1))
    return min(0.0, float(-1 + 2 * full[0] / shares.shape[0])) if full.size else -1.0


def heat_panel(
    title: str, strength: Any, colors: Any, floor: float, means: Sequence[float] | None = None
) -> Panel:
    """strength: opacity in [0, 1], [bins, layers]; colors: RGB, broadcast to [bins, layers, 3]."""
    image = np.empty((*strength.shape, 4))
    image[..., :3], image[..., 3] = colors, np.clip(strength, 0.0, 1.0)

    def draw(ax: Axes) -> None:
        extent = (-0.5, image.shape[1] - 0.5, -1.0, 1.0)
        ax.imshow(image, extent=extent, origin="lower", aspect="auto", interpolation="none", zorder=0.5)
        ax.grid(False)
        ax.set_xlabel("layer")
        ax.set_ylabel("cosine similarity")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        ax.set_ylim(floor, 1.0)
        if means is not None:
            ax.plot(means, color=INK, linewidth=1.4)

    return Panel(title, draw)


def draw_point(ax: Axes, x: float, estimate: Estimate, scale: float, style: dict[str, Any]) -> None:
    """A point with its interval; of several seeds also the interval over items and the single seeds."""
    seeds, color = estimate.seeds, style["color"]
    ax.plot([x, x], limits(estimate, scale), color=color, linewidth=0.9 if seeds else 1.8)
    if seeds is not None and estimate.over_items is not None:
        ax.plot([x, x], limits(estimate.over_items, scale), color=color, linewidth=3)
        dots = [value * scale for value in seeds.values]
        ax.plot([x + 0.06] * len(dots), dots, color=color, marker=".", markersize=4, linestyle="none")
    ax.plot([x], [scale * value for value in numbers([estimate])], markersize=6, **style)


def scatter_panel(
    title: str,
    series: Sequence[Points],
    axes: tuple[str, str],
    *,
    log: bool = False,
    box: tuple[float, float] | None = None,
) -> Panel:
    """Points by two figures; axes: their labels. box: half-sizes of a dashed box around 0."""

    def draw(ax: Axes) -> None:
        if box is not None:
            ax.axhline(0, color=MUTED, linewidth=0.8)
            ax.axvline(0, color=MUTED, linewidth=0.8)
            corner, size = (-box[0], -box[1]), (2 * box[0], 2 * box[1])
            ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor=MUTED, linestyle="--"))
        for points in series:
            xs, ys, color = numbers(points.x), numbers(points.y), points.color
            ax.plot(xs, ys, color=color, linewidth=points.line, marker=points.marker, markersize=points.size)
            for x, y, wide, high in zip(xs, ys, points.x, points.y):
                ax.plot([x, x], limits(high), color=color, linewidth=1.2, alpha=0.5)
                ax.plot(limits(wide), [y, y], color=color, linewidth=1.2, alpha=0.5)
            for label, x, y in zip(points.labels, xs, ys):
                ax.annotate(label, (x, y), xytext=(6, 5), textcoords="offset points", color=MUTED)
        ax.set_xlabel(axes[0])
        ax.set_ylabel(axes[1])
        ax.margins(x=0.24, y=0.1)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))
        if log:
            log_axis(ax)

    return Panel(title, draw)


def log_axis(ax: Axes) -> None:
    """Logarithmic y: plain numbers at powers of ten, or more where those are few."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def numbers(estimates: Sequence[Estimate | None]) -> list[float]:
    """The values; NaN, which is not drawn, where there is none."""
    values = [estimate.value if estimate else None for estimate in estimates]
    return [float("nan") if value is None else value for value in values]


def limits(estimate: Estimate, scale: float = 1.0) -> list[float]:
    """Both limits of the interval; NaN, which is not drawn, where there is none."""
    return [float("nan") if limit is None else scale * limit for limit in (estimate.low, estimate.high)]


def data_urls(plot: Plot) -> list[tuple[str, str]]:
    """(title, `data:` URL of an SVG) for each panel."""
    urls = []
    for panel in plot.panels:
        out = io.StringIO()
        with matplotlib.rc_context(STYLE):
            canvas = FigureCanvasSVG(_figure([panel], ()))
            canvas.print_svg(out, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        encoded = base64.b64encode(out.getvalue().encode()).decode()
        urls.append((panel.title, f"data:image/svg+xml;base64,{encoded}"))
    return urls


def save(plot: Plot, folder: Path) -> Path:
    """Write `<name>.png` into an existing folder: all panels side by side with a legend."""
    path = folder / f"{plot.name}.png"
    with matplotlib.rc_context(STYLE), path.open("wb") as out:
        figure = _figure(plot.panels, plot.arms)
        figure.set_dpi(PNG_DPI)
        FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    return path


def _figure(panels: Sequence[Panel], arms: Sequence[str]) -> Figure:
    columns = len(panels) if len(panels) < 4 else 2 if len(panels) == 4 else 3
    lines = -(-len(panels) // columns)
    names_a_line = 2 * columns
    legend = 0.35 * -(-len(arms) // names_a_line)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines + legend)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, ax in zip(panels, axes):
        ax.set_title(panel.title)
        panel.draw(ax)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    if arms:
        marks = [Line2D([], [], color=arm_color(arm, arms), linewidth=4) for arm in arms]
        columns_of_names = min(len(arms), names_a_line)
        figure.legend(marks, list(arms), loc="outside upper right", ncols=columns_of_names, fontsize="medium")
    return figure
