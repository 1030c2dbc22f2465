"""All plots of a report: each function gives a `Plot`, or None where the summary has nothing to draw."""

from __future__ import annotations

from edgedisp.report.before_after import table
from edgedisp.report.mixed import PARETO
from edgedisp.report.picture import Plot
from edgedisp.report.plot_condensation import (
    LAYERS,
    OUTLIERS,
    PRECISIONS,
    condensation_layers,
    condensation_outliers,
    condensation_precisions,
)
from edgedisp.report.plot_divergence import DIVERGENCE, divergence
from edgedisp.report.plot_inside import HEATMAP, TRAINING, condensation_heatmap, training
from edgedisp.report.plot_mixed import pareto
from edgedisp.report.plot_scores import DIFFERENCES, SCORES, TRADEOFF, differences, scores, tradeoff
from edgedisp.report.plot_survival import SURVIVAL, survival
from edgedisp.report.reading import Summary

NAMES = (
    HEATMAP,
    LAYERS,
    OUTLIERS,
    PRECISIONS,
    TRAINING,
    SURVIVAL,
    SCORES,
    DIFFERENCES,
    DIVERGENCE,
    TRADEOFF,
    PARETO,
)


def plots(summary: Summary) -> dict[str, Plot]:
    """Every plot that the summary has data for, by name."""
    built = table(summary, every_arm=True)
    drawn = [
        condensation_heatmap(summary),
        condensation_layers(summary),
        condensation_outliers(summary),
        condensation_precisions(summary),
        training(summary),
        survival(summary),
        scores(built),
        differences(built),
        divergence(summary),
        tradeoff(built),
        pareto(summary),
    ]
    return {plot.name: plot for plot in drawn if plot is not None}
