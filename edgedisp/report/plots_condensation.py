"""Condensation by layer: the paper's heatmap, curves of arms, outliers, and what quantization changes.

Where two curves lie on each other, the first is drawn thick underneath and later ones thin on top.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from edgedisp.core.results import BASELINE, DISPERSED, Condensation, Estimate, Run
from edgedisp.report.figure import HEAT, INK, RULE, Panel, Plot, arm_color, log_ticks
from edgedisp.report.formatting import label, percent

Profiles = Mapping[str, Condensation]
"""Model -> its profile."""
Curves = Mapping[str, tuple[Sequence[float], Sequence[Estimate]]]
"""Model -> x and y with intervals."""


def draw_lines(ax: Axes, curves: Curves, arms: Sequence[str], xlabel: str, log: bool = False) -> None:
    """One line a model over the shaded intervals of all."""
    if log:
        ax.set_yscale("log")
    for place, (arm, (x, estimates)) in enumerate(curves.items()):
        color = arm_color(arm, arms)
        if all(one.has_interval for one in estimates):
            low, high = ([getattr(one, end) for one in estimates] for end in ("low", "high"))
            ax.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)
        width = 3.4 if place == 0 and len(curves) > 1 else 1.7
        y = [_value(one) for one in estimates]
        ax.plot(x, y, color=color, linewidth=width, marker="o" if len(x) < 3 else None)
    ax.set_xlabel(xlabel)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    if log:
        log_ticks(ax)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))


def condensation_heatmap(profiles: Profiles, names: Sequence[str]) -> Plot | None:
    """How the cosines of token pairs are spread in each layer, and what changed between two models."""
    shares = {
        name: histogram(one) for name, one in profiles.items() if any(row.histogram for row in one.layers)
    }
    if not shares:
        return None
    top = max(float(one.max()) for one in shares.values())
    floor = min(_lowest_cosine(one) for one in shares.values())
    panels = [
        Panel(
            name,
            _draw_heat(
                one, [_value(row.figures.get("cosine_raw")) for row in profiles[name].layers], top, floor
            ),
        )
        for name, one in shares.items()
    ]
    caption = (
        "Each column is a layer (0 is the embedding); the stronger the colour, the more token pairs of a "
        "sequence have that cosine. The line is the mean. Condensation: the mass moves up, towards 1. Full "
        f"strength is {percent(top, 0)} of a layer's pairs, the same in all panels."
    )
    pair = (BASELINE, DISPERSED) if {BASELINE, DISPERSED} <= set(shares) else tuple(shares)
    if len(pair) == 2 and shares[pair[0]].shape == shares[pair[1]].shape:
        first, second = pair
        change = shares[second] - shares[first]
        colors = arm_color(first, names), arm_color(second, names)
        title = f"{second} - {first} (full: {percent(float(np.abs(change).max()), 1)})"
        panels.append(Panel(title, _draw_heat_change(change, colors, floor)))
        caption += f" The last panel subtracts: where {second} or {first} has more pairs, in its colour."
    title = "Cosine similarity of token pairs, by layer"
    return Plot("condensation_heatmap", title, caption, tuple(panels))


def histogram(profile: Condensation) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Shares of token pairs, float64 [bins, layers], cosine -1 to 1 upwards; 0 where there are no pairs."""
    bins = max(len(row.histogram) for row in profile.layers)
    counts = np.array([row.histogram or (0,) * bins for row in profile.layers], dtype=np.float64)
    total = counts.sum(axis=1, keepdims=True)
    return np.divide(counts, total, out=np.zeros_like(counts), where=total > 0).T


def _lowest_cosine(shares: Any) -> float:
    """Where the picture begins: the lower edge of the first bin with 0.1 % of a layer's pairs, at most 0."""
    full = np.flatnonzero((shares > 1e-3).any(axis=1))
    return min(0.0, float(-1 + 2 * full[0] / shares.shape[0])) if full.size else -1.0


def _value(estimate: Estimate | None) -> float:
    return float("nan") if estimate is None or estimate.value is None else estimate.value


def _shade(strength: Any, color: str) -> Any:
    """RGBA [bins, layers, 4]: one colour, opacity = strength in [0, 1]."""
    image = np.empty((*strength.shape, 4))
    image[..., :3] = to_rgb(color)
    image[..., 3] = np.clip(strength, 0.0, 1.0)
    return image


def _show(ax: Axes, image: Any, floor: float) -> None:
    extent = (-0.5, image.shape[1] - 0.5, -1.0, 1.0)
    ax.imshow(image, extent=extent, origin="lower", aspect="auto", interpolation="none", zorder=0.5)
    ax.grid(False)
    ax.set_xlabel("layer")
    ax.set_ylabel("cosine similarity")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.set_ylim(floor, 1.0)


def _draw_heat(shares: Any, means: Sequence[float], top: float, floor: float) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        _show(ax, _shade((shares / top) ** 0.6, HEAT), floor)
        ax.plot(means, color=INK, linewidth=1.4)

    return draw


def _draw_heat_change(change: Any, colors: tuple[str, str], floor: float) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        top = float(np.abs(change).max())
        image = _shade((np.abs(change) / top if top else np.zeros_like(change)) ** 0.7, colors[1])
        image[change < 0, :3] = to_rgb(colors[0])
        _show(ax, image, floor)

    return draw


