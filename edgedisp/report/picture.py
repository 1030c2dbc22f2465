"""From a drawing to files: SVG and PNG for sharing, inline SVG for the page.

A `Plot` is a row of `Panel`s; a panel draws itself on matplotlib axes. As files the panels stand side by
side in one picture with a legend. In the page each panel is an SVG of its own, so that a phone stacks
them and text stays readable. Inline SVG differs from the file in four ways: ids get a prefix (several
pictures share one document), colours become CSS variables (dark mode), metadata and namespaces go, and
<title>/<desc> come in for readers who cannot see it.

Figures are made through matplotlib's object API (no pyplot, no global figure state). The same data give
the same bytes: fixed hash salt, no dates, no version strings, matplotlib's own font.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Grey-blue and orange stay apart for every common kind of colour blindness; lightness differs as well.
INK, MUTED, RULE = "#1f2933", "#66727f", "#d5dbe1"
ARM_COLORS = {"baseline": "#5f7f9f", "dispersed": "#d9771f"}
OTHER_COLORS = ("#2f8f83", "#8a63a8", "#b04a5a", "#7d7a2f", "#3f6fc4", "#7a5640")
HEAT = "#3f7fb5"
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    RULE: "rule",
    ARM_COLORS["baseline"]: "baseline",
    ARM_COLORS["dispersed"]: "dispersed",
}
MARKERS = "os^Dvp"  # an arm is told by its mark too; with many arms colours come round before marks do
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
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
PANEL_INCHES = (4.6, 3.1)
PNG_DPI = 144


Series = dict[str, tuple[list[float], list[float]]]  # arm -> (x, y)


@dataclass(frozen=True)
class Panel:
    """One drawing. `description` is its text alternative: it names the figures, not the shapes."""

    name: str
    title: str
    description: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Plot:
    """Panels that belong together; `arms` are those shown in the legend."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    arms: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """All panels' text alternatives."""
        return " ".join(f"{panel.title}: {panel.description}" for panel in self.panels)


def arm_color(arm: str, arms: Sequence[str]) -> str:
    """The colour of an arm, the same in every plot."""
    return ARM_COLORS.get(arm) or OTHER_COLORS[_place(arm, arms)]


def arm_class(arm: str, arms: Sequence[str]) -> str:
    """The page's CSS class for that colour: `baseline`, `dispersed`, `other0`, ..."""
    return arm if arm in ARM_COLORS else f"other{_place(arm, arms)}"


def arm_mark(arm: str, arms: Sequence[str]) -> str:
    """The mark of an arm's points: circle, square, triangle, ..."""
    return MARKERS[list(arms).index(arm) % len(MARKERS)]


def _place(arm: str, arms: Sequence[str]) -> int:
    others = [name for name in arms if name not in ARM_COLORS]
    return others.index(arm) % len(OTHER_COLORS)


def log_ticks(ax: Axes) -> None:
    """Plain numbers (no text is read as mathematics) at powers of ten, or more where those are few."""
    low, high = ax.get_ylim()
    between = (1.0,) if high > 100 * low else (1.0, 2.0, 5.0)
    ax.yaxis.set_major_locator(LogLocator(subs=between))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def slug(text: str) -> str:
    """Letters, digits and hyphens only: fit for an id."""
    return "".join(char if char.isascii() and char.isalnum() else "-" for char in text) or "x"


def inline_svgs(plot: Plot) -> list[str]:
    """One inline SVG a panel."""
    return [
        _inline(_svg(_figure([panel], ())), f"{plot.name}-{index}-{panel.name}", panel)
        for index, panel in enumerate(plot.panels)
    ]


def save(plot: Plot, folder: Path) -> list[Path]:
    """Write `<name>.svg` and `<name>.png` into an existing folder."""
    vector, bitmap = folder / f"{plot.name}.svg", folder / f"{plot.name}.png"
    figure = _figure(plot.panels, plot.arms)
    vector.write_text(_svg(figure), encoding="utf-8")
    figure.set_layout_engine("none")  # the vector's places hold for the bitmap: finding them takes longest
    bitmap.write_bytes(_png(figure))
    return [vector, bitmap]


def _figure(panels: Sequence[Panel], arms: Sequence[str]) -> Figure:
    columns = len(panels) if len(panels) < 4 else 2 if len(panels) == 4 else 3
    lines = -(-len(panels) // columns)
    in_line = 2 * columns  # names in one line of the legend
    legend = 0.35 * -(-len(arms) // in_line)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines + legend)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel, ax in zip(panels, axes):
            ax.set_title(panel.title)
            panel.draw(ax)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        if arms:
            marks = [Line2D([], [], color=arm_color(arm, arms), linewidth=4) for arm in arms]
            figure.legend(marks, list(arms), loc="outside upper right", ncols=min(len(arms), in_line))
    return figure


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        FigureCanvasSVG(figure).print_svg(out, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return out.getvalue()


def _png(figure: Figure) -> bytes:
    """On white: a PNG is pasted into slides and pages of any colour."""
    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(PNG_DPI)
        figure.set_facecolor("white")
        canvas.print_png(out, metadata={"Software": None})
    return out.getvalue()


def _inline(svg: str, prefix: str, panel: Panel) -> str:
    """The <svg> element alone, safe to stand with others in one HTML page."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", body, flags=re.S)
    opening, rest = body.split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', opening)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', rest))

    def rename(match: re.Match[str]) -> str:
        return f' id="{prefix}-{match[1]}"' if match[1] in used else ""

    rest = re.sub(r'\sid="([^"]+)"', rename, rest)
    rest = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", rest)
    rest = re.sub(r'(?:xlink:)?href="#([^"]+)"', rf'href="#{prefix}-\1"', rest)
    rest = rest.replace("xlink:href=", "href=")
    rest = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", rest)
    for color, name in VARIABLES.items():
        rest = rest.replace(color, f"var(--{name})")
    for index, color in enumerate(OTHER_COLORS):  # a page without that variable shows the colour itself
        rest = rest.replace(color, f"var(--other{index}, {color})")
    return (
        f'<svg viewBox="{box[1] if box else ""}" role="img" aria-labelledby="{prefix}-title {prefix}-desc">'
        f'<title id="{prefix}-title">{html.escape(panel.title)}</title>'
        f'<desc id="{prefix}-desc">{html.escape(panel.description)}</desc>{rest}'
    )
