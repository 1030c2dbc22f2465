"""The stages from the recipe to trained models: base, corpus, training, the merge of adapters."""

from __future__ import annotations

from typing import Any

from edgedisp.bench.system import multiplies_bf16
from edgedisp.pipeline.walk import Stage, Work
from edgedisp.recipe import Adapter, ArmRun, Recipe, Train
from edgedisp.recipe.recipe import ONLOOKERS


def plain(section: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = section.model_dump(mode="json")
    return dumped


def base_stage(recipe: Recipe) -> Stage:
    """The weights that every training starts from."""

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        if recipe.is_smoke:
            return run.twin_base(recipe.model, recipe.data, recipe.seed, recipe.folder, job.own, job.progress)
        return run.base(recipe.model, recipe.data.context, recipe.folder, job.own, job.progress)

    section = {"model": plain(recipe.model), "smoke": recipe.is_smoke, "context": recipe.data.context}
    if recipe.is_smoke:
        section |= {"data": plain(recipe.data), "seed": recipe.seed}
    return Stage("base", section, (), work)


def corpus_stage(recipe: Recipe) -> Stage:
    """The tokens file that every training reads; one of fewer steps reads its beginning."""
    blocks = recipe.steps * recipe.train.batch * recipe.train.accumulate

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        return run.tokens(
            recipe.data,
            recipe.seed,
            blocks,
            job.folders["base"],
            recipe.folder,
            recipe.is_smoke,
            job.own,
            job.progress,
        )

    section = {"data": plain(recipe.data), "seed": recipe.seed, "blocks": blocks, "smoke": recipe.is_smoke}
    return Stage("corpus", section, ("base",), work)


def budget_stage(budget: int) -> Stage:
    """Refuses a budget that no bundle of the base fits, before anything is trained."""

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        return run.check_budget(budget, job.folders["base"])

    return Stage("budget", {"budget": budget}, ("base",), work)


def as_computed(train: Train) -> Train:
    """`train` with `precision: auto` as this machine computes it. It is part of a training's key: twins that
    are trained on two machines do not differ in it."""
    if train.precision != "auto":
        return train
    return train.model_copy(update={"precision": "bf16" if multiplies_bf16() else "fp32"})


def training_stage(recipe: Recipe, run: ArmRun) -> Stage:
    """One arm with one seed. Its key holds nothing of other arms, so that adding one retrains none."""
    computed = as_computed(recipe.train)
    train = plain(computed)
    for onlooker in ("dispersion", *ONLOOKERS):
        del train[onlooker]
    if run.dispersion is not None:
        train["dispersion"] = plain(run.dispersion)
    if recipe.train.adapter is not None:
        del train["adapter"]["merge"]  # decides what is done with the trained adapter

    chosen = recipe.train.quantization_aware
    rounded = None if chosen is None else getattr(recipe.quantize, chosen.precision)

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages

        return stages.midtrain(
            computed,
            recipe.steps,
            run.seed,
            run,
            rounded,
            job.folders["base"],
            job.folders["corpus"],
            job.own,
            job.progress,
        )

    section = {"train": train, "steps": recipe.steps, "seed": run.seed}
    if run.techniques:
        section["techniques"] = run.techniques
    if run.replica:
        section["replica"] = run.replica  # reads the tokens in another order
    if rounded is not None:
        section["rounded"] = {key: value for key, value in plain(rounded).items() if key != "accuracy_level"}
    name = f"{run.name}/model" if recipe.train.adapter is None else f"{run.name}/adapter"
    return Stage(name, section, ("base", "corpus"), work, resumable=True, every_process=True)


def merge_stage(recipe: Recipe, chosen: Adapter, arm: str) -> Stage:
    """A stage of its own: changed int4 options can change the base that is better, and must retrain nothing.

    The baseline's audit decides for every arm, so that twins are merged into the same kind of base.
    """
    adapter = f"{arm}/adapter"
    asked = chosen.kind == "qlora" and chosen.merge == "auto"
    decider = f"{decider_of(recipe)}/model" if asked and arm != decider_of(recipe) else None
    int4_ships = "int4" in recipe.precisions

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        return run.merge_adapter(
            chosen,
            recipe.quantize.int4,
            int4_ships,
            recipe.seed,
            job.folders["base"],
            job.folders["corpus"],
            job.folders[adapter],
            None if decider is None else job.folders[decider],
            job.own,
            job.progress,
        )

    section = {
        "adapter": plain(chosen),
        "int4": plain(recipe.quantize.int4),
        "int4_ships": int4_ships,
        "seed": recipe.seed,
    }
    reads = ("base", "corpus", adapter) if decider is None else ("base", "corpus", adapter, decider)
    return Stage(f"{arm}/model", section, reads, work)


def decider_of(recipe: Recipe) -> str:
    """The training whose merge audit decides for all: the baseline's, with the first seed."""
    names = [arm.name for arm in recipe.arms]
    return "baseline" if "baseline" in names else names[0]
