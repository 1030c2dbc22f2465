"""The plots of a report: one function a figure, without panels where the run has nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from edgedisp.core.results import BASELINE, DISPERSED, Condensation, Estimate
from edgedisp.core.run import Run
from edgedisp.report.comparisons import BETTER, WORSE
from edgedisp.report.figure import (
    HEAT,
    INK,
    MUTED,
    Curve,
    Panel,
    Plot,
    Points,
    arm_color,
    arm_marker,
    draw_point,
    heat_panel,
    histogram,
    line_panel,
    lowest_cosine,
    numbers,
    scatter_panel,
)
from edgedisp.report.formatting import label, small
from edgedisp.report.layout import TEXTS
from edgedisp.report.results_table import Cell, Metric, Table, table
from edgedisp.report.run_sections import searches

OUTCOME_COLORS = {BETTER: "#1d6f5c", WORSE: "#9c3d1c"}
Profiles = Mapping[str, Condensation]
"""Model -> its profile."""


def plots(run: Run) -> dict[str, Plot]:
    """Every plot that the run has data for, by name."""
    whole = table(run, all_arms=True)
    profiles = {arm: profile for arm in run.arms if (profile := run.measured(arm, "torch").condensation)}
    figures = [
        *condensation_plots(profiles, run.arms),
        condensation_precisions(run),
        training(run),
        survival(run),
        scores(whole),
        differences(whole),
        tradeoff(whole),
        pareto(run),
    ]
    return {plot.name: plot for plot in figures if plot.panels}


# Condensation


def condensation_plots(profiles: Profiles, names: Sequence[str]) -> list[Plot]:
    """Heatmap, layer curves and outliers of one model or more; names: of all arms, for their colours."""
    plots = [condensation_heatmap(profiles, names)]
    for key, scale in {"condensation_layers": "linear", "condensation_outliers": "log"}.items():
        panels = []
        for figure, title in TEXTS["panels"][key].items():
            panels += _layer_panel(title, profiles, figure, names, scale)
        plots.append(Plot(key, panels, list(profiles)))
    changes = {name: profile.change for name, profile in profiles.items() if profile.change}
    plots[1].panels.extend(
        _layer_panel("raw: change from the first model, paired", changes, "cosine_raw", names, "change")
    )
    return plots


def _layer_panel(
    title: str, profiles: Profiles, figure: str, names: Sequence[str], scale: str = "linear"
) -> list[Panel]:
    """A figure by layer, a curve a model; none where no model has it."""
    curves = [_layer_curve(profile, figure, arm_color(name, names)) for name, profile in profiles.items()]
    curves = [curve for curve in curves if curve.x]
    return [line_panel(title, curves, "layer", scale)] if curves else []


def _layer_curve(profile: Condensation, figure: str, color: str, **style: Any) -> Curve:
    rows = [(float(layer), row.figures.get(figure)) for layer, row in enumerate(profile.layers)]
    points = [(layer, estimate) for layer, estimate in rows if estimate and estimate.value is not None]
    return Curve([layer for layer, _ in points], [estimate for _, estimate in points], color, **style)


def condensation_precisions(run: Run) -> Plot:
    """Mean cosine by layer of the first two arms' bundles, then what each quantized precision changes."""
    bundles: dict[str, dict[str, Condensation]] = {}
    for arm in run.arms:
        profiles = {name: run.measured(arm, name).condensation for name in run.precisions}
        bundles[arm] = {name: profile for name, profile in profiles.items() if profile}
    arms = [arm for arm, by_precision in bundles.items() if len(by_precision) > 1]
    panels = []
    for arm in arms[:2]:
        curves = []
        for index, (precision, profile) in enumerate(bundles[arm].items()):
            color, width = (arm_color(arm, arms), 1.5) if index else (INK, 2.6)
            style = {"dash": ("-", "--", "-.", ":")[index % 4], "width": width, "label": label(precision)}
            curves.append(_layer_curve(profile, "cosine_raw", color, **style))
        panels.append(line_panel(f"mean cosine, {arm}", curves, "layer"))
    # The fp32 bundle is the torch model; its change is rounding.
    for precision in (name for name in run.precisions if name not in ("torch", "fp32")):
        changes = {arm: bundles[arm][precision].change for arm in arms if precision in bundles[arm]}
        title = f"change of mean cosine, {label(precision)} - torch"
        present = {arm: change for arm, change in changes.items() if change}
        panels += _layer_panel(title, present, "cosine_raw", arms, "change")
    return Plot("condensation_precisions", panels, arms)


