"""The plots of a report: one function a figure, without panels where the run has nothing to draw."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from edgedisp.core.results import Condensation, Estimate
from edgedisp.core.run import Run
from edgedisp.report.comparisons import NOT_CLEAR
from edgedisp.report.figure import INK, MARKERS, Panel, Plot, Series, arm_color, points_panel
from edgedisp.report.formatting import label
from edgedisp.report.layout import TEXTS
from edgedisp.report.results_table import Table, difference, table

THICK, THIN = 3.4, 1.7  # the first curve of a panel is thick, to show under others


def plots(run: Run) -> dict[str, Plot]:
    """Every plot that the run has data for, by name."""
    whole = table(run, all_arms=True)
    profiles = {arm: profile for arm in run.arms if (profile := run.measured(arm, "torch").condensation)}
    condensation = condensation_plots(profiles, run.arms)
    for precision in (name for name in run.precisions if name not in ("torch", "fp32")):
        bundles = {arm: run.measured(arm, precision).condensation for arm in run.arms}
        changes = {arm: profile and profile.change for arm, profile in bundles.items()}
        title = f"raw: change from torch to {label(precision)}, paired"
        condensation[1].panels.extend(_layer_panel(title, changes, "cosine_raw", run.arms))
    figures = [
        *condensation,
        training(run),
        by_precision("scores", whole, {arm: arm for arm in whole.arms}),
        by_precision("differences", whole, {arm: difference(arm) for arm in run.compared_arms}, [0.0]),
        tradeoff(whole),
    ]
    return {plot.name: plot for plot in figures if plot.panels}


# Condensation


def condensation_plots(profiles: Mapping[str, Condensation], names: Sequence[str]) -> list[Plot]:
    """Heatmap and layer curves of one model or more; names: of all arms, for their colours."""
    panels = []
    for figure, title in TEXTS["panels"].items():
        panels += _layer_panel(title, profiles, figure, names)
    changes = {name: profile.change for name, profile in profiles.items()}
    panels += _layer_panel("raw: change from the first model, paired", changes, "cosine_raw", names)
    return [condensation_heatmap(profiles), Plot("condensation_layers", panels, list(profiles))]


def _layer_panel(
    title: str, profiles: Mapping[str, Condensation | None], figure: str, names: Sequence[str]
) -> list[Panel]:
    """A figure by layer, a curve a model; none where no model has it."""
    curves: list[Series] = []
    for name, profile in profiles.items():
        y = [row.figures.get(figure) for row in profile.layers] if profile else []
        width = THIN if curves or len(profiles) == 1 else THICK
        curves += [Series(range(len(y)), y, arm_color(name, names), width)] if any(y) else []
    return [Panel(title, curves, "layer")] if curves else []


def condensation_heatmap(profiles: Mapping[str, Condensation]) -> Plot:
    """How the cosines of token pairs are spread in each layer, on one scale; the line is their mean."""
    counts = {
        name: np.array([row.histogram for row in profile.layers], dtype=np.float64).T  # [bins, layers]
        for name, profile in profiles.items()
        if all(row.histogram for row in profile.layers)
    }
    if not counts:
        return Plot("condensation_heatmap", [])
    shares = {name: rows / np.maximum(rows.sum(axis=0), 1) for name, rows in counts.items()}
    whole = np.hstack(list(shares.values()))
    is_used = (whole > 1e-3).any(axis=1)  # 0.1 % of the pairs of a layer
    bottom = min(0.0, -1 + 2 * float(is_used.argmax()) / len(whole))
    panels = []
    for name, share in shares.items():
        means = [row.figures.get("cosine_raw") for row in profiles[name].layers]
        line = Series(range(len(means)), means, INK, 1.4)
        image = (share / whole.max()) ** 0.6
        panels.append(Panel(name, [line], "layer", "cosine similarity", image=image, bottom=bottom))
    return Plot("condensation_heatmap", panels)


# Training


def training(run: Run) -> Plot:
    """Cross-entropy and the dispersion term over steps: thin as logged, thick the running mean."""
    panels = []
    for key, title in {"loss": "cross-entropy, nats per token", "dispersion": "dispersion loss"}.items():
        curves = []
        for arm, trained in run.training.items():
            points = [(row["step"], row[key]) for row in trained.log if row.get(key) is not None]
            if points:
                steps, values = zip(*points)
                kernel, color = np.ones(len(values) // 30 * 2 + 1), arm_color(arm, run.arms)
                counts = np.convolve(np.ones(len(values)), kernel, "same")  # fewer at both ends
                means = np.convolve(values, kernel, "same") / counts
                curves.append(Series(steps, list(map(Estimate, values)), color, 0.8, alpha=0.35))
                curves.append(Series(steps, list(map(Estimate, means)), color, THIN))
        if curves:
            panels.append(Panel(title, curves, "step"))
    return Plot("training", panels, run.arms)


# Scores


def by_precision(name: str, whole: Table, columns: Mapping[str, str], guides: Sequence[float] = ()) -> Plot:
    """Every metric by precision: of each arm its column, points with intervals; open are those not clear."""
    panels = []
    for metric in (metric for metric in whole.metrics if metric.kind != "cost"):
        series = []
        for arm, column in columns.items():
            cells = [row.cell(metric, column) for row in whole.rows]
            is_open = [cell.outcome == NOT_CLEAR for cell in cells]
            color = arm_color(arm, whole.arms)
            series.append(Series((), [cell.estimate for cell in cells], color, is_open=is_open))
        if any(estimate and estimate.has_interval for row in series for estimate in row.y):
            title = metric.heading.replace("%", "points") if guides else metric.heading
            groups = [row.label for row in whole.rows]
            panels.append(points_panel(title, groups, series, scale=metric.scale, guides=guides))
    return Plot(name, panels, list(columns) if len(columns) > 1 else ())


# Quality against cost


def tradeoff(whole: Table) -> Plot:
    """The first score against size and against decode speed; one line an arm through its precisions."""
    scores = [metric for metric in whole.metrics if metric.kind != "cost"]
    costs = [metric for metric in whole.metrics if metric.key in ("size_bytes", "decode_tokens_per_s")]
    panels = []
    for score, cost in itertools.product(scores[:1], costs):
        series = []
        for index, arm in enumerate(whole.arms):
            values = [row.cell(cost, arm).estimate.value for row in whole.rows]
            of_arm = [row.cell(score, arm).estimate for row in whole.rows]
            curve = Series(cost.scale * np.array(values, float), of_arm, arm_color(arm, whole.arms), 1.2)
            names = [] if index else [row.label for row in whole.rows]
            series.append(replace(curve, marker=MARKERS[index % len(MARKERS)], names=names))
        name = f"{cost.title}, {cost.unit}"
        panels.append(Panel(f"{score.title} against {name}", series, name, score.title, score.scale))
    return Plot("tradeoff", panels, whole.arms)


def pilot_plot(candidates: Mapping[str, tuple[Estimate, Estimate]], floors: tuple[float, float]) -> Plot:
    """The candidates of a pilot: name -> differences of (cosine, loss) to the baseline.

    floors: sizes of (cosine, loss) that count; smaller ones lie between dashed lines.
    """
    names, panels = [*candidates], []
    for index, title in enumerate(("mean cosine, difference", "held-out loss, difference (nats)")):
        series = [Series((), [pair[index]], arm_color(name, names)) for name, pair in candidates.items()]
        panels.append(points_panel(title, [""], series, guides=[0.0, floors[index], -floors[index]]))
    return Plot("pilot", panels, names)
