"""Local files, folders and data sets of the hub -> rows.

| file | one row is |
|---|---|
| .json | an item of the list, or a value of the dict (its key is the id): an object or a string |
| .jsonl, .ndjson | one line: an object or a string |
| .csv, .tsv | one record below the header line |
| .parquet | one record (needs pyarrow, which comes with the extra `train`) |
| .txt, .md | one paragraph: lines up to a blank one |

All but .parquet may be gzipped (`.jsonl.gz`). Lines end at newlines alone: U+2028, NEL, form feeds are text.
Of a folder all files of ONE kind are read, in the order of their paths: the first kind of READERS that it
has, so that a README next to the data is not read as text. A file whose name speaks of another split is left
out (`test-00000.parquet`). Every file left out is reported with the reason.
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


DEFAULTS = ReadOptions()


@dataclass(frozen=True)
class Row:
    """One entry of a source: its place for messages (`text.jsonl:7`), an id, and a string or a dict."""

    place: str
    id: str
    value: Any


def local_rows(path: Path, options: ReadOptions) -> tuple[Iterator[Row], dict[str, str]]:
    """(rows of a file, or of a folder's files, {file of the folder: why it is left out}).

    A subfolder named like the configuration is entered. Raises BadInput: nothing there, no file of a known
    kind or split, or (while reading) content that is not what the suffix says.
    """
    if path.is_file():
        return _reader(path)(path, options.text), {}
    if not path.is_dir():
        raise BadInput(f"{path}: no such file or folder.")
    folder = path / options.config if options.config and (path / options.config).is_dir() else path
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    kind = next((kind for kind in READERS if any(_kind(file) == kind for file in files)), None)
    if kind is None:
        raise BadInput(f"{folder}: the folder holds no text file; {READABLE}.")
    splits = {file: _split_in(file.relative_to(folder)) for file in files if _kind(file) == kind}
    selected = list(splits)
    if any(splits.values()):  # a file that names no split belongs to the training text
        split = next((name for name, words in SPLITS.items() if options.split in words), options.split)
        selected = [file for file, name in splits.items() if (name or "train") == split]
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
        Row(row.place, f"{file.relative_to(folder).as_posix()}:{row.id}", row.value)
        for file in selected
        for row in READERS[kind](file, options.text)
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
        raise BadInput(
            f'{name}: data sets of a hub need the package `datasets`: pip install "edgedisp[train]"'
        ) from problem
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


def _reader(path: Path) -> Callable[[Path, str], Iterator[Row]]:
    reader = READERS.get(_kind(path))
    if reader is None:
        raise BadInput(f"{path}: cannot read text from {path.suffix or 'a file without suffix'}; {READABLE}.")
    return reader


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
    try:
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise BadInput(f"{path}: not UTF-8 text (byte {problem.start}: {problem.reason}).") from problem
    except (OSError, EOFError, zlib.error) as problem:
        raise BadInput(f"{path}: not a readable gzip file ({problem}).") from problem
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
        raise BadInput(f"{path}: holds one {type(content).__name__}; a list or a dict of rows is needed.")


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(_content(path).split("\n")):
        if line.strip():
            value = _parsed(line, path, number)
            yield Row(f"{path}:{number + 1}", _row_id(value, number + 1), value)


def _parsed(content: str, path: Path, lines_before: int) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as problem:
        line = lines_before + problem.lineno
        raise BadInput(f"{path}:{line}: not valid JSON ({problem.msg}, column {problem.colno}).") from problem


def _csv(path: Path, text: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # its default, 128 kB a field, is less than a document
    lines = io.StringIO(_content(path), newline="")
    try:
        table = csv.reader(lines, delimiter="\t" if _kind(path) == ".tsv" else ",", strict=True)
        records = [(table.line_num, record) for record in table if record]
    except csv.Error as problem:
        raise BadInput(f"{path}: not a readable {_kind(path)[1:]} table ({problem}).") from problem
    header = records[0][1] if records else []
    for number, (line, values) in enumerate(records[1:]):
        if len(values) != len(header):
            raise BadInput(
                f"{path}:{line}: the record that ends here has {len(values)} fields, the header "
                f"{len(header)}. Put a field that holds the separator in quotes."
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
            columns = table.schema_arrow.names
            if text in columns:  # else all of them, for the message
                columns = [name for name in columns if name in (text, "id")]
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
