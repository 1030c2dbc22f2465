"""The stages in order, what each depends on, and the loop that walks them.

    recipe -> base -> corpus -> items -> midtrain[arm] -> condensation[arm] -> export[arm]
           -> quantize[arm, precision] -> verify -> accuracy -> latency -> pack[arm, target] -> report

A stage's key is its section of the recipe and the content hashes of the stages it reads. A finished stage
with the same key is kept. So a changed precision retrains nothing, and an unchanged recipe runs nothing:
this module imports no torch, and `stages/`, which does, is imported when the first stage has to run.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgedisp import BadInput, Progress
from edgedisp.bench.targets import load_target
from edgedisp.folder import Record, canonical, digest, finish, making, open_run, read
from edgedisp.recipe import Recipe

# Raised when a stage's code changes what it writes, so that runs made before are not taken for current.
REVISION = 1

BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Work:
    """What a stage is given: its own folder, the folders it reads, and whom to tell of its progress."""

    own: Path
    folders: dict[str, Path]
    progress: Progress


@dataclass(frozen=True)
class Stage:
    """One stage: `name` is its folder under the run, `section` and `reads` make its key, `work` does it."""

    name: str
    section: dict[str, Any]
    reads: tuple[str, ...]
    work: Callable[[Work], dict[str, Any]]
    resumable: bool = False

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
    """Every stage of a recipe, in order, each after those it reads."""
    found = [_base(recipe), _corpus(recipe), _items(recipe)]
    found += [_midtrain(recipe, arm) for arm in recipe.arms]
    found += [_condensation(arm) for arm in recipe.arms]
    found += [_export(arm, threads) for arm in recipe.arms]
    quantized = [precision for precision in recipe.precisions if precision in BITS]
    found += [_quantize(recipe, arm, precision) for arm in recipe.arms for precision in quantized]
    found += [
        _verify(recipe, arm, precision, threads) for arm in recipe.arms for precision in recipe.precisions
    ]
    scored = ["torch", *recipe.precisions]
    found += [_accuracy(recipe, arm, precision, threads) for arm in recipe.arms for precision in scored]
    found.append(_latency(recipe, threads))
    found += [_pack(arm, target, threads) for arm in recipe.arms for target in recipe.targets]
    return found


def _plain(section: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = section.model_dump(mode="json")
    return dumped


def _base(recipe: Recipe) -> Stage:
    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        if recipe.is_smoke:
            return run.twin_base(recipe.model, recipe.data, recipe.seed, recipe.folder, job.own, job.progress)
        return run.base(recipe.model, recipe.data.context, recipe.folder, job.own, job.progress)

    section = {"model": _plain(recipe.model), "smoke": recipe.is_smoke, "context": recipe.data.context}
    if recipe.is_smoke:
        section |= {"data": _plain(recipe.data), "seed": recipe.seed}
    return Stage("base", section, (), work)


def _corpus(recipe: Recipe) -> Stage:
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


def _midtrain(recipe: Recipe, arm: str) -> Stage:
    train = _plain(recipe.train)
    if arm == "baseline":
        del train["dispersion"]  # the baseline does not depend on it

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        return run.midtrain(
            recipe.train,
            recipe.steps,
            recipe.seed,
            arm,
            job.folders["base"],
            job.folders["corpus"],
            job.own,
            job.progress,
        )

    section = {"train": train, "steps": recipe.steps, "seed": recipe.seed}
    return Stage(f"{arm}/model", section, ("base", "corpus"), work, resumable=True)


def _condensation(arm: str) -> Stage:
    model = f"{arm}/model"

    def work(job: Work) -> dict[str, Any]:
        from edgedisp import stages as run

        return run.condensation(job.folders[model], job.folders["corpus"], job.own, job.progress)

    return Stage(f"{arm}/condensation", {}, (model, "corpus"), work)


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
    names = tuple(f"{arm}/{precision}" for precision in recipe.precisions for arm in recipe.arms)

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
    walked: list[Walked] = []
    with open_run(run, recipe.identity(), recipe.name):
        todo = stages(recipe, threads)
        records: dict[str, Record] = {}
        for number, stage in enumerate(todo, start=1):
            key = stage.key(records)
            record = read(run / stage.name)
            kept = record is not None and record.key == key
            if record is not None and kept:
                observer.kept(stage.name, record)
            else:
                observer.started(stage.name, number, len(todo))
                record = _make(stage, run, key, records, observer.progress)
                observer.finished(stage.name, record)
            records[stage.name] = record
            walked.append(Walked(stage.name, record, kept))
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
            shutil.rmtree(own, ignore_errors=True)  # there is nothing worth resuming
            raise
        return finish(own, folder, key, results, time.perf_counter() - started)
