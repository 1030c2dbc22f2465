"""A pilot in one picture: what each setting did to the loss and to the mean cosine, rung by rung."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from edgedisp.report.figure import MUTED, Panel, Plot, arm_color, arm_marker

Row = Mapping[str, Any]


def pilot_plot(results: Mapping[str, Any]) -> Plot:
    """The picture of a pilot.json: a panel for each variant and layers, a colour for each weight."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for rung in results["rungs"]:
        for row in rung["candidates"]:
            if "loss" in row:  # a training that diverged has no figures
                listed = (
                    row["layers"] if isinstance(row["layers"], str) else "+".join(map(str, row["layers"]))
                )
                rows = groups.setdefault(f"{row['variant']}, layers {listed}", {})
                rows.setdefault(f"weight {row['weight']:g}", []).append({**row, "tokens": rung["tokens"]})
    weights = sorted(
        {name for rows in groups.values() for name in rows}, key=lambda name: float(name.split()[1])
    )
    box = (results["floors"]["cosine"], results["floors"]["loss"])
    panels = tuple(Panel(name, _draw(groups[name], weights, box)) for name in sorted(groups))
    caption = (
        "Candidate - baseline of the same tokens, with paired 95 % intervals in the longest rung each "
        "reached, whose "
        "tokens stand beside it. Left: less condensed; down: lower held-out loss. Inside the dashed box "
        "nothing "
        "counts."
    )
    return Plot("pilot", f"Pilot of {results['recipe']}", caption, panels, tuple(weights))


def _draw(
    rows: Mapping[str, list[Row]], weights: Sequence[str], box: tuple[float, float]
) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        ax.axhline(0, color=MUTED, linewidth=0.8)
        ax.axvline(0, color=MUTED, linewidth=0.8)
        corner, size = (-box[0], -box[1]), (2 * box[0], 2 * box[1])
        ax.add_patch(Rectangle(corner, *size, fill=False, edgecolor=MUTED, linestyle="--"))
        for weight, path in rows.items():
            color, marker = arm_color(weight, weights), arm_marker(weight, weights)
            xs, ys = ([row[figure]["difference"] for row in path] for figure in ("cosine_raw", "loss"))
            ax.plot(xs, ys, color=color, linewidth=1, marker=marker, markersize=3.5, alpha=0.6)
            bars: dict[str, Any] = {"xerr": _bars(path[-1]["cosine_raw"]), "yerr": _bars(path[-1]["loss"])}
            ax.errorbar(xs[-1], ys[-1], **bars, color=color, marker=marker, markersize=7)
            text = f"{path[-1]['tokens']:,}"
            place: dict[str, Any] = {"xytext": (6, 5), "textcoords": "offset points"}
            ax.annotate(text, (xs[-1], ys[-1]), fontsize="small", color=MUTED, **place)
        ax.margins(0.08)
        ax.set_xlabel("mean cosine, difference")
        ax.set_ylabel("held-out loss, difference (nats)")

    return draw


def _bars(part: Mapping[str, float | None]) -> list[list[float]] | None:
    """How far the ends are below and above the value."""
    value, low, high = part["difference"], part["low"], part["high"]
    if value is None or low is None or high is None:
        return None
    return [[max(0.0, value - low)], [max(0.0, high - value)]]