def condensation_heatmap(profiles: Profiles, names: Sequence[str]) -> Plot:
    """How the cosines of token pairs are spread in each layer, and what changed between two models."""
    shares = {
        name: histogram(profile)
        for name, profile in profiles.items()
        if any(row.histogram for row in profile.layers)
    }
    top = max((float(share.max()) for share in shares.values()), default=1.0)
    floor = min((lowest_cosine(share) for share in shares.values()), default=-1.0)
    panels = []
    for name, share in shares.items():
        means = numbers([row.figures.get("cosine_raw") for row in profiles[name].layers])
        panels.append(heat_panel(name, (share / top) ** 0.6, to_rgb(HEAT), floor, means))
    pair = (BASELINE, DISPERSED) if {BASELINE, DISPERSED} <= set(shares) else tuple(shares)
    if len(pair) == 2 and shares[pair[0]].shape == shares[pair[1]].shape:
        first, second = pair
        change = shares[second] - shares[first]
        most = float(np.abs(change).max())
        colors = [to_rgb(arm_color(name, names)) for name in pair]
        by_sign = np.where(change[..., None] < 0, *colors)
        strength = (np.abs(change) / (most or 1.0)) ** 0.7
        title = f"{second} - {first} (full: {small(100 * most)} %)"
        panels.append(heat_panel(title, strength, by_sign, floor))
    return Plot("condensation_heatmap", panels)


# Training and what is left of it


def training(run: Run) -> Plot:
    """Cross-entropy and the dispersion term over steps: thin as logged, thick the running mean."""
    panels = []
    for key, title in {"loss": "cross-entropy, nats per token", "dispersion": "dispersion loss"}.items():
        thin, thick = [], []
        for arm, trained in run.training.items():
            rows = [row for row in trained.log if row.get(key) is not None]
            x, y = [float(row["step"]) for row in rows], [float(row[key]) for row in rows]
            color, window = arm_color(arm, run.arms), max(1, len(y) // 15)
            if window > 1:
                thin.append(Curve(x, list(map(Estimate, y)), color, width=0.8, alpha=0.35))
            if rows:
                thick.append(Curve(x, list(map(Estimate, running_mean(y, window))), color))
        if thick:
            panels.append(line_panel(title, [*thin, *thick], "step"))
    return Plot("training", panels, run.arms)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over up to `window` values (fewer at both ends)."""
    half = window // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def survival(run: Run) -> Plot:
    """By layer: integers that moved, and changes over half a step, against the base and the baseline."""
    panels = []
    for precision, reference in ((name, model) for name in run.precisions for model in ("base", "baseline")):
        curves: list[Curve] = []
        for arm in run.arms:
            record = run.delta_survival.get(arm, {}).get(precision) or {"references": {}}
            rows = record["references"].get(reference, {}).get("layers") or []
            color, width = arm_color(arm, run.arms), 1.6 if curves else 3.0
            for key, dash in (("integers_moved", "-"), ("beyond_half_step", "--")) if rows else ():
                y = [Estimate(row[key]) for row in rows]
                curves.append(Curve([row["layer"] for row in rows], y, color, dash, width))
        if curves:
            panels.append(
                line_panel(f"{label(precision)}, against the {reference}", curves, "layer", "share")
            )
    return Plot("survival", panels, run.arms)


# Scores


def scores(whole: Table) -> Plot:
    """Every metric by precision, one point an arm, with its interval."""
    metrics = [metric for metric in whole.metrics if metric.kind != "cost"]
    panels = [_points_panel(metric.heading, whole, metric, whole.arms) for metric in metrics]
    return Plot("scores", panels, whole.arms)


def differences(whole: Table) -> Plot:
    """Every arm's paired differences to the baseline by precision, with the zero line."""
    arms, panels = [arm for arm in whole.arms if arm != BASELINE], []
    for metric in whole.metrics:
        cells = [row.difference(metric, arm) for arm in arms for row in whole.rows]
        if any(cell and cell.estimate.has_interval for cell in cells):
            unit = ", points" if metric.unit == "%" else f", {metric.unit}" if metric.unit else ""
            title = f"{metric.title}{unit} ({'up' if metric.higher_is_better else 'down'} is better)"
            panels.append(_points_panel(title, whole, metric, arms, is_paired=True))
    return Plot("differences", panels, arms if len(arms) > 1 else ())


def _points_panel(
    title: str, whole: Table, metric: Metric, arms: Sequence[str], is_paired: bool = False
) -> Panel:
    """Precisions across, arms side by side at each; of differences those that count are filled."""

    def draw(ax: Axes) -> None:
        for index, arm in enumerate(arms):
            shift = (index - (len(arms) - 1) / 2) * min(0.22, 0.8 / len(arms))
            for position, row in enumerate(whole.rows):
                color, estimate, is_filled = arm_color(arm, whole.arms), row.value(metric, arm), True
                if is_paired:
                    cell = row.difference(metric, arm) or Cell(Estimate(None))
                    estimate, is_filled = cell.estimate, cell.outcome in OUTCOME_COLORS
                    color = color if len(arms) > 1 else OUTCOME_COLORS.get(cell.outcome, INK)
                if estimate and estimate.value is not None:
                    style = {"color": color, "marker": arm_marker(arm, whole.arms)}
                    style["markerfacecolor"] = color if is_filled else "white"
                    draw_point(ax, position + shift, estimate, metric.scale, style)
        if is_paired:
            ax.axhline(0, color=MUTED, linewidth=1)
        ax.set_xticks(range(len(whole.rows)), [row.label for row in whole.rows])
        ax.set_xlim(-0.5, len(whole.rows) - 0.5)
        ax.grid(False, axis="x")
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))

    return Panel(title, draw)


