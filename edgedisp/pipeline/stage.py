"""A stage is declared once: its function, its options, its inputs, the local files it reads.

A stage's key is the hash of just these: options by value, inputs and local files by content. Its function
gets just these, too: `function(options, **{keyword: folder of an input}, output_dir=, progress=)`. It returns
the results for its record. So what is not in the key cannot be read, and a finished stage with the same key
is reused. Functions are named by text and imported when they run: planning a build loads no torch.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import canonical, changed_files, digest, file_digest, write_json
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import Record, finish, read, stage_output

REVISION = 3
"""Raised when stage functions write something else from the same inputs; older runs are then made again."""

HASHES = "file_hashes.json"
"""In the run folder: SHA-256 of local files, remembered by size, modification time and inode."""


@dataclass(frozen=True)
class Stage:
    """name: its folder under the run. function: `module:name`. options: frozen; None where there are none.

    inputs: keyword of the function -> name of the stage whose folder it gets.
    files: name -> local file or folder outside the run, which the function gets as `files`.
    resumable: a partial folder with the same key is continued. every_process: every process of a launch takes
    part; all other stages are run by the first alone. A result with entries under `missing` (data that a hub
    did not give) is tried again next time.
    """

    name: str
    function: str
    options: Any
    inputs: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    resumable: bool = False
    every_process: bool = False

    def run(self, records: Mapping[str, Record], output_dir: Path, progress: Progress) -> dict[str, Any]:
        module, _, name = self.function.partition(":")
        function: Callable[..., dict[str, Any]] = getattr(import_module(module), name)
        arguments: dict[str, Any] = {key: records[stage].folder for key, stage in self.inputs.items()}
        if self.files:
            arguments["files"] = self.files
        return function(self.options, **arguments, output_dir=output_dir, progress=progress)


UNHASHED = {"hashed": False}
"""Metadata of a field of options that changes no result, such as how often training is logged."""


def plain(options: Any) -> Any:
    """Options (dataclasses, also within one another; pydantic models) as plain JSON values, without their
    unhashed fields."""
    from pydantic import TypeAdapter

    if not is_dataclass(options):
        return TypeAdapter(Any).dump_python(options, mode="json")
    hashed = (part.name for part in fields(options) if part.metadata.get("hashed", True))
    return {name: plain(getattr(options, name)) for name in hashed}


class Observer(Protocol):
    """Shows how a build goes (core/progress.py)."""

    def started(self, name: str, number: int, total: int) -> None: ...

    def progress(self, done: int, total: int, note: str) -> None: ...

    def finished(self, name: str, record: Record) -> None: ...

    def kept(self, name: str, record: Record) -> None: ...


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
        self._known: dict[str, list[Any]] = {}
        try:
            known = json.loads(self._path.read_text(encoding="utf-8"))
            self._known = known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            pass  # they are computed again

    def of(self, path: Path) -> str:
        """The hash of a file, or of the names and hashes of all files in a folder; `absent` for neither."""
        path = path.resolve()
        if path.is_dir():
            files = sorted(one for one in path.rglob("*") if one.is_file() and one.suffix != ".pyc")
            return digest({one.relative_to(path).as_posix(): self._file(one) for one in files})
        return self._file(path) if path.is_file() else "absent"

    def save(self) -> None:
        write_json(self._path, self._known)

    def _file(self, path: Path) -> str:
        status = path.stat()
        state = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = self._known.get(str(path))
        if isinstance(known, list) and known[:-1] == state:
            return str(known[-1])
        self._known[str(path)] = [*state, file_digest(path)]
        return str(self._known[str(path)][-1])


class Walk:
    """One way through the stages of a run: what is finished, what has to run, and running it."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.records: dict[str, Record] = {}
        self.hashes = FileHashes(run)
        self._verified: set[str] = set()

    def key(self, stage: Stage) -> dict[str, Any]:
        """What the stage's result depends on; every input must have a record."""
        key = {
            "stage": stage.name,
            "function": stage.function,
            "options": plain(stage.options),
            "inputs": {keyword: self.records[name].content for keyword, name in stage.inputs.items()},
            "files": {name: self.hashes.of(path) for name, path in stage.files.items()},
            "revision": REVISION,
        }
        as_read: dict[str, Any] = json.loads(canonical(key))
        return as_read

    def finished(self, stage: Stage) -> Record | None:
        """The record of a finished folder that this stage would write again; None if it has to run."""
        if any(name not in self.records for name in stage.inputs.values()):
            return None
        record = read(self.run / stage.name)
        if record is None or record.key != self.key(stage) or record.results.get("missing"):
            return None
        return record

    def execute(self, stage: Stage, progress: Progress) -> Record:
        """Run the stage in a partial folder and move that into place; BuildFailed for a damaged input."""
        key, folder = self.key(stage), self.run / stage.name
        self._verify(stage)
        started = time.perf_counter()
        with stage_output(folder, key, resumable=stage.resumable) as partial:
            try:
                results = stage.run(self.records, partial, progress)
            except BadInput:
                if not any((partial / "checkpoints").glob("*")):
                    shutil.rmtree(partial, ignore_errors=True)  # there is nothing worth resuming
                raise
            record = finish(partial, folder, key, results, time.perf_counter() - started)
        self._verified.add(stage.name)  # just written and hashed
        self.records[stage.name] = record
        return record

    def _verify(self, stage: Stage) -> None:
        """Compare the files of every input with the SHA-256 of its record, once in a build."""
        for name in stage.inputs.values():
            if name in self._verified:
                continue
            folder = self.records[name].folder
            if changed := changed_files(folder, "**/*"):
                raise BuildFailed(
                    f"{folder / changed[0]}: is not the file that stage {name} wrote (another SHA-256), and "
                    f"{stage.name} would build on it; delete {folder} and build again: it is made anew"
                )
            self._verified.add(name)


def walk(stages: Sequence[Stage], run: Path, observer: Observer) -> list[Passed]:
    """Pass every stage of an open run, in order; runs those without a finished folder of the same key."""
    way, passed = Walk(run), []
    shared = [stage.name for stage in stages if stage.every_process]
    trained = False
    for number, stage in enumerate(stages, start=1):
        record = way.finished(stage)
        cached = record is not None
        if record is None:
            observer.started(stage.name, number, len(stages))
            record = way.execute(stage, observer.progress)
            observer.finished(stage.name, record)
            trained = trained or stage.every_process
        else:
            observer.kept(stage.name, record)
        way.records[stage.name] = record
        passed.append(Passed(stage.name, record, cached))
        if shared and stage.name == shared[-1] and trained:
            from edgedisp.train.trainer import leave_processes

            leave_processes()  # the other processes of a launch end here, too
    way.hashes.save()
    return passed


def state(stages: Iterable[Stage], run: Path) -> list[tuple[Stage, Record | None]]:
    """Each stage with its finished record, or None where a build would run it. Writes nothing."""
    way = Walk(run)
    result = []
    for stage in stages:
        record = way.finished(stage)
        if record is not None:
            way.records[stage.name] = record
        result.append((stage, record))
    return result
