"""The sections about the run itself: fairness, training, what ships, times, reproduction, limits."""

from __future__ import annotations

from collections.abc import Callable

from edgedisp.core.results import BASELINE, DeviceResult, Json, Parity, Run, Timing
from edgedisp.report.formatting import (
    MISSING,
    count,
    duration,
    fixed,
    format_estimate,
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
from edgedisp.report.layout import Grid, Section, section
from edgedisp.report.result_sections import Plots, arm_name, existing
from edgedisp.report.verdict import RULES

LIMITS = (
    "Perplexity is the exponential of the mean loss per token on held-out text of the training text's kind; "
    "lower is better. It says how well the model predicts such text, not how well it answers.",
    "heldout_cloze asks for the last word of a passage; heldout_continuation for the true next sentence "
    "among four. Both are made from the held-out text. Higher is better; chance is 25 % for the second.",
    "Intervals are 95 % bootstrap intervals that resample documents, so that sentences of one document "
    "count together.",
    "A small token budget shows what this recipe does, not what dispersion does after 200 million tokens.",
    "Whether dispersion changes what quantization costs is an open question; the table shows this build's "
    "answer.",
    "Timings hold for this machine, these threads and this runtime.",
)
ONE_SEED = (
    "One training seed per arm. Another seed moves both arms; published gains of dispersion (0.7-1.5 points "
    "over ten tasks) are of the size of their own standard error."
)
SEVERAL_SEEDS = (
    "{} training seeds per arm: intervals hold the choice of test text and the spread between seeds. Two "
    "seeds make them wide, as two say little of a spread. A perplexity over seeds is that of the mean loss."
)


# Fairness


def fairness_section(run: Run) -> Section:
    """What was compared, and what the arms share."""
    title, model, corpus = "What was compared", run.model, run.corpus
    if run.runs:
        return section("fairness", title, [_runs_grid(run.runs)])
    sources = [
        one.get("source", one) if isinstance(one, dict) else one for one in corpus.get("sources") or []
    ]
    text = None
    if corpus.get("train_tokens") is not None:
        tokens, documents = count(corpus["train_tokens"]), count(corpus.get("train_documents"))
        epochs = f", {fixed(corpus['epochs'], 2)} epochs used" if corpus.get("epochs") is not None else ""
        text = f"{tokens} tokens from {documents} documents{epochs}"
    pairs = (
        ("base model", model.get("base")),
        ("architecture", model.get("architecture")),
        ("parameters", _known((model.get("parameters") or {}).get("total"))),
        ("source of the text", "; ".join(map(str, sources))),
        ("training text", text),
        ("held-out documents", _known(corpus.get("heldout_documents"))),
        ("context", _known(corpus.get("context"))),
    )
    head = ("condition", "holds", "evidence")
    has_twins = bool(run.compared_arms) and run.baseline_is is None
    grids = [Grid(head, _conditions(run) if has_twins else (), "Is the comparison fair?", (0, 1, 2))]
    facts = tuple((name, str(value)) for name, value in pairs if value)
    return section("fairness", title, [*grids, _settings_grid(run)], facts=facts)


def _known(value: float | None) -> str | None:
    return None if value is None else count(value)


def _runs_grid(runs: list[Json]) -> Grid:
    """Joined runs may differ in anything; the items that were paired do not."""
    rows = tuple(
        (
            str(run.get("title")),
            str(run.get("base") or MISSING),
            *(short_hash(run.get(key)) for key in ("weights_sha256", "tokens_sha256")),
            *(_known(run.get(key)) or MISSING for key in ("context", "heldout_documents")),
        )
        for run in runs
    )
    head = ("run", "base model", "its weights", "training text", "context", "held-out documents")
    return Grid(head, rows, "The runs, joined on the items that both were asked", (0, 1, 2, 3))


Check = Callable[[Run, str], tuple[bool | None, str]]
"""Whether a condition holds between an arm and the baseline (None: not recorded), and the evidence."""


def _conditions(run: Run) -> tuple[tuple[str, str, str], ...]:
    """Each condition of fairness over all arms: the first that breaks it, else the first arm's evidence."""
    tokens, weights = run.corpus.get("tokens_sha256"), run.model.get("weights_sha256")
    rows = [
        ("same tokens, same order", "yes" if tokens else "not recorded", f"SHA-256 {short_hash(tokens)}"),
        ("same initial weights", "yes" if weights else "not recorded", f"SHA-256 {short_hash(weights)}"),
    ]
    for name, check in CHECKS.items():
        results = {arm: check(run, arm) for arm in run.compared_arms}
        worst = min(results, key=lambda arm: {False: 0, None: 1, True: 2}[results[arm][0]])
        holds, evidence = results[worst]
        named = f"{worst}: {evidence}" if holds is not True and len(results) > 1 else evidence
        rows.append((name, {True: "yes", False: "NO", None: "not recorded"}[holds], named))
    return tuple(rows)


def _same_first_loss(run: Run, arm: str) -> tuple[bool | None, str]:
    """Before the first update the arms are one model on one batch: another loss is a fault."""
    pairs = run.first_losses(arm)
    if not pairs:
        return None, "not logged, or the technique changes the first loss"
    unlike = [f"{first:.6f} against {second:.6f}" for first, second in pairs if first != second]
    return (False, unlike[0]) if unlike else (True, ", ".join(f"{first:.6f}" for first, _ in pairs))


def _same_amount(run: Run, arm: str) -> tuple[bool | None, str]:
    trainings = [*run.trainings(BASELINE).values(), *run.trainings(arm).values()]
    texts = list(dict.fromkeys(f"{count(one.steps)} steps, {count(one.tokens)} tokens" for one in trainings))
    return (len(texts) == 1, " against ".join(texts)) if texts else (None, MISSING)


def _same_settings(run: Run, arm: str) -> tuple[bool | None, str]:
    names = differing_settings(run, arm)
    if names is None:
        return None, MISSING
    others = [name for name in names if "dispersion" not in name]
    seeds = ", ".join(str(one.settings.get("seed")) for one in run.trainings(BASELINE).values())
    return (
        (False, f"they differ in {', '.join(others)}")
        if others
        else (True, f"only what an arm adds; seed {seeds}")
    )


def differing_settings(run: Run, arm: str) -> list[str] | None:
    """Dotted names of the settings in which an arm differs from the baseline, None if not recorded."""
    names: set[str] = set()
    pairs = list(zip(run.trainings(BASELINE).values(), run.trainings(arm).values()))
    for first, second in pairs:
        before, after = dict(leaves(first.settings)), dict(leaves(second.settings))
        if not before or not after:
            return None
        names |= {key for key in before | after if before.get(key) != after.get(key)}
    return sorted(names) if pairs else None


def _different_weights(run: Run, arm: str) -> tuple[bool | None, str]:
    """The counter-check: the arms must end up different, else nothing was compared."""
    pairs = [
        (first.weights_sha256, second.weights_sha256)
        for first, second in zip(run.trainings(BASELINE).values(), run.trainings(arm).values())
    ]
    if not pairs or not all(all(pair) for pair in pairs):
        return None, MISSING
    if any(first == second for first, second in pairs):
        return False, "both arms ended with the same weights: the technique changed nothing"
    return True, " and ".join(map(short_hash, pairs[0]))


CHECKS: dict[str, Check] = {
    "same loss before the first update": _same_first_loss,
    "same steps and tokens": _same_amount,
    "same optimizer, schedule, seed": _same_settings,
    "trained weights differ": _different_weights,
}


def _settings_grid(run: Run) -> Grid:
    """Every training setting by arm."""
    by_arm = {
        arm: {**dict(leaves(one.settings)), "processes": one.processes}
        for arm, one in run.training.items()
        if one.settings
    }
    keys = list(dict.fromkeys(key for settings in by_arm.values() for key in settings))
    rows = tuple((key, *(setting(settings.get(key)) for settings in by_arm.values())) for key in keys)
    columns = tuple(range(len(by_arm) + 1))
    return Grid(("setting", *by_arm), rows, "Training settings", columns, folded=True)


# Training


def training_section(run: Run, plots: Plots) -> Section:
    """The curves and, per training, what it took."""
    rows, notes = [], []
    for arm in run.arms:
        for name, one in run.trainings(arm).items():
            last = one.log[-1] if one.log else {}
            texts = (
                count(one.steps),
                count(one.tokens),
                duration(one.seconds),
                significant(one.tokens_per_s),
            )
            losses = fixed(last.get("loss"), 3), fixed(last.get("dispersion"), 4)
            rows.append((name, *texts, megabytes(one.peak_memory_bytes), *losses))
        speeds = [run.training[name].tokens_per_s for name in (BASELINE, arm) if name in run.training]
        if arm != BASELINE and len(speeds) == 2 and speeds[0] and speeds[1]:
            share = percent(speeds[1] / speeds[0])
            notes.append(f"The {arm_name(arm)} trained at {share} of the baseline's speed.")
    head = ("arm", "steps", "tokens", "time", "tokens/s", "peak memory, MB", "last loss", "last dispersion")
    lead = "The curves are those of the first seed." if len(run.seeds) > 1 else ""
    plot = existing(plots, "training")
    return section("training", "Training", [Grid(head, tuple(rows))], lead, plots=plot, notes=tuple(notes))


# What ships


def latency_section(run: Run, plots: Plots) -> Section:
    """Every bundle's timing, the measurement's own noise, and quality against cost."""
    result = run.latency or DeviceResult("local")
    head = ("bundle", "load, s", "first token, ms", "prefill, tokens/s", "decode, tokens/s", "p50, ms/token",
            "p90, ms/token", "peak memory, MB", "weights, MB")  # fmt: skip
    by_label = {row.label: row for row in result.rows}
    names = [(arm, precision) for precision in run.precisions for arm in run.arms]
    rows = tuple(
        (f"{label(precision)}, {arm}", *_timing_texts(by_label[f"{arm}/{precision}"]))
        for arm, precision in names
        if f"{arm}/{precision}" in by_label
    )
    threads = next((f" with {count(row.threads)} threads" for row in result.rows if row.threads), "")
    lead = (
        f"Measured on the machine that built it{threads}: batch 1, after a warm-up, arms interleaved. Decode "
        "speed is counted after the first token."
    )
    notes = [*_timing_noise(run, by_label), *warnings(result)] if rows else []
    plot = existing(plots, "tradeoff")
    return section("latency", "Latency and memory", [Grid(head, rows)], lead, plots=plot, notes=tuple(notes))


def _timing_texts(row: Timing) -> tuple[str, ...]:
    rates = (row.ttft_ms, row.prefill_tokens_per_s, row.decode_tokens_per_s)
    times = significant(row.token_ms_p50), significant(row.token_ms_p90)
    memory = megabytes(row.peak_memory_bytes), megabytes(row.weights_bytes)
    return (significant(row.load_s, 3), *map(format_estimate, rates), *times, *memory)


def _timing_noise(run: Run, by_label: dict[str, Timing]) -> list[str]:
    """Training leaves the graph as it is, so the gap between the arms measures the measurement."""
    gaps = []
    for precision in run.precisions:
        rows = [by_label[f"{arm}/{precision}"] for arm in run.arms if f"{arm}/{precision}" in by_label]
        speeds = [row.decode_tokens_per_s.value for row in rows if row.decode_tokens_per_s]
        known = [speed for speed in speeds if speed]
        if len(known) > 1:
            gaps.append(max(known) / min(known) - 1)
    notes = [
        "How a model was trained does not change its graph, so the arms should be equally fast: the largest "
        "gap "
        f"in decode speed, {percent(max(gaps))}, is the noise of this measurement."
    ] if gaps else []  # fmt: skip
    return [*notes, *(["Timed: the first seed of each arm."] if len(run.seeds) > 1 else [])]


def warnings(device: DeviceResult) -> list[str]:
    """What a measurement warns of: a lost device, in general, between twins, for one bundle."""
    notes = [f"lost in the middle, what follows is partial: {device.lost}"] if device.lost else []
    notes += [*device.warnings, *(str(pair["fault"]) for pair in device.pairs if pair.get("fault"))]
    return notes + [f"{row.label}: {text}" for row in device.rows for text in row.warnings]


def parity_section(run: Run) -> Section:
    """How far each bundle is from its torch model, and whether the device runtime opens it."""
    rows = tuple(
        (f"{label(precision)}, {arm}", *_parity_texts(parity))
        for precision in run.precisions
        for arm in run.arms
        if (parity := run.measured(arm, precision).parity) is not None
    )
    lead = "Every bundle's logits against the torch model's on the same text. KL in nats per token."
    head = ("bundle", "max abs difference", "mean KL", "same top token", "same greedy text", "tokens",
            "onnxruntime-genai", "limits", "passed")  # fmt: skip
    return section("verify", "Check of what ships", [Grid(head, rows, "", (0, 6, 7, 8))], lead)


def _parity_texts(parity: Parity) -> tuple[str, ...]:
    genai = parity.genai
    opened = MISSING if not genai else "opened" if genai.get("opened") else f"no: {genai.get('reason')}"
    limits = ", ".join(f"{key} {small(value)}" for key, value in parity.limits.items() if value is not None)
    figures = small(parity.max_abs_difference), small(parity.mean_kl)
    agreement = percent(parity.top1_agreement), percent(parity.greedy_agreement)
    passed = "yes" if parity.passed else "NO"
    return (*figures, *agreement, count(parity.tokens), opened, limits or MISSING, passed)


def sizes_section(run: Run) -> Section:
    """Where the parameters are, and how large each bundle is."""
    parameters = run.model.get("parameters") or {}
    total = parameters.get("total") or 0
    rows, bars = [], []
    for name in ("embedding", "attention", "mlp", "norm", "head", "total") if total else ():
        is_tied = name == "head" and parameters.get("tied")
        value = 0 if is_tied else parameters.get(name, 0)
        rows.append((name, "tied to the embedding" if is_tied else count(value), percent(value / total)))
        bars.append(value / total)
    grid = Grid(("component", "parameters", "share"), tuple(rows), "Parameters", bars=tuple(bars))
    bundles = {
        f"{label(precision)}, {arm}": run.bundles[arm][precision]
        for precision in run.precisions
        for arm in run.arms
        if precision in run.bundles.get(arm, {})
    }
    most = max((one.size_bytes for one in bundles.values()), default=1)
    shipped = []
    for name, one in bundles.items():
        nodes = sorted(one.nodes.items(), key=lambda item: -item[1])[:4]
        words = ", ".join(f"{node} {count(number)}" for node, number in nodes)
        shipped.append((name, megabytes(one.size_bytes), words or MISSING))
    shares = tuple(one.size_bytes / most for one in bundles.values())
    head = ("bundle", "MB", "most frequent nodes")
    return section("sizes", "Sizes", [grid, Grid(head, tuple(shipped), "Bundles", (0, 2), shares)])


# Times, reproduction, limits


def stages_section(run: Run) -> Section:
    """What took how long, and what was taken from an earlier run."""
    longest = max((stage.seconds for stage in run.stages), default=0.0) or 1.0
    rows = tuple((one.name, duration(one.seconds), "kept" if one.cached else "made") for one in run.stages)
    bars = tuple(stage.seconds / longest for stage in run.stages)
    fresh = [stage.seconds for stage in run.stages if not stage.cached]
    cached = len(run.stages) - len(fresh)
    note = f"Made in this run: {duration(sum(fresh))}."
    note += f" Kept from earlier: {plural(cached, 'stage')}." if cached else ""
    grid = Grid(("stage", "time", "this run"), rows, "", (0, 2), bars)
    return section("stages", "Where the time went", [grid], notes=(note,) if rows else ())


def reproduce_section(run: Run) -> Section:
    """Command, recipe, versions, machine."""
    facts = [("created", run.created), ("git commit", run.git_commit or "")]
    grids = [
        Grid(("machine", "value"), tuple(_property(*one) for one in leaves(run.machine)), "Machine", (0, 1)),
        Grid(("versions", "value"), tuple(run.versions.items()), "Versions", (0, 1), folded=True),
    ]
    code = [("Command", run.command), ("Recipe", run.recipe_yaml)]
    return section(
        "reproduce",
        "How to reproduce",
        grids,
        facts=tuple(fact for fact in facts if fact[1]),
        code=tuple(part for part in code if part[1]),
    )


def _property(name: str, value: object) -> tuple[str, str]:
    """A fact about the machine; bytes as MB."""
    if name.endswith("_bytes") and isinstance(value, int | float):
        return name.removesuffix("_bytes"), f"{megabytes(value)} MB"
    return name, setting(value)


def limits_section(run: Run) -> Section:
    """What the numbers mean, and the verdict's rules."""
    seeds = len(run.seeds)
    notes = [*LIMITS[:3], SEVERAL_SEEDS.format(seeds) if seeds > 1 else ONE_SEED, *LIMITS[3:]]
    rules = Grid(
        ("", "rule"), tuple((str(i), rule) for i, rule in enumerate(RULES, 1)), "Rules of the verdict", (0, 1)
    )
    return section("limits", "What the numbers mean, and their limits", [rules], notes=tuple(notes))
