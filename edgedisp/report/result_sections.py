"""The sections of a report that hold results: one function a section, from a run and the plots that exist."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from edgedisp.core.results import (
    BASELINE,
    CHANGES_FORWARD,
    DISPERSED,
    Condensation,
    Estimate,
    Json,
    LayerProfile,
    Run,
    detectable,
)
from edgedisp.report.comparisons import Comparison, comparisons
from edgedisp.report.formatting import (
    MISSING,
    bits,
    change,
    count,
    decimals_for,
    fixed,
    format_estimate,
    label,
    megabytes,
    p_value,
    percent,
    plural,
    setting,
    signed,
    small,
)
from edgedisp.report.layout import Grid, Section, section
from edgedisp.report.results_table import arms_grid, has_more_arms

Plots = Collection[str]
SEED_NOTES = (
    "The spread between seeds is the luck of training: initial adapter, dropout, order of the text and "
    "random draws. The interval with seeds holds both (half-widths add as squares; the seeds' part is "
    "Student's t times their standard deviation over the root of their number).",
    "Geometry, timing, sizes and packages are those of the first seed's training.",
)
LOG_LIKELIHOODS = {"gold_bits_per_byte": "bits per byte", "gold_nll": "nats", "word_nll": "nats"}
"""Metrics of the right answer's log-likelihood, the first that a task has, and their units."""


def existing(plots: Plots, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if name in plots)


# All arms


def arms_section(run: Run, plots: Plots) -> Section:
    """All arms against the baseline; empty for two arms and one seed."""
    title = "All arms against the baseline"
    if not has_more_arms(run):
        return Section("arms", title)
    several = len(run.seeds) > 1
    lead = (
        "Every arm started from the same weights, and read the same tokens in the same order with the same "
        f"settings as the baseline{' of its seed' if several else ''}."
    )
    if run.runs:
        lead = (
            "Arms of several runs, each trained as its recipe says, against the baseline of the first on the "
            "items that both were asked."
        )
    lead += f" Each was trained with {len(run.seeds)} seeds." if several else ""
    rows = comparisons(run)
    grids = [arms_grid(run, task, run.precisions) for task in dict.fromkeys(row.task for row in rows)]
    grids = [grids[0], *(Grid(**{**vars(grid), "folded": True}) for grid in grids[1:])] if grids else []
    exempt = [
        arm
        for arm in run.compared_arms
        if any(run.techniques.get(arm, {}).get(one) for one in CHANGES_FORWARD)
    ]
    notes = [
        f"{', '.join(exempt)}: noise or dropout on the embedding changes the very first loss, so it cannot "
        "be "
        "checked there against the baseline's."
    ]
    return section(
        "arms",
        title,
        [*grids, _seeds_grid(rows), _comparison_grid(rows, with_arm=True)],
        lead,
        facts=tuple((arm, technique_text(run, arm)) for arm in run.compared_arms),
        plots=existing(plots, "differences"),
        notes=(*(notes if exempt else []), *(SEED_NOTES if several else ())),
    )


def technique_text(run: Run, arm: str) -> str:
    """What an arm's training adds to plain cross-entropy."""
    adds = run.techniques.get(arm, {})
    words = []
    if dispersion := adds.get("dispersion"):
        others = [one["dispersion"] for one in run.techniques.values() if one.get("dispersion")]
        words.append(f"{dispersion.get('variant', 'angular')} dispersion")
        words += [f"{key} {setting(dispersion[key])}" for key in ("weight", "layers") if key in dispersion]
        words += [
            f"{key} {setting(value)}"
            for key, value in dispersion.items()
            if key not in ("variant", "weight", "layers") and any(one.get(key) != value for one in others)
        ]
    texts = {
        "neftune": "NEFTune noise, alpha {}",
        "active_forgetting": "embedding drawn anew every {} steps",
        "embedding_dropout": "embedding dropout {}",
    }
    words += [text.format(small(adds[key])) for key, text in texts.items() if adds.get(key) is not None]
    return ", ".join(words) or ("nothing" if arm == BASELINE else MISSING)


