"""The stages in order, what each depends on, and the loop that walks them.

    recipe -> base -> corpus -> items -> midtrain[arm, seed] -> condensation[arm] -> export[arm, seed]
           -> quantize[arm, seed, precision] -> verify -> accuracy -> latency -> pack[arm, target] -> report

A stage's key is its section of the recipe and the content hashes of the stages it reads. A finished stage
with the same key is kept. So a changed precision retrains nothing, and an unchanged recipe runs nothing:
this module imports no torch, and `stages/`, which does, is imported when the first stage has to run.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgedisp import BadInput, Progress
from edgedisp.bench.targets import load_target
from edgedisp.folder import Record, canonical, digest, finish, making, open_run, read
from edgedisp.recipe import Adapter, ArmRun, Recipe
from edgedisp.recipe.schema import ONLOOKERS

# Raised when a stage's code changes what it writes, so that runs made before are not taken for current.
REVISION = 2

BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Work:
    """What a stage is given: its own folder, the folders it reads, and whom to tell of its progress."""

    own: Path
    folders: dict[str, Path]
    progress: Progress


@dataclass(frozen=True)
class Stage:
    """One stage: `name` is its folder under the run, `section` and `reads` make its key, `work` does it.

    `every_process`: of a launch takes part in it (follow.py); all other stages are the first's alone.
    """

    name: str
    section: dict[str, Any]
    reads: tuple[str, ...]
    work: Callable[[Work], dict[str, Any]]
    resumable: bool = False
    every_process: bool = False

    def key(self, records: dict[str, Record]) -> dict[str, Any]:
        sources = {name: records[name].content for name in self.reads}
        key = {"stage": self.name, "section": self.section, "reads": sources, "revision": REVISION}
        plain: dict[str, Any] = json.loads(canonical(key))  # as it will be read back
        return plain


class Observer(Protocol):
    """Whoever wants to know how a build goes; the command line draws it."""

    def started(self, name: str, number: int, total: int) -> None: ...

    def progress(self, done: int, total: int, note: str) -> None: ...

    def finished(self, name: str, record: Record) -> None: ...

    def kept(self, name: str, record: Record) -> None: ...


def run_folder(recipe: Recipe, out: Path | None) -> Path:
    return out or Path("runs") / f"{recipe.name}-{recipe.hash8}"


def stages(recipe: Recipe, threads: int) -> list[Stage]:
    """Every stage of a recipe, in order, each after those it reads.

    Every training is exported and scored, as scores differ from seed to seed. Geometry, timing and packing
    are of the first seed's: one is looked into, timed (the graph is the same) and shipped.
    """
    runs = recipe.arm_runs
    names = [run.name for run in runs]
    first = [run.name for run in runs if run.replica == 0]
    found = [base_stage(recipe), corpus_stage(recipe), _items(recipe)]
    found += [training_stage(recipe, run) for run in runs]
    if (adapter := recipe.train.adapter) is not None:
        decider = _decider(recipe)
        found += [_merge(recipe, adapter, name) for name in sorted(names, key=lambda name: name != decider)]
    found += _condensations(first)
    found += [_export(name, threads) for name in names]
    quantized = [precision for precision in recipe.precisions if precision in BITS]
    found += [_quantize(recipe, name, precision) for name in names for precision in quantized]
    found += [_verify(recipe, name, precision, threads) for name in names for precision in recipe.precisions]
    found += [
        _bundle_condensation(name, precision, threads) for name in first for precision in recipe.precisions
    ]
    scored = ["torch", *recipe.precisions]
    found += [_accuracy(recipe, name, precision, threads) for name in names for precision in scored]
    found.append(_latency(recipe, threads))
    found += [_pack(name, target, threads) for name in first for target in recipe.targets]
    return found


def _plain(section: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = section.model_dump(mode="json")
    return dumped


def base_stage(recipe: Recipe) -> Stage:
    """The weights that every training starts from."""

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        if recipe.is_smoke:
            return run.twin_base(recipe.model, recipe.data, recipe.seed, recipe.folder, job.own, job.progress)
        return run.base(recipe.model, recipe.data.context, recipe.folder, job.own, job.progress)

    section = {"model": _plain(recipe.model), "smoke": recipe.is_smoke, "context": recipe.data.context}
    if recipe.is_smoke:
        section |= {"data": _plain(recipe.data), "seed": recipe.seed}
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

    section = {"data": _plain(recipe.data), "seed": recipe.seed, "blocks": blocks, "smoke": recipe.is_smoke}
    return Stage("corpus", section, ("base",), work)


def training_stage(recipe: Recipe, run: ArmRun) -> Stage:
    """One arm with one seed. Its key holds nothing of other arms, so that adding one retrains none."""
    train = _plain(recipe.train)
    for onlooker in ("dispersion", *ONLOOKERS):
        del train[onlooker]
    if run.dispersion is not None:
        train["dispersion"] = _plain(run.dispersion)
    if recipe.train.adapter is not None:
        del train["adapter"]["merge"]  # decides what is done with the trained adapter

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages

        return stages.midtrain(
            recipe.train,
            recipe.steps,
            run.seed,
            run,
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
    name = f"{run.name}/model" if recipe.train.adapter is None else f"{run.name}/adapter"
    return Stage(name, section, ("base", "corpus"), work, resumable=True, every_process=True)


def _merge(recipe: Recipe, chosen: Adapter, arm: str) -> Stage:
    """A stage of its own: changed int4 options can change the base that is better, and must retrain nothing.

    The baseline's audit decides for every arm, so that twins are merged into the same kind of base.
    """
    adapter = f"{arm}/adapter"
    asked = chosen.kind == "qlora" and chosen.merge == "auto"
    decider = f"{_decider(recipe)}/model" if asked and arm != _decider(recipe) else None
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
        "adapter": _plain(chosen),
        "int4": _plain(recipe.quantize.int4),
        "int4_ships": int4_ships,
        "seed": recipe.seed,
    }
    reads = ("base", "corpus", adapter) if decider is None else ("base", "corpus", adapter, decider)
    return Stage(f"{arm}/model", section, reads, work)


def _decider(recipe: Recipe) -> str:
    """The training whose merge audit decides for all: the baseline's, with the first seed."""
    names = [arm.name for arm in recipe.arms]
    return "baseline" if "baseline" in names else names[0]


