"""Scores by precision, paired differences, and quality against cost, drawn from the before/after table.

Absolute scores and paired differences are separate plots: two arms whose own intervals overlap widely may
still differ clearly when paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from edgedisp.report.before_after import (
    Cell,
    Metric,
    Table,
    difference_texts,
    difference_to,
    value_text,
)
from edgedisp.report.picture import INK, MUTED, Panel, Plot, arm_color, arm_mark, slug
from edgedisp.report.reading import BASELINE, DISPERSED
from edgedisp.report.wording import MISSING, fixed

SCORES, DIFFERENCES, TRADEOFF = "scores", "differences", "tradeoff"
FAR = 6.0  # times the median arm's distance: an arm further out is drawn as an arrow at the edge


def scores(built: Table) -> Plot | None:
    """Every metric by precision, one point an arm, with its interval."""
    panels = []
    for metric in built.metrics:
        if metric.kind == "cost":
            continue
        draw = _dots(built, metric, {arm: arm for arm in built.arms})
        panels.append(Panel(slug(metric.key), metric.heading, _score_words(built, metric), draw))
    caption = (
        "Points with 95 % intervals. They cover each arm alone, and texts differ in difficulty, so they are "
        "wide; whether the arms differ is seen in the paired differences."
        f"{_seed_words(built)}{_far_words(built, built.metrics, built.arms)}"
    )
    return Plot(SCORES, "What quantization costs", caption, tuple(panels), built.arms) if panels else None


def differences(built: Table) -> Plot | None:
    """Every arm's paired differences to the baseline by precision, with the zero line."""
    panels = []
    others = tuple(arm for arm in built.arms if arm != BASELINE)
    for metric in built.metrics:
        known = [row.cell(metric.key, difference_to(arm)) for row in built.rows for arm in others]
        if not metric.paired or not any(cell.low is not None for cell in known):
            continue
        arrow = {True: " (up is better)", False: " (down is better)", None: ""}[metric.higher_is_better]
        unit = f", {metric.difference_unit}" if metric.difference_unit else ""
        draw = _dots(built, metric, {difference_to(arm): arm for arm in others}, zero=True)
        words = _difference_words(built, metric, others)
        panels.append(Panel(slug(metric.key), f"{metric.title}{unit}{arrow}", words, draw))
    caption = (
        f"{'Dispersed' if others == (DISPERSED,) else 'Arm'} - baseline on the same items, with 95 % "
        f"intervals. An interval that crosses the line at 0 shows no difference.{_seed_words(built)}"
        f"{_far_words(built, built.metrics, [difference_to(arm) for arm in others])}"
    )
    shown = others if len(others) > 1 else ()
    return Plot(DIFFERENCES, "Paired differences", caption, tuple(panels), shown) if panels else None


def _seed_words(built: Table) -> str:
    """What is drawn of several seeds, empty for one."""
    cells = (cell for row in built.rows for group in row.cells.values() for cell in group.values())
    if not any(len(cell.by_seed) > 1 for cell in cells):
        return ""
    return " Thin: with the spread between seeds; thick: over items alone; small dots: the single seeds."


def _far_words(built: Table, metrics: Sequence[Metric], columns: Sequence[str]) -> str:
    """What the arrows are, where there are any."""
    for metric in metrics:
        groups = [[row.cell(metric.key, column) for row in built.rows] for column in columns]
        if scale_of(groups, metric.scale) is not None:
            return " An arrow at the edge: off the scale; the figures stand in the tables."
    return ""


def _dots(
    built: Table, metric: Metric, columns: dict[str, str], zero: bool = False
) -> Callable[[Axes], None]:
    """Precisions along x; the columns (column -> arm) side by side with error bars.

    A single column of differences is drawn in ink: it belongs to two arms. Where one arm is far from all
    others the scale is theirs, and arrows at the edge stand for it.
    """
    groups = {column: [row.cell(metric.key, column) for row in built.rows] for column in columns}
    ends = scale_of(list(groups.values()), metric.scale)

    def draw(ax: Axes) -> None:
        step = min(0.22, 0.8 / max(1, len(columns)))
        for index, (column, arm) in enumerate(columns.items()):
            shift = (index - (len(columns) - 1) / 2) * step
            alone = zero and len(columns) == 1
            mark = "o" if alone or len(built.arms) < 3 else arm_mark(arm, built.arms)
            color = INK if alone else arm_color(arm, built.arms)
            _bars(ax, groups[column], shift, metric.scale, color, mark, ends)
        if zero:
            ax.axhline(0, color=MUTED, linewidth=1)
        if ends is not None:
            ax.set_ylim(*ends)
        ax.set_xticks(range(len(built.rows)), [row.label for row in built.rows])
        ax.set_xlim(-0.5, len(built.rows) - 0.5)
        ax.grid(False, axis="x")
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))

    return draw


