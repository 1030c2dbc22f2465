"""The plots of a report: one function a figure; None where the run has nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from edgedisp.core.results import BASELINE, Estimate, Json
from edgedisp.core.run import Run
from edgedisp.report.comparisons import BETTER, WORSE
from edgedisp.report.figure import (
    INK,
    MUTED,
    Panel,
    Plot,
    arm_color,
    arm_marker,
    draw_lines,
    log_ticks,
    number,
)
from edgedisp.report.formatting import label
from edgedisp.report.plots_condensation import (
    condensation_heatmap,
    condensation_layers,
    condensation_outliers,
    condensation_precisions,
)
from edgedisp.report.results_table import Metric, Row, Table, table
from edgedisp.report.weight_sections import searches

OUTCOME_COLORS = {BETTER: "#1d6f5c", WORSE: "#9c3d1c"}
NEAR: dict[str, Any] = {"xytext": (6, 5), "textcoords": "offset points"}


def plots(run: Run) -> dict[str, Plot]:
    """Every plot that the run has data for, by name."""
    whole = table(run, all_arms=True)
    profiles = {arm: one for arm in run.arms if (one := run.measured(arm, "torch").condensation)}
    drawn = [
        condensation_heatmap(profiles, run.arms),
        condensation_layers(profiles, run.arms),
        condensation_outliers(profiles, run.arms),
        condensation_precisions(run),
        training(run),
        survival(run),
        scores(whole),
        differences(whole),
        tradeoff(whole),
        pareto(run),
    ]
    return {plot.name: plot for plot in drawn if plot.panels}


def training(run: Run) -> Plot:
    """Cross-entropy and the dispersion term over steps."""
    panels = []
    for key, title in {"loss": "cross-entropy, nats per token", "dispersion": "dispersion loss"}.items():
        curves = {}
        for arm, one in run.training.items():
            if rows := [row for row in one.log if row.get(key) is not None]:
                curves[arm] = ([float(row["step"]) for row in rows], [float(row[key]) for row in rows])
        if curves:
            panels.append(Panel(title, partial(_draw_curves, curves, run.arms)))
    return Plot("training", tuple(panels), tuple(run.arms))


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over up to `window` values (fewer at the ends)."""
    half = window // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def _draw_curves(
    curves: Mapping[str, tuple[list[float], list[float]]], arms: Sequence[str], ax: Axes
) -> None:
    smooth = {}
    for arm, (x, y) in curves.items():
        window = max(1, len(y) // 15)
        if window > 1:
            ax.plot(x, y, color=arm_color(arm, arms), linewidth=0.8, alpha=0.35)
        smooth[arm] = (x, [Estimate(value) for value in running_mean(y, window)])
    draw_lines(smooth, arms, "step", ax)


def survival(run: Run) -> Plot:
    """By layer: integers that moved, and changes over half a step, against the base and the baseline."""
    panels = []
    for precision in run.precisions:
        for reference in ("base", "baseline"):
            records = {arm: run.delta_survival.get(arm, {}).get(precision) for arm in run.arms}
            against = {arm: one["references"].get(reference, {}) for arm, one in records.items() if one}
            layers = {arm: one["layers"] for arm, one in against.items() if one.get("layers")}
            if layers:
                title = f"{label(precision)}, against the {reference}"
                panels.append(Panel(title, partial(_draw_survival, layers, run.arms)))
    return Plot("survival", tuple(panels), tuple(run.arms))


def _draw_survival(layers: Mapping[str, Sequence[Json]], arms: Sequence[str], ax: Axes) -> None:
    for place, (arm, rows) in enumerate(layers.items()):
        for key, dash in (("integers_moved", "-"), ("beyond_half_step", "--")):
            x, y = [row["layer"] for row in rows], [row[key] for row in rows]
            ax.plot(x, y, dash, color=arm_color(arm, arms), linewidth=1.6 if place else 3.0)
    ax.set_ylim(bottom=0.0)
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))


# Scores


def scores(whole: Table) -> Plot:
    """Every metric by precision, one point an arm, with its interval."""
    metrics = [metric for metric in whole.metrics if metric.kind != "cost"]
    panels = [Panel(metric.heading, partial(_draw_scores, whole, metric)) for metric in metrics]
    return Plot("scores", tuple(panels), whole.arms)


