"""The stages in order, what each depends on, and the loop that walks them.

    recipe -> base -> corpus -> items -> (budget) -> (bits) -> midtrain[arm, seed]
           -> export[arm, seed] -> quantize[arm, seed, precision] -> survival[arm, precision]
           -> measure[arm, seed, precision] -> latency -> pack[arm, target] -> report

A stage's key is its section of the recipe and the content hashes of the stages it reads. A finished stage
with the same key is kept. So a changed precision retrains nothing, and an unchanged recipe runs nothing:
this module imports no torch, and `stages/`, which does, is imported when the first stage has to run.
"""

from __future__ import annotations

from pathlib import Path

from edgedisp.core.stage_folder import Record, open_run
from edgedisp.pipeline import shipping
from edgedisp.pipeline.training import (
    as_computed,
    base_stage,
    budget_stage,
    corpus_stage,
    decider_of,
    merge_stage,
    training_stage,
)
from edgedisp.pipeline.walk import Observer, Stage, Walked, Work, walk
from edgedisp.recipe import BITS, Recipe

__all__ = [
    "Observer",
    "Stage",
    "Walked",
    "Work",
    "as_computed",
    "base_stage",
    "build",
    "corpus_stage",
    "run_folder",
    "stages",
    "state",
    "training_stage",
    "walk",
]


def run_folder(recipe: Recipe, out: Path | None) -> Path:
    return out or Path("runs") / f"{recipe.name}-{recipe.hash8}"


def stages(recipe: Recipe, threads: int) -> list[Stage]:
    """Every stage of a recipe, in order, each after those it reads.

    Every training is exported and scored, as scores differ from seed to seed. Geometry, survival, timing and
    packing are of the first seed's: one is looked into, timed (the graph is the same) and shipped.
    """
    runs = recipe.arm_runs
    names = [run.name for run in runs]
    first = [run.name for run in runs if run.replica == 0]
    found = [base_stage(recipe), corpus_stage(recipe), shipping.items(recipe)]
    if recipe.quantize.budget is not None:
        found.append(budget_stage(recipe.quantize.budget))
    found += [training_stage(recipe, run) for run in runs]
    decider = decider_of(recipe)
    ordered = sorted(names, key=lambda name: name != decider)  # others may follow what this one decides
    if (adapter := recipe.train.adapter) is not None:
        found += [merge_stage(recipe, adapter, name) for name in ordered]
    found += [shipping.export(name, threads) for name in names]
    precisions = recipe.precisions
    quantized = [precision for precision in precisions if precision in BITS]
    found += [shipping.quantize(recipe, name, precision) for name in ordered for precision in quantized]
    for name in first:
        against = "baseline/model" if name != "baseline" and "baseline" in first else None
        found += [shipping.survival(name, precision, against) for precision in quantized]
    found += shipping.measurements(recipe, threads)
    found.append(shipping.latency(recipe, threads))
    found += [shipping.pack(recipe, name, target, threads) for name in first for target in recipe.targets]
    return found


def state(recipe: Recipe, run: Path, threads: int) -> list[tuple[Stage, Record | None]]:
    """Each stage with its finished record, or None where a build would have to run it."""
    records: dict[str, Record] = {}
    found: list[tuple[Stage, Record | None]] = []
    for stage in stages(recipe, threads):
        record = stage.kept(run, records) if all(name in records for name in stage.reads) else None
        if record is not None:
            records[stage.name] = record
        found.append((stage, record))
    return found


def build(recipe: Recipe, run: Path, threads: int, observer: Observer) -> list[Walked]:
    """Walk the stages in `run`, making those whose record does not fit.

    Raises BadInput for what the user can mend (a run folder made by this call is then removed again),
    BuildFailed when a stage cannot be completed.
    """
    with open_run(run, recipe.identity(), recipe.name):
        return walk(stages(recipe, threads), run, observer)
