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
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.core.hub import check_repository, one_line, unreachable, unreachable_error
from edgedisp.recipe import Source

SPLIT_NAMES = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing"},
}
EXTRA = 'pip install "edgedisp[train]"'
HALF_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text with a name. Scores are clustered by `id`, so two different texts need different ids. weight:
    of its source."""

    id: str
    text: str
    weight: float = field(default=1.0, compare=False)

    def row(self) -> dict[str, Any]:
        """What a file of documents says of it."""
        return {"id": self.id, "text": self.text}


@dataclass(frozen=True)
class Row:
    """One entry of a source: its place for messages (`text.jsonl:7`), an id, and a string or a dict."""

    location: str
    id: str
    value: Any


def check_pairs(text: str, location: str) -> None:
    """Raises BadInput for half of a surrogate pair, as JSON may write it."""
    if HALF_PAIR.search(text):
        raise BadInput(f"{location}: holds half of a surrogate pair, which no tokenizer can read.")


Parsed = Iterator[tuple[str, int | str, Any]]
"""Place within the file, number (or key) of the row, value."""


def local_files(path: Path, source: Source) -> tuple[dict[Path, str], dict[Path, str]]:
    """({file to read: what its rows' ids begin with}, {file of a folder: why it is left out}).

    Of a folder (its subfolder named like the configuration, if there is one) the files of ONE kind, the first
    of KINDS, are read, by path, so that a README is no text; not those whose name speaks of another split
    (`test-00000.parquet`). Raises BadInput: nothing there, no file of a known kind or split.
    """
    if path.is_file():
        if _kind(path) not in KINDS:
            what = path.suffix or "a file without suffix"
            raise BadInput(f"{path}: cannot read text from {what}; {READABLE}.")
        return {path: ""}, {}
    if not path.is_dir():
        raise BadInput(f"{path}: no such file or folder.")
    folder = path / source.config if source.config and (path / source.config).is_dir() else path
    entries = sorted(folder.rglob("*"))
    for place in (folder, *(entry for entry in entries if entry.is_dir() and not entry.is_symlink())):
        os.scandir(place).close()  # rglob passes over a forbidden folder without a word
    files = [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    kind = next((kind for kind in KINDS if any(_kind(file) == kind for file in files)), None)
    if kind is None:
        raise BadInput(f"{folder}: the folder holds no text file; {READABLE}.")
    names = {file: file.relative_to(folder).as_posix() for file in files}
    splits = {file: _split_of(names[file]) for file in files if _kind(file) == kind}
    # A file that names no split belongs to the training text; where no file names one, all are read.
    split_to_read = (_split_of(source.split) or source.split) if any(splits.values()) else "train"
    skipped = {file: f"not {kind}" for file in files if file not in splits}
    links = (entry for entry in entries if entry.is_symlink() and not entry.is_file())
    skipped |= dict.fromkeys(links, "a link to no file")
    skipped |= {
        file: f"split {split or 'train'}"
        for file, split in splits.items()
        if (split or "train") != split_to_read
    }
    selected = {file: f"{names[file]}:" for file in files if file not in skipped}
    if not selected:
        others = ", ".join(sorted({skipped[file] for file in splits}))
        raise BadInput(f"{folder}: no file of the split {source.split!r}; its files are of {others}.")
    return selected, skipped


def hub_rows(name: str, source: Source) -> Iterator[Row]:
    """The rows of one split of a data set on the hub, in order, through the package `datasets`.

    With a limit the set is streamed. Raises BadInput: `datasets` missing, hub unreachable and nothing cached,
    no such set, configuration, split or revision.
    """
    try:
        import datasets
    except ImportError as problem:
        raise BadInput(f"{name}: data sets of a hub need the package `datasets`: {EXTRA}") from problem
    check_repository("dataset", name, source.revision)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        table: Any = datasets.load_dataset(
            name,
            source.config,
            split=source.split,
            revision=source.revision,
            streaming=source.limit is not None and unreachable() is None,
        )
    except (ConnectionError, FileNotFoundError, ValueError, RuntimeError) as problem:
        if unreachable() or isinstance(problem, ConnectionError):
            raise unreachable_error("dataset", name, problem) from problem
        raise BadInput(f"{name}: the hub's data set cannot be read: {one_line(problem)}") from problem
    number = 0
    for batch in table.iter(batch_size=1024):  # many times faster than row by row
        needed = {*source.fields, source.tools or "tools"}
        is_there = {*source.fields} <= {*batch}  # else all of them, for the message
        columns = [column for column in batch if column in needed or not is_there]
        for values in zip(*(batch[column] for column in columns)):
            yield Row(f"{name} row {number}", str(number), dict(zip(columns, values)))
            number += 1


def _kind(path: Path) -> str:
    """The suffix that says how to read the file, without a `.gz` after it."""
    suffix = path.suffix.lower()
    inner = path.with_suffix("").suffix.lower()
    return inner if suffix == ".gz" and inner != ".parquet" else suffix


def _split_of(name: str) -> str | None:
    words = set(re.split(r"[^a-z]+", name.lower()))
    return next((split for split, names in SPLIT_NAMES.items() if words & names), None)


def file_rows(path: Path, source: Source, prefix: str = "") -> Iterator[Row]:
    """The rows of a file; an id is `prefix` and the row's `id` field if it has one, else its number or key.
    Raises BadInput for damaged content, with the line."""
    kind = _kind(path)
    parsed = _parquet(path, source) if kind == ".parquet" else PARSERS[kind](_content(path), path)
    for location, number, value in parsed:
        row_id = value.get("id") if isinstance(value, dict) and isinstance(number, int) else None
        has_id = isinstance(row_id, str | int) and row_id != ""
        yield Row(f"{path}{location}", f"{prefix}{row_id if has_id else number}", value)


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
        line, hint = first_line - 1 + problem.lineno, ""
        if problem.msg == "Extra data" and _kind(path) == ".json":
            hint = " One JSON value a line is JSON Lines: name the file .jsonl."
        elif _kind(path) != ".json" and first_line == 1 and content.strip() in ("[", "{", "[{"):
            hint = " A JSON value over several lines is no JSON Lines: name the file .json."
        elif content[problem.pos :].strip() in (",", "]", ",]"):
            hint = " JSON has no comma after the last item, and JSON Lines none between rows: take it out."
        message = f"{path}:{line}: not valid JSON ({problem.msg}, column {problem.colno}).{hint}"
        raise BadInput(message) from problem
    except RecursionError:
        raise BadInput(f"{path}:{first_line}: nested too deeply.") from None


def _csv(content: str, path: Path) -> Parsed:
    csv.field_size_limit(2**31 - 1)  # its default, 128 kB a field, is less than a document
    separator = "\t" if _kind(path) == ".tsv" else ","
    table = csv.DictReader(io.StringIO(content, newline=""), delimiter=separator, strict=True)
    try:
        table.fieldnames = next(filter(None, table.reader), [])  # blank lines may stand before the header
        for number, record in enumerate(table):
            if None in record or None in record.values():
                raise BadInput(
                    f"{path}:{table.line_num}: the record that ends here has not as many fields as the header"
                    f" ({len(table.fieldnames or ())}). Put a field that holds the separator in quotes."
                )
            yield f" record {number + 1}", number, record
    except csv.Error as problem:
        raise BadInput(f"{path}: not a readable table ({problem}).") from problem


def _paragraphs(content: str, path: Path) -> Parsed:
    paragraph: list[str] = []
    for number, line in enumerate([*content.split("\n"), ""], start=1):
        if line.strip(" \t"):
            paragraph.append(line)
        elif paragraph:
            start = number - len(paragraph)
            yield f":{start}", start, "\n".join(paragraph)
            paragraph = []


def _parquet(path: Path, source: Source) -> Parsed:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as problem:
        raise BadInput(f"{path}: parquet files need pyarrow: {EXTRA}") from problem
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            needed = {*source.fields, source.tools or "tools", "id"}
            is_there = {*source.fields} <= {*names}  # else all of them, for the message
            columns = [name for name in names if name in needed or not is_there]
            batches = table.iter_batches(batch_size=1024, columns=columns)
            records = (record for batch in batches for record in batch.to_pylist())
            yield from ((f" record {number + 1}", number, record) for number, record in enumerate(records))
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