def differences(whole: Table) -> Plot:
    """Every arm's paired differences to the baseline by precision, with the zero line."""
    panels = []
    for metric in whole.metrics:
        cells = [row.difference(metric, arm) for arm in whole.arms for row in whole.rows]
        if any(cell and cell.estimate.has_interval for cell in cells):
            unit = ", points" if metric.unit == "%" else f", {metric.unit}" if metric.unit else ""
            title = f"{metric.title}{unit} ({'up' if metric.higher_is_better else 'down'} is better)"
            panels.append(Panel(title, partial(_draw_differences, whole, metric)))
    arms = tuple(arm for arm in whole.arms if arm != BASELINE)
    return Plot("differences", tuple(panels), arms if len(arms) > 1 else ())


def _draw_scores(whole: Table, metric: Metric, ax: Axes) -> None:
    for index, arm in enumerate(whole.arms):
        for x, row in _places(index, len(whole.arms), whole.rows):
            if (estimate := row.value(metric, arm)) is not None:
                style = (arm_color(arm, whole.arms), arm_marker(arm, whole.arms), True)
                _draw_point(ax, x, estimate, metric.scale, style)
    _precision_axis(whole, ax)


def _draw_differences(whole: Table, metric: Metric, ax: Axes) -> None:
    arms = [arm for arm in whole.arms if arm != BASELINE]
    for index, arm in enumerate(arms):
        for x, row in _places(index, len(arms), whole.rows):
            if (cell := row.difference(metric, arm)) is not None:
                by_outcome = OUTCOME_COLORS.get(cell.outcome, INK)
                color = by_outcome if len(arms) == 1 else arm_color(arm, whole.arms)
                style = (color, arm_marker(arm, whole.arms), cell.outcome in OUTCOME_COLORS)
                _draw_point(ax, x, cell.estimate, metric.scale, style)
    ax.axhline(0, color=MUTED, linewidth=1)
    _precision_axis(whole, ax)


def _places(index: int, arms: int, rows: Sequence[Row]) -> list[tuple[float, Row]]:
    """x of the index-th arm at each precision: arms stand side by side."""
    shift = (index - (arms - 1) / 2) * min(0.22, 0.8 / max(1, arms))
    return [(place + shift, row) for place, row in enumerate(rows)]


def _precision_axis(whole: Table, ax: Axes) -> None:
    ax.set_xticks(range(len(whole.rows)), [row.label for row in whole.rows])
    ax.set_xlim(-0.5, len(whole.rows) - 0.5)
    ax.grid(False, axis="x")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _draw_point(ax: Axes, x: float, estimate: Estimate, scale: float, style: tuple[str, str, bool]) -> None:
    """A point with its interval; of several seeds also the interval over items and the single seeds."""
    (color, marker, is_filled), seeds = style, estimate.seeds
    if estimate.value is None:
        return
    if estimate.low is not None and estimate.high is not None:
        limits = [estimate.low * scale, estimate.high * scale]
        ax.plot([x, x], limits, color=color, linewidth=0.9 if seeds else 1.8)
    if seeds is not None:
        if seeds.item_low is not None and seeds.item_high is not None:
            ax.plot([x, x], [seeds.item_low * scale, seeds.item_high * scale], color=color, linewidth=3)
        dots = [value * scale for value in seeds.values]
        ax.plot([x + 0.06] * len(dots), dots, color=color, marker=".", markersize=4, linestyle="none")
    face = color if is_filled else "white"
    ax.plot([x], [estimate.value * scale], color=color, marker=marker, markersize=6, markerfacecolor=face)


# Quality against cost

Points = Mapping[str, Sequence[tuple[str, float, Estimate]]]
"""Arm -> (precision, cost, perplexity)."""


def tradeoff(whole: Table) -> Plot:
    """Perplexity against size and against decode speed; one line an arm through its precisions."""
    loss = next((metric for metric in whole.metrics if metric.kind == "loss"), None)
    panels = []
    for metric in whole.metrics:
        if loss is None or metric.key not in ("size_bytes", "decode_tokens_per_s"):
            continue
        points: dict[str, list[tuple[str, float, Estimate]]] = {}
        for arm in whole.arms:
            for row in whole.rows:
                cost, value = row.value(metric, arm), row.value(loss, arm)
                if cost and cost.value is not None and value and value.value is not None:
                    points.setdefault(arm, []).append((row.label, cost.value * metric.scale, value))
        if any(len(row) > 1 for row in points.values()):
            labels = f"{metric.title}, {metric.unit}", loss.title
            draw = partial(_draw_tradeoff, points, whole.arms, labels)
            panels.append(Panel(f"{loss.title} against {labels[0]}", draw))
    return Plot("tradeoff", tuple(panels), whole.arms)


