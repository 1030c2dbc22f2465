"""Local files, folders and data sets of the hub -> rows.

| file | one row is |
|---|---|
| .json | an item of the list, or a value of the dict (its key is the id): an object or a string |
| .jsonl, .ndjson | one line: an object or a string |
| .csv, .tsv | one record below the header line |
| .parquet | one record (needs pyarrow, which comes with the extra `train`) |
| .txt, .md | one paragraph: lines up to a blank one |

All but .parquet may be gzipped (`.jsonl.gz`). Lines end at newlines alone: U+2028, NEL, form feeds are text.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.core.hub import check_repository, one_line, unreachable, unreachable_error

SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing"},
}
EXTRA = 'pip install "edgedisp[train]"'


@dataclass(frozen=True)
class ReadOptions:
    """What to read of a source.

    text: the field that holds the text, where rows have fields. config, split, revision: of hub sets; config
    and split also select the files of a folder that is laid out like one. limit: at most so many documents.
    """

    text: str = "text"
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Row:
    """One entry of a source: its place for messages (`text.jsonl:7`), an id, and a string or a dict."""

    location: str
    id: str
    value: Any


Parsed = Iterator[tuple[str, int | str, Any]]
"""Place within the file, number (or key) of the row, value."""


def local_rows(path: Path, options: ReadOptions) -> tuple[Iterator[Row], dict[str, str]]:
    """(rows of a file, or of a folder's files, {file of the folder: why it is left out}).

    Of a folder (its subfolder named like the configuration, if there is one) the files of ONE kind are read,
    by path: the first kind of KINDS that it has, so that a README is not read as text. Files whose name
    speaks of another split (`test-00000.parquet`) are left out. Raises BadInput: nothing there, no file of a
    known kind or split, or (while reading) content that is not what the suffix says.
    """
    if path.is_file():
        if _kind(path) not in KINDS:
            what = path.suffix or "a file without suffix"
            raise BadInput(f"{path}: cannot read text from {what}; {READABLE}.")
        return _rows(path, options.text), {}
    if not path.is_dir():
        raise BadInput(f"{path}: no such file or folder.")
    folder = path / options.config if options.config and (path / options.config).is_dir() else path
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    kind = next((kind for kind in KINDS if any(_kind(file) == kind for file in files)), None)
    if kind is None:
        raise BadInput(f"{folder}: the folder holds no text file; {READABLE}.")
    splits = {file: _split_of(file.relative_to(folder)) for file in files if _kind(file) == kind}
    split = next((name for name, words in SPLITS.items() if options.split in words), options.split)
    # A file that names no split belongs to the training text; where no file names one, all are read.
    selected = [f for f, name in splits.items() if not any(splits.values()) or (name or "train") == split]
    if not selected:
        names = ", ".join(sorted({name for name in splits.values() if name}))
        raise BadInput(f"{folder}: no file of the split {options.split!r}; the file names speak of {names}.")
    skipped = {
        file.relative_to(path).as_posix(): f"split {splits[file] or 'train'}"
        if file in splits
        else f"not {kind}"
        for file in files
        if file not in selected
    }
    rows = (
        Row(row.location, f"{file.relative_to(folder).as_posix()}:{row.id}", row.value)
        for file in selected
        for row in _rows(file, options.text)
    )
    return rows, skipped


def hub_rows(name: str, options: ReadOptions) -> Iterator[Row]:
    """The rows of one split of a data set on the hub, in order, through the package `datasets`.

    With a limit the set is streamed, so that a thousand documents do not cost the download of all of it. If
    the hub does not answer, the cache alone is used. Raises BadInput: `datasets` missing, hub unreachable and
    nothing cached, no such set, configuration, split or revision.
    """
    try:
        import datasets
    except ImportError as problem:
        raise BadInput(f"{name}: data sets of a hub need the package `datasets`: {EXTRA}") from problem
    check_repository("dataset", name, options.revision)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        table: Any = datasets.load_dataset(
            name,
            options.config,
            split=options.split,
            revision=options.revision,
            streaming=options.limit is not None and unreachable() is None,
        )
    except (ConnectionError, FileNotFoundError, ValueError, RuntimeError) as problem:
        if unreachable() or isinstance(problem, ConnectionError):
            raise unreachable_error("dataset", name, problem) from problem
        raise BadInput(f"{name}: the hub's data set cannot be read: {one_line(problem)}") from problem
    number = 0
    for batch in table.iter(batch_size=1024):  # many times faster than row by row
        for value in batch.get(options.text, [None]):
            record = {options.text: value} if options.text in batch else dict.fromkeys(batch)
            yield Row(f"{name} row {number}", str(number), record)
            number += 1


def _kind(path: Path) -> str:
    """The suffix that says how to read the file, without a `.gz` after it."""
    suffix = path.suffix.lower()
    inner = path.with_suffix("").suffix.lower()
    return inner if suffix == ".gz" and inner != ".parquet" else suffix


def _split_of(path: Path) -> str | None:
    words = set(re.split(r"[^a-z]+", path.as_posix().lower()))
    return next((name for name, spellings in SPLITS.items() if words & spellings), None)


def _rows(path: Path, field: str) -> Iterator[Row]:
    """The rows of a file; a row's id is its own `id` field if it has one, else its number or key."""
    kind = _kind(path)
    parsed = _parquet(path, field) if kind == ".parquet" else PARSERS[kind](_content(path), path)
    for location, number, value in parsed:
        row_id = value.get("id") if isinstance(value, dict) and isinstance(number, int) else None
        has_id = isinstance(row_id, str | int) and row_id != ""
        yield Row(f"{path}{location}", str(row_id if has_id else number), value)


def _content(path: Path) -> str:
    """The file's text, unpacked; line ends become newlines."""
    data = path.read_bytes()
    try:
        content = (gzip.decompress(data) if path.suffix.lower() == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise BadInput(f"{path}: not UTF-8 text (byte {problem.start}: {problem.reason}).") from problem
    except (OSError, EOFError, zlib.error) as problem:
        raise BadInput(f"{path}: not a readable gzip file ({problem}).") from problem
    return content.replace("\r\n", "\n").replace("\r", "\n")


def _json(content: str, path: Path) -> Parsed:
    rows = _load(content, path)
    if isinstance(rows, dict):
        yield from ((f" entry {key!r}", key, value) for key, value in rows.items())
    elif isinstance(rows, list):
        yield from ((f" item {number}", number, value) for number, value in enumerate(rows))
    else:
        raise BadInput(f"{path}: holds one {type(rows).__name__}; a list or a dict of rows is needed.")


def _json_lines(content: str, path: Path) -> Parsed:
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield f":{number}", number, _load(line, path, number)


def _load(content: str, path: Path, first_line: int = 1) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as problem:
        line = first_line - 1 + problem.lineno
        raise BadInput(f"{path}:{line}: not valid JSON ({problem.msg}, column {problem.colno}).") from problem


def _csv(content: str, path: Path) -> Parsed:
    csv.field_size_limit(2**31 - 1)  # its default, 128 kB a field, is less than a document
    kind = _kind(path)
    separator = "\t" if kind == ".tsv" else ","
    table = csv.reader(io.StringIO(content, newline=""), delimiter=separator, strict=True)
    try:
        records = [(table.line_num, record) for record in table if record]
    except csv.Error as problem:
        raise BadInput(f"{path}: not a readable {kind[1:]} table ({problem}).") from problem
    header = records[0][1] if records else []
    for number, (line, values) in enumerate(records[1:]):
        if len(values) != len(header):
            raise BadInput(
                f"{path}:{line}: the record that ends here has {len(values)} fields, the header "
                f"{len(header)}. Put a field that holds the separator in quotes."
            )
        yield f" record {number + 1}", number, dict(zip(header, values, strict=True))


def _paragraphs(content: str, path: Path) -> Parsed:
    paragraph: list[str] = []
    for number, line in enumerate([*content.split("\n"), ""], start=1):
        if line.strip(" \t"):
            paragraph.append(line)
        elif paragraph:
            start = number - len(paragraph)
            yield f":{start}", start, "\n".join(paragraph)
            paragraph = []


def _parquet(path: Path, field: str) -> Parsed:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as problem:
        raise BadInput(f"{path}: parquet files need pyarrow: {EXTRA}") from problem
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names  # without the field all of them, for the message
            columns = [name for name in names if field not in names or name in (field, "id")]
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for record in batch.to_pylist():
                    yield f" record {number + 1}", number, record
                    number += 1
    except pyarrow.ArrowInvalid as problem:
        raise BadInput(f"{path}: not a readable parquet file ({problem}).") from problem


PARSERS: dict[str, Callable[[str, Path], Parsed]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv,
    ".tsv": _csv,
    ".json": _json,
    ".txt": _paragraphs,
    ".md": _paragraphs,
}
KINDS = (".parquet", *PARSERS)
READABLE = f"what can be read: {', '.join(KINDS)}"
