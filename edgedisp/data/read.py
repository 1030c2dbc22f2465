"""Rows -> documents: the named text field of each, empty ones dropped and counted.

Language-model sets such as wikitext come as LINES: an article starts at ` = Title = `, sections at
` = = Section = = `, and most rows are a paragraph or blank. One line is no document, so when the first
non-empty row is a top-level heading, all rows up to the next one are joined (`join_at_headings`).
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
from edgedisp.data import files, hub
from edgedisp.data.document import Document, Documents, Row, unique_id

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
    folders laid out like one. limit: at most so many documents, the first ones. `.dropped["empty"]` of the
    result counts rows whose text was empty or blank.

    Raises BadInput: unreadable or unknown file (with the line), a row without the field (with the fields
    found and the nearest name), a text that is no string, no document at all, hub unreachable.
    """
    path = Path(path_or_id)
    if isinstance(path_or_id, Path) or path.exists():
        rows = files.rows(path, text, config, split)
    else:
        rows = hub.rows(path_or_id, text=text, config=config, split=split, revision=revision, limit=limit)
    found = Documents(dropped={"empty": 0})
    seen: set[str] = set()
    for row, content in _joined((row, _text_of(row, text)) for row in rows):
        if not content.strip():
            found.dropped["empty"] += 1
            continue
        found.append(Document(unique_id(row.id, seen), content))
        if len(found) == limit:
            break
        if len(found) % 1000 == 0:
            progress(len(found), limit or 0, f"reading {path.name}")
    if not found:
        raise BadInput(f"{path_or_id}: no text found ({found.dropped['empty']} rows, all of them empty).")
    return found


def join_at_headings(lines: Iterable[str]) -> list[str]:
    """Lines -> articles: a line that is a top-level heading (` = Title = `) starts a new one.

    Lines before the first heading make an article of their own. Lines keep their text; a line that does not
    end in a newline gets one, so that joining cannot glue words together.
    """
    return [text for _, text in _articles((Row("", str(n), line), line) for n, line in enumerate(lines))]


def _joined(rows: Iterator[tuple[Row, str]]) -> Iterator[tuple[Row, str]]:
    """The rows as they are, or as articles if the first non-empty one is a top-level heading."""
    head: list[tuple[Row, str]] = []
    for row in rows:
        head.append(row)
        if row[1].strip():
            break
    everything = chain(head, rows)
    return _articles(everything) if head and HEADING.fullmatch(head[-1][1]) else everything


def _articles(rows: Iterable[tuple[Row, str]]) -> Iterator[tuple[Row, str]]:
    first: Row | None = None
    lines: list[str] = []
    for row, line in rows:
        if HEADING.fullmatch(line) and any(kept.strip() for kept in lines) and first is not None:
            yield first, "".join(lines).strip()
            first, lines = None, []
        first = first or row
        lines.append(line if line.endswith("\n") else line + "\n")
    if first is not None:
        yield first, "".join(lines).strip()


def _text_of(row: Row, field: str) -> str:
    value: Any = row.value
    if isinstance(value, dict):
        if field not in value:
            raise BadInput(_no_field(row, field, [str(name) for name in value]))
        value = value[field]
        if value is None:
            return ""
    if not isinstance(value, str):
        raise BadInput(
            f"{row.place}: the text must be a string, found {type(value).__name__}"
            + (f" in field {field!r}." if isinstance(row.value, dict) else "; rows are objects or strings.")
        )
    return value


def _no_field(row: Row, field: str, fields: list[str]) -> str:
    near = difflib.get_close_matches(field, fields, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"{row.place}: no text field {field!r}.{hint} Fields found: {', '.join(fields) or 'none'}. "
        "Name the one that holds the text with `text:`."
    )