def _seeds_grid(rows: list[Comparison]) -> Grid:
    """At the fewest bits: the error over items, and the spread between seeds beside it."""
    losses = [row for row in rows if row.unit == "nats" and row.estimate.seeds]
    fewest = min((row.precision for row in losses), key=bits, default="")
    texts = []
    for row in (row for row in losses if row.precision == fewest):
        seeds, decimals = row.estimate.seeds, decimals_for(row.half_width, 4)
        if seeds is None or seeds.sd is None:
            continue
        items = Estimate(row.value, seeds.item_low, seeds.item_high)
        each = ", ".join(signed(value, decimals) for value in seeds.values)
        sizes = [fixed(seeds.item_se, decimals), fixed(seeds.sd, decimals)]
        over_items = format_estimate(items, signs=True)
        texts.append((f"{row.arm}, {row.task}, {label(fewest)}", *sizes, each, over_items, row.text()))
    head = ("arm", "SE over items", "SD of seeds", "each seed", "over items alone", "with seeds")
    return Grid(head, tuple(texts), "How much is luck: held-out loss, nats per token, 95 % intervals", (0, 3))


def _comparison_grid(rows: list[Comparison], with_arm: bool) -> Grid:
    """Every comparison with its corrected p and what the verdict's rule says of it."""
    texts = []
    for row in rows:
        sizes = count(row.estimate.n), count(row.estimate.documents)
        corrected = "headline" if row.is_headline else p_value(row.p_holm)
        name = f"{row.task}, {label(row.precision)}"
        texts.append(((f"{row.arm}, {name}" if with_arm else name), row.text(), row.unit_text, *sizes,
                      p_value(row.p), corrected, row.outcome))  # fmt: skip
    head = ("comparison", "difference [95 %]", "unit", "items", "documents", "p", "p (Holm)", "arm is")
    caption = "Every paired comparison (arm - baseline); p corrected over all arms, the headline apart"
    return Grid(head, tuple(texts), caption, (0, 2, 6, 7), folded=with_arm)


# Scores


def scores_section(run: Run, plots: Plots) -> Section:
    """What quantization costs each arm, and the main arm's comparisons."""
    more = has_more_arms(run)
    rows = [row for row in comparisons(run) if row.arm == run.main_arm]
    lead = (
        "The same items scored on the torch model and on every bundle that ships, through the same scorer. "
        "Absolute scores have wide intervals because texts differ in difficulty; the paired difference takes "
        "that out."
    )
    grids = [_comparison_grid(rows, False), _mean_grid(run), _log_likelihood_grid(run), _bytes_grid(run)]
    names = existing(plots, *(() if more else ("differences",)), "scores")
    return section("scores", "Scores and quantization", grids, lead, plots=names)


def _mean_grid(run: Run) -> Grid:
    """The mean over tasks, a row for each arm and precision."""
    rows, left_out = [], dict[str, None]()
    for arm, by_precision in run.means.items():
        for precision, mean in by_precision.items():
            left_out |= dict.fromkeys(f"{task} ({why})" for task, why in mean.left_out.items())
            scores = fixed(100 * mean.first, 1), fixed(100 * mean.second, 1)
            half = mean.estimate.half_width
            visible = MISSING if half is None else fixed(100 * detectable(half), 1)
            texts = (*scores, format_estimate(mean.estimate, 100, signs=True), visible)
            rows.append((f"{arm}, {label(precision)}", str(len(mean.tasks)), *texts))
    without = f"; without {', '.join(left_out)} where it is so" if left_out else ""
    caption = f"Mean over the tasks that count right answers, each task once{without}"
    head = ("mean of tasks", "tasks", "baseline, %", "arm, %", "difference, points", "could be seen, points")
    return Grid(head, tuple(rows), caption)


def _log_likelihood_grid(run: Run) -> Grid:
    rows = []
    for precision, tasks in run.comparisons.get(run.main_arm or "", {}).items():
        for task, difference in tasks.items():
            name = next((one for one in LOG_LIKELIHOODS if one in difference.metrics), None)
            if name is not None:
                one = difference.metrics[name]
                shown = format_estimate(one.estimate, signs=True), LOG_LIKELIHOODS[name]
                rows.append(
                    (f"{task}, {label(precision)}", fixed(one.first, 3), fixed(one.second, 3), *shown)
                )
    head = ("task", "baseline", str(run.main_arm), "difference [95 %]", "unit")
    caption = "Right answers' negative log-likelihood: it moves before accuracy does (lower is better)"
    return Grid(head, tuple(rows), caption, (0, 4), folded=True)


