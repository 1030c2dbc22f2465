"""The stages of a recipe, in order, each declared once: function, options, inputs, local files.

    base, corpus, items -> (budget) -> train[arm, seed] (-> merge) -> export[arm, seed]
      -> quantize[arm, seed, precision] -> delta survival -> measure[arm, seed, precision] -> latency
      -> package[arm, target]

Every training is exported and scored, as scores differ from seed to seed. Geometry, survival, timing and
packages are those of each arm's first seed: its graph is the same as the others', and it ships.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedisp.bench.system import multiplies_bf16
from edgedisp.core.results import BASELINE
from edgedisp.core.stage_folder import open_run
from edgedisp.data import local_path
from edgedisp.pipeline import options
from edgedisp.pipeline.stage import Observer, Passed, Stage, walk
from edgedisp.recipe import BITS, Adapter, ArmRun, Recipe, Train, load_target

TORCH = "torch"
HERE = "edgedisp.pipeline"


def run_folder(recipe: Recipe, out: Path | None) -> Path:
    return out or Path("runs") / f"{recipe.name}-{recipe.hash8}"


def build(recipe: Recipe, run: Path, threads: int, observer: Observer) -> list[Passed]:
    """Walk the stages in `run`, running those without a finished folder of the same key.

    Raises BadInput for what the user can mend (a run folder made by this call is then removed again),
    BuildFailed when a stage cannot be completed.
    """
    with open_run(run, recipe.identity(), recipe.name):
        return walk(stages(recipe, threads), run, observer)


def stages(recipe: Recipe, threads: int) -> list[Stage]:
    """Every stage of a recipe, in order, each after those it reads."""
    runs = recipe.arm_runs
    first = [run.name for run in runs if run.replica == 0]
    names = sorted((run.name for run in runs), key=lambda name: name != deciding_arm(recipe))
    quantized = [precision for precision in recipe.precisions if precision in BITS]
    plan = [base(recipe), corpus(recipe), items(recipe)]
    if recipe.quantize.budget is not None:
        plan.append(budget(recipe.quantize.budget))
    plan += [training(recipe, run) for run in runs]
    if (adapter := recipe.train.adapter) is not None:
        plan += [merge(recipe, adapter, name) for name in names]
    plan += [export(name, threads) for name in names]
    plan += [quantize(recipe, name, precision) for name in names for precision in quantized]
    plan += [delta_survival(recipe, name, precision) for name in first for precision in quantized]
    plan += measurements(recipe, threads)
    plan.append(latency(recipe, threads))
    plan += [package(recipe, name, target, threads) for name in first for target in recipe.targets]
    return plan


def reference_arm(recipe: Recipe, arm: str) -> str | None:
    """The baseline, for every other arm of a recipe that has one."""
    names = [one.name for one in recipe.arms]
    return BASELINE if BASELINE in names and arm != BASELINE else None


def deciding_arm(recipe: Recipe) -> str:
    """The arm whose merge audit and search for bits hold for all, so that twins are stored alike."""
    names = [arm.name for arm in recipe.arms]
    return BASELINE if BASELINE in names else names[0]


# ---------------------------------------------------------------- the shared start


def base(recipe: Recipe) -> Stage:
    """The weights that every training starts from."""
    chosen = options.BaseOptions(recipe.model, recipe.data.context)
    files = {} if recipe.is_smoke else _local([recipe.model.base], recipe)
    if recipe.is_smoke:
        chosen = options.BaseOptions(recipe.model, recipe.data.context, recipe.data, recipe.seed)
        files = _local([source.source for source in recipe.data.train], recipe)
    return Stage("base", f"{HERE}.prepare:base", chosen, files=files)


def corpus(recipe: Recipe) -> Stage:
    """The tokens file that every training reads; one of fewer steps reads its beginning."""
    blocks = recipe.steps * recipe.train.batch * recipe.train.accumulate
    return Stage(
        "corpus",
        f"{HERE}.prepare:corpus",
        options.CorpusOptions(recipe.data, recipe.seed, blocks, recipe.is_smoke),
        {"base": "base"},
        files=_local([source.source for source in recipe.data.train], recipe),
    )


def _local(sources: list[str], recipe: Recipe) -> dict[str, Path]:
    """Source as the recipe writes it -> its file or folder, for those that are local."""
    paths = {source: local_path(source, recipe.folder) for source in sources}
    return {source: path for source, path in paths.items() if path is not None}


def items(recipe: Recipe) -> Stage:
    """The questions of the recipe's tasks: the same for every arm and precision."""
    return Stage(
        "items",
        f"{HERE}.prepare:items",
        items_options(recipe),
        {"base": "base", "corpus": "corpus"},
        files=_tasks(recipe),
    )


