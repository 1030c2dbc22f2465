"""A stage, and the loop that walks a list of them.

A finished stage whose key is the same is kept. This module imports no torch; `stages/`, which does, is
imported when the first stage has to run.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgedisp.core.errors import BadInput
from edgedisp.core.files import canonical
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import Record, finish, read, stage_output

# Raised when a stage's code changes what it writes, so that runs made before are not taken for current.
REVISION = 2


@dataclass(frozen=True)
class Work:
    """What a stage is given: its own folder, the folders it reads, and whom to tell of its progress."""

    own: Path
    folders: dict[str, Path]
    progress: Progress


@dataclass(frozen=True)
class Stage:
    """One stage: `name` is its folder under the run, `section` and `reads` make its key, `work` does it.

    `every_process`: of a launch takes part in it (follow.py); all other stages are the first's alone. A
    result that holds something under `missing`, data that a hub did not give, is tried again next time.
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

    def kept(self, run: Path, records: dict[str, Record]) -> Record | None:
        """The finished record of an earlier build, if it is what this stage would make."""
        record = read(run / self.name)
        fits = record is not None and record.key == self.key(records) and not record.results.get("missing")
        return record if fits else None


class Observer(Protocol):
    """Whoever wants to know how a build goes; the command line draws it."""

    def started(self, name: str, number: int, total: int) -> None: ...

    def progress(self, done: int, total: int, note: str) -> None: ...

    def finished(self, name: str, record: Record) -> None: ...

    def kept(self, name: str, record: Record) -> None: ...


@dataclass(frozen=True)
class Walked:
    """A stage that a build has passed, and whether its folder was kept from an earlier build."""

    name: str
    record: Record
    kept: bool


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
        earlier = stage.kept(run, records)
        if earlier is not None:
            record = earlier
            observer.kept(stage.name, record)
        else:
            observer.started(stage.name, number, total)
            record = _make(stage, run, stage.key(records), records, observer.progress)
            observer.finished(stage.name, record)
        records[stage.name] = record
        walked.append(Walked(stage.name, record, earlier is not None))
        if stage.name == last_shared and any(not step.kept for step in walked if step.name in shared):
            from edgedisp.train.trainer import leave_processes

            leave_processes()  # the other processes of a launch end here too
    return walked


def _make(
    stage: Stage, run: Path, key: dict[str, Any], records: dict[str, Record], progress: Progress
) -> Record:
    folder = run / stage.name
    started = time.perf_counter()
    with stage_output(folder, key, resumable=stage.resumable) as own:
        try:
            results = stage.work(Work(own, {name: records[name].folder for name in stage.reads}, progress))
        except BadInput:
            if not any((own / "checkpoints").glob("*")):
                shutil.rmtree(own, ignore_errors=True)  # there is nothing worth resuming
            raise
        return finish(own, folder, key, results, time.perf_counter() - started)
