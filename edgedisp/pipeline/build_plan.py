"""The stages of a recipe, in order, each declared once: function, options, inputs, local files.

    base, corpus, items -> (budget) -> train[arm, seed] (-> merge) -> export[arm, seed]
      -> quantize[arm, seed, precision] -> delta survival -> measure[arm, seed, precision] -> latency
      -> package[arm, target]

Every training is exported and scored, as scores differ from seed to seed. Geometry, survival, timing and
packages are those of each arm's first seed: its graph is the same as the others', and it ships.
"""

from __future__ import annotations

from pathlib import Path

from edgedisp.bench.system import multiplies_bf16
from edgedisp.core.stage_folder import open_run
from edgedisp.data import local_path
from edgedisp.pipeline import options
from edgedisp.pipeline.stage import Observer, Passed, Stage, walk
from edgedisp.recipe import BITS, Adapter, ArmRun, Recipe, Train, load_target

BASELINE = "baseline"
PREPARE, TRAINING, BUNDLES, MEASURE, PACKAGE = (
    f"edgedisp.pipeline.{module}" for module in ("prepare", "training", "bundles", "measure", "package")
)


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
    plan += [quantize(recipe, name, precision, threads) for name in names for precision in quantized]
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
    files = [] if recipe.is_smoke else _local([recipe.model.base], recipe)
    if recipe.is_smoke:
        chosen = options.BaseOptions(recipe.model, recipe.data.context, recipe.data, recipe.seed)
        files = _local([source.source for source in recipe.data.train], recipe)
    return Stage("base", f"{PREPARE}:base", chosen, files=tuple(files))


def corpus(recipe: Recipe) -> Stage:
    """The tokens file that every training reads; one of fewer steps reads its beginning."""
    blocks = recipe.steps * recipe.train.batch * recipe.train.accumulate
    return Stage(
        "corpus",
        f"{PREPARE}:corpus",
        options.CorpusOptions(recipe.data, recipe.seed, blocks, recipe.is_smoke),
        {"base": "base"},
        files=tuple(_local([source.source for source in recipe.data.train], recipe)),
    )


def _local(sources: list[str], recipe: Recipe) -> list[Path]:
    """Those of the sources that are local files or folders, in their order."""
    paths = (local_path(source, recipe.folder) for source in sources)
    return [path for path in paths if path is not None]


def items(recipe: Recipe) -> Stage:
    """The questions of the recipe's tasks: the same for every arm and precision."""
    path = recipe.evaluate.tasks_path
    return Stage(
        "items",
        f"{PREPARE}:items",
        options.ItemsOptions(recipe.evaluate, recipe.data.context, recipe.seed),
        {"base": "base", "corpus": "corpus"},
        files=() if path is None else ((recipe.folder / path).resolve(),),
    )


def budget(size: int) -> Stage:
    """Refuses a budget that no bundle of the base fits, before anything is trained."""
    return Stage("budget", f"{PREPARE}:check_budget", options.BudgetOptions(size), {"base": "base"})


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
    unread = {"report_to": (), "checkpoint_every": None, "watch_every": None, "dispersion": None}
    if train.adapter is not None:  # `merge` decides what is done with the trained adapter
        unread["adapter"] = train.adapter.model_copy(update={"merge": "auto"})
    aware = train.quantization_aware
    rounding = None
    if aware is not None:  # training sees rounded weights, in fp32 products
        rounding = getattr(recipe.quantize, aware.precision).model_copy(update={"accuracy_level": 4})
    return Stage(
        f"{run.name}/{'model' if train.adapter is None else 'adapter'}",
        f"{TRAINING}:train",
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
    return Stage(f"{arm}/model", f"{TRAINING}:merge", chosen, inputs)


# ---------------------------------------------------------------- bundles


def export(arm: str, threads: int) -> Stage:
    return Stage(
        f"{arm}/fp32", f"{BUNDLES}:export", options.ExportOptions(threads), {"model": f"{arm}/model"}
    )


def quantize(recipe: Recipe, arm: str, precision: str, threads: int) -> Stage:
    inputs = {"bundle": f"{arm}/fp32", "model": f"{arm}/model", "corpus": "corpus"}
    goal, decider = recipe.quantize, deciding_arm(recipe)
    if precision == "int4" and goal.searched:
        if arm != decider:
            inputs["decider"] = f"{decider}/int4"
        search = options.SearchOptions(
            goal.int4, goal.budget, goal.max_perplexity_increase, recipe.seed, threads
        )
        return Stage(f"{arm}/int4", f"{BUNDLES}:quantize_searched", search, inputs)
    aware, rounding = recipe.train.quantization_aware, getattr(goal, precision)
    is_trained = aware is not None and aware.precision == precision
    if not rounding.calibrated:
        del inputs["model"], inputs["corpus"]
    chosen = options.QuantizeOptions(BITS[precision], rounding, is_trained)
    return Stage(f"{arm}/{precision}", f"{BUNDLES}:quantize", chosen, inputs)


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
    return Stage(f"{arm}/survival-{precision}", f"{BUNDLES}:delta_survival", None, inputs)


# ---------------------------------------------------------------- figures


def latency(recipe: Recipe, threads: int) -> Stage:
    """Every bundle of every arm's first seed, timed in turns; the keywords are the labels of the bundles."""
    names = [f"{arm.name}/{precision}" for precision in recipe.precisions for arm in recipe.arms]
    chosen = options.LatencyOptions(recipe.latency, recipe.seed, threads)
    return Stage("latency", f"{MEASURE}:latency", chosen, dict(zip(names, names, strict=True)))


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
        f"{PACKAGE}:package",
        options.PackageOptions(plain, profile.threads or threads, origin),
        {"bundle": f"{arm}/{profile.precision}", "model": f"{arm}/model", "base": "base", "corpus": "corpus"},
    )
