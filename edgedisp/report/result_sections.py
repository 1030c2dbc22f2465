"""The sections of a report that hold results: one function a section, from a run to finished texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from edgedisp.core.results import BASELINE, Condensation, Measurement
from edgedisp.core.run import Run
from edgedisp.report import formatting as fmt
from edgedisp.report.comparisons import comparisons
from edgedisp.report.layout import TERMS, TEXTS, Grid, Section, grid, notes, section
from edgedisp.report.results_table import arms_grid, has_more_arms

LOG_LIKELIHOODS = ("gold_bits_per_byte", "gold_nll", "word_nll")
"""Metrics of the right answer's log-likelihood; the first that a task has is shown."""
CONDENSATION_PLOTS = tuple(f"condensation_{name}" for name in ("heatmap", "layers", "precisions", "outliers"))


def models(run: Run) -> list[tuple[str, str, str]]:
    """(`int4, dispersed`, arm, precision) of every model, most bits first."""
    pairs = [(arm, precision) for precision in run.precisions for arm in run.arms]
    return [(f"{fmt.label(precision)}, {arm}", arm, precision) for arm, precision in pairs]


def measured(run: Run, figure: Callable[[Measurement], Any]) -> list[tuple[str, Any]]:
    """(`int4, dispersed`, a figure of it) of every model that has the figure."""
    rows = [(name, figure(run.measured(arm, precision))) for name, arm, precision in models(run)]
    return [row for row in rows if row[1] is not None]


def arms_section(run: Run) -> Section:
    """All arms against the baseline; empty for two arms and one seed."""
    if not has_more_arms(run):
        return section("arms")
    rows = comparisons(run)
    first, *more = [arms_grid(run, task, run.precisions) for task in dict.fromkeys(row.task for row in rows)]
    with_seeds = [
        (f"{row.arm}, {row.task}, {fmt.label(row.precision)}", row)
        for row in rows
        if row.unit == "nats" and row.estimate.seeds
    ]
    return section(
        "arms",
        [first, *(replace(table, folded=True) for table in more), grid("seeds", with_seeds)],
        TERMS["joined_runs"] if run.runs else "",
        facts=[(arm, technique_text(run, arm)) for arm in run.compared_arms],
        plots=("differences",),
        notes=notes("arms", run),
    )


def technique_text(run: Run, arm: str) -> str:
    """What an arm's training adds to plain cross-entropy, with the dispersion's keys in which arms differ."""
    adds, texts = run.techniques.get(arm, {}), []
    if dispersion := adds.get("dispersion"):
        everyone = [added["dispersion"] for added in run.techniques.values() if added.get("dispersion")]
        texts.append(f"{dispersion.get('variant', 'angular')} dispersion")
        for key, value in dispersion.items():
            differs = key != "variant" and any(other.get(key) != value for other in everyone)
            texts += [f"{key} {fmt.setting(value)}"] * (differs or key in ("weight", "layers"))
    for key, text in TEXTS["techniques"].items():
        texts += [] if adds.get(key) is None else [text.format(fmt.small(adds[key]))]
    return ", ".join(texts) or ("nothing" if arm == BASELINE else fmt.MISSING)