def items_options(recipe: Recipe) -> options.ItemsOptions:
    """What the questions depend on, without what only their scoring does."""
    fields = type(recipe.evaluate).model_fields
    scoring = {name: fields[name].default for name in ("bootstrap", "divergence_tokens")}
    evaluate = recipe.evaluate.model_copy(update=scoring)
    return options.ItemsOptions(evaluate, recipe.data.context, recipe.seed)


def _tasks(recipe: Recipe) -> dict[str, Path]:
    path = recipe.evaluate.tasks_path
    return {} if path is None else {options.TASKS_PATH: (recipe.folder / path).resolve()}


def budget(size: int) -> Stage:
    """Refuses a budget that no bundle of the base fits, before anything is trained."""
    return Stage("budget", f"{HERE}.prepare:check_budget", options.BudgetOptions(size), {"base": "base"})


# ---------------------------------------------------------------- training


def as_computed(train: Train) -> Train:
    """`train` with `precision: auto` as this machine computes it: twins of two machines share no key."""
    if train.precision != "auto":
        return train
    return train.model_copy(update={"precision": "bf16" if multiplies_bf16() else "fp32"})


def training(recipe: Recipe, run: ArmRun) -> Stage:
    """One arm with one seed. Its key holds nothing of other arms, so that adding one retrains none."""
    train = as_computed(recipe.train)
    logging = options.Logging(train.report_to, train.checkpoint_every, train.watch_every)
    unread: dict[str, Any] = {
        "report_to": (),
        "checkpoint_every": None,
        "watch_every": None,
        "dispersion": None,
    }
    if train.adapter is not None:  # `merge` decides what is done with the trained adapter
        unread["adapter"] = train.adapter.model_copy(update={"merge": "auto"})
    aware = train.quantization_aware
    rounding = None
    if aware is not None:  # training sees rounded weights, in fp32 products
        rounding = getattr(recipe.quantize, aware.precision).model_copy(update={"accuracy_level": 4})
    return Stage(
        f"{run.name}/{'model' if train.adapter is None else 'adapter'}",
        f"{HERE}.training:train",
        options.TrainOptions(train.model_copy(update=unread), recipe.steps, run, rounding, logging),
        {"base": "base", "corpus": "corpus"},
        resumable=True,
        every_process=True,
    )


def merge(recipe: Recipe, adapter: Adapter, arm: str) -> Stage:
    """A stage of its own: changed int4 options can change the better base, and must retrain nothing."""
    inputs = {"base": "base", "corpus": "corpus", "adapter": f"{arm}/adapter"}
    decider = deciding_arm(recipe)
    if adapter.kind == "qlora" and adapter.merge == "auto" and arm != decider:
        inputs["decider"] = f"{decider}/model"
    chosen = options.MergeOptions(adapter, recipe.quantize.int4, "int4" in recipe.precisions, recipe.seed)
    return Stage(f"{arm}/model", f"{HERE}.adapters:merge", chosen, inputs)


# ---------------------------------------------------------------- bundles


def export(arm: str, threads: int) -> Stage:
    return Stage(
        f"{arm}/fp32", f"{HERE}.bundles:export", options.ExportOptions(threads), {"model": f"{arm}/model"}
    )


def quantize(recipe: Recipe, arm: str, precision: str) -> Stage:
    inputs = {"bundle": f"{arm}/fp32", "model": f"{arm}/model", "corpus": "corpus"}
    goal, decider = recipe.quantize, deciding_arm(recipe)
    if precision == "int4" and goal.searched:
        if arm != decider:
            inputs["decider"] = f"{decider}/int4"
        # Of int4's options a search reads these; grids and bits are what it searches.
        kept = {"accuracy_level"} | (
            {"method", "calibration_tokens"} if goal.int4.method == "gptq" else set()
        )
        int4 = type(goal.int4)(**goal.int4.model_dump(include=kept))
        search = options.SearchOptions(int4, goal.budget, goal.max_perplexity_increase, recipe.seed)
        return Stage(f"{arm}/int4", f"{HERE}.search:quantize_searched", search, inputs)
    aware, rounding = recipe.train.quantization_aware, getattr(goal, precision)
    is_trained = aware is not None and aware.precision == precision
    if not rounding.calibrated:
        del inputs["model"], inputs["corpus"]
    chosen = options.QuantizeOptions(BITS[precision], rounding, is_trained)
    return Stage(f"{arm}/{precision}", f"{HERE}.bundles:quantize", chosen, inputs)


