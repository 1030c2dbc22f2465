"""The sections about the run itself: fairness, training, parity, sizes, times, reproduction, limits."""

from __future__ import annotations

from collections.abc import Callable

from edgedisp.core.results import BASELINE, Bundle, Json, Parity, Training
from edgedisp.core.run import Run, Stage
from edgedisp.report.formatting import (
    MISSING,
    count,
    duration,
    fixed,
    label,
    leaves,
    megabytes,
    percent,
    plural,
    setting,
    short_hash,
    significant,
    small,
)
from edgedisp.report.layout import TERMS, TEXTS, Grid, Section, grid, section
from edgedisp.report.result_sections import measured
from edgedisp.report.verdict import RULES

# Fairness


def fairness_section(run: Run) -> Section:
    """What was compared, and what the arms share."""
    if run.runs:
        of_run: dict[str, Callable[[Json], str]] = {
            "base model": lambda one: str(one.get("base") or MISSING),
            "its weights": lambda one: short_hash(one.get("weights_sha256")),
            "training text": lambda one: short_hash(one.get("tokens_sha256")),
            "context": lambda one: count(one.get("context")),
            "held-out documents": lambda one: count(one.get("heldout_documents")),
        }
        rows = [(str(one.get("title")), one) for one in run.runs]
        return section(
            "fairness", [grid("run", rows, of_run, "The runs, joined on the items that both were asked")]
        )
    model, corpus = run.model, run.corpus
    texts = {
        "base model": model.get("base"),
        "architecture": model.get("architecture"),
        "parameters": count((model.get("parameters") or {}).get("total")),
        "initial weights": model.get("weights_sha256") and f"SHA-256 {short_hash(model['weights_sha256'])}",
        "source of the text": sources_text(corpus),
        "training tokens": count(corpus.get("train_tokens")),
        "training documents": count(corpus.get("train_documents")),
        "epochs": fixed(corpus.get("epochs"), 2),
        "tokens in order": corpus.get("tokens_sha256") and f"SHA-256 {short_hash(corpus['tokens_sha256'])}",
        "held-out documents": count(corpus.get("heldout_documents")),
        "context": count(corpus.get("context")),
    }
    facts = [(name, str(text)) for name, text in texts.items() if text and text != MISSING]
    notes, grids = [], []
    if run.compared_arms and run.baseline_is is None:
        arms = run.compared_arms
        columns = {arm: lambda check, arm=arm: check(run, arm) for arm in arms}
        grids = [grid("same as the baseline?", CHECKS.items(), columns, "Is the comparison fair?")]
        for arm in arms:
            if _same_settings(run, arm) == "NO":
                notes.append(f"{arm} differs in {', '.join(differing_settings(run, arm) or [])}.")
    return section("fairness", [*grids, _settings_grid(run)], facts=facts, notes=notes)


def sources_text(corpus: Json) -> str:
    """The sources of the training text in a line."""
    sources = corpus.get("sources") or []
    return "; ".join(str(one.get("source", one) if isinstance(one, dict) else one) for one in sources)


def _trainings(run: Run, arm: str) -> list[tuple[Training, Training]]:
    """Per seed the trainings of (baseline, arm)."""
    return list(zip(run.trainings(BASELINE).values(), run.trainings(arm).values()))


def _holds(checks: list[bool]) -> str:
    """An en dash where nothing was recorded."""
    return MISSING if not checks else "yes" if all(checks) else "NO"


def _same_settings(run: Run, arm: str) -> str:
    names = differing_settings(run, arm)
    return MISSING if names is None else _holds(["dispersion" in name for name in names] or [True])


def _different_weights(run: Run, arm: str) -> str:
    pairs = [(first.weights_sha256, second.weights_sha256) for first, second in _trainings(run, arm)]
    return _holds([first != second for first, second in pairs if first and second])


CHECKS: dict[str, Callable[[Run, str], str]] = {
    "loss before the first update": lambda run, arm: _holds([a == b for a, b in run.first_losses(arm)]),
    "steps and tokens": lambda run, arm: _holds(
        [(a.steps, a.tokens) == (b.steps, b.tokens) for a, b in _trainings(run, arm)]
    ),
    "optimizer, schedule, seed": _same_settings,
    "trained weights differ": _different_weights,
}


def differing_settings(run: Run, arm: str) -> list[str] | None:
    """Dotted names of the settings in which an arm differs from the baseline, None if not recorded."""
    names: set[str] = set()
    pairs = _trainings(run, arm)
    for first, second in pairs:
        before, after = dict(leaves(first.settings)), dict(leaves(second.settings))
        if not before or not after:
            return None
        names |= {key for key in before | after if before.get(key) != after.get(key)}
    return sorted(names) if pairs else None


def _settings_grid(run: Run) -> Grid:
    """Every training setting by arm."""
    by_arm = {
        arm: {**dict(leaves(one.settings)), "processes": one.processes}
        for arm, one in run.training.items()
        if one.settings
    }
    keys = dict.fromkeys(key for settings in by_arm.values() for key in settings)
    columns = {arm: lambda key, arm=arm: setting(by_arm[arm].get(key)) for arm in by_arm}
    return grid("setting", [(key, key) for key in keys], columns, "Training settings", folded=True)


# Training