def _bytes_grid(run: Run) -> Grid:
    """Bits per byte: perplexity made comparable between tokenizers."""
    rows = [
        (f"{arm}, {label(precision)}", task, format_estimate(score.metrics["bits_per_byte"].estimate))
        for arm in run.arms
        for precision in run.precisions
        for task, score in run.measured(arm, precision).scores.items()
        if "bits_per_byte" in score.metrics
    ]
    return Grid(("model", "task", "bits per byte [95 %]"), tuple(rows), "Bits per byte", (0, 1), folded=True)


# Divergence


def divergence_section(run: Run) -> Section:
    """KL of bundles from their fp32 parents and of the arms from each other, and the noise floor."""
    lead = (
        "KL divergence of the next-token distributions on held-out text, in nats: what perplexity averages "
        "away. Quantization moves a model away from its parent; training moves the arms apart."
    )
    grids = [
        _divergence_grid(run, "parent", "Bundle against its fp32 parent"),
        _divergence_grid(run, "baseline", "Arm against the baseline, at the same precision"),
        _noise_grid(run),
    ]
    return section("divergence", "Divergence, token by token", grids, lead)


def _divergence_grid(run: Run, reference: str, caption: str) -> Grid:
    rows = []
    for precision in run.precisions:
        for arm in run.arms:
            one = run.measured(arm, precision).divergence.get(reference)
            if one is not None:
                kl = (one.mean_kl, one.median_kl, one.p90_kl, one.p99_kl, one.max_kl)
                shares = percent(one.top1_agreement), percent(one.top5_overlap)
                rows.append((f"{label(precision)}, {arm}", *map(small, kl), *shares, count(one.tokens)))
    head = (
        "model",
        "mean KL",
        "median",
        "p90",
        "p99",
        "largest",
        "same top token",
        "top 5 in common",
        "tokens",
    )
    return Grid(head, tuple(rows), f"{caption}, nats")


def _noise_grid(run: Run) -> Grid:
    ways = {"threads": "another number of threads", "attention": "another attention kernel"}
    rows = []
    for precision in run.precisions:
        noise = next((one for arm in run.arms if (one := run.measured(arm, precision).noise)), None)
        if noise is not None:
            texts = (_shift(noise.variants.get(way)) for way in ways)
            rows.append((label(precision), *texts, small(noise.floor)))
    head = ("baseline at", *(f"{way}, nats" for way in ways.values()), "noise floor, nats")
    caption = "The same model scored in another way: a difference no larger than the floor is none"
    return Grid(head, tuple(rows), caption)


def _shift(estimate: Estimate | None) -> str:
    """Sizes of 1e-8 need significant digits, not decimals."""
    if estimate is None or not estimate.has_interval:
        return MISSING if estimate is None else small(estimate.value)
    return f"{small(estimate.value)} [{small(estimate.low)}, {small(estimate.high)}]"


# Condensation

CONDENSATION = (
    "Embedding condensation: layer by layer the token vectors of one sequence point into an ever narrower "
    "cone, more so in small models. Dispersion loss works against it."
)
CORRELATIONS = (
    "Spearman and Kendall: rank correlation of a layer's mean cosine with its depth, the embedding counted "
    "and the last layer after the final norm, as in the paper; 1 is condensation at every step. Intervals: "
    "95 %, from a bootstrap over sequences."
)
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


