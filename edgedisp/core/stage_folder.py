"""A run's folders: one per stage, each finished or absent.

A stage writes into `<stage>.partial`, then `record.json` last, and the folder is renamed into place: a folder
with the stage's name is always whole. The record holds the key the stage was made for (its options and the
content hashes of what it read), so that an unchanged stage is recognised without opening a model, and the
SHA-256 of every file, from which the stage's own content hash is made. A bundle that leaves its run lists its
files in the same way in `manifest.json`; `check_files` compares them before a runtime reads one.

JSON of the wrong shape counts as truncated. Records are synced to the disk; large files are not: a power cut
may cost the stage, whose file sizes are compared when it is read. There is no database of artefacts: a run
folder can be copied, zipped or deleted with ordinary tools.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgedisp import __version__
from edgedisp.core.errors import BadInput

RECORD = "record.json"
MANIFEST = "manifest.json"  # what a bundle says of itself wherever it is taken
RUN = "run.json"
SCORES = "scores.sqlite"  # beside it: the store of all scores
KEY = "key.json"

Files = dict[str, dict[str, Any]]
"""File by its path from the folder -> {size_bytes, sha256}."""


# --- JSON and hashes -------------------------------------------------------------------------------------


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value, in hex."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either whole or absent; NaN is refused with ValueError."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty if the file is absent, damaged, or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# --- records ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What a finished stage says of itself; `results` is the stage's own."""

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
    raw = _read_object(folder / RECORD)
    try:
        record = Record(
            folder, dict(raw["key"]), dict(raw["results"]), _listed_files(raw), float(raw["seconds"])
        )
    except _WRONG_SHAPE:
        return None
    whole = all(_size(folder / name) == entry["size_bytes"] for name, entry in record.files.items())
    return record if whole else None


def changed_files(folder: Path, pattern: str) -> list[str]:
    """Names of the files that match `pattern` whose SHA-256 is no longer what the folder's record says.

    A folder without a readable record has none.
    """
    try:
        files = _listed_files(_read_object(folder / RECORD))
    except _WRONG_SHAPE:
        return []
    paths = (path for path in sorted(folder.glob(pattern)) if path.name in files)
    return [path.name for path in paths if file_digest(path) != files[path.name]["sha256"]]


