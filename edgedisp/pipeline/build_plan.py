"""The stages of a recipe, in order, each declared once: function, options, inputs, local files.

    base, corpus, items -> (budget) -> train[arm, seed] (-> merge) -> export -> quantize[precision]
      -> delta survival -> measure[arm, seed, precision] -> latency -> package[arm, target]

Every training is exported and scored. Geometry, survival, timing and packages are those of each arm's first
seed: its graph is the same as the others', and it ships.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgedisp.bench.system import multiplies_bf16
from edgedisp.core.errors import BadInput
from edgedisp.core.files import RECORD
from edgedisp.core.progress import Screen, warn
from edgedisp.core.results import BASE, BASELINE
from edgedisp.core.stage_folder import open_run
from edgedisp.data import local_path
from edgedisp.pipeline import options
from edgedisp.pipeline.options import TASKS_PATH, BundleRounding
from edgedisp.pipeline.stage import Passed, Stage, walk
from edgedisp.recipe import BITS, Adapter, ArmRun, Recipe, Train, load_target

TORCH = "torch"
HERE = "edgedisp.pipeline"
START = {"base": "base", "corpus": "corpus"}  # inputs that nearly every stage has
UNTRAINED = "untrained"  # the folder of what is made of the base itself


def run_folder(recipe: Recipe, out: Path | None) -> Path:
    return out or Path("runs") / f"{recipe.name}-{recipe.hash8}"


def build(recipe: Recipe, run: Path, threads: int, screen: Screen) -> list[Passed]:
    """Walk the stages in `run`, running those without a finished folder of the same key.

    Raises BadInput for what the user can mend (a run folder made by this call is then removed again),
    BuildFailed when a stage cannot be completed.
    """
    with open_run(run, recipe.identity(), recipe.name):
        return walk(stages(recipe, threads), run, screen)


def stages(recipe: Recipe, threads: int) -> list[Stage]:
    """Every stage of a recipe, in order, each after those it reads."""
    runs = recipe.arm_runs
    first = [run.name for run in runs if run.replica == 0]
    names = sorted((run.name for run in runs), key=lambda name: name != deciding_arm(recipe))
    quantized = [precision for precision in recipe.precisions if precision in BITS]
    plan = [base(recipe), corpus(recipe), items(recipe)]
    if recipe.quantize.budget is not None:
        check = f"{HERE}.size_estimate:check_budget"
        plan.append(Stage("budget", check, recipe.quantize.budget, {"base": "base"}))
    plan += [training(recipe, run) for run in runs]
    if (adapter := recipe.train.adapter) is not None:
        plan += [merge(recipe, adapter, name) for name in names]
    names += [UNTRAINED] if recipe.evaluate.measures_base else []
    plan += [
        Stage(f"{name}/fp32", f"{HERE}.bundles:export", threads, {"model": model_of(name)}) for name in names
    ]
    plan += [quantize(recipe, name, precision) for name in names for precision in quantized]
    plan += [delta_survival(recipe, name, precision) for name in first for precision in quantized]
    plan += measurements(recipe, threads)
    folders = {BASE: UNTRAINED} if recipe.evaluate.measures_base else {}
    folders |= {arm.name: arm.name for arm in recipe.arms}
    labels = {
        f"{label}/{precision}": f"{folder}/{precision}"
        for precision in recipe.precisions
        for label, folder in folders.items()
    }
    timing = options.LatencyOptions(recipe.latency, recipe.seed, threads)
    plan.append(Stage("latency", f"{HERE}.measure:latency", timing, labels))
    plan += [package(recipe, name, target, threads) for name in first for target in recipe.targets]
    return plan


def model_of(name: str) -> str:
    """The stage that leaves the torch model of a training, or of the untouched base."""
    return "base" if name == UNTRAINED else f"{name}/model"


def reference_arm(recipe: Recipe, arm: str) -> str | None:
    """The baseline, for every other arm of a recipe that has one."""
    has_baseline = any(other.name == BASELINE for other in recipe.arms)
    return BASELINE if has_baseline and arm != BASELINE else None


def deciding_arm(recipe: Recipe) -> str:
    """The arm whose merge audit and search for bits hold for all, so that twins are stored alike."""
    first = recipe.arms[0].name
    return reference_arm(recipe, first) or first


def base(recipe: Recipe, leaves: tuple[str, ...] = ("model", "fp32")) -> Stage:
    """The weights that every training starts from; a smoke run's tokenizer is made from the text.

    leaves: the folders with weights in fp32 that every training leaves.
    """
    read, files = options.BaseOptions(recipe.model, recipe.data.context), _texts(recipe)
    if recipe.is_smoke:
        read = replace(read, smoke_text=recipe.data, seed=recipe.seed)
    else:
        files = _local({"model.base": recipe.model.base}, recipe)
    check = partial(check_base, recipe, leaves)
    return Stage("base", f"{HERE}.prepare:base", read, files=files, check=check)


def check_base(recipe: Recipe, leaves: tuple[str, ...], folder: Path) -> None:
    """`check_fits` for the folder of a finished base; nothing where all is trained, as it loads torch."""
    run = folder.parent
    if all((run / arm.name / "model" / RECORD).is_file() for arm in recipe.arm_runs):
        return
    from edgedisp import models
    from edgedisp.pipeline.size_estimate import check_fits

    if warning := check_fits(recipe, run, models.empty_model(folder), leaves):
        warn(f"warning: {warning}")


def corpus(recipe: Recipe) -> Stage:
    """The tokens file that every training reads; one of fewer steps reads its beginning."""
    step = recipe.train.batch * recipe.train.accumulate
    read = options.CorpusOptions(recipe.data, recipe.seed, None, recipe.is_smoke, recipe.train.epochs, step)
    if recipe.steps is not None:  # steps of another size can read the same file
        read = replace(read, blocks=recipe.steps * step, step=1)
    return Stage("corpus", f"{HERE}.prepare:corpus", read, {"base": "base"}, _texts(recipe))


def _texts(recipe: Recipe) -> dict[str, Path]:
    sources = {f"data.train.{index}.source": text.source for index, text in enumerate(recipe.data.train)}
    return _local(sources, recipe)


def _local(sources: dict[str, str], recipe: Recipe) -> dict[str, Path]:
    """Source as the recipe writes it -> its file or folder, for those that are local. sources: by key."""
    paths = {}
    for key, source in sources.items():
        try:
            paths[source] = local_path(source, recipe.folder)
        except BadInput as problem:
            raise BadInput(f"{recipe.where(key)}: {problem}") from None
    return {source: path for source, path in paths.items() if path is not None}


def items(recipe: Recipe) -> Stage:
    """The questions of the recipe's tasks: the same for every arm and precision."""
    return Stage("items", f"{HERE}.prepare:items", _items_options(recipe), START, _tasks(recipe))


