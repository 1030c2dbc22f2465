"""JSON files, hashes of values and files, and the lists of files in `record.json` and `manifest.json`."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

from edgedisp.core.errors import BadInput

RECORD = "record.json"
MANIFEST = "manifest.json"  # what a bundle says of itself wherever it is taken
GENAI_CONFIG = "genai_config.json"  # what onnxruntime-genai reads of a bundle
APP = "app.json"  # what an app reads of a bundle
GGUF_FILE = "model.gguf"  # of a bundle for llama.cpp
# Of a session, those that onnxruntime-genai's builder writes for CPUs and what sets threads and memory.
OPTIONS: dict[str, set[str]] = {
    "session_options": {
        *("log_id", "log_severity_level", "intra_op_num_threads", "inter_op_num_threads"),
        *("provider_options", "enable_cpu_mem_arena", "enable_mem_pattern"),
    },
    "provider_options": set(),
    "run_options": set(),
}
SEAL = "edgedisp_sha256"
"""Key of the hash of all else in a JSON file, where we wrote one (`sealed`)."""

Files = dict[str, dict[str, Any]]
"""File by its path from the folder -> {size_bytes, sha256}."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary proper, in tokenizer.json."""

    content: str
    id: int
    special: bool = False


@dataclass(frozen=True)
class GenaiDecoder:
    """The part of genai_config.json about the graph."""

    head_size: int = 0
    session_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GenaiModel:
    """The part `model` of genai_config.json, as far as it is read."""

    context_length: int = 0
    vocab_size: int = 0
    eos_token_id: int | list[int] = 0
    decoder: GenaiDecoder = GenaiDecoder()


ANEW = "copy or export the folder again; of a run, delete it and build again: it is made anew"


@dataclass(frozen=True)
class AppExample:
    """The part `example` of app.json, as far as it is read."""

    messages: list[dict[str, Any]]
    prompt: str
    prompt_ids: list[int]
    tools: list[dict[str, Any]] | None = None


_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), int | list[int] | None)
_LENGTHS = ("vocab_size", "max_position_embeddings", "n_positions", "n_ctx")
SHAPES: dict[str, dict[str, Any]] = {
    "config.json": {
        "model_type": str,
        "architectures": list[str] | None,
        "text_config": dict[str, Any] | None,
        "transformers.js_config": dict[str, Any],
        **dict.fromkeys(_LENGTHS, int | None),
        **_IDS,
    },
    "generation_config.json": _IDS,
    "genai_config.json": {"model": GenaiModel, "search": dict[str, Any]},
    APP: {"system": str | None, "tools": list[dict[str, Any]] | None, "example": AppExample | None},
    "license.json": {"files": list[str], **dict.fromkeys(("license", "base", "license_link"), str | None)},
    MANIFEST: {"layouts": dict[str, dict[str, Any]], "provenance": dict[str, Any], "base": dict[str, Any]},
    "model.safetensors.index.json": {"weight_map": dict[str, str]},
    "tokenizer.json": {"added_tokens": list[AddedToken]},
    "tokenizer_config.json": {
        "chat_template": str | list[dict[str, str]] | None,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), str | dict[str, Any] | None),
    },
}
"""Types of the keys that we read in files that others write, too; `read_json` holds them against it."""

PACKAGE = Path(__file__).resolve().parents[1]

WRONG_SHAPE = (KeyError, TypeError, ValueError, AttributeError)
"""What reading JSON of another shape raises."""


def data_folder(name: str) -> Path:
    """Folder of packaged data: `recipes` or `export`, from the wheel or from the top of a checkout."""
    packaged = PACKAGE / "packaged" / name
    return packaged if packaged.is_dir() else PACKAGE.parent / name


def to_json(result: Any) -> Any:
    """Plain JSON of a record (dataclasses, mappings, lists); figures that are not finite become None."""
    from pydantic_core import to_json as dump

    return json.loads(dump(result, inf_nan_mode="null"))


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


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """With a hash that `read_json` compares, so that a changed byte does not pass for a result."""
    return {**document, SEAL: digest(json.loads(canonical(document)))}


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON; NaN is refused with ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either whole or absent, or as it was before."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def check_writable(name: str, path: Path) -> None:
    """Raise BadInput, before any work, where a file or folder cannot be written, or made. It is tried, as the
    rights of an administrator say nothing on a read-only disk or in /proc."""
    target = path.absolute()
    try:
        nearest = next(place for place in (target, *target.parents) if place.exists())
        if nearest.is_dir():
            tempfile.TemporaryFile(dir=nearest).close()
        elif nearest != target:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        elif nearest.is_file():  # no pipe, whose reader would be told that this was all
            nearest.open("ab").close()
    except OSError as error:
        raise BadInput(f"{name} {path}: cannot be written ({error.strerror}); name another place") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file, empty where there is no file. Raises BadInput for one that is damaged, or
    changed since we sealed it."""
    if not path.is_file():
        return {}
    try:
        document = dict(json.loads(path.read_text(encoding="utf-8")).items())
        seal = document.pop(SEAL, None)
        is_whole = seal is None or seal == digest(document)
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path}: is no JSON object ({error}); restore it, or make it again") from error
    if not is_whole:
        raise BadInput(f"{path}: is damaged or was edited; restore it, or make it again")
    _check_shape(path, document)
    return document


def _check_shape(path: Path, document: dict[str, Any]) -> None:
    """Refuse values of another type than in `SHAPES`."""
    from pydantic import TypeAdapter, ValidationError

    for key in SHAPES.get(path.name, {}).keys() & document.keys():
        try:
            TypeAdapter(SHAPES[path.name][key]).validate_json(json.dumps(document[key]), strict=True)
        except ValidationError as invalid:
            where = ".".join(map(str, (key, *invalid.errors()[0]["loc"])))
            words = f"{where}: {invalid.errors()[0]['msg']}; restore it, or make it again"
            raise BadInput(f"{path}: {words}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty if the file is absent or damaged."""
    try:
        return read_json(path)
    except BadInput:
        return {}


