"""The sections of a report: one function a section, from a run to finished texts.

What the columns of a table show is in templates/tables.toml, the notes are in templates/notes.j2.
"""

from __future__ import annotations

import difflib
import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from edgedisp.core.results import ANSWERS_TASK, BASE, BASELINE, Condensation, Estimate, Json, Measurement
from edgedisp.core.run import Run
from edgedisp.report import formatting as fmt
from edgedisp.report.comparisons import comparisons, gains
from edgedisp.report.layout import TERMS, TEXTS, Grid, Section, facts, grid, notes, section

UNLIKE = 0.4  # answers less alike than this are shown without marks
shorten = partial(textwrap.shorten, width=160, placeholder=" …")
LOG_LIKELIHOODS = ("gold_bits_per_byte", "gold_nll", "word_nll")
"""Metrics of the right answer's log-likelihood; the first that a task has is shown."""
Value = TypeVar("Value")


def models(run: Run) -> list[tuple[str, str, str]]:
    """(`int4, dispersed`, arm, precision) of every model, most bits first, the base before the arms."""
    arms = [BASE, *run.arms] if run.has_base else run.arms
    pairs = [(arm, precision) for precision in run.precisions for arm in arms]
    return [(f"{fmt.label(precision)}, {arm}", arm, precision) for arm, precision in pairs]


def by_model(run: Run, values: Mapping[str, Mapping[str, Value]]) -> list[tuple[str, Value]]:
    """(`int4, dispersed`, value) of every model that has one in arm -> precision -> value."""
    return [(name, values[arm][key]) for name, arm, key in models(run) if key in values.get(arm, {})]


def measured(run: Run, figure: Callable[[Measurement], Any]) -> list[tuple[str, Any]]:
    """(`int4, dispersed`, a figure of it) of every model that has the figure."""
    rows = [(name, figure(measurement)) for name, measurement in by_model(run, run.measurements)]
    return [row for row in rows if row[1] is not None]


# What was compared


def fairness_section(run: Run) -> Section:
    """What was compared, and in which settings and facts of training the arms differ."""
    adds = [(arm, technique_text(run, arm)) for arm in run.compared_arms if arm in run.techniques]
    if run.runs:
        joined = [(str(origin.get("title")), origin) for origin in run.runs]
        return section("fairness", [grid("runs", joined)], TERMS["joined_runs"], facts=adds)
    about = facts("run", {"model": run.model, "corpus": run.corpus, "sources": sources_text(run.corpus)})
    about += adds
    by_arm = {
        arm: {  # what a fair comparison shares, and the hash of the weights, which differs
            "trained weights": fmt.short_hash(training.weights_sha256),
            "loss before the first update": training.first_loss,
            "steps": training.steps,
            "tokens": training.tokens,
            "processes": training.processes,
            **dict(fmt.leaves(training.settings)),
        }
        for arm, training in run.training.items()
    }
    rows = [
        (key, {arm: fmt.setting(settings.get(key)) for arm, settings in by_arm.items()})
        for key in dict.fromkeys(key for settings in by_arm.values() for key in settings)
    ]
    same = [row for row in rows if len(set(row[1].values())) == 1]
    grids = [grid("differs", [row for row in rows if row not in same]), grid("settings", same)]
    return section("fairness", grids, facts=about, notes=notes("fairness", run))


def sources_text(corpus: Json) -> str:
    """The sources of the training text in a line."""
    sources = corpus.get("sources") or []
    return "; ".join(str(item.get("source", item) if isinstance(item, dict) else item) for item in sources)


def technique_text(run: Run, arm: str) -> str:
    """What an arm's training adds to cross-entropy, such as `angular dispersion, weight 0.1, layers all`."""
    adds, texts = run.techniques.get(arm, {}), []
    if dispersion := adds.get("dispersion"):
        texts.append(f"{dispersion.get('variant', 'angular')} dispersion")
        texts += [f"{key} {fmt.setting(dispersion.get(key))}" for key in ("weight", "layers")]
    others = [(text, adds[key]) for key, text in TEXTS["techniques"].items() if adds.get(key) is not None]
    texts += [text.format(fmt.small(value)) for text, value in others]
    return ", ".join(texts) or ("nothing" if arm == BASELINE else fmt.MISSING)