def _items_options(recipe: Recipe) -> options.ItemsOptions:
    """What the questions depend on, without what only their scoring does."""
    unread = {"bootstrap": 0, "divergence_tokens": 0, "base": None}
    fields = {"messages": "messages"} if recipe.evaluate.answers else {}
    if fields and (chats := [source for source in recipe.data.train if source.is_chat]):
        fields = chats[0].model_dump(include={"messages", "prompt", "completion", "tools"})
    evaluate = recipe.evaluate.model_copy(update=unread)
    return options.ItemsOptions(evaluate, recipe.data.context, recipe.seed, fields)


def _tasks(recipe: Recipe) -> dict[str, Path]:
    """The recipe's own tasks and conversations, as files of a stage."""
    evaluate, files = recipe.evaluate, dict[str, Path]()
    if evaluate.tasks_path is not None:
        files[TASKS_PATH] = (recipe.folder / evaluate.tasks_path).resolve()
    if evaluate.answers is not None:
        files |= _local({"evaluate.answers": evaluate.answers}, recipe)
    return files


def as_computed(train: Train) -> Train:
    """`train` with `precision: auto` as this machine computes it: twins of two machines share no key."""
    if train.precision != "auto":
        return train
    return train.model_copy(update={"precision": "bf16" if multiplies_bf16() else "fp32"})