def condensation_section(run: Run, plots: Plots) -> Section:
    """The paper's heatmap, the layer curves, what quantization changes, and their numbers."""
    profiles = {
        f"{arm}, {label(precision)}": profile
        for arm in run.arms
        for precision in run.precisions
        if (profile := run.measured(arm, precision).condensation) is not None
    }
    sizes = sorted({(one.tokens, one.sequences) for one in profiles.values()})
    notes = [f"Measured on {count(tokens)} tokens in {count(number)} sequences." for tokens, number in sizes]
    names = (
        "condensation_heatmap",
        "condensation_layers",
        "condensation_precisions",
        "condensation_outliers",
    )
    torch = {name: one for name, one in profiles.items() if name.endswith(label("torch"))}
    return section(
        "condensation",
        "Condensation",
        [model_grid(profiles), *(layer_grid(name, one) for name, one in torch.items())],
        CONDENSATION
        + " Measured on held-out text, in torch in full precision and in the graph of every bundle.",
        plots=existing(plots, *names),
        notes=(*notes, CORRELATIONS) if profiles else (),
    )


def model_grid(profiles: dict[str, Condensation]) -> Grid:
    """Every model: mean over layers, both correlations, and the paired change of the mean cosine."""
    rows = [
        (name, *profile_texts(one), profile_texts(one.change, signs=True)[0] if one.change else MISSING)
        for name, one in profiles.items()
    ]
    caption = (
        "Mean cosine over all layers, and its correlation with depth. Change: of an arm against the "
        "baseline, of "
        "a bundle against its own torch model, paired by sequence"
    )
    return Grid(
        ("model", "mean cosine", "Spearman", "Kendall", "change of mean cosine"), tuple(rows), caption
    )


def profile_texts(profile: Condensation, signs: bool = False) -> tuple[str, ...]:
    """Mean cosine, Spearman and Kendall, each with its interval."""
    estimates = (profile.mean_cosine, *(profile.correlations.get(name) for name in ("spearman", "kendall")))
    return tuple(format_estimate(one, signs=signs) for one in estimates)


def layer_grid(name: str, profile: Condensation, signs: bool = False) -> Grid:
    """Every figure of every layer."""
    layers = [*profile.layers, *([profile.final_norm] if profile.final_norm else [])]
    rows = tuple(
        (layer_name(layer), *(format_estimate(layer.figures.get(key), signs=signs) for key in FIGURES))
        for layer in layers
    )
    return Grid(("layer", *FIGURES.values()), rows, f"{name}, layer by layer", folded=True)


def layer_name(layer: LayerProfile) -> str:
    return "after the final norm" if layer.layer is None else str(layer.layer)


# Survival

SURVIVAL = (
    "A short training moves a weight by a fraction of a quantization step. A change of more than half a step "
    "more likely than not lands on another integer. A smaller one now and then moves an integer by a whole "
    "step: it is there on average over many weights, but under rounding noise, which the cosine shows."
)
SURVIVED = {
    "nothing": "nothing measurable to survive",
    "kept": "still there",
    "weaker": "there, but weaker",
    "stronger": "there, and stronger",
    "reversed": "reversed",
    "unclear": "no longer clear",
}


def survival_section(run: Run, plots: Plots) -> Section:
    """What quantization leaves of training: in the loss, and in the weights."""
    losses = tuple(
        (
            f"{task}, {label(precision)}, {arm}",
            SURVIVED.get(one.verdict, MISSING),
            *(format_estimate(part, signs=True) for part in (one.full, one.quantized, one.change)),
        )
        for precision in run.precisions
        for arm in run.arms
        for task, one in run.loss_survival.get(arm, {}).get(precision, {}).items()
    )
    loss_caption = (
        "Difference of the loss from the baseline, nats per token, before and after quantization, on the "
        "same "
        "documents, with 95 % intervals. Change: quantized - full precision"
    )
    head = ("loss", "the difference is", "full precision", "quantized", "change")
    weights_caption = (
        "Change of the quantized weights, in steps of the grid that ships. Slope: of the rounded change "
        "upon the "
        "change, 1 where it is all there on average. Cosine: between both; what it lacks of 1 is noise"
    )
    parts = ("change", "change, rms in steps", "over half a step", "integers moved", "slope", "cosine")
    grids = [
        Grid(head, losses, loss_caption, (0, 1)),
        Grid(parts, _delta_rows(run, "bits", " bits"), weights_caption),
        Grid(parts, _delta_rows(run, "components", ""), "The same by component", folded=True),
    ]
    title = "What quantization leaves of training"
    return section(
        "survival", title, grids, SURVIVAL, plots=existing(plots, "survival"), notes=tuple(_delta_notes(run))
    )


