"""The plots of a report: one function a figure; None where the run has nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from edgedisp.core.results import BASELINE, Estimate, Run
from edgedisp.report.comparisons import BETTER, WORSE
from edgedisp.report.figure import INK, MUTED, Panel, Plot, arm_color, arm_marker, log_ticks
from edgedisp.report.formatting import label
from edgedisp.report.plots_condensation import (
    condensation_heatmap,
    condensation_layers,
    condensation_outliers,
    condensation_precisions,
    draw_lines,
)
from edgedisp.report.result_sections import searches
from edgedisp.report.results_table import Metric, Row, Table, table

OUTCOME_COLORS = {BETTER: "#1d6f5c", WORSE: "#9c3d1c"}


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
    return {plot.name: plot for plot in drawn if plot is not None}


def training(run: Run) -> Plot | None:
    """Cross-entropy and the dispersion term over steps."""
    panels = []
    for key, title in {"loss": "cross-entropy, nats per token", "dispersion": "dispersion loss"}.items():
        curves = {}
        for arm, one in run.training.items():
            rows = [(row["step"], row[key]) for row in one.log if row.get(key) is not None]
            if rows:
                curves[arm] = ([float(x) for x, _ in rows], [float(y) for _, y in rows])
        if curves:
            panels.append(Panel(title, _draw_curves(curves, run.arms)))
    caption = (
        "Thin: every logged step. Thick: running mean. The dispersion term is measured where it was logged."
    )
    return Plot("training", "Training curves", caption, tuple(panels), tuple(run.arms)) if panels else None


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over up to `window` values (fewer at the ends)."""
    half = window // 2
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [float(total[end] - total[start]) / (end - start) for start, end in spans]


def _draw_curves(
    curves: Mapping[str, tuple[list[float], list[float]]], arms: Sequence[str]
) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        smooth = {}
        for arm, (x, y) in curves.items():
            window = max(1, len(y) // 15)
            if window > 1:
                ax.plot(x, y, color=arm_color(arm, arms), linewidth=0.8, alpha=0.35)
            smooth[arm] = (x, [Estimate(value) for value in running_mean(y, window)])
        draw_lines(ax, smooth, arms, "step")

    return draw


def survival(run: Run) -> Plot | None:
    """By layer: integers that moved, and changes over half a step, against the base and the baseline."""
    panels = []
    for precision in run.precisions:
        for reference in ("base", "baseline"):
            records = {arm: run.delta_survival.get(arm, {}).get(precision) for arm in run.arms}
            layers = {
                arm: record["references"].get(reference, {}).get("layers") or []
                for arm, record in records.items()
                if record
            }
            if any(layers.values()):
                title = f"{label(precision)}, against the {reference}"
                panels.append(Panel(title, _draw_survival(layers, run.arms)))
    caption = (
        "Line: share of a layer's quantized weights whose integer is another one than the same grid gives "
        "the "
        "model compared with. Dashed: share whose change is more than half a step. Against the base: what "
        "training changed; against the baseline: what the arm changed beyond its twin."
    )
    title = "What is left of the change, by layer"
    return Plot("survival", title, caption, tuple(panels), tuple(run.arms)) if panels else None


def _draw_survival(
    layers: Mapping[str, Sequence[Mapping[str, float]]], arms: Sequence[str]
) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        for place, (arm, rows) in enumerate(layers.items()):
            for key, dash in (("integers_moved", "-"), ("beyond_half_step", "--")):
                x, y = [row["layer"] for row in rows], [row[key] for row in rows]
                ax.plot(x, y, dash, color=arm_color(arm, arms), linewidth=1.6 if place else 3.0)
        ax.set_ylim(bottom=0.0)
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))

    return draw


