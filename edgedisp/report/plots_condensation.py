"""Condensation by layer: the paper's heatmap, curves of arms, outliers, and what quantization changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from edgedisp.core.results import BASELINE, DISPERSED, Condensation, Estimate
from edgedisp.core.run import Run
from edgedisp.report.figure import HEAT, INK, RULE, Panel, Plot, arm_color, draw_lines, number
from edgedisp.report.formatting import label, percent

Profiles = Mapping[str, Condensation]
"""Model -> its profile."""


def condensation_heatmap(profiles: Profiles, names: Sequence[str]) -> Plot:
    """How the cosines of token pairs are spread in each layer, and what changed between two models."""
    shares = {
        name: histogram(one) for name, one in profiles.items() if any(row.histogram for row in one.layers)
    }
    top = max((float(one.max()) for one in shares.values()), default=1.0)
    floor = min((_lowest_cosine(one) for one in shares.values()), default=-1.0)
    panels = []
    for name, one in shares.items():
        means = [number(row.figures.get("cosine_raw")) for row in profiles[name].layers]
        panels.append(Panel(name, partial(_draw_heat, (one / top) ** 0.6, means, floor)))
    pair = (BASELINE, DISPERSED) if {BASELINE, DISPERSED} <= set(shares) else tuple(shares)
    if len(pair) == 2 and shares[pair[0]].shape == shares[pair[1]].shape:
        first, second = pair
        change = shares[second] - shares[first]
        colors = arm_color(first, names), arm_color(second, names)
        title = f"{second} - {first} (full: {percent(float(np.abs(change).max()), 1)})"
        panels.append(Panel(title, partial(_draw_heat_change, change, colors, floor)))
    return Plot("condensation_heatmap", tuple(panels))


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


def _show(ax: Axes, strength: Any, colors: Any, floor: float) -> None:
    """strength: opacity in [0, 1], [bins, layers]; colors: RGB, broadcast to [bins, layers, 3]."""
    image = np.empty((*strength.shape, 4))
    image[..., :3], image[..., 3] = colors, np.clip(strength, 0.0, 1.0)
    extent = (-0.5, image.shape[1] - 0.5, -1.0, 1.0)
    ax.imshow(image, extent=extent, origin="lower", aspect="auto", interpolation="none", zorder=0.5)
    ax.grid(False)
    ax.set_xlabel("layer")
    ax.set_ylabel("cosine similarity")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.set_ylim(floor, 1.0)


def _draw_heat(strength: Any, means: Sequence[float], floor: float, ax: Axes) -> None:
    _show(ax, strength, to_rgb(HEAT), floor)
    ax.plot(means, color=INK, linewidth=1.4)


def _draw_heat_change(change: Any, colors: tuple[str, str], floor: float, ax: Axes) -> None:
    top = float(np.abs(change).max()) or 1.0
    by_sign = np.where(change[..., None] < 0, to_rgb(colors[0]), to_rgb(colors[1]))
    _show(ax, (np.abs(change) / top) ** 0.7, by_sign, floor)


def condensation_layers(profiles: Profiles, names: Sequence[str]) -> Plot:
    """Mean pairwise cosine by layer, three ways, and over how many directions the vectors spread."""
    figures = {
        "cosine_raw": "mean cosine, raw",
        "cosine_sink_excluded": "mean cosine, sinks left out",
        "cosine_mean_removed": "mean cosine, mean vector removed",
        "effective_rank": "effective rank",
        "maximum_explainable_variance": "maximum explainable variance",
    }
    panels = _layer_panels(profiles, names, figures)
    changes = {name: one.change for name, one in profiles.items() if one.change and one.change.layers}
    if changes:
        panels.append(
            Panel("raw: change from the first model, paired", partial(_draw_change, changes, names))
        )
    return Plot("condensation_layers", tuple(panels), tuple(profiles))


def condensation_outliers(profiles: Profiles, names: Sequence[str]) -> Plot:
    """How far single values stand out, by layer."""
    figures = {
        "kurtosis": "kurtosis over features",
        "max_over_median": "largest / median value",
        "max_over_median_sink_excluded": "largest / median value, no sinks",
    }
    panels = _layer_panels(profiles, names, figures, log=True)
    return Plot("condensation_outliers", tuple(panels), tuple(profiles))


def _layer_panels(
    profiles: Profiles, names: Sequence[str], figures: Mapping[str, str], log: bool = False
) -> list[Panel]:
    panels = []
    for key, title in figures.items():
        curves = {name: layer_curve(one, key) for name, one in profiles.items()}
        curves = {name: curve for name, curve in curves.items() if curve[0]}
        if curves:
            panels.append(Panel(title, partial(draw_lines, curves, names, "layer", log=log)))
    return panels


def layer_curve(profile: Condensation, key: str) -> tuple[list[float], list[Estimate]]:
    """Layers and a figure of theirs, where it was measured."""
    rows = [(float(place), row.figures.get(key)) for place, row in enumerate(profile.layers)]
    known = [(place, one) for place, one in rows if one is not None and one.value is not None]
    return [place for place, _ in known], [one for _, one in known]


def condensation_precisions(run: Run, shown_arms: int = 2) -> Plot:
    """Mean cosine by layer of the first arms' bundles, then what each quantized precision changes."""
    bundles = {
        arm: {name: one for name in run.precisions if (one := run.measured(arm, name).condensation)}
        for arm in run.arms
    }
    arms = [arm for arm, by_precision in bundles.items() if len(by_precision) > 1]
    panels = [
        Panel(f"mean cosine, {arm}", partial(_draw_precisions, bundles[arm], arm_color(arm, arms)))
        for arm in arms[:shown_arms]
    ]
    # The fp32 bundle is the torch model; its change is rounding.
    for precision in (name for name in run.precisions if name not in ("torch", "fp32")):
        measured = {arm: bundles[arm][precision].change for arm in arms if precision in bundles[arm]}
        changes = {arm: one for arm, one in measured.items() if one is not None}
        if changes:
            title = f"change of mean cosine, {label(precision)} - torch"
            panels.append(Panel(title, partial(_draw_change, changes, arms)))
    return Plot("condensation_precisions", tuple(panels), tuple(arms))


def _draw_precisions(profiles: Profiles, color_of: str, ax: Axes) -> None:
    for place, (precision, one) in enumerate(profiles.items()):
        x, y = layer_curve(one, "cosine_raw")
        dash, width = ("-", "--", "-.", ":")[place % 4], 1.5 if place else 2.6
        values, color = [number(value) for value in y], color_of if place else INK
        ax.plot(x, values, dash, color=color, linewidth=width, label=label(precision))
    ax.legend(fontsize=8.5, loc="best")
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def _draw_change(changes: Profiles, arms: Sequence[str], ax: Axes) -> None:
    """Differences of the mean cosine around a line at 0, shaded intervals."""
    ax.axhline(0.0, color=RULE, linewidth=1.2)
    draw_lines({arm: layer_curve(one, "cosine_raw") for arm, one in changes.items()}, arms, "layer", ax)
