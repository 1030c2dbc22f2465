"""A run's folders: one per stage, each finished or absent.

A stage writes into `<stage>.partial`, then `record.json` last, and the folder is renamed into place: a
folder with the stage's name is always whole. The record holds the key the stage was made for (its section
of the recipe and the content hashes of what it read), so that an unchanged stage is recognised without
opening a model, and the SHA-256 of every file, from which the stage's own content hash is made.

A bundle that leaves its run carries `manifest.json`, which lists its files in the same way; whoever opens one
compares them first (`check_files`), so that a damaged download is found before a runtime reads it.

What was left out: a database of artefacts shared between runs. A run folder can be copied, zipped or
deleted with ordinary tools, and that is worth more.
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
SCORES = "scores.sqlite"  # beside it: every score so far (evaluate/kept.py)
KEY = "key.json"


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
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(
        json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    unfinished.replace(path)


@dataclass(frozen=True)
class Record:
    """What a finished stage says of itself; `results` is the stage's own."""

    folder: Path
    key: dict[str, Any]
    results: dict[str, Any]
    files: dict[str, dict[str, Any]]
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
    try:
        raw = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return None  # a damaged record is no record: the stage is made again
    for name, entry in raw["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size_bytes"]:
            return None
    return Record(folder, raw["key"], raw["results"], raw["files"], raw["seconds"])


def changed_files(folder: Path, pattern: str) -> list[str]:
    """Names of the files that match `pattern` whose SHA-256 is no longer what the folder's record says.

    A folder without a readable record has none.
    """
    try:
        files = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return []
    found = (path for path in sorted(folder.glob(pattern)) if path.name in files)
    return [path.name for path in found if file_digest(path) != files[path.name]["sha256"]]


@contextmanager
def making(folder: Path, key: dict[str, Any], *, resumable: bool = False) -> Iterator[Path]:
    """Give the folder to write a stage into; what is left there survives a kill only if `resumable`.

    On an exception an unresumable partial folder is removed at once, so that a full disk gets its space back.
    """
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists() and not (resumable and _key_of(partial) == key):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / KEY, key)
    try:
        yield partial
    except BaseException:
        if not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def begun(folder: Path, key: dict[str, Any]) -> bool:
    """Whether a stage's partial folder is there, made for this key."""
    return bool(_key_of(folder.with_name(folder.name + ".partial")) == key)