# ---------------------------------------------------------------- lists of files


def list_files(folder: Path, without: Sequence[str] = (), patterns: Sequence[str] = ("**/*",)) -> Files:
    """The files under a folder like one of the `patterns` and like none of `without`."""
    paths = {
        path.relative_to(folder).as_posix(): path
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    out = {name for name in paths for pattern in without if fnmatch(name, pattern)}
    return {name: _entry(path) for name, path in paths.items() if name not in out}


def _entry(path: Path) -> dict[str, Any]:
    return {"size_bytes": path.stat().st_size, "sha256": file_digest(path)}


def listed_files(raw: dict[str, Any]) -> Files:
    """The `files` of a record or manifest; one of WRONG_SHAPE is raised if they are not a list of files."""
    return {
        name: {"size_bytes": int(entry["size_bytes"]), "sha256": str(entry["sha256"])}
        for name, entry in raw["files"].items()
    }


def file_size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def damaged_file(folder: Path, files: Files) -> str | None:
    """`name: what is wrong` of the first file that is not as listed, sizes first; None if all are whole."""
    for name, entry in files.items():
        size, expected = file_size(folder / name), entry["size_bytes"]
        if size is None:
            return f"{name}: is missing; it had {expected:,} bytes"
        if size != expected:
            return f"{name}: has {size:,} bytes instead of {expected:,}: truncated or changed"
    for name, entry in files.items():
        if (actual := file_digest(folder / name)) != entry["sha256"]:
            return f"{name}: is damaged or changed: its SHA-256 is {actual}, not {entry['sha256']}"
    return None


def listing_damage(listing: Path) -> str | None:
    """`damaged_file` of a folder by the list that lies in it; a damaged list is damage, too."""
    try:
        return damaged_file(listing.parent, listed_files(read_json(listing)))
    except WRONG_SHAPE as error:
        return f"{listing.name}: is damaged ({error!r})"


def read_listing(folder: Path) -> Files | None:
    """The files of a folder by its manifest, or by its record; None where there is neither, BadInput where
    the list is damaged."""
    listing = next((path for path in (folder / MANIFEST, folder / RECORD) if path.is_file()), None)
    if listing is None:
        return None
    try:
        return listed_files(read_json(listing))
    except WRONG_SHAPE as error:
        raise BadInput(f"{listing}: is damaged ({error!r}); {ANEW}") from error


def check_files(folder: Path, pattern: str = "*") -> None:
    """Compare a folder's files (names like `pattern`) with its `read_listing`, if it has one.

    Raises BadInput naming the file, what was expected and what is there.
    """
    files = {name: entry for name, entry in (read_listing(folder) or {}).items() if fnmatch(name, pattern)}
    if damage := damaged_file(folder, files):
        raise BadInput(f"{folder}/{damage}; {ANEW}")
    for path in filter(Path.is_file, folder.glob("*")):
        path.open("rb").close()  # runtimes would call a forbidden file missing, or broken


def check_options(bundle: Path) -> None:
    """BadInput for options in a bundle's genai_config.json, at any depth, that are not known to be harmless:
    `custom_ops_library` and providers load native code, others write files."""
    path, unsafe = bundle / GENAI_CONFIG, list[str]()

    def check(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):  # which of them the runtime takes is its own affair
            raise ValueError("a key is there twice")
        for name in content.keys() & OPTIONS.keys():
            options = content[name] or {}
            unsafe.extend(set(options) - OPTIONS[name] if isinstance(options, dict) else [name])
        unsafe.extend(content.keys() & {"custom_ops_library"})
        return content

    try:
        json.loads(path.read_text(encoding="utf-8") if path.is_file() else "{}", object_pairs_hook=check)
    except ValueError as error:
        raise BadInput(f"{path}: is no JSON object ({error}); restore or export it again") from error
    if unsafe:
        names = ", ".join(sorted({*unsafe}))
        raise BadInput(f"{path}: has the option {names}, which may load native code; remove it")


def git_commit() -> str | None:
    """The commit of the checkout that edgedisp runs from, with `+` if it has changes; None outside one."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    describe = ["describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    command = ["git", "-C", str(PACKAGE.parent), *describe]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
