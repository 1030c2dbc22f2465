"""A stage is declared once: its function, its options, its inputs, the local files it reads.

A stage's key is just these: options by value, inputs and local files by content. Its function gets just
these, too: `function(options, inputs, output_dir, progress)` returns the results for its record. So what is
not in the key cannot be read, and a finished stage with the same key is reused. Functions are named by text
and imported when they run: planning a build loads no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import canonical, damaged_file, digest, file_digest, read_object, sealed, write_json
from edgedisp.core.progress import Progress, Screen, silent
from edgedisp.core.stage_folder import CHECKPOINTS, Record, finish, is_started, read, stage_output

REVISION = 6
"""Raised when stage functions write something else from the same inputs; older runs are then made again."""

HASHES = "file_hashes.json"
"""In the run folder: SHA-256 of local files, remembered by size, modification time and inode."""

POLL_S = 0.2


class Inputs(dict[str, Path]):
    """What a stage reads: keyword -> folder of an earlier stage. files: name in the recipe -> local path."""

    def __init__(self, files: Mapping[str, Path] | None = None, /, **folders: Path) -> None:
        super().__init__(folders)
        self.files = files or {}


@dataclass(frozen=True)
class Stage:
    """name: its folder under the run. function: `module:name`. options: frozen; None where there are none.

    inputs: keyword -> name of the stage whose folder the function gets under it. files: name in the recipe ->
    local file or folder outside the run. resumable: a partial folder with the same key is continued.
    every_process: every process of a launch takes part; other stages are run by the first alone. A result
    with entries under `missing` (data that a hub did not give) is tried again next time. check: called with
    the folder, new or kept; raises BadInput where the build cannot go on from it.
    """

    name: str
    function: str
    options: Any
    inputs: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    resumable: bool = False
    every_process: bool = False
    check: Callable[[Path], None] | None = None

    def run(self, records: Mapping[str, Record], output_dir: Path, progress: Progress) -> dict[str, Any]:
        module, _, name = self.function.partition(":")
        function: Callable[..., dict[str, Any]] = getattr(import_module(module), name)
        folders = {keyword: records[stage].folder for keyword, stage in self.inputs.items()}
        return function(self.options, Inputs(self.files, **folders), output_dir, progress)


def plain(options: Any) -> Any:
    """Options (dataclasses, also within one another; pydantic models) as JSON values, without the keys that a
    model names in `unhashed`: they change no result."""
    from pydantic import TypeAdapter

    if is_dataclass(options):
        return {part.name: plain(getattr(options, part.name)) for part in fields(options)}
    unhashed = getattr(options, "unhashed", None)
    return TypeAdapter(Any).dump_python(options, mode="json", exclude=unhashed)


def results_of(folder: Path) -> dict[str, Any]:
    """The results in a finished stage's record. Raises BuildFailed if the record is gone or damaged."""
    if (record := read(folder)) is None:
        raise BuildFailed(f"{folder}: its record is gone or damaged; build again")
    return record.results


@dataclass(frozen=True)
class Passed:
    """A stage that a build has passed; cached: its folder is from an earlier build."""

    name: str
    record: Record
    cached: bool


class FileHashes:
    """SHA-256 of local files and folders, read again only where size, modification time or inode changed."""

    def __init__(self, run: Path) -> None:
        self._path = run / HASHES
        self._hashes: dict[str, list[Any]] = read_object(self._path)

    def of(self, path: Path) -> str:
        """The hash of a file, or of the names and hashes of all files in a folder; `absent` for neither."""
        path = path.resolve()
        if path.is_dir():
            files = [file for file in path.rglob("*") if file.is_file() and file.suffix != ".pyc"]
            return digest({file.relative_to(path).as_posix(): self.of(file) for file in files})
        if not path.is_file():
            return "absent"
        status = path.stat()
        state = [status.st_size, status.st_mtime_ns, status.st_ino]
        cached = self._hashes.get(str(path))
        if not isinstance(cached, list) or cached[:-1] != state:
            self._hashes[str(path)] = cached = [*state, file_digest(path)]
        return str(cached[-1])

    def save(self) -> None:
        write_json(self._path, sealed(self._hashes))


