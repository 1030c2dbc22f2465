"""The curve of a search for bits by weight: file size against KL divergence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes

from edgedisp.report.mixed import PARETO, Search, rows_of, searches
from edgedisp.report.picture import MUTED, Panel, Plot, arm_color, arm_mark, log_ticks, slug
from edgedisp.report.reading import Summary, arms, number
from edgedisp.report.wording import MISSING, fixed, small


def pareto(summary: Summary) -> Plot | None:
    """File size against KL divergence: the curve of the search, and what was measured on it."""
    panels = [
        Panel(slug(arm), arm, _point_words(search), _draw(search, arm, arms(summary)))
        for arm, search in searches(summary)
    ]
    caption = (
        "Line: predicted KL of the best assignment at each size. Marks: measured KL of whole bundles. Lower "
        "and further left is better."
    )
    return Plot(PARETO, "Size against loss, bits by weight", caption, tuple(panels)) if panels else None


def _draw(search: Search, arm: str, names: list[str]) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        color = arm_color(arm, names)
        line = _known(rows_of(search.get("curve")), "predicted_kl")
        ax.plot([x for _, x, _ in line], [y for *_, y in line], color=color, linewidth=1.2, alpha=0.6)
        for name, x, y in _known(rows_of(search.get("points")), "measured_kl"):
            chosen = name == "chosen"
            mark = arm_mark(arm, names) if chosen else "x"
            ax.plot([x], [y], color=color if chosen else MUTED, marker=mark, markersize=8 if chosen else 6)
            place = (-8, -9) if chosen else (6, 5)  # a uniform bundle of that size lies above it
            side = "right" if chosen else "left"
            ax.annotate(name, (x, y), place, textcoords="offset points", color=MUTED, ha=side)
        ax.set_yscale("log")
        ax.set_xlabel("size, MB")
        ax.set_ylabel("KL, nats per token")
        ax.margins(x=0.3, y=0.12)
        log_ticks(ax)

    return draw


def _known(rows: list[dict[str, Any]], loss: str) -> list[tuple[str, float, float]]:
    """(name, MB, KL) of the points that can stand on a logarithmic scale."""
    found = []
    for row in rows:
        size, value = number(row.get("size_bytes")), number(row.get(loss))
        if size is not None and value is not None and value > 0:
            found.append((str(row.get("name") or ""), size / 1e6, value))
    return found


def _point_words(search: Search) -> str:
    known = _known(rows_of(search.get("points")), "measured_kl")
    return "; ".join(f"{name} {fixed(x, 1)} MB at KL {small(y)}" for name, x, y in known) or MISSING
