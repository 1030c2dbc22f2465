"""The sections about the run itself: fairness, training, adapters, bits, parity, sizes, times, limits."""

from __future__ import annotations

from collections import Counter

from edgedisp.core.results import BASELINE, Estimate, Json
from edgedisp.core.run import Run
from edgedisp.report import formatting as fmt
from edgedisp.report.layout import Grid, Section, facts, grid, notes, section
from edgedisp.report.result_sections import measured, models
from edgedisp.report.verdict import RULES

COMPONENTS = ("embedding", "attention", "mlp", "norm", "head", "total")


# Fairness


def fairness_section(run: Run) -> Section:
    """What was compared, and what the arms share."""
    if run.runs:
        return section(
            "fairness", [grid("runs", [(str(joined.get("title")), joined) for joined in run.runs])]
        )
    about = facts("run", {"model": run.model, "corpus": run.corpus, "sources": sources_text(run.corpus)})
    checks: dict[str, dict[str, str]] = {}
    remarks = []
    for arm in run.compared_arms if run.baseline_is is None else []:
        for name, passed in fairness_checks(run, arm).items():
            checks.setdefault(name, {})[arm] = fmt.yes_no(passed)
        if checks["optimizer, schedule, seed"][arm] == "NO":
            remarks.append(f"{arm} differs in {', '.join(differing_settings(run, arm) or [])}.")
    by_arm = {
        arm: {**dict(fmt.leaves(training.settings)), "processes": training.processes}
        for arm, training in run.training.items()
        if training.settings
    }
    keys = dict.fromkeys(key for settings in by_arm.values() for key in settings)
    settings = [(key, {arm: fmt.setting(by_arm[arm].get(key)) for arm in by_arm}) for key in keys]
    return section(
        "fairness", [grid("fairness", checks.items()), grid("settings", settings)], facts=about, notes=remarks
    )


def sources_text(corpus: Json) -> str:
    """The sources of the training text in a line."""
    sources = corpus.get("sources") or []
    return "; ".join(str(item.get("source", item) if isinstance(item, dict) else item) for item in sources)


def fairness_checks(run: Run, arm: str) -> dict[str, bool | None]:
    """Whether an arm had what the baseline had, over all seeds; None where nothing was recorded."""
    pairs = list(zip(run.trainings(BASELINE).values(), run.trainings(arm).values()))
    names = differing_settings(run, arm)
    checks = {
        "loss before the first update": [first == second for first, second in run.first_losses(arm)],
        "steps and tokens": [(a.steps, a.tokens) == (b.steps, b.tokens) for a, b in pairs],
        "optimizer, schedule, seed": ["dispersion" in name for name in names or []] or [True] * (names == []),
        "trained weights differ": [
            a.weights_sha256 != b.weights_sha256 for a, b in pairs if a.weights_sha256 and b.weights_sha256
        ],
    }
    return {name: all(passed) if passed else None for name, passed in checks.items()}


def differing_settings(run: Run, arm: str) -> list[str] | None:
    """Dotted names of the settings in which an arm differs from the baseline, None if not recorded."""
    names: set[str] = set()
    pairs = list(zip(run.trainings(BASELINE).values(), run.trainings(arm).values()))
    for first, second in pairs:
        before, after = dict(fmt.leaves(first.settings)), dict(fmt.leaves(second.settings))
        if not before or not after:
            return None
        names |= {key for key in before | after if before.get(key) != after.get(key)}
    return sorted(names) if pairs else None


# Training and adapters


def training_section(run: Run) -> Section:
    """The curves and, per training, what it took."""
    rows = [item for arm in run.arms for item in run.trainings(arm).items()]
    return section("training", [grid("training", rows)], plots=("training",), notes=notes("training", run))


