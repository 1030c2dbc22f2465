"""The sections of a report that hold results: one function a section, from a run and the plots that exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from edgedisp.core.results import (
    BASELINE,
    Condensation,
    Divergence,
    Estimate,
    Measurement,
    NoiseFloor,
    detectable,
)
from edgedisp.core.run import CHANGES_FORWARD, Run
from edgedisp.report.comparisons import Comparison, comparisons
from edgedisp.report.formatting import (
    MISSING,
    count,
    decimals_for,
    fixed,
    format_estimate,
    label,
    p_value,
    percent,
    setting,
    signed,
    small,
)
from edgedisp.report.layout import TERMS, Grid, Section, grid, section
from edgedisp.report.results_table import arms_grid, has_more_arms

LOG_LIKELIHOODS = {"gold_bits_per_byte": "bits per byte", "gold_nll": "nats", "word_nll": "nats"}
"""Metrics of the right answer's log-likelihood, the first that a task has, and their units."""


def measured(run: Run, figure: Callable[[Measurement], Any]) -> list[tuple[str, Any]]:
    """(`int4, dispersed`, a figure of it) of every model that has the figure, most bits first."""
    names = [(arm, precision) for precision in run.precisions for arm in run.arms]
    rows = [(f"{label(precision)}, {arm}", figure(run.measured(arm, precision))) for arm, precision in names]
    return [row for row in rows if row[1] is not None]


# Scores


def arms_section(run: Run) -> Section:
    """All arms against the baseline; empty for two arms and one seed."""
    if not has_more_arms(run):
        return section("arms")
    rows, notes = comparisons(run), []
    grids = [arms_grid(run, task, run.precisions) for task in dict.fromkeys(row.task for row in rows)]
    for arm in run.compared_arms:
        if any(run.techniques.get(arm, {}).get(one) for one in CHANGES_FORWARD):
            notes.append(f"{arm} changes the first loss, so it cannot be checked against the baseline's.")
    if len(run.seeds) > 1:
        notes.append(TERMS["seeds"])
    return section(
        "arms",
        [*grids[:1], *(replace(one, folded=True) for one in grids[1:]), _seeds_grid(rows)],
        TERMS["joined_runs"] if run.runs else "",
        facts=[(arm, technique_text(run, arm)) for arm in run.compared_arms],
        plots=("differences",),
        notes=notes,
    )


def technique_text(run: Run, arm: str) -> str:
    """What an arm's training adds to plain cross-entropy; a key of the dispersion where arms differ in it."""
    adds = run.techniques.get(arm, {})
    words = []
    if dispersion := adds.get("dispersion"):
        others = [one["dispersion"] for one in run.techniques.values() if one.get("dispersion")]
        words.append(f"{dispersion.get('variant', 'angular')} dispersion")
        words += [
            f"{key} {setting(value)}"
            for key, value in dispersion.items()
            if key in ("weight", "layers")
            or (key != "variant" and any(one.get(key) != value for one in others))
        ]
    texts = {
        "neftune": "NEFTune noise, alpha {}",
        "active_forgetting": "embedding drawn anew every {} steps",
        "embedding_dropout": "embedding dropout {}",
    }
    words += [text.format(small(adds[key])) for key, text in texts.items() if adds.get(key) is not None]
    return ", ".join(words) or ("nothing" if arm == BASELINE else MISSING)


def _seeds_grid(rows: list[Comparison]) -> Grid:
    """The spread between seeds and the error over items."""
    several = [(f"{row.arm}, {row.task}, {label(row.precision)}", row) for row in rows if row.unit == "nats"]

    def over_items(row: Comparison) -> Estimate:
        return Estimate(row.value, *(getattr(row.estimate.seeds, end) for end in ("item_low", "item_high")))

    def values(row: Comparison) -> str:
        decimals = decimals_for(row.half_width, 4)
        return ", ".join(signed(value, decimals) for value in row.estimate.seeds.values)  # type: ignore[union-attr]

    columns = {
        "each seed": values,
        "SD of seeds": lambda row: small(row.estimate.seeds.sd),
        "SE over items": lambda row: small(row.estimate.seeds.item_se),
        "over items alone": lambda row: format_estimate(over_items(row), signs=True),
        "with seeds": lambda row: row.text(),
    }
    caption = "Luck of training: difference of the loss, nats per token, 95 % intervals"
    return grid("arm", [row for row in several if row[1].estimate.seeds], columns, caption)