# Raised when the profile of a model gets other figures; 2: intervals, correlations, outliers.
CONDENSATION_FORM = {"form": 2}


def _condensations(arms: list[str]) -> list[Stage]:
    """The torch models' profiles, the baseline's first: the others are compared with it."""
    ordered = sorted(arms, key=lambda arm: arm != "baseline")
    against = "baseline/condensation" if "baseline" in arms else None
    return [_condensation(arm, None if arm == "baseline" else against) for arm in ordered]


def _condensation(arm: str, against: str | None) -> Stage:
    model = f"{arm}/model"

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        baseline = None if against is None else job.folders[against]
        return run.condensation(job.folders[model], job.folders["corpus"], baseline, job.own, job.progress)

    reads = (model, "corpus") if against is None else (model, "corpus", against)
    return Stage(f"{arm}/condensation", CONDENSATION_FORM, reads, work)


def _bundle_condensation(arm: str, precision: str, threads: int) -> Stage:
    bundle, measured = f"{arm}/{precision}", f"{arm}/condensation"

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        folders = job.folders
        return run.bundle_condensation(
            folders[bundle], folders[measured], folders["corpus"], threads, job.own, job.progress
        )

    section = {**CONDENSATION_FORM, "threads": threads}
    return Stage(f"{arm}/condensation-{precision}", section, (bundle, measured, "corpus"), work)


def _export(arm: str, threads: int) -> Stage:
    model = f"{arm}/model"

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        return run.export(job.folders[model], threads, job.own, job.progress)

    return Stage(f"{arm}/fp32", {"threads": threads}, (model,), work)


def _quantize(recipe: Recipe, arm: str, precision: str) -> Stage:
    parent = f"{arm}/fp32"
    options = getattr(recipe.quantize, precision)

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        return run.quantize(options, BITS[precision], job.folders[parent], job.own, job.progress)

    return Stage(f"{arm}/{precision}", {"bits": BITS[precision], **_plain(options)}, (parent,), work)