# Scores


def scores_section(run: Run) -> Section:
    """Every comparison with its p, the spread of seeds, means over tasks, log-likelihoods."""
    several, rows = len(run.compared_arms) > 1, comparisons(run)
    named = [(f"{f'{row.arm}, ' * several}{row.task}, {fmt.label(row.precision)}", row) for row in rows]
    with_seeds = [(name, row) for name, row in named if row.unit == "nats" and row.estimate.seeds]
    log_likelihoods = [
        (f"{task}, {name}", next(compared.metrics[key] for key in LOG_LIKELIHOODS if key in compared.metrics))
        for name, differences in by_model(run, run.comparisons)
        for task, compared in differences.items()
        if not compared.metrics.keys().isdisjoint(LOG_LIKELIHOODS)
    ]
    over_base = [(f"{row.arm}, {row.task}, {fmt.label(row.precision)}", row) for row in gains(run)]
    grids = [
        grid("answers", measured(run, lambda model: model.scores.get(ANSWERS_TASK))),
        grid("gains", over_base),
        grid("seeds", with_seeds),
        grid("comparisons", named, folded=len(rows) > 20),
        grid("means", by_model(run, run.means)),
        grid("log_likelihoods", log_likelihoods),
    ]
    return section("scores", grids, plots=("differences", "scores"), notes=notes("scores", run))


# Wrong answers


def examples(run: Run) -> list[Json]:
    """The run's wrong answers {prompt, reference, answers}; answers: (models, pieces of `marked`), equal ones
    together, that of the main arm first, that of the base last. models: (name, precision)."""
    order, rows = [run.main_arm, *run.arms, BASE], []
    for answer in run.answers:
        models: dict[str, list[tuple[str, str]]] = {}
        for label, text in answer.answers.items():
            model, _, precision = label.partition("/")
            models.setdefault(plain(text), []).append((model, precision))
        texts = sorted(models, key=lambda text: min(order.index(model) for model, _ in models[text]))
        reference = plain(answer.reference)
        answers = [(models[text], marked(reference, text)) for text in texts]
        rows.append({"prompt": shorten(answer.prompt), "reference": reference, "answers": answers})
    return rows


def marked(reference: str, answer: str) -> list[tuple[str, str]]:
    """An answer in pieces (text, kind), word by word, white space aside. Kinds: `same` as the reference,
    `other`, `missing` (in the reference alone), for a whole answer `unlike`."""
    before, after = (re.findall(r"\s*(?:\w+|[^\w\s])", text) for text in (reference, answer))
    words, other_words = ([word.strip() for word in text] for text in (before, after))
    matcher = difflib.SequenceMatcher(None, words, other_words, autojunk=False)
    if matcher.ratio() < UNLIKE:
        return [(answer or "(nothing)", "unlike")]
    pieces = []
    for kind, first, last, start, stop in matcher.get_opcodes():
        text = "".join(after[start:stop] or before[first:last])
        pieces.append((text, "same" if kind == "equal" else "other" if start < stop else "missing"))
    return pieces


def plain(text: str) -> str:
    """A text cut to what fits; a call as `turn_on(area: "cellar")`, other JSON in its usual form."""
    try:
        value = json.loads(text)
    except ValueError:
        return shorten(text)
    return shorten("; ".join(map(_call, value if isinstance(value, list) else [value])))


def _call(value: Any) -> str:
    match value:
        case {"name": str(name), "arguments": dict(arguments)}:
            return f"{name}({', '.join(f'{key}: {_call(item)}' for key, item in arguments.items())})"
    return json.dumps(value, ensure_ascii=False)


# Condensation


def condensation_section(profiles: Mapping[str, Condensation], detailed: Sequence[str]) -> Section:
    """Heatmap, layer curves and mean cosines of models, and all figures of those `detailed`."""
    grids = [grid("models", profiles.items()), *(layer_grid(name, profiles[name]) for name in detailed)]
    plots, remarks = ("condensation_heatmap", "condensation_layers"), notes("condensation", profiles)
    return section("condensation", grids, plots=plots, notes=remarks)