def delta_survival(recipe: Recipe, arm: str, precision: str) -> Stage:
    """What is left of training's change in the weights of a bundle."""
    inputs = {
        "base": "base",
        "model": f"{arm}/model",
        "parent": f"{arm}/fp32",
        "bundle": f"{arm}/{precision}",
    }
    if (reference := reference_arm(recipe, arm)) is not None:
        inputs["baseline"] = f"{reference}/model"
    return Stage(f"{arm}/survival-{precision}", f"{HERE}.bundles:delta_survival", None, inputs)


# ---------------------------------------------------------------- figures


def measurements(recipe: Recipe, threads: int) -> list[Stage]:
    """The measuring of every training at every precision, each after those that it is compared with.

    Hidden states and divergence are looked at for the first seed alone, noise for one model of a precision.
    """
    runs = sorted(recipe.arm_runs, key=lambda run: run.arm != BASELINE)
    first = [run.name for run in runs if run.replica == 0]
    return [
        measure(
            recipe,
            run,
            precision,
            options.MeasureOptions(
                items_options(recipe),
                threads,
                recipe.evaluate.bootstrap,
                recipe.evaluate.divergence_tokens,
                hidden_states=run.replica == 0,
                noise=run.name == first[0],
                parity=_parity(recipe, precision),
            ),
        )
        for precision in (TORCH, *recipe.precisions)
        for run in runs
    ]


def _parity(recipe: Recipe, precision: str) -> options.ParityOptions | None:
    """None for the torch model, which is what bundles are held against."""
    if precision == TORCH:
        return None
    aware = recipe.train.quantization_aware
    is_trained = aware is not None and aware.precision == precision
    limits = recipe.verify.limits(precision)
    trained = (getattr(recipe.quantize, precision), BITS[precision]) if is_trained else None
    return options.ParityOptions(recipe.verify.tokens, limits, trained)


def measure(recipe: Recipe, run: ArmRun, precision: str, chosen: options.MeasureOptions) -> Stage:
    """All that is found out about one model, in one stage; precision `torch`: before export."""
    arm, reference = run.name, reference_arm(recipe, run.arm)
    inputs = {"model": f"{arm}/model", "base": "base", "corpus": "corpus", "items": "items"}
    if precision != TORCH:
        inputs["bundle"] = f"{arm}/{precision}"
    if chosen.hidden_states and precision == TORCH and reference is not None:
        inputs["reference"] = f"{reference}/measure-{TORCH}"
    if chosen.hidden_states and precision != TORCH:
        inputs["reference"] = f"{arm}/measure-{TORCH}"
        if precision != "fp32":
            inputs["parent"] = f"{arm}/fp32"
        if reference is not None:
            inputs["baseline"] = f"{reference}/{precision}"
    name = f"{arm}/measure-{precision}"
    return Stage(name, f"{HERE}.measure:measure", chosen, inputs, files=_tasks(recipe))


def latency(recipe: Recipe, threads: int) -> Stage:
    """Every bundle of every arm's first seed, timed in turns; the keywords are the labels of the bundles."""
    names = [f"{arm.name}/{precision}" for precision in recipe.precisions for arm in recipe.arms]
    chosen = options.LatencyOptions(recipe.latency, recipe.seed, threads)
    return Stage("latency", f"{HERE}.measure:latency", chosen, dict(zip(names, names, strict=True)))


def package(recipe: Recipe, arm: str, target: str, threads: int) -> Stage:
    """What was measured, for a device. The profile's words are no part of the key, nor how it quantizes."""
    profile = load_target(target)
    plain = profile.model_copy(
        update={"description": "", "notes": (), "sources": (), "quantize": type(profile.quantize)()}
    )
    run = next(run for run in recipe.arm_runs if run.name == arm)
    origin = {
        "recipe": {"name": recipe.name, "hash8": recipe.hash8},
        "arm": run.arm,
        "seed": run.seed,
        "smoke": recipe.is_smoke,
    }
    return Stage(
        f"{arm}/{target}",
        f"{HERE}.package:package",
        options.PackageOptions(plain, profile.threads or threads, origin),
        {"bundle": f"{arm}/{profile.precision}", "model": f"{arm}/model", "base": "base", "corpus": "corpus"},
    )