def _verify(recipe: Recipe, arm: str, precision: str, threads: int) -> Stage:
    model, bundle = f"{arm}/model", f"{arm}/{precision}"
    limits = recipe.verify.limits(precision)
    blocks = max(1, -(-recipe.verify.tokens // recipe.data.context))

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        folders = job.folders
        return run.verify(
            limits, blocks, folders[model], folders[bundle], folders["corpus"], threads, job.own, job.progress
        )

    section = {"limits": limits, "blocks": blocks, "threads": threads}
    return Stage(f"{arm}/verify-{precision}", section, (model, bundle, "corpus"), work)


def _scoring(recipe: Recipe) -> tuple[dict[str, Any], Callable[[Work], Any]]:
    """What the tasks' questions depend on, and how to make them."""
    section = {**_plain(recipe.evaluate), "context": recipe.data.context, "seed": recipe.seed}
    path = recipe.evaluate.tasks_path
    tasks_path = None if path is None else (recipe.folder / path).resolve()
    if tasks_path is not None:
        section["tasks_content"] = _folder_digest(tasks_path)

    def suite(job: Work) -> Any:
        from edgedisp import stages as run

        base, corpus = job.folders["base"], job.folders["corpus"]
        return run.items(recipe.evaluate, recipe.seed, tasks_path, base, corpus, recipe.data.context)

    return section, suite


def _items(recipe: Recipe) -> Stage:
    section, suite = _scoring(recipe)

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        return run.count_items(suite(job), job.own)

    return Stage("items", section, ("base", "corpus"), work)


def _accuracy(recipe: Recipe, arm: str, precision: str, threads: int) -> Stage:
    section, suite = _scoring(recipe)
    model, bundle = f"{arm}/model", None if precision == "torch" else f"{arm}/{precision}"

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        shipped = None if bundle is None else job.folders[bundle]
        return run.accuracy(
            suite(job), recipe.evaluate, job.folders[model], shipped, threads, job.own, job.progress
        )

    reads = ("base", "corpus", model) if bundle is None else ("base", "corpus", model, bundle)
    return Stage(f"{arm}/accuracy-{precision}", {**section, "threads": threads}, reads, work)


def _folder_digest(folder: Path) -> str:
    """Names and contents of a folder of local tasks: editing a task scores it again."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return digest({path.relative_to(folder).as_posix(): digest(path.read_bytes().hex()) for path in files})


def _latency(recipe: Recipe, threads: int) -> Stage:
    names = tuple(f"{arm.name}/{precision}" for precision in recipe.precisions for arm in recipe.arms)

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        bundles = {name: job.folders[name] for name in names}
        return run.latency(recipe.latency, recipe.seed, threads, bundles, job.own, job.progress)

    section = {**_plain(recipe.latency), "threads": threads, "seed": recipe.seed}
    return Stage("latency", section, names, work)


def _pack(arm: str, target: str, threads: int) -> Stage:
    profile = load_target(target)
    bundle = f"{arm}/{profile.precision}"
    started_with = profile.threads or threads

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        return run.pack(target, started_with, job.folders[bundle], job.own)

    return Stage(f"{arm}/{target}", {"threads": started_with}, (bundle,), work)


@dataclass(frozen=True)
class Walked:
    """A stage that a build has passed, and whether its folder was kept from an earlier build."""

    name: str
    record: Record
    kept: bool


def state(recipe: Recipe, run: Path, threads: int) -> list[tuple[Stage, Record | None]]:
    """Each stage with its finished record, or None where a build would have to run it."""
    records: dict[str, Record] = {}
    found: list[tuple[Stage, Record | None]] = []
    for stage in stages(recipe, threads):
        record = read(run / stage.name) if all(name in records for name in stage.reads) else None
        if record is not None and record.key == stage.key(records):
            records[stage.name] = record
            found.append((stage, record))
        else:
            found.append((stage, None))
    return found


def build(recipe: Recipe, run: Path, threads: int, observer: Observer) -> list[Walked]:
    """Walk the stages in `run`, making those whose record does not fit.

    Raises BadInput for what the user can mend (a run folder made by this call is then removed again),
    BuildFailed when a stage cannot be completed.
    """
    with open_run(run, recipe.identity(), recipe.name):
        return walk(stages(recipe, threads), run, observer)


def walk(
    todo: list[Stage], run: Path, observer: Observer, before: Sequence[Walked] = (), total: int | None = None
) -> list[Walked]:
    """Walk `todo` in an open run; returns the stages passed, those `before` included.

    `before`: stages passed earlier, which `todo` may read. `total`: how many the observer is told of, where
    more will follow.
    """
    walked = list(before)
    records = {step.name: step.record for step in walked}
    total = total or len(walked) + len(todo)
    shared = [stage.name for stage in todo if stage.every_process]
    last_shared = shared[-1] if shared else None
    for number, stage in enumerate(todo, start=len(walked) + 1):
        key = stage.key(records)
        record = read(run / stage.name)
        kept = record is not None and record.key == key
        if record is not None and kept:
            observer.kept(stage.name, record)
        else:
            observer.started(stage.name, number, total)
            record = _make(stage, run, key, records, observer.progress)
            observer.finished(stage.name, record)
        records[stage.name] = record
        walked.append(Walked(stage.name, record, kept))
        if stage.name == last_shared and any(not step.kept for step in walked if step.name in shared):
            from edgedisp.stages import leave_processes

            leave_processes()  # the other processes of a launch end here too
    return walked


def _make(
    stage: Stage, run: Path, key: dict[str, Any], records: dict[str, Record], progress: Progress
) -> Record:
    folder = run / stage.name
    started = time.perf_counter()
    with making(folder, key, resumable=stage.resumable) as own:
        try:
            results = stage.work(Work(own, {name: records[name].folder for name in stage.reads}, progress))
        except BadInput:
            if not any((own / "checkpoints").glob("*")):
                shutil.rmtree(own, ignore_errors=True)  # there is nothing worth resuming
            raise
        return finish(own, folder, key, results, time.perf_counter() - started)
