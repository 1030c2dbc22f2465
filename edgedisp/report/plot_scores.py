"""Scores by precision, paired differences, and quality against cost, drawn from the before/after table.

Absolute scores and paired differences are separate plots: two arms whose own intervals overlap widely may
still differ clearly when paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from edgedisp.report.before_after import DIFFERENCE, Cell, Metric, Table, difference_texts, value_text
from edgedisp.report.picture import INK, MUTED, Panel, Plot, arm_color, slug
from edgedisp.report.wording import MISSING, fixed

SCORES, DIFFERENCES, TRADEOFF = "scores", "differences", "tradeoff"


def scores(built: Table) -> Plot | None:
    """Every metric by precision, one point an arm, with its interval."""
    panels = []
    for metric in built.metrics:
        if metric.kind == "cost":
            continue
        draw = _dots(built, metric, built.arms)
        panels.append(Panel(slug(metric.key), metric.heading, _score_words(built, metric), draw))
    caption = (
        "Points with 95 % intervals. They cover each arm alone, and texts differ in difficulty, so they are "
        "wide; whether the arms differ is seen in the paired differences."
    )
    return Plot(SCORES, "What quantization costs", caption, tuple(panels), built.arms) if panels else None


def differences(built: Table) -> Plot | None:
    """Every paired difference by precision, with the zero line."""
    panels = []
    for metric in built.metrics:
        known = [row.cell(metric.key, DIFFERENCE) for row in built.rows]
        if not metric.paired or not any(cell.low is not None for cell in known):
            continue
        arrow = {True: " (up is better)", False: " (down is better)", None: ""}[metric.higher_is_better]
        unit = f", {metric.difference_unit}" if metric.difference_unit else ""
        draw = _dots(built, metric, (DIFFERENCE,))
        panels.append(
            Panel(slug(metric.key), f"{metric.title}{unit}{arrow}", _difference_words(built, metric), draw)
        )
    caption = (
        "Dispersed - baseline on the same items, with 95 % intervals. An interval that crosses the line at 0 "
        "shows no difference."
    )
    return Plot(DIFFERENCES, "Paired differences", caption, tuple(panels)) if panels else None


def _dots(built: Table, metric: Metric, columns: Sequence[str]) -> Callable[[Axes], None]:
    """Precisions along x; the columns side by side with error bars."""

    def draw(ax: Axes) -> None:
        for index, column in enumerate(columns):
            shift = (index - (len(columns) - 1) / 2) * 0.22
            cells = [row.cell(metric.key, column) for row in built.rows]
            color = INK if column == DIFFERENCE else arm_color(column, columns)
            _bars(ax, cells, shift, metric.scale, color)
        if tuple(columns) == (DIFFERENCE,):
            ax.axhline(0, color=MUTED, linewidth=1)
        ax.set_xticks(range(len(built.rows)), [row.label for row in built.rows])
        ax.set_xlim(-0.5, len(built.rows) - 0.5)
        ax.grid(False, axis="x")
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))

    return draw


def _bars(ax: Axes, cells: Sequence[Cell], shift: float, scale: float, color: str) -> None:
    """A point a cell; its interval where there is one."""
    for index, cell in enumerate(cells):
        if cell.value is None:
            continue
        value = cell.value * scale
        if cell.low is not None and cell.high is not None:
            ax.plot([index + shift] * 2, [cell.low * scale, cell.high * scale], color=color, linewidth=1.8)
        ax.plot([index + shift], [value], color=color, marker="o", markersize=6, linestyle="none")


def _score_words(built: Table, metric: Metric) -> str:
    words = []
    for row in built.rows:
        values = [f"{arm} {value_text(metric, row.cell(metric.key, arm).value)}" for arm in built.arms]
        words.append(f"{row.label}: {', '.join(values)}")
    return "; ".join(words) + "."


def _difference_words(built: Table, metric: Metric) -> str:
    words = []
    for row in built.rows:
        shown, ends, _ = difference_texts(metric, row.cell(metric.key, DIFFERENCE))
        words.append(f"{row.label}: {shown}" + (f" (95 % interval {ends})" if ends else ""))
    return "; ".join(words) + "."


# Quality against cost


def tradeoff(built: Table) -> Plot | None:
    """Perplexity against size and against decode speed; one line an arm through its precisions."""
    loss = next((metric for metric in built.metrics if metric.kind == "loss"), None)
    if loss is None:
        return None
    panels = []
    for key, xlabel in {"size_bytes": "size, MB", "decode_tokens_per_s": "decode, tokens/s"}.items():
        cost = next((metric for metric in built.metrics if metric.key == key), None)
        found = {} if cost is None else _pairs(built, loss, cost)
        if any(len(points) > 1 for points in found.values()):
            draw = _tradeoff_draw(found, built.arms, xlabel, loss.title)
            panels.append(
                Panel(slug(key), f"{loss.title} against {xlabel}", _pair_words(found, xlabel), draw)
            )
    caption = (
        "Lower perplexity, smaller size and higher speed are better. The arms' timings differ by noise "
        "alone: dispersion leaves the graph as it is."
    )
    return Plot(TRADEOFF, "Quality against cost", caption, tuple(panels), built.arms) if panels else None


Point = tuple[str, float, Cell]


def _pairs(built: Table, loss: Metric, cost: Metric) -> dict[str, list[Point]]:
    """arm -> (precision's label, cost, loss cell)."""
    found: dict[str, list[Point]] = {}
    for arm in built.arms:
        for row in built.rows:
            x, y = row.cell(cost.key, arm).value, row.cell(loss.key, arm)
            if x is not None and y.value is not None:
                found.setdefault(arm, []).append((row.label, x * cost.scale, y))
    return found


def _tradeoff_draw(
    found: dict[str, list[Point]], names: Sequence[str], xlabel: str, ylabel: str
) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        for index, (arm, points) in enumerate(found.items()):
            color = arm_color(arm, names)
            xs, ys = [x for _, x, _ in points], [cell.value or 0.0 for _, _, cell in points]
            ax.plot(xs, ys, color=color, linewidth=1.2, alpha=0.6)
            ax.plot(
                xs,
                ys,
                color=color,
                marker="os^D"[index % 4],
                markersize=max(5, 9 - 4 * index),
                linestyle="none",
            )
            for name, x, cell in points:
                if cell.low is not None and cell.high is not None:
                    ax.plot([x, x], [cell.low, cell.high], color=color, linewidth=1.2, alpha=0.5)
                if index == 0:
                    ax.annotate(name, (x, cell.value or 0.0), (7, 6), textcoords="offset points", color=MUTED)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        ax.margins(x=0.24, y=0.1)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))

    return draw


def _pair_words(found: dict[str, list[Point]], xlabel: str) -> str:
    unit = xlabel.split(", ")[-1]
    words = []
    for arm, points in found.items():
        pairs = [f"{name} {fixed(x, 0)} {unit} at {fixed(cell.value, 2)}" for name, x, cell in points]
        words.append(f"{arm}: {', '.join(pairs) or MISSING}")
    return "; ".join(words) + "."