def list_files(folder: Path, without: Sequence[str] = ()) -> Files:
    """Every file under a folder."""
    files = (
        (path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file()
    )
    return {name: _entry(path) for name, path in files if name not in without}


def check_files(folder: Path) -> bool:
    """Compare a folder's files with what its manifest says, or its record: sizes first, then contents.

    Returns False where there is neither. Raises BadInput naming the file, what was expected and what is
    there, also where the list itself is damaged.
    """
    again = "copy or export the bundle again"
    listing = next((path for path in (folder / MANIFEST, folder / RECORD) if path.is_file()), None)
    if listing is None:
        return False
    try:
        files = _listed_files(_read_object(listing))
    except _WRONG_SHAPE as error:
        raise BadInput(f"{listing}: is damaged ({error!r}); {again}") from error
    for name, entry in files.items():
        path, size, expected = folder / name, _size(folder / name), entry["size_bytes"]
        if size is None:
            raise BadInput(f"{path}: is missing; {listing.name} lists it with {expected:,} bytes; {again}")
        if size != expected:
            raise BadInput(
                f"{path}: has {size:,} bytes, {listing.name} says {expected:,}: truncated or changed; {again}"
            )
    for name, entry in files.items():
        actual, expected = file_digest(folder / name), entry["sha256"]
        if actual != expected:
            reason = f"its SHA-256 is {actual}, {listing.name} says {expected}"
            raise BadInput(f"{folder / name}: is damaged: {reason}; {again}")
    return True


def update_listing(folder: Path, names: Sequence[str]) -> None:
    """Enter the files `names` anew where the folder's manifest lists them, then both in its record.

    For a bundle whose files were changed on purpose after it was made.
    """
    for listing, changed in ((MANIFEST, names), (RECORD, (*names, MANIFEST))):
        raw = _read_object(folder / listing)
        files = raw.get("files")
        if isinstance(files, dict):
            files |= {name: _entry(folder / name) for name in changed if name in files}
            write_json(folder / listing, raw)


def _entry(path: Path) -> dict[str, Any]:
    return {"size_bytes": path.stat().st_size, "sha256": file_digest(path)}


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


_WRONG_SHAPE = (KeyError, TypeError, ValueError, AttributeError)


def _listed_files(raw: dict[str, Any]) -> Files:
    """The `files` of a record or manifest; one of _WRONG_SHAPE is raised if they are not a list of files."""
    return {
        name: {"size_bytes": int(entry["size_bytes"]), "sha256": str(entry["sha256"])}
        for name, entry in raw["files"].items()
    }


def git_commit() -> str | None:
    """The commit of the checkout that edgedisp runs from, with `+` if it has changes; None outside one."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "--short=12", "HEAD").strip() if (root / ".git").exists() else None
        return commit and commit + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# --- making a stage --------------------------------------------------------------------------------------


@contextmanager
def stage_output(folder: Path, key: dict[str, Any], *, resumable: bool = False) -> Iterator[Path]:
    """Give the folder to write a stage into; what is there survives a kill only if `resumable`.

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
    """Whether a stage's partial folder is there, made for this key."""
    path = _partial(folder) / KEY
    return path.is_file() and _read_object(path) == key


def finish(
    partial: Path, folder: Path, key: dict[str, Any], results: dict[str, Any], seconds: float
) -> Record:
    """Hash the files, write the record, and rename the folder into place over an outdated one."""
    (partial / RECORD).unlink(missing_ok=True)  # of a folder that the stage copied
    files = list_files(partial, without=(KEY,))
    raw = {
        "key": key,
        "results": results,
        "files": files,
        "seconds": seconds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "edgedisp": __version__,
        "git_commit": git_commit(),
    }
    write_json(partial / RECORD, raw)
    _move_into_place(folder)
    return Record(folder, key, results, files, seconds)


def _move_into_place(folder: Path) -> None:
    """Rename a partial folder whose record is whole; a kill at any step leaves something to go on from."""
    partial, outdated = _partial(folder), folder.with_name(folder.name + ".outdated")
    (partial / KEY).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(outdated, ignore_errors=True)
        folder.rename(outdated)
    partial.rename(folder)
    shutil.rmtree(outdated, ignore_errors=True)


def _recover(run: Path) -> None:
    """Finish what a killed build left: rename stages whose record is whole, remove outdated folders."""
    for partial in [path for path in run.rglob("*.partial") if path.is_dir()]:
        if _is_finished(partial):
            _move_into_place(partial.with_name(partial.name.removesuffix(".partial")))
    for outdated in [path for path in run.rglob("*.outdated") if path.is_dir()]:
        shutil.rmtree(outdated, ignore_errors=True)


def _is_finished(partial: Path) -> bool:
    """Whether a partial folder has its own whole record: not one that came along with copied files."""
    record = read(partial)
    key = partial / KEY
    return record is not None and (not key.is_file() or _read_object(key) == record.key)


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


# --- the run folder --------------------------------------------------------------------------------------


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
    if not is_new and not path.is_dir():
        raise BadInput(f"{path}: is a file; an output folder is needed (--out FOLDER)")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise BadInput(f"{path}: cannot be made ({reason}); choose another --out") from error
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(
            f"{path}: another build is writing there; wait for it to end, or name another folder with --out"
        ) from None
    try:
        _check_owner(path, json.loads(canonical(identity)), name)
        _recover(path)
        yield path
    except BadInput:
        if is_new and not any(path.glob(f"*/*/{RECORD}")):
            shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        lock.release()
        if is_new and path.exists() and not any(path.rglob(RECORD)) and not any(path.rglob("*.partial")):
            shutil.rmtree(path, ignore_errors=True)


def _check_owner(path: Path, identity: dict[str, Any], name: str) -> None:
    if not (path / RUN).exists():
        entries = {entry.name for entry in path.iterdir()} - {".lock", f"{RUN}.partial"}
        if entries:
            raise BadInput(
                f"{path}: is not a run folder and not empty ({', '.join(sorted(entries)[:3])}, ...); "
                "choose another --out"
            )
        made = time.strftime("%Y-%m-%dT%H:%M:%S")
        write_json(path / RUN, {"name": name, "identity": identity, "made": made})
        return
    owner = _read_object(path / RUN)
    if not isinstance(owner.get("identity"), dict):
        raise BadInput(f"{path / RUN}: is damaged; restore it from a copy, or choose another --out")
    if owner["identity"] != identity:
        changed = ", ".join(_differences(owner["identity"], identity))
        raise BadInput(
            f"{path}: belongs to another recipe ({owner.get('name')}), which differs in {changed}; "
            "choose another --out, or leave --out away to get a folder of its own"
        )


def _differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Dotted paths at which two JSON values differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys = sorted({*left, *right})
        return [
            d for k in keys for d in _differences(left.get(k), right.get(k), f"{path}.{k}" if path else k)
        ]
    return [] if left == right else [path]
