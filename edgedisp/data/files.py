"""Local files and folders -> rows.

| file | one row is |
|---|---|
| .json | an item of the list, or a value of the dict (its key is the id): an object or a string |
| .jsonl, .ndjson | one line: an object or a string |
| .csv, .tsv | one record below the header line |
| .parquet | one record (needs pyarrow, which comes with the extra `train`) |
| .txt, .md | one paragraph: lines up to a blank one |

Of a folder, such as a data set repository copied from a hub, all files of ONE kind are read, in the order
of their paths: the first of parquet, jsonl, ndjson, csv, tsv, json, txt, md that it has, so that a README
beside the data is not taken for text. If the names speak of splits (`train-00000.parquet`), only those of the
wanted split are read; a subfolder named like the wanted configuration is entered.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.data.document import Row

SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing"},
}


def rows(path: Path, text: str, config: str | None, split: str) -> Iterator[Row]:
    """All rows of a file or folder. `text` is the field that will be asked for; columns may skip others.

    Raises BadInput: nothing there, an unknown kind of file, or content that is not what the suffix says.
    """
    if path.is_dir():
        folder = path / config if config and (path / config).is_dir() else path
        for file in _files_of(folder, split):
            prefix = file.relative_to(folder).as_posix()
            for row in _reader(file)(file, text):
                yield Row(row.place, f"{prefix}:{row.id}", row.value)
        return
    if not path.exists():
        raise BadInput(f"{path}: no such file or folder.")
    yield from _reader(path)(path, text)


def _reader(path: Path) -> Callable[[Path, str], Iterator[Row]]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"{path}: cannot read text from {path.suffix or 'a file without suffix'}; {KINDS}.")
    return reader


def _files_of(folder: Path, split: str) -> list[Path]:
    found = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    for suffix in FOLDER_ORDER:
        files = [p for p in found if p.suffix.lower() == suffix]
        if files:
            return _of_split(files, folder, split)
    raise BadInput(f"{folder}: the folder holds no text file; {KINDS}.")


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """The files of the wanted split, or all of them if no name speaks of splits."""
    named = {path: _split_in(path.relative_to(folder)) for path in files}
    if not any(named.values()):
        return files
    wanted = next((name for name, words in SPLITS.items() if split in words), split)
    chosen = [path for path in files if named[path] == wanted]
    if not chosen:
        there = ", ".join(sorted({name for name in named.values() if name}))
        raise BadInput(f"{folder}: no file of the split {split!r}; the file names speak of {there}.")
    return chosen


def _split_in(path: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", path.as_posix().lower()))
    return next((name for name, known in SPLITS.items() if words & known), None)


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise BadInput(
            f"{path}: not UTF-8 text (byte {problem.start}: {problem.reason}). Convert it to UTF-8 first."
        ) from problem


def _json(path: Path, text: str) -> Iterator[Row]:
    try:
        content: Any = json.loads(_content(path))
    except json.JSONDecodeError as problem:
        raise BadInput(
            f"{path}:{problem.lineno}: not valid JSON ({problem.msg}, column {problem.colno})."
        ) from problem
    if isinstance(content, dict):
        for key, value in content.items():
            yield Row(f"{path} entry {key!r}", key, value)
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield Row(f"{path} item {number}", _own_id(value, number), value)
    else:
        raise BadInput(
            f"{path}: holds one {type(content).__name__}; a list of objects, a list of strings, or a dict of "
            "objects is needed."
        )


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    # Split at newlines alone: JSON strings may hold other separators, such as U+2028, unescaped.
    for number, line in enumerate(_content(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as problem:
            raise BadInput(
                f"{path}:{number}: not valid JSON ({problem.msg}, column {problem.colno})."
            ) from problem
        yield Row(f"{path}:{number}", _own_id(value, number), value)


def _csv(path: Path, text: str) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # The csv module's limit (128 kB a field) is for the whole process: lift it only while we read.
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        reader = csv.DictReader(_content(path).splitlines(keepends=True), delimiter=delimiter, strict=True)
        records = list(reader)
    except csv.Error as problem:
        raise BadInput(f"{path}: not a readable {path.suffix[1:]} table ({problem}).") from problem
    finally:
        csv.field_size_limit(limit)
    for number, record in enumerate(records):
        yield Row(f"{path} record {number + 1}", _own_id(record, number), record)


def _parquet(path: Path, text: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as problem:
        raise BadInput(f'{path}: parquet files need pyarrow: pip install "edgedisp[train]"') from problem
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = [name for name in table.schema_arrow.names if name in (text, "id")]
            if text not in columns:  # one row with all its fields' names, for the message
                yield Row(str(path), "0", dict.fromkeys(table.schema_arrow.names))
                return
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    yield Row(f"{path} record {number + 1}", _own_id(record, number), record)
                    number += 1
    except pyarrow.ArrowInvalid as problem:
        raise BadInput(f"{path}: not a readable parquet file ({problem}).") from problem


def _paragraphs(path: Path, text: str) -> Iterator[Row]:
    kept: list[str] = []
    start = 1
    for number, line in enumerate([*_content(path).split("\n"), ""], start=1):
        if line.strip():
            start = start if kept else number
            kept.append(line)
        elif kept:
            yield Row(f"{path}:{start}", str(start), "\n".join(kept))
            kept = []


def _own_id(value: Any, number: int) -> str:
    """A row's own `id` field if it has one, else its number."""
    own = value.get("id") if isinstance(value, dict) else None
    return str(own) if isinstance(own, str | int) and own != "" else str(number)


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".parquet": _parquet,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".json": _json,
    ".txt": _paragraphs,
    ".md": _paragraphs,
}
FOLDER_ORDER = tuple(READERS)
KINDS = f"what can be read: {', '.join(READERS)}"