def scores_section(run: Run) -> Section:
    """Every comparison with its p, means over tasks, log-likelihoods, bits per byte."""
    several, rows = len(run.compared_arms) > 1, comparisons(run)
    labelled = [(f"{f'{row.arm}, ' * several}{row.task}, {fmt.label(row.precision)}", row) for row in rows]
    means = [
        (f"{arm}, {fmt.label(name)}", mean)
        for arm, means in run.means.items()
        for name, mean in means.items()
    ]
    left_out = dict.fromkeys(f"{task} ({why})" for _, mean in means for task, why in mean.left_out.items())
    caption = (
        f"Mean over the tasks that count right answers{'; without ' * bool(left_out)}{', '.join(left_out)}"
    )
    log_likelihoods = []
    for precision, tasks in run.comparisons.get(run.main_arm or "", {}).items():
        for task, compared in tasks.items():
            metrics = [compared.metrics[name] for name in LOG_LIKELIHOODS if name in compared.metrics]
            log_likelihoods += [(f"{task}, {fmt.label(precision)}", metric) for metric in metrics[:1]]
    byte_rows = [
        (f"{name}, {task}", score.metrics["bits_per_byte"].estimate)
        for name, scores in measured(run, lambda model: model.scores)
        for task, score in scores.items()
        if "bits_per_byte" in score.metrics
    ]
    grids = [
        grid("comparisons", labelled, folded=len(rows) > 20),
        grid("means", means, caption),
        grid("log_likelihoods", log_likelihoods),
        grid("bits_per_byte", byte_rows),
    ]
    return section("scores", grids, plots=("scores",) if has_more_arms(run) else ("differences", "scores"))


def divergence_section(run: Run) -> Section:
    """KL of bundles from their fp32 parents and of the arms from each other, and the noise floor."""
    parents = measured(run, lambda model: model.divergence.get("parent"))
    twins = measured(run, lambda model: model.divergence.get("baseline"))
    grids = [
        grid("divergence", parents, "Bundle against its fp32 parent, nats"),
        grid("divergence", twins, "Arm against the baseline at the same precision, nats"),
        grid("noise", measured(run, lambda model: model.noise)),
    ]
    return section("divergence", grids)


# Condensation


def condensation_section(run: Run) -> Section:
    """The paper's heatmap, the layer curves, what quantization changes, and their numbers."""
    profiles = dict(measured(run, lambda model: model.condensation))
    torch = {name: profile for name, profile in profiles.items() if name.startswith(fmt.label("torch"))}
    return section(
        "condensation",
        [grid("models", profiles.items()), *(layer_grid(name, profile) for name, profile in torch.items())],
        plots=CONDENSATION_PLOTS,
        notes=notes("condensation", profiles),
    )


def profile_grids(profiles: Mapping[str, Condensation]) -> list[Grid]:
    """One model or two: their means and correlations, all their layers, and last what differs."""
    names, changes = list(profiles), profiles[[*profiles][-1]].change
    grids = [grid("models", profiles.items()), *(layer_grid(name, profiles[name]) for name in names)]
    if changes:
        grids.append(layer_grid(f"{names[-1]} - {names[0]}, paired over sequences", changes, signs=True))
    return grids


def layer_grid(name: str, profile: Condensation, signs: bool = False) -> Grid:
    """Every figure of every layer; signs: for differences."""
    rows = [
        (
            "after the final norm" if layer.layer is None else str(layer.layer),
            {
                title: fmt.format_estimate(layer.figures.get(key), signs=signs)
                for key, title in TEXTS["figures"].items()
            },
        )
        for layer in (*profile.layers, *([profile.final_norm] if profile.final_norm else []))
    ]
    return grid("layers", rows, f"{name}, layer by layer")


# What quantization leaves of training


def survival_section(run: Run) -> Section:
    """What quantization leaves of training: in the loss, and in the weights."""
    losses = [
        (f"{task}, {name}", loss)
        for name, arm, precision in models(run)
        for task, loss in run.loss_survival.get(arm, {}).get(precision, {}).items()
    ]
    records = [(name, run.delta_survival.get(arm, {}).get(precision)) for name, arm, precision in models(run)]
    present = [(name, record) for name, record in records if record]
    weights = {
        part: [
            (f"{name} - {reference}, {key}{' bits' * (part == 'bits')}", figures)
            for name, record in present
            for reference, against in record["references"].items()
            for key, figures in (against.get(part) or {}).items()
        ]
        for part in ("bits", "components")
    }
    grids = [
        grid("loss_survival", losses),
        grid("weight_survival", weights["bits"], TERMS["parameter_change"]),
        grid("weight_survival", weights["components"], "The same by component", folded=True),
    ]
    return section("survival", grids, plots=("survival",), notes=notes("survival", run, present))