def scores_section(run: Run) -> Section:
    """Every comparison with its p, means over tasks, log-likelihoods, bits per byte."""
    rows = comparisons(run)
    several = len(run.compared_arms) > 1
    names = [f"{f'{row.arm}, ' * several}{row.task}, {label(row.precision)}" for row in rows]
    compared = {
        "difference [95 %]": lambda row: row.text(),
        "unit": lambda row: row.unit_text or MISSING,
        "items": lambda row: count(row.estimate.n),
        "documents": lambda row: count(row.estimate.documents),
        "p": lambda row: p_value(row.p),
        "p (Holm)": lambda row: "headline" if row.is_headline else p_value(row.p_holm),
        "arm is": lambda row: row.outcome,
    }
    caption = "Arm - baseline, paired by item; p corrected over all comparisons but the headline"
    byte_rows = [
        (f"{name}, {task}", score.metrics["bits_per_byte"].estimate)
        for name, scores in measured(run, lambda one: one.scores)
        for task, score in scores.items()
        if "bits_per_byte" in score.metrics
    ]
    byte_columns = {"bits per byte [95 %]": format_estimate}
    grids = [
        grid("comparison", zip(names, rows), compared, caption, folded=len(rows) > 20),
        _mean_grid(run),
        _log_likelihood_grid(run),
        grid(
            "model", byte_rows, byte_columns, "Bits per byte: for models with unlike tokenizers", folded=True
        ),
    ]
    plots = ("scores",) if has_more_arms(run) else ("differences", "scores")
    return section("scores", grids, plots=plots)


def _mean_grid(run: Run) -> Grid:
    """The mean over tasks, a row for each arm and precision."""
    rows = [
        (f"{arm}, {label(name)}", mean) for arm, means in run.means.items() for name, mean in means.items()
    ]
    left_out = dict.fromkeys(f"{task} ({why})" for _, mean in rows for task, why in mean.left_out.items())
    columns = {
        "tasks": lambda mean: count(len(mean.tasks)),
        "baseline, %": lambda mean: fixed(100 * mean.first, 1),
        "arm, %": lambda mean: fixed(100 * mean.second, 1),
        "difference, points": lambda mean: format_estimate(mean.estimate, 100, signs=True),
        "could be seen, points": lambda mean: fixed(100 * detectable(mean.estimate.half_width or 0.0), 1),
    }
    caption = "Mean over the tasks that count right answers"
    return grid("model", rows, columns, caption + (f"; without {', '.join(left_out)}" if left_out else ""))


def _log_likelihood_grid(run: Run) -> Grid:
    rows = [
        (f"{task}, {label(precision)}", next(known))
        for precision, tasks in run.comparisons.get(run.main_arm or "", {}).items()
        for task, one in tasks.items()
        if any(name in one.metrics for name in LOG_LIKELIHOODS)
        for known in [(one.metrics[name] for name in LOG_LIKELIHOODS if name in one.metrics)]
    ]
    columns = {
        "baseline": lambda one: fixed(one.first, 3),
        str(run.main_arm): lambda one: fixed(one.second, 3),
        "difference [95 %]": lambda one: format_estimate(one.estimate, signs=True),
        "unit": lambda one: LOG_LIKELIHOODS[one.metric],
    }
    caption = "Right answers' negative log-likelihood, lower is better: it moves before accuracy does"
    return grid("task", rows, columns, caption, folded=True)


# Divergence


