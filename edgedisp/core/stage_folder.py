"""A run's folders: one per stage, each finished or absent.

A stage writes into `<stage>.partial`, then `record.json` last, and the folder is renamed into place. The
record holds the stage's key (options, and content hashes of what it read) and every file's SHA-256. Records
are synced to the disk, large files are not: a power cut may cost a stage, whose file sizes are compared when
it is read.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.core.files import (
    RECORD,
    WRONG_SHAPE,
    Files,
    canonical,
    digest,
    file_size,
    list_files,
    listed_files,
    read_object,
    sealed,
    write_json,
)

RUN = "run.json"
SCORES = "scores.sqlite"  # in the run folder: the cache of all scores
KEY = "key.json"
CHECKPOINTS = "checkpoints"  # in a partial folder: what a killed stage goes on from


@dataclass(frozen=True)
class Record:
    """The record of a finished stage; `results` is what its function returned."""

    folder: Path
    key: dict[str, Any]
    results: dict[str, Any]
    files: Files
    seconds: float

    @property
    def content(self) -> str:
        """Hash of the stage's files: what a later stage that reads them depends on."""
        return digest({name: entry["sha256"] for name, entry in self.files.items()})

    def sha256(self, name: str) -> str:
        return str(self.files[name]["sha256"])


def read(folder: Path) -> Record | None:
    """The record of a finished stage, or None if the folder is absent or its files are not all there.

    File sizes are compared, not hashes: a second build should cost seconds.
    """
    raw = read_object(folder / RECORD)
    try:
        files, seconds = listed_files(raw), float(raw["seconds"])
        record = Record(folder, dict(raw["key"]), dict(raw["results"]), files, seconds)
    except WRONG_SHAPE:
        return None
    is_whole = all(file_size(folder / name) == entry["size_bytes"] for name, entry in files.items())
    return record if is_whole else None


@contextmanager
def stage_output(folder: Path, key: dict[str, Any], *, resumable: bool = False) -> Iterator[Path]:
    """Give the folder to write a stage into; after a kill its files are still there only if `resumable`.

    On an exception an unresumable partial folder is removed at once, so that a full disk gets its space back.
    """
    partial = _partial(folder)
    if partial.exists() and not (resumable and is_started(folder, key)):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / KEY, key)
    try:
        yield partial
    except BaseException:
        if not resumable and not _is_finished(partial):
            shutil.rmtree(partial, ignore_errors=True)
        raise


def is_started(folder: Path, key: dict[str, Any]) -> bool:
    """Whether a stage's partial folder is there, with this key."""
    path = _partial(folder) / KEY
    return path.is_file() and read_object(path) == key


def finish(
    partial: Path, folder: Path, key: dict[str, Any], results: dict[str, Any], seconds: float
) -> Record:
    """Hash the files, write the record, and rename the folder into place over an outdated one."""
    (partial / RECORD).unlink(missing_ok=True)  # of a folder that the stage copied
    files = list_files(partial, without=(KEY, f"{CHECKPOINTS}/*"))
    record = Record(folder, key, results, files, seconds)
    stored = {"key": key, "results": results, "files": files, "seconds": seconds}
    write_json(partial / RECORD, sealed(stored))
    _move_into_place(folder)
    return record


def _move_into_place(folder: Path) -> None:
    """Rename a partial folder whose record is whole; a kill at any step leaves something to go on from."""
    partial, outdated = _partial(folder), folder.with_name(folder.name + ".outdated")
    shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)  # needed until the record is written
    (partial / KEY).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(outdated, ignore_errors=True)
        folder.rename(outdated)
    partial.rename(folder)
    shutil.rmtree(outdated, ignore_errors=True)


def _is_finished(partial: Path) -> bool:
    """Whether a partial folder has its own whole record: not one that came along with copied files."""
    record, key = read(partial), partial / KEY
    return record is not None and (not key.is_file() or read_object(key) == record.key)


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


@contextmanager
def open_run(path: Path, identity: dict[str, Any], name: str) -> Iterator[Path]:
    """Hold a run folder as its only writer, after completing what a killed build left.

    A folder that this call made is removed again after a BadInput, or if nothing was begun in it; never one
    in which an arm has a finished stage: a training may have taken hours.
    Raises BadInput if the folder belongs to another recipe, holds something else, cannot be made, or is
    being written by another process.
    """
    from filelock import FileLock, Timeout

    is_new = not path.exists()
    lock = FileLock(path / ".lock")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        words = "another build is writing there; wait for it to end, or name another folder with --out"
        raise BadInput(f"{path}: {words}") from None
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise BadInput(f"{path}: cannot be made ({reason}); choose another --out") from error
    is_useful = False
    try:
        _check_owner(path, json.loads(canonical(identity)), name)
        for partial in [entry for entry in path.rglob("*.partial") if entry.is_dir()]:
            if _is_finished(partial):
                _move_into_place(partial.with_suffix(""))
        for outdated in [entry for entry in path.rglob("*.outdated") if entry.is_dir()]:
            shutil.rmtree(outdated, ignore_errors=True)
        yield path
        is_useful = True
    except BadInput:
        is_useful = any(path.glob(f"*/*/{RECORD}"))
        raise
    except BaseException:
        is_useful = any(path.rglob(RECORD)) or any(path.rglob("*.partial"))
        raise
    finally:
        lock.release()
        if is_new and not is_useful:
            shutil.rmtree(path, ignore_errors=True)


def _check_owner(path: Path, identity: dict[str, Any], name: str) -> None:
    """Refuse a folder of another recipe or of something else; a new one gets its run.json."""
    if not (path / RUN).exists():
        entries = {entry.name for entry in path.iterdir()} - {".lock", f"{RUN}.partial"}
        if entries:
            content = ", ".join(sorted(entries)[:3])
            words = f"is not a run folder and not empty ({content}, ...); choose another --out"
            raise BadInput(f"{path}: {words}")
        write_json(path / RUN, sealed({"name": name, "identity": identity}))
        return
    owner = read_object(path / RUN)
    if not isinstance(owner.get("identity"), dict):
        raise BadInput(f"{path / RUN}: is damaged; restore it from a copy, or choose another --out")
    if changed := ", ".join(_differences(owner["identity"], identity)):
        raise BadInput(
            f"{path}: belongs to another recipe ({owner.get('name')}), which differs in {changed}; "
            "choose another --out, or leave --out away to get a folder of its own"
        )


def _differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Dotted paths at which two JSON values differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        pairs = {f"{path}.{key}" if path else key: (left.get(key), right.get(key)) for key in left | right}
        return sorted(each for inner, pair in pairs.items() for each in _differences(*pair, inner))
    return [] if left == right else [path]