def training(recipe: Recipe, run: ArmRun) -> Stage:
    """One arm with one seed. Its key holds nothing of other arms, so that adding one retrains none.

    Raises BadInput if a program that the log should go to is not installed.
    """
    train = as_computed(recipe.train)
    if missing := " ".join(name for name in train.report_to if find_spec(name) is None):
        key = recipe.where("train.report_to")
        raise BadInput(f"{key}: {missing} is not installed: pip install {missing}, or leave it out")
    unread: dict[str, Any] = {"dispersion": None}
    if train.adapter is not None:  # `merge` decides what is done with the trained adapter
        unread["adapter"] = train.adapter.model_copy(update={"merge": "auto"})
    rounding = None
    if train.quantization_aware is not None:  # training sees rounded weights, in fp32 products
        rounding = bundle_rounding(recipe, train.quantization_aware.precision, accuracy_level=4)
    return Stage(
        f"{run.name}/{'model' if train.adapter is None else 'adapter'}",
        f"{HERE}.training:train",
        options.TrainOptions(train.model_copy(update=unread), recipe.steps, run, rounding),
        START,
        resumable=True,
        every_process=True,
    )


def bundle_rounding(recipe: Recipe, precision: str, **changes: int) -> BundleRounding:
    """How the bundle of a precision is rounded, with `changes` to its section."""
    section = getattr(recipe.quantize, precision).model_copy(update=changes)
    return BundleRounding(BITS[precision], section)


def _trains_under(recipe: Recipe, name: str, precision: str) -> bool:
    """Whether quantization-aware training has seen the rounding of this precision."""
    aware = recipe.train.quantization_aware
    return name != UNTRAINED and aware is not None and aware.precision == precision


def merge(recipe: Recipe, adapter: Adapter, arm: str) -> Stage:
    """A stage of its own: changed int4 options can change the better base, and must retrain nothing."""
    inputs = START | {"adapter": f"{arm}/adapter"}
    decider = deciding_arm(recipe)
    if adapter.kind == "qlora" and adapter.merge == "auto" and arm != decider:
        inputs["decider"] = f"{decider}/model"
    is_judged = adapter.kind == "qlora" and "int4" in recipe.precisions
    read = options.MergeOptions(adapter, recipe.quantize.int4 if is_judged else None, recipe.seed)
    return Stage(f"{arm}/model", f"{HERE}.adapters:merge", read, inputs)


def quantize(recipe: Recipe, arm: str, precision: str) -> Stage:
    name, inputs = f"{arm}/{precision}", {"bundle": f"{arm}/fp32"}
    training_text = {"model": model_of(arm), "corpus": "corpus"}
    section, decider = recipe.quantize, deciding_arm(recipe)
    if precision != "int4" or not section.searched:
        rounding = bundle_rounding(recipe, precision)
        if rounding.section.method == "gptq":  # calibrated on the training text
            inputs |= training_text
        read = options.QuantizeOptions(rounding, _trains_under(recipe, arm, precision))
        return Stage(name, f"{HERE}.bundles:quantize", read, inputs)
    # Of int4's options a search reads these; grids and bits are what it searches.
    keys = {"accuracy_level"} | ({"method", "calibration_tokens"} if section.int4.method == "gptq" else set())
    int4 = type(section.int4)(**section.int4.model_dump(include=keys))
    search = options.SearchOptions(int4, section.budget, section.max_perplexity_increase)
    inputs |= training_text | ({} if arm == decider else {"decider": f"{decider}/int4"})
    return Stage(name, f"{HERE}.bundles:quantize_searched", search, inputs)