def _deltas(run: Run) -> Iterator[tuple[str, Json]]:
    for precision in run.precisions:
        for arm in run.arms:
            if record := run.delta_survival.get(arm, {}).get(precision):
                yield f"{label(precision)}, {arm}", record


def _delta_rows(run: Run, part: str, unit: str) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            f"{name} - {reference}, {key}{unit}",
            small(figures.get("rms_steps")),
            *(percent(figures.get(key), 2) for key in ("beyond_half_step", "integers_moved")),
            *(fixed(figures.get(key), 3) for key in ("slope", "cosine")),
        )
        for name, record in _deltas(run)
        for reference, against in record["references"].items()
        for key, figures in (against.get(part) or {}).items()
    )


def _delta_notes(run: Run) -> Iterator[str]:
    for name, record in _deltas(run):
        if unmatched := record.get("unmatched"):
            number = len(unmatched)
            yield f"{name}: {number} packed tensors were not found in the torch models, and are not counted."
        if record["references"].get("base", {"total": 1}).get("total") is None:
            yield f"{name}: no weight is stored on a block grid that the change could be compared on."
        nearest = record.get("nearest")
        if nearest is not None and nearest < 0.9999:
            yield (
                f"{name}: {percent(nearest)} of the shipped integers are the nearest ones; the method moved "
                "the others on purpose, and integers moved are counted as if all were rounded to nearest."
            )
    for arm, training in run.training.items():
        if (training.merge_audit or {}).get("chosen") == "dequantized":
            yield f"{arm}: merged into the dequantized base, so its change holds that rounding too."


# Bits by weight


def searches(run: Run) -> dict[str, Json]:
    """Arm -> the search for bits by weight; arms that follow another's search are left out."""
    found = {arm: run.bundles.get(arm, {}).get("int4") for arm in run.arms}
    return {
        arm: one.search for arm, one in found.items() if one and one.search and "decided_by" not in one.search
    }


def mixed_section(run: Run, plots: Plots) -> Section:
    """What a search for bits by weight chose, and the assignments it chose from."""
    facts, grids = [], []
    for arm in run.arms:
        bundle = run.bundles.get(arm, {}).get("int4")
        if bundle is not None and bundle.search:
            facts.append((f"int4, {arm}", _search_text(bundle.search)))
    for arm, search in searches(run).items():
        points = tuple(
            (str(row.get("name")), megabytes(row.get("size_bytes")), small(row.get("predicted_kl")),
             small(row.get("measured_kl")), fixed(row.get("decode_ratio"), 2))
            for row in search.get("points", [])
        )  # fmt: skip
        head = ("assignment", "MB", "KL, predicted", "KL, measured", "decode to uniform int4, predicted")
        grids.append(Grid(head, points, f"{arm}: whole assignments (decode predicted from bytes read)"))
        alone = search.get("sensitivity") or {}
        weights = tuple(
            (str(row["name"]), _stored(row), megabytes(row.get("size_bytes")), small(alone.get(row["name"])))
            for row in run.bundles[arm]["int4"].tensors
        )
        columns = ("weight", "stored as", "MB", "KL of it alone at 4 bits")
        grids.append(Grid(columns, weights, f"{arm}: the assignment", (0, 1), folded=True))
    lead = (
        "Bits, group and method of each weight were chosen by a search: the least predicted KL divergence "
        "from the unrounded model within the budget. Sensitivities were measured on training text."
    )
    return section(
        "mixed", "Bits by weight", grids, lead, facts=tuple(facts), plots=existing(plots, "pareto")
    )


def search_text(run: Run) -> str:
    """The choice of each arm as lines for a terminal; empty without a search."""
    lines = []
    for arm, search in searches(run).items():
        lines.append(f"int4, {arm}: {_search_text(search)}")
        by_component: dict[str, Counter[str]] = {}
        for row in run.bundles[arm]["int4"].tensors:
            by_component.setdefault(str(row.get("component")), Counter())[_stored(row)] += 1
        for component, kinds in by_component.items():
            stored = ", ".join(f"{times} x {kind}" for kind, times in kinds.most_common())
            lines.append(f"  {component:10} {kinds.total():>3} weights  {stored}")
    return "\n".join(lines)


