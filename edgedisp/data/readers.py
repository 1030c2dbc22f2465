"""Local files and folders -> rows.

| file | one row is |
|---|---|
| .json | an item of the list, or a value of the dict (its key is the id): an object or a string |
| .jsonl, .ndjson | one line: an object or a string |
| .csv, .tsv | one record below the header line |
| .parquet | one record (needs pyarrow, which comes with the extra `train`) |
| .txt, .md | one paragraph: lines up to a blank one |

All but .parquet may be gzipped (`.jsonl.gz`). Lines end at newlines alone: U+2028, NEL, form feeds are text.
Of a folder all files of ONE kind are read, in the order of their paths: the first kind of the table's READERS
that it has, so that a README beside the data is not taken for text. A file whose name speaks of another split
is left out (`test-00000.parquet`). Every file that is left out is reported with the reason.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.data.rows import Row

SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing"},
}


def files_of(path: Path, config: str | None, split: str) -> tuple[list[Path], dict[str, str]]:
    """The files to read, and name -> reason for those of a folder that are left out.

    A subfolder named like `config` is entered. BadInput: nothing there, or no file of a known kind or split.
    """
    if not path.is_dir():
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder.")
        return [path], {}
    folder = _config_folder(path, config)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    kind = next((kind for kind in READERS if any(_kind(file) == kind for file in files)), None)
    if kind is None:
        raise BadInput(f"{folder}: the folder holds no text file; {READABLE}.")
    # A file that names no split belongs to the training text.
    split_name = next((name for name, words in SPLITS.items() if split in words), split)
    splits = {file: _split_in(file.relative_to(folder)) for file in files if _kind(file) == kind}
    no_split_named = not any(splits.values())
    selected = [f for f, name in splits.items() if no_split_named or (name or "train") == split_name]
    if not selected:
        there = ", ".join(sorted({name for name in splits.values() if name}))
        raise BadInput(f"{folder}: no file of the split {split!r}; the file names speak of {there}.")
    skipped = {}
    for file in sorted(set(files) - set(selected)):
        reason = f"split {splits[file] or 'train'}" if file in splits else f"not {kind}"
        skipped[file.relative_to(path).as_posix()] = reason
    return selected, skipped


def rows(path: Path, files: Iterable[Path], text: str, config: str | None) -> Iterator[Row]:
    """All rows of the files of `path`. `text` is the field that will be asked for; columns may skip others.

    Raises BadInput: an unknown kind of file, or content that is not what the suffix says.
    """
    for file in files:
        reader = READERS.get(_kind(file))
        if reader is None:
            suffix = path.suffix or "a file without suffix"
            raise BadInput(f"{path}: cannot read text from {suffix}; {READABLE}.")
        prefix = "" if file == path else f"{file.relative_to(_config_folder(path, config)).as_posix()}:"
        for row in reader(file, text):
            yield Row(row.place, prefix + row.id, row.value)


def _config_folder(path: Path, config: str | None) -> Path:
    return path / config if config and (path / config).is_dir() else path


def _kind(path: Path) -> str:
    """The suffix that says how to read the file, without a `.gz` behind it."""
    suffix = path.suffix.lower()
    inner = path.with_suffix("").suffix.lower()
    return inner if suffix == ".gz" and inner != ".parquet" else suffix


def _split_in(path: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", path.as_posix().lower()))
    return next((name for name, known in SPLITS.items() if words & known), None)


def _content(path: Path) -> str:
    """The file's text, unpacked; line ends become newlines."""
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as problem:
            raise BadInput(f"{path}: not a readable gzip file ({problem}).") from problem
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise BadInput(
            f"{path}: not UTF-8 text (byte {problem.start}: {problem.reason}). Convert it to UTF-8 first."
        ) from problem
    return content.replace("\r\n", "\n").replace("\r", "\n")


def _json(path: Path, text: str) -> Iterator[Row]:
    content = _parsed(_content(path), path, 0)
    if isinstance(content, dict):
        for key, value in content.items():
            yield Row(f"{path} entry {key!r}", key, value)
    elif isinstance(content, list):
        for number, value in enumerate(content):
            yield Row(f"{path} item {number}", _row_id(value, number), value)
    else:
        raise BadInput(
            f"{path}: holds one {type(content).__name__}; a list of objects, a list of strings, or a dict of "
            "objects is needed."
        )


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(_content(path).split("\n"), start=1):
        if line.strip():
            value = _parsed(line, path, number - 1)
            yield Row(f"{path}:{number}", _row_id(value, number), value)


def _parsed(content: str, path: Path, lines_before: int) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as problem:
        line = lines_before + problem.lineno
        raise BadInput(f"{path}:{line}: not valid JSON ({problem.msg}, column {problem.colno}).") from problem


def _csv(path: Path, text: str) -> Iterator[Row]:
    delimiter = "\t" if _kind(path) == ".tsv" else ","
    # The csv module's limit (128 kB a field) is for the whole process: lift it only while we read.
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        table = csv.reader(io.StringIO(_content(path), newline=""), delimiter=delimiter, strict=True)
        records = [(table.line_num, record) for record in table if record]
    except csv.Error as problem:
        raise BadInput(f"{path}: not a readable {_kind(path)[1:]} table ({problem}).") from problem
    finally:
        csv.field_size_limit(limit)
    header = records[0][1] if records else []
    for number, (line, values) in enumerate(records[1:]):
        if len(values) != len(header):
            character = "comma" if delimiter == "," else "tab"
            raise BadInput(
                f"{path}:{line}: the record that ends here has {len(values)} fields, the header "
                f"{len(header)}. Put a field that holds a {character} in quotes."
            )
        record = dict(zip(header, values, strict=True))
        yield Row(f"{path} record {number + 1}", _row_id(record, number), record)


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
                    yield Row(f"{path} record {number + 1}", _row_id(record, number), record)
                    number += 1
    except pyarrow.ArrowInvalid as problem:
        raise BadInput(f"{path}: not a readable parquet file ({problem}).") from problem


def _paragraphs(path: Path, text: str) -> Iterator[Row]:
    paragraph: list[str] = []
    start = 1
    for number, line in enumerate([*_content(path).split("\n"), ""], start=1):
        if line.strip(" \t"):
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield Row(f"{path}:{start}", str(start), "\n".join(paragraph))
            paragraph = []


def _row_id(value: Any, number: int) -> str:
    """The row's own `id` field if it has one, else its number."""
    row_id = value.get("id") if isinstance(value, dict) else None
    return str(row_id) if isinstance(row_id, str | int) and row_id != "" else str(number)


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
READABLE = f"what can be read: {', '.join(READERS)}"