class StageRunner:
    """Runs stages into a run's folders; `records` holds those of the stages passed so far."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.records: dict[str, Record] = {}
        self.hashes = FileHashes(run)
        self._verified: set[str] = set()

    def key(self, stage: Stage) -> dict[str, Any]:
        """What the stage's result depends on, as JSON; every input must have a record."""
        key = {
            "stage": stage.name,
            "function": stage.function,
            "options": plain(stage.options),
            "inputs": {keyword: self.records[name].content for keyword, name in stage.inputs.items()},
            "files": {name: self.hashes.of(path) for name, path in stage.files.items()},
            "revision": REVISION,
        }
        return dict(json.loads(canonical(key)))

    def finished(self, stage: Stage) -> Record | None:
        """The record of a finished folder that this stage would write again; None if it has to run."""
        if any(name not in self.records for name in stage.inputs.values()):
            return None
        record = read(self.run / stage.name)
        if record is None or record.results.get("missing") or record.key != self.key(stage):
            return None
        self.records[stage.name] = record
        return record

    def execute(self, stage: Stage, progress: Progress) -> Record:
        """Run the stage in a partial folder and move that into place.

        Raises BuildFailed where a file of an input is not as its record says (compared once in a build).
        """
        key, folder = self.key(stage), self.run / stage.name
        for name in sorted(set(stage.inputs.values()) - self._verified):
            source = self.records[name]
            if damage := damaged_file(source.folder, source.files):
                raise BuildFailed(
                    f"{source.folder}/{damage}; stage {stage.name} would build on it. Delete {source.folder} "
                    "and build again: it is made anew"
                )
            self._verified.add(name)
        started = time.perf_counter()
        with stage_output(folder, key, resumable=stage.resumable) as partial:
            try:
                results = stage.run(self.records, partial, progress)
            except BadInput:
                if not any((partial / CHECKPOINTS).glob("*")):
                    shutil.rmtree(partial, ignore_errors=True)  # there is nothing worth resuming
                raise
            record = finish(partial, folder, key, results, time.perf_counter() - started)
        self._verified.add(stage.name)  # just written and hashed
        self.records[stage.name] = record
        return record

    def pass_stage(self, stage: Stage, screen: Screen, number: int, total: int) -> Passed:
        """Take the finished folder of the same key, or run the stage, which is number `number` of `total`."""
        record = self.finished(stage)
        is_cached = record is not None
        if record is not None:
            screen.cached(stage.name)
        else:
            screen.started(stage.name, number, total)
            record = self.execute(stage, screen.progress)
            screen.finished(stage.name, record)
        if stage.check is not None:
            stage.check(record.folder)
        return Passed(stage.name, record, is_cached)


def walk(stages: Sequence[Stage], run: Path, screen: Screen) -> list[Passed]:
    """Pass every stage of an open run, in order; runs those without a finished folder of the same key."""
    runner, passed, trained = StageRunner(run), [], False
    last = _last_shared(stages)
    for index, stage in enumerate(stages):
        passed.append(runner.pass_stage(stage, screen, index + 1, len(stages)))
        trained = trained or (stage.every_process and not passed[-1].cached)
        if trained and index == last:
            _leave_processes()
    runner.hashes.save()
    return passed


def _last_shared(stages: Sequence[Stage]) -> int:
    return max((index for index, stage in enumerate(stages) if stage.every_process), default=-1)


def state(stages: Iterable[Stage], run: Path) -> list[tuple[Stage, Record | None]]:
    """Each stage with its finished record, or None where a build would run it. Writes nothing."""
    runner = StageRunner(run)
    return [(stage, runner.finished(stage)) for stage in stages]


def follow(stages: Sequence[Stage], run: Path) -> None:
    """Non-zero ranks join each training stage and wait for rank 0 with the others.

    They wait for the record of a stage in the run folder (one machine or one file system), as a collective
    operation has a time limit, and write their part of a checkpoint alone. Raises BuildFailed if the launcher
    is gone.
    """
    launcher, runner, trained = os.getppid(), StageRunner(run), False
    for stage in stages[: _last_shared(stages) + 1]:
        key, folder, joined = runner.key(stage), run / stage.name, False
        while (record := read(folder)) is None or record.key != key:
            if stage.every_process and not joined and is_started(folder, key):
                joined = trained = True
                stage.run(runner.records, folder.with_name(f"{folder.name}.partial"), silent)
            elif os.getppid() != launcher:
                raise BuildFailed(f"the launcher ended while {folder} was waited for")
            else:
                time.sleep(POLL_S)
        runner.records[stage.name] = record
    if trained:
        _leave_processes()


def _leave_processes() -> None:
    from edgedisp.train.trainer import leave_processes  # brings torch

    leave_processes()
