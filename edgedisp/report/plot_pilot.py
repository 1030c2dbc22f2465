"""A pilot in one picture: what each setting did to the loss and to the mean cosine, rung by rung.

One panel for each variant and choice of layers, all on one scale; one colour for each weight. A line runs
from rung to rung; the last point is the large one and has its intervals. Nothing counts inside the dashed
box.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from edgedisp.report.picture import MUTED, Panel, Plot, arm_color, arm_mark, slug
from edgedisp.report.wording import signed

NAME = "pilot"
Row = Mapping[str, Any]
Figure = Mapping[str, Any]
Path = list[Row]  # one candidate's rows, from rung to rung

LAST, EARLIER = 7.0, 3.5  # sizes of points


def pilot_plot(found: Mapping[str, Any]) -> Plot:
    """The picture of what `edgedisp.pilot` found (its pilot.json)."""
    groups: dict[str, dict[str, Path]] = {}
    for rung in found["rungs"]:
        for row in rung["candidates"]:
            if "loss" in row:  # a training that diverged has no figures
                paths = groups.setdefault(_group(row), {})
                paths.setdefault(_weight(row), []).append({**row, "tokens": rung["tokens"]})
    weights = sorted(
        {name for paths in groups.values() for name in paths}, key=lambda name: float(name.split()[1])
    )
    box = (found["floors"]["cosine"], found["floors"]["loss"])
    ends = _ends([path for paths in groups.values() for path in paths.values()], box)
    panels = tuple(_panel(name, groups[name], weights, box, ends) for name in sorted(groups))
    caption = (
        "Candidate - baseline of the same tokens, with paired 95 % intervals in the longest rung each "
        "reached, whose tokens stand beside it; a line runs from rung to rung. Left: less condensed; down: "
        "lower held-out loss. Inside the dashed box nothing counts."
    )
    return Plot(NAME, f"Pilot of {found['recipe']}", caption, panels, tuple(weights))


def _group(row: Row) -> str:
    layers = row["layers"] if isinstance(row["layers"], str) else "+".join(map(str, row["layers"]))
    return f"{row['variant']}, layers {layers}"


def _weight(row: Row) -> str:
    return f"weight {row['weight']:g}"


def _panel(
    name: str,
    paths: Mapping[str, Path],
    weights: Sequence[str],
    box: tuple[float, float],
    ends: tuple[tuple[float, float], tuple[float, float]],
) -> Panel:
    def draw(ax: Axes) -> None:
        ax.axhline(0, color=MUTED, linewidth=0.8)
        ax.axvline(0, color=MUTED, linewidth=0.8)
        ax.add_patch(
            Rectangle((-box[0], -box[1]), 2 * box[0], 2 * box[1], fill=False, edgecolor=MUTED, linestyle="--")
        )
        for weight, path in paths.items():
            _draw_path(ax, path, arm_color(weight, weights), arm_mark(weight, weights))
        ax.set_xlim(*ends[0])
        ax.set_ylim(*ends[1])
        ax.set_xlabel("mean cosine, difference")
        ax.set_ylabel("held-out loss, difference (nats)")

    words = "; ".join(_words(weight, path[-1]) for weight, path in paths.items())
    return Panel(slug(name), name, words, draw)


def _draw_path(ax: Axes, path: Path, color: str, mark: str) -> None:
    xs, ys = ([row[figure]["difference"] for row in path] for figure in ("cosine_raw", "loss"))
    ax.plot(xs, ys, color=color, linewidth=1, marker=mark, markersize=EARLIER, alpha=0.6)
    last = path[-1]
    ax.errorbar(
        xs[-1],
        ys[-1],
        xerr=_bars(last["cosine_raw"]),
        yerr=_bars(last["loss"]),
        color=color,
        marker=mark,
        markersize=LAST,
        elinewidth=1.2,
        capsize=0,
    )
    ax.annotate(
        f"{last['tokens']:,}",
        (xs[-1], ys[-1]),
        xytext=(6, 5),
        textcoords="offset points",
        fontsize="small",
        color=MUTED,
    )


def _bars(part: Figure) -> list[list[float]] | None:
    """What matplotlib takes: how far the ends are below and above; never negative."""
    if part["low"] is None:
        return None
    value = part["difference"]
    return [[max(0.0, value - part["low"])], [max(0.0, part["high"] - value)]]


def _ends(paths: Sequence[Path], box: tuple[float, float]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The ends of both axes: all points, the intervals that are drawn, and the box, with a margin."""
    found = []
    for figure, floor in zip(("cosine_raw", "loss"), box):
        values = [row[figure]["difference"] for path in paths for row in path] + [-floor, floor]
        last = [path[-1][figure] for path in paths]
        values += [part[end] for part in last for end in ("low", "high") if part[end] is not None]
        margin = 0.06 * (max(values) - min(values))
        found.append((min(values) - margin, max(values) + margin))
    return found[0], found[1]


def _words(weight: str, row: Row) -> str:
    parts = [
        f"{name} {signed(row[figure]['difference'], 4)}"
        for name, figure in (("cosine", "cosine_raw"), ("loss", "loss"))
    ]
    return f"{weight}: {', '.join(parts)}, {row['effect']}, at {row['tokens']:,} tokens"