def scores(whole: Table) -> Plot | None:
    """Every metric by precision, one point an arm, with its interval."""
    panels = []
    for metric in whole.metrics:
        if metric.kind != "cost":
            points = {arm: [row.value(metric, arm) for row in whole.rows] for arm in whole.arms}
            panels.append(Panel(metric.heading, _draw_points(points, whole, metric)))
    caption = (
        "Points with 95 % intervals. They cover each arm alone, and texts differ in difficulty, so they are "
        f"wide; whether the arms differ is seen in the paired differences.{_seed_caption(whole)}"
    )
    return Plot("scores", "What quantization costs", caption, tuple(panels), whole.arms) if panels else None


def differences(whole: Table) -> Plot | None:
    """Every arm's paired differences to the baseline by precision, with the zero line."""
    arms = tuple(arm for arm in whole.arms if arm != BASELINE)
    panels = []
    for metric in whole.metrics:
        cells = {arm: [row.difference(metric, arm) for row in whole.rows] for arm in arms}
        if not any(cell and cell.estimate.has_interval for row in cells.values() for cell in row):
            continue
        points = {arm: [cell.estimate if cell else None for cell in row] for arm, row in cells.items()}
        unit = ", points" if metric.unit == "%" else f", {metric.unit}" if metric.unit else ""
        way = "up" if metric.higher_is_better else "down"
        draw = _draw_points(points, whole, metric, zero=True)
        panels.append(Panel(f"{metric.title}{unit} ({way} is better)", draw))
    caption = (
        "Arm - baseline on the same items, with 95 % intervals. Filled: better or worse by the verdict's "
        "rule, "
        f"in green or red where there is one arm; open: not clear.{_seed_caption(whole)}"
    )
    legend = arms if len(arms) > 1 else ()
    return Plot("differences", "Paired differences", caption, tuple(panels), legend) if panels else None


def _seed_caption(whole: Table) -> str:
    values = (one for row in whole.rows for group in row.values.values() for one in group.values())
    if not any(one.seeds for one in values):
        return ""
    return " Thin: with the spread between seeds; thick: over items alone; small dots: the single seeds."


def _draw_points(
    points: Mapping[str, Sequence[Estimate | None]], whole: Table, metric: Metric, zero: bool = False
) -> Callable[[Axes], None]:
    """Precisions along x, arms side by side with error bars."""

    def draw(ax: Axes) -> None:
        step = min(0.22, 0.8 / max(1, len(points)))
        for index, (arm, estimates) in enumerate(points.items()):
            shift = (index - (len(points) - 1) / 2) * step
            for place, (row, estimate) in enumerate(zip(whole.rows, estimates)):
                color, filled = _point_style(row, metric, arm, whole, zero)
                if estimate is not None and estimate.value is not None:
                    marker = arm_marker(arm, whole.arms)
                    _draw_point(ax, place + shift, estimate, metric.scale, (color, marker, filled))
        if zero:
            ax.axhline(0, color=MUTED, linewidth=1)
        ax.set_xticks(range(len(whole.rows)), [row.label for row in whole.rows])
        ax.set_xlim(-0.5, len(whole.rows) - 0.5)
        ax.grid(False, axis="x")
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))

    return draw


def _point_style(row: Row, metric: Metric, arm: str, whole: Table, zero: bool) -> tuple[str, bool]:
    """(colour, filled): of a difference by its outcome."""
    cell = row.difference(metric, arm) if zero else None
    filled = cell is None or cell.outcome in OUTCOME_COLORS
    if cell is not None and len(whole.arms) == 2:
        return OUTCOME_COLORS.get(cell.outcome, INK), filled
    return arm_color(arm, whole.arms), filled


def _draw_point(ax: Axes, x: float, estimate: Estimate, scale: float, style: tuple[str, str, bool]) -> None:
    """A point with its interval; of several seeds also the interval over items and the single seeds."""
    color, marker, filled = style
    seeds = estimate.seeds
    if estimate.low is not None and estimate.high is not None:
        ends = [estimate.low * scale, estimate.high * scale]
        ax.plot([x, x], ends, color=color, linewidth=0.9 if seeds else 1.8)
    if seeds is not None:
        if seeds.item_low is not None and seeds.item_high is not None:
            ax.plot([x, x], [seeds.item_low * scale, seeds.item_high * scale], color=color, linewidth=3)
        dots = [value * scale for value in seeds.values]
        ax.plot([x + 0.06] * len(dots), dots, color=color, marker=".", markersize=4, linestyle="none")
    value = (estimate.value or 0.0) * scale
    face = color if filled else "white"
    ax.plot([x], [value], color=color, marker=marker, markersize=6, markerfacecolor=face, linestyle="none")


