"""From drawings to pictures: PNG files, and SVG inside the page, one image a panel: a phone stacks them.

Figures use matplotlib's object API (no pyplot, no global state). The same data give the same bytes: fixed
hash salt, no dates, no version strings, matplotlib's own font.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from edgedisp.core.results import BASELINE, DISPERSED, Estimate
from edgedisp.report.layout import TEXTS

# Grey-blue and orange stay apart for every common kind of colour blindness; lightness differs as well.
INK, MUTED, RULE, HEAT = "#1f2933", "#66727f", "#d5dbe1", "#3f7fb5"
ARM_COLORS = {BASELINE: "#5f7f9f", DISPERSED: "#d9771f"}
OTHER_COLORS = ("#2f8f83", "#8a63a8", "#b04a5a", "#7d7a2f", "#3f6fc4", "#7a5640")
MARKERS = "os^Dvp"
PANEL_INCHES = (4.6, 3.1)
PNG_DPI = 120
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "edgedisp",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "text.parse_math": False,  # a "$" in a name is only a character
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}


@dataclass(frozen=True)
class Panel:
    """One drawing on its own axes."""

    title: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Plot:
    """Panels that belong together; `arms` are those shown in the legend. Its title is in texts.toml."""

    name: str
    panels: tuple[Panel, ...]
    arms: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return str(TEXTS["plots"][self.name][0])

    @property
    def caption(self) -> str:
        return str(TEXTS["plots"][self.name][1])


def arm_color(arm: str, arms: Sequence[str]) -> str:
    """The colour of an arm, the same in every plot and in the page."""
    others = [name for name in arms if name not in ARM_COLORS]
    return ARM_COLORS.get(arm) or OTHER_COLORS[others.index(arm) % len(OTHER_COLORS)]


def arm_marker(arm: str, arms: Sequence[str]) -> str:
    """The marker of an arm's points: circle, square, triangle, ..."""
    return MARKERS[list(arms).index(arm) % len(MARKERS)]


def log_ticks(ax: Axes) -> None:
    """Plain numbers at powers of ten, or more where those are few."""
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


Curves = Mapping[str, tuple[Sequence[float], Sequence[Estimate]]]
"""Model -> x and y with intervals."""


def draw_lines(curves: Curves, arms: Sequence[str], xlabel: str, ax: Axes, *, log: bool = False) -> None:
    """One line a model over the shaded intervals of all; the first is thick and shows under others."""
    if log:
        ax.set_yscale("log")
    for place, (arm, (x, estimates)) in enumerate(curves.items()):
        color = arm_color(arm, arms)
        if all(one.has_interval for one in estimates):
            low, high = ([getattr(one, limit) for one in estimates] for limit in ("low", "high"))
            ax.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
        width = 3.4 if place == 0 and len(curves) > 1 else 1.7
        marker = "o" if len(x) < 3 else None
        ax.plot(x, [number(one) for one in estimates], color=color, linewidth=width, marker=marker)
    ax.set_xlabel(xlabel)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if log:
        log_ticks(ax)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))


def number(estimate: Estimate | None) -> float:
    return float("nan") if estimate is None or estimate.value is None else estimate.value


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
    path, out = folder / f"{plot.name}.png", io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = _figure(plot.panels, plot.arms)
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(PNG_DPI)
        canvas.print_png(out, metadata={"Software": None})
    path.write_bytes(out.getvalue())
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
        figure.legend(marks, list(arms), loc="outside upper right", ncols=min(len(arms), names_a_line))
    return figure
