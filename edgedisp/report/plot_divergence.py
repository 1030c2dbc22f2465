"""Divergence from the fp32 parent, by position in the text."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from edgedisp.report.picture import Panel, Plot, Series, arm_color, arm_mark, log_ticks, slug
from edgedisp.report.reading import Summary, arms, at, branch, label, number, precisions
from edgedisp.report.wording import small

DIVERGENCE = "divergence"
REFERENCES = {"parent": "from its fp32 parent", "baseline": "from the baseline"}


def divergence(summary: Summary) -> Plot | None:
    """A panel for each precision and reference: mean KL over positions, a line an arm."""
    panels = [
        panel
        for reference, words in REFERENCES.items()
        for precision in precisions(summary)
        if (panel := _panel(summary, precision, reference, words)) is not None
    ]
    caption = (
        "Mean KL divergence over ranges of positions, both axes logarithmic. A flat line: rounding costs the "
        "same wherever a token stands."
    )
    built = tuple(arms(summary))
    return Plot(DIVERGENCE, "Divergence by position", caption, tuple(panels), built) if panels else None


def _panel(summary: Summary, precision: str, reference: str, words: str) -> Panel | None:
    names = arms(summary)
    lines: Series = {}
    for arm in names:
        points = _points(at(summary, "divergence", arm, precision, reference, "by_position"))
        if points[0]:
            lines[arm] = points
    if not lines:
        return None

    def draw(ax: Axes) -> None:
        for index, (arm, (xs, ys)) in enumerate(lines.items()):
            width = 3.0 if index == 0 and len(lines) > 1 else 1.6
            color = arm_color(arm, names)
            ax.plot(xs, ys, color=color, linewidth=width, marker=arm_mark(arm, names), markersize=4)
        ax.set_xscale("log", base=2)
        ticks = sorted({x for xs, _ in lines.values() for x in xs})[::2]
        ax.xaxis.set_major_locator(FixedLocator(ticks))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks(ticks, [f"{tick - 1:.0f}" for tick in ticks])
        ax.set_yscale("log")
        log_ticks(ax)
        ax.set_xlabel("position, from")
        ax.set_ylabel("mean KL, nats")

    told = "; ".join(
        f"{arm}: {', '.join(f'{small(y)} from position {x - 1:.0f}' for x, y in zip(*points))}"
        for arm, points in lines.items()
    )
    return Panel(f"{slug(precision)}-{reference}", f"{label(precision)}, {words}", f"{told}.", draw)


def _points(rows: Any) -> tuple[list[float], list[float]]:
    """Positions counted from 1, so that the first has a place on a logarithmic axis, and mean KL above 0."""
    xs, ys = [], []
    for row in rows if isinstance(rows, list) else []:
        start, value = number(branch(row).get("start")), number(branch(row).get("mean_kl"))
        if start is not None and value is not None and value > 0:
            xs.append(start + 1)
            ys.append(value)
    return xs, ys