def scale_of(groups: Sequence[Sequence[Cell]], scale: float) -> tuple[float, float] | None:
    """Ends of the y axis that leave out arms far from the others; None where all fit on one scale.

    Far: more than `FAR` times the median arm's distance from the median of all points, of three arms or more.
    """
    reach = [
        [x * scale for cell in group for x in (cell.low, cell.value, cell.high) if x is not None]
        for group in groups
    ]
    reach = [values for values in reach if values]
    if len(reach) < 3:
        return None
    centre = median([median(values) for values in reach])
    far = [max(abs(x - centre) for x in values) for values in reach]
    near = [values for values, distance in zip(reach, far) if distance <= FAR * median(far)]
    if len(near) == len(reach):
        return None
    low, high = min(map(min, near)), max(map(max, near))
    margin = 0.12 * (high - low) or 1.0
    return low - margin, high + margin


def _bars(
    ax: Axes,
    cells: Sequence[Cell],
    shift: float,
    scale: float,
    color: str,
    mark: str,
    ends: tuple[float, float] | None,
) -> None:
    """A point a cell; its interval where there is one, and of several seeds the interval's parts."""
    for index, cell in enumerate(cells):
        if cell.value is None:
            continue
        x, several = index + shift, len(cell.by_seed) > 1
        if ends is not None and not ends[0] <= cell.value * scale <= ends[1]:
            up = cell.value * scale > ends[1]
            edge = ends[1] if up else ends[0]
            ax.plot(
                [x], [edge], color=color, marker=6 if up else 7, markersize=8, linestyle="none", clip_on=False
            )
            continue
        if cell.low is not None and cell.high is not None:
            ends_ = [cell.low * scale, cell.high * scale]
            ax.plot([x, x], ends_, color=color, linewidth=0.9 if several else 1.8)
        if several and cell.item_low is not None and cell.item_high is not None:
            ax.plot([x, x], [cell.item_low * scale, cell.item_high * scale], color=color, linewidth=3)
        if several:
            dots = [value * scale for value in cell.by_seed]
            ax.plot([x + 0.06] * len(dots), dots, color=color, marker=".", markersize=4, linestyle="none")
        ax.plot([x], [cell.value * scale], color=color, marker=mark, markersize=6, linestyle="none")


def _score_words(built: Table, metric: Metric) -> str:
    words = []
    for row in built.rows:
        values = [f"{arm} {value_text(metric, row.cell(metric.key, arm).value)}" for arm in built.arms]
        words.append(f"{row.label}: {', '.join(values)}")
    return "; ".join(words) + "."


def _difference_words(built: Table, metric: Metric, others: Sequence[str]) -> str:
    words = []
    for row in built.rows:
        said = []
        for arm in others:
            shown, ends, _ = difference_texts(metric, row.cell(metric.key, difference_to(arm)))
            name = f"{arm} " if len(others) > 1 else ""
            said.append(f"{name}{shown}" + (f" (95 % interval {ends})" if ends else ""))
        words.append(f"{row.label}: {', '.join(said)}")
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
        "alone: how a model was trained leaves the graph as it is."
    )
    if _far_words(built, [loss], built.arms):
        caption += " An arm whose perplexity is far off the others' is left out."
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
    ends = scale_of([[cell for *_, cell in points] for points in found.values()], 1.0)

    def draw(ax: Axes) -> None:
        for index, (arm, points) in enumerate(found.items()):
            color = arm_color(arm, names)
            xs, ys = [x for _, x, _ in points], [cell.value or 0.0 for _, _, cell in points]
            ax.plot(xs, ys, color=color, linewidth=1.2, alpha=0.6)
            ax.plot(
                xs,
                ys,
                color=color,
                marker=arm_mark(arm, names),
                markersize=9 if index == 0 else 5,
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
        if ends is not None:
            ax.set_ylim(*ends)  # an arm far from the others has left the picture
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