def divergence_section(run: Run) -> Section:
    """KL of bundles from their fp32 parents and of the arms from each other, and the noise floor."""
    columns: dict[str, Callable[[Divergence], str]] = {
        "mean KL": lambda one: small(one.mean_kl),
        "median": lambda one: small(one.median_kl),
        "p90": lambda one: small(one.p90_kl),
        "p99": lambda one: small(one.p99_kl),
        "largest": lambda one: small(one.max_kl),
        "same top token": lambda one: percent(one.top1_agreement),
        "top 5 in common": lambda one: percent(one.top5_overlap),
        "tokens": lambda one: count(one.tokens),
    }
    noise: dict[str, Callable[[NoiseFloor], str]] = {
        "other number of threads": lambda one: _shift(one.variants.get("threads")),
        "other attention kernel": lambda one: _shift(one.variants.get("attention")),
        "token by token": lambda one: _shift(one.variants.get("decoding")),
        "noise floor": lambda one: small(one.floor),
    }
    parents = measured(run, lambda one: one.divergence.get("parent"))
    twins = measured(run, lambda one: one.divergence.get("baseline"))
    floors = measured(run, lambda one: one.noise)
    grids = [
        grid("model", parents, columns, "Bundle against its fp32 parent, nats"),
        grid("model", twins, columns, "Arm against the baseline at the same precision, nats"),
        grid("model", floors, noise, "One model scored in another way: change of the loss, nats per token"),
    ]
    return section("divergence", grids)


def _shift(estimate: Estimate | None) -> str:
    """Sizes of 1e-8 need significant digits, not decimals."""
    if estimate is None or not estimate.has_interval:
        return MISSING if estimate is None else small(estimate.value)
    return f"{small(estimate.value)} [{small(estimate.low)}, {small(estimate.high)}]"


# Condensation

CONDENSATION_PLOTS = tuple(f"condensation_{name}" for name in ("heatmap", "layers", "precisions", "outliers"))
FIGURES = {
    "cosine_raw": "mean cosine",
    "cosine_sink_excluded": "no sinks",
    "cosine_mean_removed": "mean removed",
    "effective_rank": "effective rank",
    "maximum_explainable_variance": "max. explainable variance",
    "kurtosis": "kurtosis",
    "max_over_median": "largest / median",
    "max_over_median_sink_excluded": "largest / median, no sinks",
    "sinks": "sinks",
}


def condensation_section(run: Run) -> Section:
    """The paper's heatmap, the layer curves, what quantization changes, and their numbers."""
    profiles = dict(measured(run, lambda one: one.condensation))
    torch = {name: one for name, one in profiles.items() if name.startswith(label("torch"))}
    sizes = sorted({(one.tokens, one.sequences) for one in profiles.values()})
    notes = [f"Measured on {count(tokens)} tokens in {count(number)} sequences." for tokens, number in sizes]
    return section(
        "condensation",
        [model_grid(profiles), *(layer_grid(name, one) for name, one in torch.items())],
        plots=CONDENSATION_PLOTS,
        notes=[*notes, TERMS["correlations"]] if profiles else [],
    )


def model_grid(profiles: dict[str, Condensation]) -> Grid:
    """Every model: mean over layers, both correlations, and the paired change of the mean cosine."""
    columns: dict[str, Callable[[Condensation], str]] = {
        "mean cosine": lambda one: format_estimate(one.mean_cosine),
        "Spearman": lambda one: format_estimate(one.correlations.get("spearman")),
        "Kendall": lambda one: format_estimate(one.correlations.get("kendall")),
        "change of mean cosine": lambda one: format_estimate(
            one.change.mean_cosine if one.change else None, signs=True
        ),
    }
    caption = (
        "Mean cosine over all layers. Change, paired by sequence: of an arm from the baseline, of a bundle "
        "from its torch model"
    )
    return grid("model", profiles.items(), columns, caption)


def layer_grid(name: str, profile: Condensation, signs: bool = False) -> Grid:
    """Every figure of every layer."""
    layers = [*profile.layers, *([profile.final_norm] if profile.final_norm else [])]
    rows = [("after the final norm" if one.layer is None else str(one.layer), one.figures) for one in layers]
    columns = {
        title: lambda figures, key=key: format_estimate(figures.get(key), signs=signs)
        for key, title in FIGURES.items()
    }
    return grid("layer", rows, columns, f"{name}, layer by layer", folded=True)
