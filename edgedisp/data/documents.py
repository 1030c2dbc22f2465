"""Files, folders and data sets of the hub -> documents.

Rows come from `readers` (local) or `hub` (data sets). The named text field of each row becomes a document; a
row without text is dropped and counted. Language-model sets such as wikitext come as LINES: an article starts
at ` = Title = `, and most rows are a paragraph or blank. When the first non-empty row is such a heading, all
rows up to the next one are joined to one document.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.data import hub, readers
from edgedisp.data.rows import Document, Documents, Row, unique_id

HEADING = re.compile(r"\s*= (?!=)(\S|\S.*\S)(?<!=) =\s*")  # ` = Title = `, but not ` = = Section = = `


def read_documents(
    path_or_id: Path | str,
    text: str = "text",
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    limit: int | None = None,
    progress: Progress = silent,
) -> Documents:
    """The documents of a local file or folder, or of a data set on the hub, in their order there.

    text: the field that holds the text, where rows have fields. config, split, revision: for hub sets and
    folders laid out like one. limit: at most so many documents, the first ones. The result counts the rows
    and characters read, what was dropped and why, and the files of a folder that were not read.

    Raises BadInput: unreadable or unknown file (with the line), a row without the field (with the fields
    found and the nearest name), a text that is no string, no document at all, hub unreachable.
    """
    documents = Documents()
    path = Path(path_or_id)
    if isinstance(path_or_id, Path) or path.exists():
        files, documents.files_skipped = readers.files_of(path, config, split)
        rows = readers.rows(path, files, text, config)
    else:
        rows = hub.rows(path_or_id, text=text, config=config, split=split, revision=revision, limit=limit)
    ids: set[str] = set()
    for row, content in _articles_or_rows(_texts(rows, text, documents)):
        if not content.strip():
            documents.drop("blank")
            continue
        documents.append(Document(unique_id(row.id, ids), content))
        if len(documents) == limit:
            break
        if len(documents) % 1000 == 0:
            progress(len(documents), limit or 0, f"reading {path.name}")
    if not documents:
        raise BadInput(f"{path_or_id}: no text found ({documents.rows_read} rows, none of them holds text).")
    return documents


def _texts(rows: Iterable[Row], field: str, documents: Documents) -> Iterator[tuple[Row, str]]:
    for row in rows:
        content = _text_of(row, field)
        documents.rows_read += 1
        documents.characters_read += len(content or "")
        if content is None:
            documents.drop("null")
        else:
            yield row, content


def _articles_or_rows(rows: Iterator[tuple[Row, str]]) -> Iterator[tuple[Row, str]]:
    """The rows as they are, or as articles if the first non-empty one is a top-level heading."""
    head: list[tuple[Row, str]] = []
    for row in rows:
        head.append(row)
        if row[1].strip():
            break
    everything = chain(head, rows)
    return _articles(everything) if head and HEADING.fullmatch(head[-1][1]) else everything


def _articles(rows: Iterable[tuple[Row, str]]) -> Iterator[tuple[Row, str]]:
    """Rows joined to articles. A line without a newline gets one, so that words stay apart."""
    first: Row | None = None
    lines: list[str] = []
    for row, line in rows:
        if HEADING.fullmatch(line) and any(earlier.strip() for earlier in lines) and first is not None:
            yield first, "".join(lines).strip()
            first, lines = None, []
        first = first or row
        lines.append(line if line.endswith("\n") else line + "\n")
    if first is not None:
        yield first, "".join(lines).strip()


def _text_of(row: Row, field: str) -> str | None:
    """The row's text, None for a null. BadInput for everything else that is no text."""
    value: Any = row.value
    if isinstance(value, dict):
        if field not in value:
            raise BadInput(_missing_field(row, field, [str(name) for name in value]))
        value = value[field]
        if value is None:
            return None
    if not isinstance(value, str):
        raise BadInput(
            f"{row.place}: the text must be a string, found {type(value).__name__}"
            + (f" in field {field!r}." if isinstance(row.value, dict) else "; rows are objects or strings.")
        )
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as problem:
            raise BadInput(
                f"{row.place}: character {problem.start} of the text is half of a surrogate pair "
                f"(\\u{ord(value[problem.start]):04x}), which no tokenizer can read. Write the whole "
                "character, or remove it."
            ) from problem
    return value


def _missing_field(row: Row, field: str, fields: list[str]) -> str:
    near = difflib.get_close_matches(field, fields, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"{row.place}: no text field {field!r}.{hint} Fields found: {', '.join(fields) or 'none'}. "
        "Name the one that holds the text with `text:`."
    )
