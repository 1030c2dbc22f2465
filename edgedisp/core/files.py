"""JSON files, hashes of values and files, and the lists of files in `record.json` and `manifest.json`.

JSON is written whole or not at all; JSON of the wrong shape counts as truncated when it is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from edgedisp.core.errors import BadInput

RECORD = "record.json"
MANIFEST = "manifest.json"  # what a bundle says of itself wherever it is taken

Files = dict[str, dict[str, Any]]
"""File by its path from the folder -> {size_bytes, sha256}."""

Result = TypeVar("Result")
PACKAGE = Path(__file__).resolve().parents[1]

WRONG_SHAPE = (KeyError, TypeError, ValueError, AttributeError)
"""What reading JSON of another shape raises."""


def data_folder(name: str) -> Path:
    """Folder of packaged data: `recipes` or `export`, from the wheel or from the top of a checkout."""
    packaged = PACKAGE / "packaged" / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name


def to_json(result: Any) -> Any:
    """Plain JSON of a record; figures that are not finite become None, tuples lists."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {field.name: to_json(getattr(result, field.name)) for field in dataclasses.fields(result)}
    if isinstance(result, dict):
        return {str(key): to_json(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [to_json(value) for value in result]
    return None if isinstance(result, float) and not math.isfinite(result) else result


def from_json(kind: type[Result], data: Any) -> Result:
    """A record from JSON. Raises ValueError naming the values of the wrong type by their path."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as invalid:
        faults = [f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {e['msg']}" for e in invalid.errors()]
        raise ValueError("; ".join(faults[:3]) + ("; ..." if len(faults) > 3 else "")) from None


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


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty if the file is absent, damaged, or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file, empty where there is no file. Raises BadInput for one that is damaged."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: not readable as JSON ({error}); restore or export it again") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object; restore or export it again")
    return content


def changed_files(folder: Path, pattern: str) -> list[str]:
    """Paths, from the folder, of files that match `pattern` and whose SHA-256 is not what its record says.

    A folder without a readable record has none.
    """
    try:
        files = listed_files(read_object(folder / RECORD))
    except WRONG_SHAPE:
        return []
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.glob(pattern)))
    return [name for name in names if name in files and file_digest(folder / name) != files[name]["sha256"]]


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
        files = listed_files(read_object(listing))
    except WRONG_SHAPE as error:
        raise BadInput(f"{listing}: is damaged ({error!r}); {again}") from error
    for name, entry in files.items():
        path, size, expected = folder / name, file_size(folder / name), entry["size_bytes"]
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
        raw = read_object(folder / listing)
        files = raw.get("files")
        if isinstance(files, dict):
            files |= {name: _entry(folder / name) for name in changed if name in files}
            write_json(folder / listing, raw)


def _entry(path: Path) -> dict[str, Any]:
    return {"size_bytes": path.stat().st_size, "sha256": file_digest(path)}


def file_size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def listed_files(raw: dict[str, Any]) -> Files:
    """The `files` of a record or manifest; one of WRONG_SHAPE is raised if they are not a list of files."""
    return {
        name: {"size_bytes": int(entry["size_bytes"]), "sha256": str(entry["sha256"])}
        for name, entry in raw["files"].items()
    }


def git_commit() -> str | None:
    """The commit of the checkout that edgedisp runs from, with `+` if it has changes; None outside one."""
    root = PACKAGE.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "--short=12", "HEAD").strip() if (root / ".git").exists() else None
        return commit and commit + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