def delta_survival(recipe: Recipe, arm: str, precision: str) -> Stage:
    """What is left of training's change in the weights of a bundle."""
    inputs = {"base": "base", "model": f"{arm}/model", "parent": f"{arm}/fp32"}
    inputs["bundle"] = f"{arm}/{precision}"
    if (reference := reference_arm(recipe, arm)) is not None:
        inputs["baseline"] = f"{reference}/model"
    return Stage(f"{arm}/survival-{precision}", f"{HERE}.bundles:delta_survival", None, inputs)


def package(recipe: Recipe, arm: str, target: str, threads: int) -> Stage:
    """What was measured, for a device. The profile's words are no part of the key, nor how it quantizes."""
    profile = load_target(target)
    unread = {"description": "", "notes": (), "sources": (), "quantize": type(profile.quantize)()}
    run = next(run for run in recipe.arm_runs if run.name == arm)
    origin = {"recipe": {"name": recipe.name, "hash8": recipe.hash8}, "arm": run.arm, "seed": run.seed}
    origin["smoke"] = recipe.is_smoke
    read = options.PackageOptions(profile.model_copy(update=unread), profile.threads or threads, origin)
    inputs = START | {"bundle": f"{arm}/{profile.precision}", "model": f"{arm}/model"}
    return Stage(f"{arm}/{target}", f"{HERE}.bundles:package", read, inputs)


def measurements(recipe: Recipe, threads: int) -> list[Stage]:
    """The measuring of every training at every precision, each after those that it is compared with."""
    runs = sorted(recipe.arm_runs, key=lambda run: run.arm != BASELINE)
    pairs = [(run, precision) for precision in (TORCH, *recipe.precisions) for run in runs]
    trained = [measure(recipe, run, at, threads, noise=run is runs[0]) for run, at in pairs]
    at_all = (TORCH, *recipe.precisions) if recipe.evaluate.measures_base else ()
    return trained + [measure_base(recipe, precision, threads) for precision in at_all]


def measure_base(recipe: Recipe, precision: str, threads: int) -> Stage:
    """The scores of the untouched base alone: its bundles are no arm's, and ship nowhere."""
    inputs = START | {"model": "base", "items": "items"}
    if precision != TORCH:
        inputs["bundle"] = f"{UNTRAINED}/{precision}"
    counts = recipe.evaluate.bootstrap, recipe.evaluate.divergence_tokens
    read = options.MeasureOptions(_items_options(recipe), threads, *counts, hidden_states=False)
    return Stage(f"{UNTRAINED}/measure-{precision}", f"{HERE}.measure:measure", read, inputs, _tasks(recipe))


def measure(recipe: Recipe, run: ArmRun, precision: str, threads: int, *, noise: bool) -> Stage:
    """All that is measured of one model, in one stage; precision `torch`: before export.

    Hidden states and divergence are looked at for the first seed alone, noise for one model of a precision.
    """
    arm, reference, is_first = run.name, reference_arm(recipe, run.arm), run.replica == 0
    inputs = START | {"model": f"{arm}/model", "items": "items"}
    parity = None
    if precision == TORCH:
        if is_first and reference is not None:
            inputs["reference"] = f"{reference}/measure-{TORCH}"
    else:
        inputs["bundle"] = f"{arm}/{precision}"
        trained_under = bundle_rounding(recipe, precision) if _trains_under(recipe, arm, precision) else None
        parity = options.ParityOptions(recipe.verify.tokens, recipe.verify.limits(precision), trained_under)
        if is_first:
            inputs["reference"] = f"{arm}/measure-{TORCH}"
            if precision != "fp32":
                inputs["parent"] = f"{arm}/fp32"
            if reference is not None:
                inputs["baseline"] = f"{reference}/{precision}"
    counts = recipe.evaluate.bootstrap, recipe.evaluate.divergence_tokens
    read = options.MeasureOptions(_items_options(recipe), threads, *counts, is_first, noise, parity)
    return Stage(f"{arm}/measure-{precision}", f"{HERE}.measure:measure", read, inputs, _tasks(recipe))