def merge_section(run: Run) -> Section:
    """Held-out loss with the adapter on, merged and quantized. Empty without adapters."""
    rows: dict[str, dict[str, str]] = {}
    about, remarks = [], dict[str, None]()
    for arm, training in run.training.items():
        if not (audit := training.merge_audit):
            continue
        for row in audit["rows"]:
            texts = rows.setdefault(row["name"], {})
            texts[f"{arm}, loss"] = fmt.fixed(row.get("loss"), 4)
            texts[f"{arm}, from adapter on [95 %]"] = _audit_text(row)
        about.append((arm, f"merged into the {audit.get('chosen')} base, because {audit.get('why')}"))
        gains = [_audit_text(audit["gains"].get(key)) for key in ("fp32", "int4")]
        worth = f"{gains[0]} nats per token from the base to the merged model, {gains[1]} from int4 to int4"
        about.append((f"{arm}, worth of the adapter", worth))
        remarks |= dict.fromkeys(notes("audit", arm, audit))
    return section("merge_audit", [grid("merge", rows.items())], facts=about, notes=remarks)


def _audit_text(record: Json | None) -> str:
    record = record or {}
    if record.get("name") == "adapter on":
        return fmt.MISSING
    difference = Estimate(record.get("difference"), record.get("low"), record.get("high"))
    return fmt.format_estimate(difference, signs=True)


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
            weights = [
                (row["name"], {**row, "stored": _stored(row), "kl_alone": alone.get(row["name"])})
                for row in run.bundles[arm]["int4"].tensors
            ]
            grids.append(grid("assignments", points, f"{arm}: whole assignments"))
            grids.append(grid("weights", weights, f"{arm}: the assignment"))
    return section("mixed", grids, facts=about, plots=("pareto",))


def search_text(run: Run) -> str:
    """The choice of each search as lines for a terminal; empty without a search."""
    lines = []
    for arm, search in searches(run).items():
        if "decided_by" in search:
            continue
        lines.append(f"int4, {arm}: {' '.join(notes('search', search))}")
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


# What ships


def parity_section(run: Run) -> Section:
    """How far each bundle is from its torch model, and whether the device runtime opens it."""
    return section("verify", [grid("parity", measured(run, lambda model: model.parity))])


def sizes_section(run: Run) -> Section:
    """Where the parameters are, and how large each bundle is."""
    parameters = run.model.get("parameters") or {}
    total, rows = parameters.get("total") or 0, []
    for name in COMPONENTS if total else ():
        is_tied = name == "head" and bool(parameters.get("tied"))
        size = 0 if is_tied else parameters.get(name, 0)
        rows.append((f"{name} (tied)" if is_tied else name, {"size": size, "share": size / total}))
    all_bundles = [(name, run.bundles.get(arm, {}).get(precision)) for name, arm, precision in models(run)]
    bundles = [(name, bundle) for name, bundle in all_bundles if bundle]
    largest = max((bundle.size_bytes for _, bundle in bundles), default=1)
    grids = [
        grid("parameters", rows, bars=tuple(row["share"] for _, row in rows)),
        grid("bundles", bundles, bars=tuple(bundle.size_bytes / largest for _, bundle in bundles)),
    ]
    return section("sizes", grids)


# Times, reproduction, limits


def stages_section(run: Run) -> Section:
    """What took how long, and what was taken from an earlier run."""
    longest = max((stage.seconds for stage in run.stages), default=0.0) or 1.0
    bars = tuple(stage.seconds / longest for stage in run.stages)
    table = grid("stages", [(stage.name, stage) for stage in run.stages], bars=bars)
    return section("stages", [table], notes=notes("stages", run.stages))


def reproduce_section(run: Run) -> Section:
    """Command, recipe, versions, machine."""
    machine = [
        (name, f"{fmt.megabytes(value)} MB" if name.endswith("_bytes") and value else fmt.setting(value))
        for name, value in fmt.leaves(run.machine)
    ]
    grids = [
        Grid(("machine", "value"), tuple(machine), "Machine"),
        Grid(("package", "version"), tuple(run.versions.items()), "Versions", folded=True),
    ]
    about = [("created", run.created), ("git commit", run.git_commit)]
    code = [("Command", run.command), ("Recipe", run.recipe_yaml)]
    return section("reproduce", grids, facts=about, code=code)


def limits_section(run: Run) -> Section:
    """What the numbers mean, and the verdict's rules."""
    rules = tuple((str(number), rule) for number, rule in enumerate(RULES, 1))
    return section("limits", [Grid(("", "rule"), rules, "Rules of the verdict")], notes=notes("limits", run))