def _stored(row: Json) -> str:
    zero = "symmetric" if row.get("symmetric") else "asymmetric"
    return f"{row.get('bits')} bits g{row.get('group')} {zero} {row.get('method')}"


def _search_text(search: Json) -> str:
    measured = f"KL {small(search.get('measured_kl'))} nats"
    perplexity = f"perplexity on training text {change(search.get('perplexity_increase'))}"
    if "decided_by" in search:
        return f"stored as {search['decided_by']} is: {measured}, {perplexity}"
    goal = search.get("goal") or {}
    budget = goal.get("budget")
    limit = f"perplexity + {percent(goal.get('max_perplexity_increase'))}"
    wanted = f"at most {megabytes(budget)} MB" if budget is not None else limit
    parts = [
        f"{wanted} asked; {megabytes(search.get('size_bytes'))} MB",
        f"{measured} (predicted {small(search.get('predicted_kl'))})",
        f"{perplexity} on {count(search.get('perplexity_tokens'))} tokens",
    ]
    if after := search.get("gptq"):
        kl, increase = small(after.get("measured_kl")), change(after.get("perplexity_increase"))
        parts.append(f"after gptq KL {kl}, perplexity {increase}")
    return ", ".join(parts)


# Adapters


def merge_section(run: Run) -> Section:
    """Held-out loss with the adapter on, merged and quantized. Empty without adapters."""
    audits = {arm: one.merge_audit for arm, one in run.training.items() if one.merge_audit}
    names = dict.fromkeys(row["name"] for audit in audits.values() for row in audit["rows"])
    rows = []
    for name in names:
        cells = [str(name)]
        for audit in audits.values():
            row: Json = next((row for row in audit["rows"] if row["name"] == name), {})
            shown = MISSING if name == "adapter on" else format_estimate(_estimate(row), signs=True)
            cells += [fixed(row.get("loss"), 4), shown]
        rows.append(tuple(cells))
    head = ["model", *(text for arm in audits for text in (f"{arm}, loss", f"{arm}, from adapter on [95 %]"))]
    facts, notes = [], dict[str, None]()
    for arm, audit in audits.items():
        facts.append((arm, f"merged into {run.training[arm].merged_into}, because {audit.get('why')}"))
        gains = [
            format_estimate(_estimate(audit["gains"].get(key) or {}), signs=True) for key in ("fp32", "int4")
        ]
        worth = f"{gains[0]} nats per token from the base to the merged model, {gains[1]} from int4 to int4"
        facts.append((f"{arm}, worth of the adapter", worth))
        notes |= dict.fromkeys([f"{arm}: {audit['warning']}."] if audit.get("warning") else [])
        notes[_audit_note(audit)] = None
    lead = (
        "Held-out loss in nats per token with the adapter on, merged into each base it can be merged into, "
        "and on "
        "the int4 grid: lower is better. Differences are from the same arm's adapter on, paired by block."
    )
    return section(
        "merge_audit",
        "Merge audit",
        [Grid(tuple(head), tuple(rows))],
        lead,
        facts=tuple(facts),
        notes=tuple(notes),
    )


def _estimate(record: Json) -> Estimate:
    return Estimate(record.get("difference"), record.get("low"), record.get("high"))


def _audit_note(audit: Json) -> str:
    grid = audit.get("grid") or {}
    kind = "symmetric" if grid.get("symmetric") else "asymmetric"
    measured_on = (
        f"{count(audit.get('tokens'))} tokens of {plural(audit.get('blocks') or 0, 'held-out block')}"
    )
    return (
        f"Measured in torch on {measured_on}. int4 rows: weights alone, rounded to nearest in {kind} groups "
        "of "
        f"{grid.get('group')}, embedding and head at {grid.get('head_bits')} bits. Rounding of activations "
        "shows "
        "in the bundles' scores alone."
    )


def arm_name(arm: str) -> str:
    return "dispersed arm" if arm == DISPERSED else f"arm {arm}"