def training_section(run: Run) -> Section:
    """The curves and, per training, what it took."""
    columns: dict[str, Callable[[Training], str]] = {
        "steps": lambda one: count(one.steps),
        "tokens": lambda one: count(one.tokens),
        "time": lambda one: duration(one.seconds),
        "tokens/s": lambda one: significant(one.tokens_per_s),
        "peak memory, MB": lambda one: megabytes(one.peak_memory_bytes),
        "last loss": lambda one: fixed(one.log[-1].get("loss") if one.log else None, 3),
        "last dispersion": lambda one: fixed(one.log[-1].get("dispersion") if one.log else None, 4),
    }
    rows = [item for arm in run.arms for item in run.trainings(arm).items()]
    speed = run.training[BASELINE].tokens_per_s if BASELINE in run.training else None
    notes = [
        f"{arm} trained at {percent(one.tokens_per_s / speed)} of the baseline's speed."
        for arm, one in run.training.items()
        if arm != BASELINE and speed and one.tokens_per_s
    ]
    return section("training", [grid("arm", rows, columns)], plots=("training",), notes=notes)


# What ships


def parity_section(run: Run) -> Section:
    """How far each bundle is from its torch model, and whether the device runtime opens it."""

    def genai(one: Parity) -> str:
        return (
            MISSING
            if not one.genai
            else "opened"
            if one.genai.get("opened")
            else f"no: {one.genai.get('reason')}"
        )

    def limits(one: Parity) -> str:
        return ", ".join(f"{key} {small(value)}" for key, value in one.limits.items() if value is not None)

    columns: dict[str, Callable[[Parity], str]] = {
        "max abs difference": lambda one: small(one.max_abs_difference),
        "mean KL": lambda one: small(one.mean_kl),
        "same top token": lambda one: percent(one.top1_agreement),
        "same greedy text": lambda one: percent(one.greedy_agreement),
        "tokens": lambda one: count(one.tokens),
        "onnxruntime-genai": genai,
        "limits": lambda one: limits(one) or MISSING,
        "passed": lambda one: "yes" if one.passed else "NO",
    }
    return section("verify", [grid("bundle", measured(run, lambda one: one.parity), columns)])


def sizes_section(run: Run) -> Section:
    """Where the parameters are, and how large each bundle is."""
    parameters = run.model.get("parameters") or {}
    total, rows = parameters.get("total") or 0, []
    for name in ("embedding", "attention", "mlp", "norm", "head", "total") if total else ():
        is_tied = name == "head" and parameters.get("tied")
        rows.append((f"{name} (tied)", 0) if is_tied else (name, parameters.get(name, 0)))
    columns: dict[str, Callable[[int], str]] = {
        "parameters": count,
        "share": lambda size: percent(size / total),
    }
    shares = tuple(size / total for _, size in rows)
    bundles = [
        (f"{label(precision)}, {arm}", run.bundles[arm][precision])
        for precision in run.precisions
        for arm in run.arms
        if precision in run.bundles.get(arm, {})
    ]

    def nodes(one: Bundle) -> str:
        most = sorted(one.nodes.items(), key=lambda item: -item[1])[:4]
        return ", ".join(f"{node} {count(number)}" for node, number in most) or MISSING

    largest = max((one.size_bytes for _, one in bundles), default=1)
    bars = tuple(one.size_bytes / largest for _, one in bundles)
    of_bundle = {"MB": lambda one: megabytes(one.size_bytes), "most frequent nodes": nodes}
    grids = [
        grid("component", rows, columns, "Parameters", bars=shares),
        grid("bundle", bundles, of_bundle, "Bundles", bars=bars),
    ]
    return section("sizes", grids)


# Times, reproduction, limits


def stages_section(run: Run) -> Section:
    """What took how long, and what was taken from an earlier run."""
    longest = max((stage.seconds for stage in run.stages), default=0.0) or 1.0
    columns: dict[str, Callable[[Stage], str]] = {
        "time": lambda one: duration(one.seconds),
        "this run": lambda one: "cached" if one.cached else "new",
    }
    rows = [(one.name, one) for one in run.stages]
    fresh = [stage.seconds for stage in run.stages if not stage.cached]
    note = f"In this run: {duration(sum(fresh))}. Cached: {plural(len(run.stages) - len(fresh), 'stage')}."
    table = grid("stage", rows, columns, bars=tuple(stage.seconds / longest for stage in run.stages))
    return section("stages", [table], notes=[note] if rows else [])


def reproduce_section(run: Run) -> Section:
    """Command, recipe, versions, machine."""
    machine = [
        (name, f"{megabytes(value)} MB" if name.endswith("_bytes") and value else setting(value))
        for name, value in leaves(run.machine)
    ]
    facts = [("created", run.created), ("git commit", run.git_commit)]
    code = [("Command", run.command), ("Recipe", run.recipe_yaml)]
    return section(
        "reproduce",
        [
            Grid(("machine", "value"), tuple(machine), "Machine"),
            Grid(("package", "version"), tuple(run.versions.items()), "Versions", folded=True),
        ],
        facts=[fact for fact in facts if fact[1]],
        code=[part for part in code if part[1]],
    )


def limits_section(run: Run) -> Section:
    """What the numbers mean, and the verdict's rules."""
    seeds = len(run.seeds)
    luck = TERMS["several_seeds"].format(seeds) if seeds > 1 else TERMS["one_seed"]
    rules = tuple((str(place), rule) for place, rule in enumerate(RULES, 1))
    notes = [*TEXTS["lists"]["limits"], luck]
    return section("limits", [Grid(("", "rule"), rules, "Rules of the verdict")], notes=notes)