def _key_of(partial: Path) -> Any:
    try:
        return json.loads((partial / KEY).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def finish(
    partial: Path, folder: Path, key: dict[str, Any], results: dict[str, Any], seconds: float
) -> Record:
    """Hash the files, write the record, and rename the folder into place over an outdated one."""
    (partial / KEY).unlink()
    (partial / RECORD).unlink(missing_ok=True)  # came along with a folder that the stage copied
    files = list_files(partial)
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
    outdated = folder.with_name(folder.name + ".outdated")
    if folder.exists():
        shutil.rmtree(outdated, ignore_errors=True)
        folder.rename(outdated)
    partial.rename(folder)
    shutil.rmtree(outdated, ignore_errors=True)
    return Record(folder, key, results, files, seconds)


def list_files(folder: Path, without: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Every file under a folder, by its path from there: {size_bytes, sha256}."""
    found = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    return {
        name: {"size_bytes": path.stat().st_size, "sha256": file_digest(path)}
        for name, path in found.items()
        if name not in without
    }


def check_files(folder: Path) -> bool:
    """Compare a folder's files with what its manifest says, or its record: sizes first, then contents.

    Returns False where there is neither. Raises BadInput naming the file, what was expected and what is
    there, also where the list itself is damaged.
    """
    listed = next((path for path in (folder / MANIFEST, folder / RECORD) if path.is_file()), None)
    if listed is None:
        return False
    try:
        files = json.loads(listed.read_text(encoding="utf-8"))["files"]
        expected = [
            (str(name), int(entry["size_bytes"]), str(entry["sha256"])) for name, entry in files.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{listed}: is damaged ({error!r}); {_AGAIN}") from error
    for name, size, _ in expected:
        path = folder / name
        if not path.is_file():
            raise BadInput(f"{path}: is missing; {listed.name} lists it with {size:,} bytes; {_AGAIN}")
        if path.stat().st_size != size:
            found = f"has {path.stat().st_size:,} bytes, {listed.name} says {size:,}"
            raise BadInput(f"{path}: {found}: truncated or changed; {_AGAIN}")
    for name, _, sha256 in expected:
        if (found := file_digest(folder / name)) != sha256:
            raise BadInput(
                f"{folder / name}: is damaged: its SHA-256 is {found}, {listed.name} says {sha256}; " + _AGAIN
            )
    return True


def list_again(folder: Path, names: Sequence[str]) -> None:
    """Write down the files `names` anew where the folder's manifest lists them, then both in its record.

    For a bundle whose files were changed on purpose after it was made.
    """
    for listing, changed in ((MANIFEST, names), (RECORD, (*names, MANIFEST))):
        path = folder / listing
        if not path.is_file():
            continue
        raw = json.loads(path.read_text(encoding="utf-8"))
        for name in changed:
            if name in raw["files"]:
                place = folder / name
                raw["files"][name] = {"size_bytes": place.stat().st_size, "sha256": file_digest(place)}
        write_json(path, raw)


_AGAIN = "copy or export the bundle again"


def git_commit() -> str | None:
    """The commit of the checkout that edgedisp runs from, with `+` if it has changes; None outside one."""
    here = Path(__file__).resolve().parent.parent
    if not (here.parent / ".git").exists():
        return None
    try:
        commit = _git(here, "rev-parse", "--short=12", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@contextmanager
def open_run(path: Path, identity: dict[str, Any], name: str) -> Iterator[Path]:
    """Hold a run folder as its only writer.

    A folder that this call made is removed again after a BadInput, or if nothing was begun in it; never one
    in which an arm has a finished stage: a training may have taken hours.
    Raises BadInput if the folder belongs to another recipe, holds something else, cannot be made, or is
    being written by another process.
    """
    from filelock import FileLock, Timeout

    made = _claim(path)
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BadInput(
            f"{path}: another build is writing there; wait for it to end, or name another folder with --out"
        ) from None
    try:
        _check_owner(path, identity, name)
        yield path
    except BadInput:
        if made and not any(path.glob(f"*/*/{RECORD}")):
            shutil.rmtree(path, ignore_errors=True)
        raise
    finally:
        lock.release()
        if made and path.exists() and not any(path.rglob(RECORD)) and not any(path.rglob("*.partial")):
            shutil.rmtree(path, ignore_errors=True)


def _claim(path: Path) -> bool:
    """Make the run folder if it is absent; says whether it did."""
    if path.exists() and not path.is_dir():
        raise BadInput(f"{path}: is a file; an output folder is needed (--out FOLDER)")
    if path.is_dir():
        return False
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise BadInput(
            f"{path}: cannot be made ({os.strerror(error.errno or 0)}); choose another --out"
        ) from error
    return True


def _check_owner(path: Path, identity: dict[str, Any], name: str) -> None:
    try:
        owner = json.loads((path / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        strangers = [entry.name for entry in path.iterdir() if entry.name != ".lock"]
        if strangers:
            raise BadInput(
                f"{path}: is not a run folder and not empty ({', '.join(sorted(strangers)[:3])}, ...); "
                "choose another --out"
            ) from None
        write_json(
            path / RUN, {"name": name, "identity": identity, "made": time.strftime("%Y-%m-%dT%H:%M:%S")}
        )
        return
    if owner["identity"] != json.loads(canonical(identity)):
        changed = ", ".join(_differences(owner["identity"], json.loads(canonical(identity))))
        raise BadInput(
            f"{path}: belongs to another recipe ({owner['name']}), which differs in {changed}; "
            "choose another --out, or leave --out away to get a folder of its own"
        )


def _differences(left: Any, right: Any, path: str = "") -> list[str]:
    """Dotted paths at which two JSON values differ."""
    if isinstance(left, dict) and isinstance(right, dict):
        found = []
        for key in sorted({*left, *right}):
            found += _differences(left.get(key), right.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if left == right else [path]