# Quality against cost


def tradeoff(whole: Table) -> Plot:
    """Perplexity against size and against decode speed; one line an arm through its precisions."""
    loss = next((metric for metric in whole.metrics if metric.kind == "loss"), None)
    panels = []
    for metric in whole.metrics:
        if loss is None or metric.key not in ("size_bytes", "decode_tokens_per_s"):
            continue
        series: list[Points] = []
        for arm in whole.arms:
            triples = [(row.label, row.value(metric, arm), row.value(loss, arm)) for row in whole.rows]
            present = [(name, x.value, y) for name, x, y in triples if x and x.value is not None and y]
            x, y = [Estimate(value * metric.scale) for _, value, _ in present], [y for *_, y in present]
            if present:  # the first arm's points are large and labelled
                size, labels = (5, []) if series else (9, [name for name, *_ in present])
                color, marker = arm_color(arm, whole.arms), arm_marker(arm, whole.arms)
                series.append(Points(x, y, color, marker, size, 1.2, labels))
        if any(len(points.x) > 1 for points in series):
            cost = f"{metric.title}, {metric.unit}"
            panels.append(scatter_panel(f"{loss.title} against {cost}", series, (cost, loss.title)))
    return Plot("tradeoff", panels, whole.arms)


def pareto(run: Run) -> Plot:
    """A search for bits by weight: file size against KL divergence, predicted, and measured where it was."""
    panels = []
    for arm, search in searches(run).items():
        if "decided_by" in search:
            continue
        rows = [row for row in search.get("curve", []) if row.get("predicted_kl")]
        x = [Estimate(row["size_bytes"] / 1e6) for row in rows]
        y = [Estimate(row["predicted_kl"]) for row in rows]
        series = [Points(x, y, arm_color(arm, run.arms), "", line=1.2)]
        for row in search.get("points", []):
            is_chosen = row["name"] == "chosen"
            color, marker = (arm_color(arm, run.arms), "o") if is_chosen else (MUTED, "x")
            x, y = (
                [Estimate(row["size_bytes"] / 1e6)],
                [Estimate(row.get("measured_kl") or row["predicted_kl"])],
            )
            series.append(Points(x, y, color, marker, labels=[row["name"]]))
        panels.append(scatter_panel(arm, series, ("size, MB", "KL, nats per token"), log=True))
    return Plot("pareto", panels)


def pilot_plot(candidates: Mapping[str, tuple[Estimate, Estimate]], floors: tuple[float, float]) -> Plot:
    """The candidates of a pilot: name -> differences of (cosine, loss) to the baseline.

    floors: sizes of (cosine, loss) that count; smaller ones lie in a dashed box.
    """
    names = [*candidates]
    series = [
        Points([x], [y], arm_color(name, names), arm_marker(name, names), 7)
        for name, (x, y) in candidates.items()
    ]
    axes = "mean cosine, difference", "held-out loss, difference (nats)"
    return Plot("pilot", [scatter_panel("", series, axes, box=floors)], names)