def profile_grids(profiles: Mapping[str, Condensation]) -> list[Grid]:
    """One model or two: their means and correlations, all their layers, and last what differs."""
    grids, names = [*condensation_section(profiles, [*profiles]).grids], [*profiles]
    if changes := profiles[names[-1]].change:
        grids.append(layer_grid(f"{names[-1]} - {names[0]}, paired over sequences", changes, signs=True))
    return grids


def layer_grid(name: str, profile: Condensation, signs: bool = False) -> Grid:
    """Every figure of every layer; signs: for differences."""
    rows = []
    for layer in profile.layers:
        texts = {
            title: fmt.format_estimate(layer.figures.get(key), signs=signs)
            for key, title in TEXTS["figures"].items()
        }
        rows.append((str(layer.layer), texts))
    return grid("layers", rows, f"{name}, layer by layer")


# Training, and what is left of it


def merge_section(run: Run) -> Section:
    """Held-out loss with the adapter on, merged and quantized. Empty without adapters."""
    audits = {arm: training.merge_audit for arm, training in run.training.items() if training.merge_audit}
    rows, remarks = [], dict[str, None]()
    for arm, audit in audits.items():
        rows += [(f"{arm}: {row['name']}", {**row, "change": _change(row)}) for row in audit["rows"]]
        gains = {key: fmt.format_estimate(_change(row), signs=True) for key, row in audit["gains"].items()}
        remarks |= dict.fromkeys(notes("audit", arm, audit, gains))
    return section("merge_audit", [grid("merge", rows)], notes=remarks)


def _change(record: Json) -> Estimate:
    return Estimate(record.get("difference"), record.get("low"), record.get("high"))


def survival_section(run: Run) -> Section:
    """What quantization leaves of training: in the loss, and in the weights."""
    losses = [
        (f"{task}, {name}", loss)
        for name, by_task in by_model(run, run.loss_survival)
        for task, loss in by_task.items()
    ]
    records = by_model(run, run.delta_survival)
    weights = [
        (f"{name} - {reference}", against["total"])
        for name, record in records
        for reference, against in record["references"].items()
    ]
    grids = [grid("loss_survival", losses), grid("weight_survival", weights, TERMS["parameter_change"])]
    return section("survival", grids, notes=notes("survival", run, records))


# Bits by weight


def searches(run: Run) -> dict[str, Json]:
    """Arm -> the search for bits by weight; an arm may follow another's search (`decided_by`)."""
    bundles = {arm: run.bundles.get(arm, {}).get("int4") for arm in run.arms}
    return {arm: bundle.search for arm, bundle in bundles.items() if bundle and bundle.search}


def mixed_section(run: Run) -> Section:
    """What a search for bits by weight chose, and the assignments it chose from."""
    grids, about = [], []
    for arm, search in searches(run).items():
        about.append((f"int4, {arm}", notes("search", search)[0]))
        if "decided_by" not in search:
            alone = search.get("sensitivity") or {}
            points = [(str(row.get("name")), row) for row in search.get("points", [])]
            tensors = run.bundles[arm]["int4"].by_tensor
            weights = [(row["name"], {**row, "kl_alone": alone.get(row["name"])}) for row in tensors]
            grids.append(grid("assignments", points, f"{arm}: whole assignments"))
            grids.append(grid("weights", weights, f"{arm}: the assignment"))
    return section("mixed", grids, facts=about)


def search_text(run: Run) -> str:
    """The choice of each search as lines for a terminal; empty without a search."""
    return "\n".join(f"int4, {arm}: {notes('search', search)[0]}" for arm, search in searches(run).items())


# Reproduction


def reproduce_section(run: Run) -> Section:
    """Command, recipe, versions, machine."""
    machine = [
        (name, f"{fmt.megabytes(value)} MB" if name.endswith("_bytes") else fmt.setting(value))
        for name, value in fmt.leaves(run.machine)
    ]
    grids = [
        Grid(("machine", "value"), tuple(machine)),
        Grid(("package", "version"), tuple(run.versions.items()), "Versions", folded=True),
    ]
    about = [("created", run.created), ("git commit", run.git_commit)]
    code = [("Command", run.command), ("Recipe", run.recipe_yaml)]
    return section("reproduce", grids, facts=about, code=code)