def _draw_tradeoff(points: Points, arms: Sequence[str], labels: tuple[str, str], ax: Axes) -> None:
    for index, (arm, rows) in enumerate(points.items()):
        color, marker = arm_color(arm, arms), arm_marker(arm, arms)
        xs, ys = [x for _, x, _ in rows], [one.value or 0.0 for *_, one in rows]
        ax.plot(xs, ys, color=color, linewidth=1.2, marker=marker, markersize=5 if index else 9)
        for name, x, one in rows:
            if one.low is not None and one.high is not None:
                ax.plot([x, x], [one.low, one.high], color=color, linewidth=1.2, alpha=0.5)
            if index == 0:
                ax.annotate(name, (x, one.value or 0.0), color=MUTED, **NEAR)
    ax.set_xlabel(labels[0])
    ax.set_ylabel(labels[1])
    ax.margins(x=0.24, y=0.1)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5))


def pareto(run: Run) -> Plot:
    """A search for bits by weight: file size against KL divergence, predicted and measured."""
    own = {arm: search for arm, search in searches(run).items() if "decided_by" not in search}
    panels = [Panel(arm, partial(_draw_pareto, one, arm_color(arm, run.arms))) for arm, one in own.items()]
    return Plot("pareto", tuple(panels))


def _draw_pareto(search: Json, color: str, ax: Axes) -> None:
    curve = [row for row in search.get("curve", []) if row.get("predicted_kl")]
    xs = [row["size_bytes"] / 1e6 for row in curve]
    ax.plot(xs, [row["predicted_kl"] for row in curve], color=color, linewidth=1.2, alpha=0.6)
    for row in (row for row in search.get("points", []) if row.get("measured_kl")):
        x, y, is_chosen = row["size_bytes"] / 1e6, row["measured_kl"], row["name"] == "chosen"
        ax.plot([x], [y], color=color if is_chosen else MUTED, marker="o" if is_chosen else "x")
        place: dict[str, Any] = NEAR | ({"xytext": (-8, -9), "ha": "right"} if is_chosen else {})
        ax.annotate(row["name"], (x, y), color=MUTED, **place)
    ax.set_yscale("log")
    ax.set_xlabel("size, MB")
    ax.set_ylabel("KL, nats per token")
    ax.margins(x=0.3, y=0.12)
    log_ticks(ax)


# Pilot

PilotPoints = Mapping[str, tuple[Estimate, Estimate]]
"""Weight -> differences of (cosine, loss) to the baseline."""


def pilot_plot(panels: Mapping[str, PilotPoints], floors: tuple[float, float]) -> Plot:
    """The candidates of a pilot, a panel for each title. floors: sizes of (cosine, loss) that count."""
    weights = tuple(dict.fromkeys(weight for points in panels.values() for weight in points))
    drawn = [Panel(title, partial(_draw_pilot, points, weights, floors)) for title, points in panels.items()]
    return Plot("pilot", tuple(drawn), weights)


def _draw_pilot(points: PilotPoints, weights: Sequence[str], floors: tuple[float, float], ax: Axes) -> None:
    x, y = floors
    ax.axhline(0, color=MUTED, linewidth=0.8)
    ax.axvline(0, color=MUTED, linewidth=0.8)
    ax.add_patch(Rectangle((-x, -y), 2 * x, 2 * y, fill=False, edgecolor=MUTED, linestyle="--"))
    for weight, (cosine, loss) in points.items():
        style: dict[str, Any] = {"color": arm_color(weight, weights), "marker": arm_marker(weight, weights)}
        bars: dict[str, Any] = {"xerr": _bars(cosine), "yerr": _bars(loss)}
        ax.errorbar(number(cosine), number(loss), **bars, **style, markersize=7)
    ax.margins(0.08)
    ax.set_xlabel("mean cosine, difference")
    ax.set_ylabel("held-out loss, difference (nats)")


def _bars(estimate: Estimate) -> list[list[float]] | None:
    """How far the limits are below and above the value."""
    value, low, high = estimate.value, estimate.low, estimate.high
    if value is None or low is None or high is None:
        return None
    return [[max(0.0, value - low)], [max(0.0, high - value)]]
