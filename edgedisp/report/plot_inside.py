"""What happened inside the models: condensation by layer, training curves.

Every panel comes with a text alternative made from the same numbers. Where the two arms lie on each
other, the baseline is drawn thick underneath and the dispersed arm thin on top, so that both stay
visible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from edgedisp.report.picture import HEAT, INK, Panel, Plot, Series, arm_color, log_ticks, slug
from edgedisp.report.reading import BASELINE, DISPERSED, Summary, arms, at, branch, number
from edgedisp.report.wording import fixed, percent, small

HEATMAP, TRAINING = "condensation_heatmap", "training"

Band = tuple[list[float], list[float], list[float]]
"""x, low, high."""


def layers(summary: Summary, arm: str) -> list[dict[str, Any]]:
    """The measured layers of an arm, in order."""
    found = at(summary, "condensation", arm, "layers")
    kept = [branch(layer) for layer in found] if isinstance(found, list) else []
    return sorted(kept, key=lambda layer: number(layer.get("layer")) or 0.0)


# Condensation


def histogram(summary: Summary, arm: str) -> np.ndarray[Any, np.dtype[np.float64]] | None:
    """Shares of token pairs, float64 [bins, layers], cosine -1 to 1 upwards; an empty layer is all 0."""
    rows = [layer.get("histogram") for layer in layers(summary, arm)]
    lists = [[number(count) or 0.0 for count in row] if isinstance(row, list) else [] for row in rows]
    bins = max((len(row) for row in lists), default=0)
    if not bins or any(len(row) not in (0, bins) for row in lists):
        return None
    counts = np.array([row or [0.0] * bins for row in lists])
    total = counts.sum(axis=1, keepdims=True)
    if not total.any():
        return None
    return np.divide(counts, total, out=np.zeros_like(counts), where=total > 0).T


def condensation_heatmap(summary: Summary) -> Plot | None:
    """The paper's picture: how the cosines of token pairs are spread in each layer, and what changed."""
    built = arms(summary)
    shares = {arm: found for arm in built if (found := histogram(summary, arm)) is not None}
    if not shares:
        return None
    top = max(float(found.max()) for found in shares.values())
    floor = min(lowest_cosine(found) for found in shares.values())
    panels = [_heat_panel(summary, arm, found, top, floor) for arm, found in shares.items()]
    pair = changed(shares)
    if pair is not None:
        panels.append(_change_panel(*pair, shares, floor, built))
    caption = (
        "Each column is a layer (0 is the embedding); the stronger the colour, the more token pairs of a "
        "sequence have that cosine. The line is the mean. Condensation: the mass moves up, towards 1. "
        f"Full strength is {percent(top, 0)} of a layer's pairs, the same in all panels."
    )
    if pair is not None:
        caption += (
            f" The last panel subtracts: where {pair[1]} or {pair[0]} has more pairs, in the colour that it "
            "has in the curves."
        )
    return Plot(HEATMAP, "Cosine similarity of token pairs, by layer", caption, tuple(panels))


def lowest_cosine(shares: Any) -> float:
    """Where a picture may begin: the lower edge of the first bin with 0.1 % of a layer's pairs, at most 0."""
    full = np.flatnonzero((shares > 1e-3).any(axis=1))
    return min(0.0, float(-1 + 2 * full[0] / shares.shape[0])) if full.size else -1.0


def _shade(strength: Any, color: str) -> Any:
    """RGBA [bins, layers, 4]: one colour, opacity = strength in [0, 1]; so it works on any background."""
    image = np.empty((*strength.shape, 4))
    image[..., :3] = to_rgb(color)
    image[..., 3] = np.clip(strength, 0.0, 1.0)
    return image


def _show(ax: Axes, image: Any) -> None:
    """Raw pixels, no resampling: a few kilobytes inside the SVG."""
    columns = image.shape[1]
    extent = (-0.5, columns - 0.5, -1.0, 1.0)
    ax.imshow(image, extent=extent, origin="lower", aspect="auto", interpolation="none", zorder=0.5)
    ax.grid(False)
    ax.set_xlabel("layer")
    ax.set_ylabel("cosine similarity")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))


def _heat_panel(summary: Summary, arm: str, shares: Any, top: float, floor: float) -> Panel:
    means = [number(layer.get("cosine_raw")) for layer in layers(summary, arm)]

    def draw(ax: Axes) -> None:
        _show(ax, _shade((shares / top) ** 0.6, HEAT))
        ax.plot([math.nan if mean is None else mean for mean in means], color=INK, linewidth=1.4)
        ax.set_ylim(floor, 1.0)

    known = [mean for mean in means if mean is not None]
    words = f"mean {fixed(known[0], 2)} at the first layer, at most {fixed(max(known), 2)}" if known else ""
    most = shares.argmax(axis=0)
    centre = -1 + (2 * most + 1) / shares.shape[0]
    description = (
        f"{shares.shape[1]} layers; {words or 'no mean'}; the fullest bin lies at cosine {centre[0]:.2f} in "
        f"the first layer and {centre[-1]:.2f} in the last."
    )
    return Panel(f"heat-{slug(arm)}", arm, description, draw)