def condensation_layers(profiles: Profiles, names: Sequence[str]) -> Plot | None:
    """Mean pairwise cosine by layer, three ways, and over how many directions the vectors spread."""
    figures = {
        "cosine_raw": "mean cosine, raw",
        "cosine_sink_excluded": "mean cosine, sinks left out",
        "cosine_mean_removed": "mean cosine, mean vector removed",
        "effective_rank": "effective rank",
        "maximum_explainable_variance": "maximum explainable variance",
    }
    caption = (
        "Raw cosine counts the attention sinks (the first token, and any whose norm is over ten times the "
        "median); leaving them out, or removing the mean vector too, shows what the other tokens do. "
        "Effective rank, without sinks: in how many directions the token vectors spread; higher is less "
        "condensed. Maximum explainable variance, without sinks: the share of their squared lengths along "
        "one "
        "direction; lower is less condensed. Shaded: 95 % intervals over sequences."
    )
    panels = _layer_panels(profiles, names, figures)
    changes = {
        name: one.change for name, one in profiles.items() if one.change is not None and one.change.layers
    }
    if changes:
        panels.append(Panel("raw: change from the first model, paired", _draw_change(changes, names)))
    title = "Condensation by layer"
    return Plot("condensation_layers", title, caption, tuple(panels), tuple(profiles)) if panels else None


def condensation_outliers(profiles: Profiles, names: Sequence[str]) -> Plot | None:
    """How far single values stand out, by layer."""
    figures = {
        "kurtosis": "kurtosis over features",
        "max_over_median": "largest / median value",
        "max_over_median_sink_excluded": "largest / median value, no sinks",
    }
    caption = (
        "Outliers are what few-bit activations suffer from. Kurtosis of each token's values, no sinks: 3 for "
        "normally distributed values, more where some features are always large. Largest / median: of the "
        "absolute values of all tokens and features of a layer. Shaded: 95 % intervals over sequences."
    )
    panels = _layer_panels(profiles, names, figures, log=True)
    arms = tuple(profiles)
    return (
        Plot("condensation_outliers", "Outliers by layer", caption, tuple(panels), arms) if panels else None
    )


def _layer_panels(
    profiles: Profiles, names: Sequence[str], figures: Mapping[str, str], log: bool = False
) -> list[Panel]:
    def draw_of(curves: Curves) -> Callable[[Axes], None]:
        return lambda ax: draw_lines(ax, curves, names, "layer", log)

    panels = []
    for key, title in figures.items():
        curves = {name: layer_curve(one, key) for name, one in profiles.items()}
        curves = {name: curve for name, curve in curves.items() if curve[0]}
        if curves:
            panels.append(Panel(title, draw_of(curves)))
    return panels


def layer_curve(profile: Condensation, key: str) -> tuple[list[float], list[Estimate]]:
    """Layers and a figure of theirs, where it was measured."""
    rows = [(place, row.figures.get(key)) for place, row in enumerate(profile.layers)]
    known = [(place, one) for place, one in rows if one is not None and one.value is not None]
    return [float(place) for place, _ in known], [one for _, one in known]


def condensation_precisions(run: Run, shown_arms: int = 2) -> Plot | None:
    """Mean cosine by layer of the first arms' bundles, then what each quantized precision changes."""
    bundles = {
        arm: {name: one for name in run.precisions if (one := run.measured(arm, name).condensation)}
        for arm in run.arms
    }
    arms = [arm for arm, by_precision in bundles.items() if len(by_precision) > 1]
    panels = [
        Panel(f"mean cosine, {arm}", _draw_precisions(bundles[arm], arm, arms)) for arm in arms[:shown_arms]
    ]
    # The fp32 bundle is the torch model; its change is rounding.
    for precision in (name for name in run.precisions if name not in ("torch", "fp32")):
        measured = {arm: bundles[arm][precision].change for arm in arms if precision in bundles[arm]}
        changes = {arm: one for arm, one in measured.items() if one is not None}
        if changes:
            title = f"change of mean cosine, {label(precision)} - torch"
            panels.append(Panel(title, _draw_change(changes, arms)))
    caption = (
        "Mean cosine of token pairs in the torch model of an arm and in its bundles, measured in the graph "
        "that "
        "ships; then what a precision changes against the torch model of the same arm, over the same "
        "sequences. "
        "Shaded: 95 % intervals."
    )
    name, title = "condensation_precisions", "Condensation of what ships"
    return Plot(name, title, caption, tuple(panels), tuple(arms)) if panels else None


def _draw_precisions(profiles: Profiles, arm: str, arms: Sequence[str]) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        for place, (precision, one) in enumerate(profiles.items()):
            x, y = layer_curve(one, "cosine_raw")
            dash = ("-", "--", "-.", ":")[place % 4]
            style: dict[str, Any] = {
                "color": arm_color(arm, arms) if place else INK,
                "linewidth": 1.5 if place else 2.6,
            }
            ax.plot(x, [_value(value) for value in y], dash, label=label(precision), **style)
        ax.legend(fontsize=8.5, loc="lower right")
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))

    return draw


def _draw_change(changes: Profiles, arms: Sequence[str]) -> Callable[[Axes], None]:
    """Differences of the mean cosine around a line at 0, shaded intervals."""

    def draw(ax: Axes) -> None:
        ax.axhline(0.0, color=RULE, linewidth=1.2)
        draw_lines(ax, {arm: layer_curve(one, "cosine_raw") for arm, one in changes.items()}, arms, "layer")

    return draw