def tradeoff(whole: Table) -> Plot | None:
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
            xlabel = f"{metric.title}, {metric.unit}"
            draw = _draw_tradeoff(points, whole.arms, (xlabel, loss.title))
            panels.append(Panel(f"{loss.title} against {xlabel}", draw))
    caption = (
        "Lower perplexity, smaller size and higher speed are better. The arms' timings differ by noise "
        "alone: how "
        "a model was trained leaves the graph as it is."
    )
    return Plot("tradeoff", "Quality against cost", caption, tuple(panels), whole.arms) if panels else None


def _draw_tradeoff(
    points: Mapping[str, list[tuple[str, float, Estimate]]], arms: Sequence[str], labels: tuple[str, str]
) -> Callable[[Axes], None]:
    def draw(ax: Axes) -> None:
        for index, (arm, rows) in enumerate(points.items()):
            color, marker = arm_color(arm, arms), arm_marker(arm, arms)
            xs, ys = [x for _, x, _ in rows], [one.value or 0.0 for *_, one in rows]
            ax.plot(xs, ys, color=color, linewidth=1.2, alpha=0.6)
            ax.plot(xs, ys, color=color, marker=marker, markersize=5 if index else 9, linestyle="none")
            for name, x, one in rows:
                if one.low is not None and one.high is not None:
                    ax.plot([x, x], [one.low, one.high], color=color, linewidth=1.2, alpha=0.5)
                if index == 0:
                    place: dict[str, Any] = {"xytext": (7, 6), "textcoords": "offset points"}
                    ax.annotate(name, (x, one.value or 0.0), color=MUTED, **place)
        ax.set_xlabel(labels[0])
        ax.set_ylabel(labels[1])
        ax.margins(x=0.24, y=0.1)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5))

    return draw


def pareto(run: Run) -> Plot | None:
    """A search for bits by weight: file size against KL divergence, predicted and measured."""
    caption = (
        "Line: predicted KL of the best assignment at each size. Marks: measured KL of whole bundles. Lower "
        "and "
        "further left is better."
    )

    def draw_of(arm: str, search: Mapping[str, list[Mapping[str, float]]]) -> Callable[[Axes], None]:
        def known(rows: str, loss: str) -> list[tuple[str, float, float]]:
            listed = [row for row in search.get(rows, []) if row.get(loss)]
            return [(str(row.get("name") or ""), row["size_bytes"] / 1e6, row[loss]) for row in listed]

        def draw(ax: Axes) -> None:
            color = arm_color(arm, run.arms)
            curve = known("curve", "predicted_kl")
            ax.plot([x for _, x, _ in curve], [y for *_, y in curve], color=color, linewidth=1.2, alpha=0.6)
            for name, x, y in known("points", "measured_kl"):
                chosen = name == "chosen"
                style: dict[str, Any] = (
                    {"color": color, "marker": "o"} if chosen else {"color": MUTED, "marker": "x"}
                )
                ax.plot([x], [y], markersize=8 if chosen else 6, **style)
                place: dict[str, Any] = {
                    "xytext": (-8, -9) if chosen else (6, 5),
                    "textcoords": "offset points",
                }
                ax.annotate(name, (x, y), color=MUTED, ha="right" if chosen else "left", **place)
            ax.set_yscale("log")
            ax.set_xlabel("size, MB")
            ax.set_ylabel("KL, nats per token")
            ax.margins(x=0.3, y=0.12)
            log_ticks(ax)

        return draw

    panels = [Panel(arm, draw_of(arm, search)) for arm, search in searches(run).items()]
    return Plot("pareto", "Size against loss, bits by weight", caption, tuple(panels)) if panels else None