def changed(shares: dict[str, Any]) -> tuple[str, str] | None:
    """Which two arms the last panel subtracts, (before, after): baseline and dispersed, or the only two."""
    pair = (BASELINE, DISPERSED) if {BASELINE, DISPERSED} <= set(shares) else tuple(shares)
    if len(pair) != 2 or shares[pair[0]].shape != shares[pair[1]].shape:
        return None
    return pair[0], pair[1]


def _change_panel(
    before: str, after: str, shares: dict[str, Any], floor: float, names: Sequence[str]
) -> Panel:
    change = shares[after] - shares[before]
    top = float(np.abs(change).max())

    def draw(ax: Axes) -> None:
        strength = np.abs(change) / top if top else np.zeros_like(change)
        image = _shade(strength**0.7, arm_color(after, names))
        image[change < 0, :3] = to_rgb(arm_color(before, names))
        _show(ax, image)
        ax.set_ylim(floor, 1.0)

    moved = float(np.abs(change).sum() / 2 / change.shape[1])
    description = (
        f"{percent(moved, 2)} of the pairs lie in another bin, averaged over layers; one bin changes by at "
        f"most {percent(top, 2)}."
    )
    return Panel("heat-change", f"{after} - {before} (full: {percent(top, 1)})", description, draw)


# Curves


def columns(rows: Sequence[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """Two columns of the rows that have both."""
    pairs = [(number(row.get(x)), number(row.get(y))) for row in rows]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return [a for a, _ in known], [b for _, b in known]


def lines(
    series: Series,
    names: Sequence[str],
    xlabel: str,
    bands: dict[str, Band] | None = None,
    log: bool = False,
) -> Callable[[Axes], None]:
    """One line an arm, the first thick, later ones thinner on top; below them the intervals, shaded."""

    def draw(ax: Axes) -> None:
        if log:
            ax.set_yscale("log")
        for arm, (x, low, high) in (bands or {}).items():
            ax.fill_between(x, low, high, color=arm_color(arm, names), alpha=0.16, linewidth=0)
        for index, (arm, (x, y)) in enumerate(series.items()):
            width = 3.4 if index == 0 and len(series) > 1 else 1.7
            ax.plot(x, y, color=arm_color(arm, names), linewidth=width, marker="o" if len(x) < 3 else None)
        ax.set_xlabel(xlabel)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        if log:
            log_ticks(ax)
        else:
            ax.yaxis.set_major_locator(MaxNLocator(nbins=5))

    return draw


def series_words(series: Series, x: str) -> str:
    """First, highest and last value of every arm."""
    words = []
    for arm, (xs, ys) in series.items():
        top = max(range(len(ys)), key=ys.__getitem__)
        words.append(
            f"{arm} {small(ys[0])} at {x} {xs[0]:g}, highest {small(ys[top])} at {x} {xs[top]:g}, "
            f"{small(ys[-1])} at {x} {xs[-1]:g}"
        )
    return "; ".join(words) + "."


# Training


def training(summary: Summary) -> Plot | None:
    """Cross-entropy and the dispersion term over steps."""
    panels = []
    for key, title in {"loss": "cross-entropy, nats per token", "dispersion": "dispersion loss"}.items():
        series: Series = {}
        for arm in arms(summary):
            log = at(summary, "midtrain", arm, "log")
            points = columns([branch(row) for row in log] if isinstance(log, list) else [], "step", key)
            if points[0]:
                series[arm] = points
        if series:
            panels.append(Panel(key, title, series_words(series, "step"), _curves(series, arms(summary))))
    caption = (
        "Thin: every logged step. Thick: running mean. The dispersion term is measured where it was logged."
    )
    return Plot(TRAINING, "Training curves", caption, tuple(panels), tuple(arms(summary))) if panels else None


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over up to `window` values (fewer at the ends)."""
    half = window // 2
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [float(total[end] - total[start]) / (end - start) for start, end in spans]


def _curves(series: Series, names: Sequence[str]) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        smooth: Series = {}
        for arm, (x, y) in series.items():
            window = max(1, len(y) // 15)
            if window > 1:
                ax.plot(x, y, color=arm_color(arm, names), linewidth=0.8, alpha=0.35)
            smooth[arm] = (x, running_mean(y, window))
        lines(smooth, names, "step")(ax)

    return draw
