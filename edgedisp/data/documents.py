"""Files, folders and data sets of the hub -> documents, with a count of what was read and dropped.

The text field of each row becomes a document; a row without text is dropped and counted. In sets such as
wikitext a row is one LINE and an article starts at ` = Title = `: when the first non-empty row is such a
heading, the rows up to the next one are joined to one document. Synthetic documents serve runs that only
prove a recipe whose data lie on a hub.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.data.chat import Conversation, conversation
from edgedisp.data.readers import Document, Row, check_pairs, file_rows, hub_rows, local_files
from edgedisp.recipe import Source

CHAT_FIELDS = {"messages", "conversations", "conversation"}
CHAT_HINT = "A chat is no text: name its field with `messages:` in the place of `text:`."
HEADING = re.compile(r"\s*= (?!=)(\S|\S.*\S)(?<!=) =\s*")  # ` = Title = `, but not ` = = Section = = `


class Documents(list[Document]):
    """A list of documents that also counts what it was made from.

    files_read, rows_read, characters_read: of the source. dropped: reason ("null", "blank", "duplicate") ->
    rows that became no document. files_skipped: file of a folder -> why it was not read.
    """

    def __init__(self, documents: Iterable[Document] = (), **dropped: int) -> None:
        super().__init__(documents)
        self.files_read = self.rows_read = self.characters_read = 0
        self.dropped = Counter(dropped)
        self.files_skipped: dict[str, str] = {}

    def add(self, other: Documents) -> None:
        """Append another source's documents and counts."""
        self.extend(other)
        self.files_read += other.files_read
        self.rows_read += other.rows_read
        self.characters_read += other.characters_read
        self.files_skipped |= other.files_skipped
        self.dropped.update(other.dropped)

    def counts(self) -> dict[str, Any]:
        """The record of the reading, as JSON."""
        return {
            "files_read": self.files_read,
            "rows_read": self.rows_read,
            "documents": len(self),
            "dropped": dict(self.dropped),
            "characters_read": self.characters_read,
            "characters": sum(len(document.text) for document in self),
            "files_skipped": self.files_skipped,
        }


def read_documents(path: Path | str, source: Source | None = None, progress: Progress = silent) -> Documents:
    """The documents of a local file or folder, or of a data set on the hub, in their order there.

    Raises BadInput: unreadable or unknown file (with the line), a row without the source's field, a text that
    is no string, a row that is no conversation (data/chat.py), no document at all, hub unreachable.
    """
    documents, source = Documents(), source or Source(source=str(path))
    files: dict[Path, str] = {}
    if isinstance(path, Path) or Path(path).exists():
        files, skipped = local_files(Path(path), source)
        names = {file.relative_to(path).as_posix(): reason for file, reason in skipped.items()}
        documents.files_skipped = names
        rows = _rows_of(files, source, documents)
    else:
        rows = hub_rows(path, source)
    ids: set[str] = set()
    for document in (_conversations if source.is_chat else _documents)(rows, source, documents):
        documents.append(replace(document, id=unique_id(document.id, ids)))
        if len(documents) == source.limit:
            break
        if len(documents) % 1000 == 0:
            progress(len(documents), source.limit or 0, f"reading {Path(path).name}")
    for file in [*files][documents.files_read :]:
        documents.files_skipped[file.relative_to(path).as_posix()] = "beyond the limit"
    if not documents:
        raise BadInput(f"{path}: no text found ({documents.rows_read} rows, none of them holds text).")
    return documents


def unique_id(name: str, used: set[str]) -> str:
    """`name`, or the first free one of `name#2`, `name#3` ...; it is added to `used`."""
    candidate, count = name, 1
    while candidate in used:
        count += 1
        candidate = f"{name}#{count}"
    used.add(candidate)
    return candidate


def _rows_of(files: dict[Path, str], source: Source, documents: Documents) -> Iterator[Row]:
    """The rows of the files, which are counted as they are opened."""
    for file, prefix in files.items():
        documents.files_read += 1
        yield from file_rows(file, source, prefix)


def _conversations(rows: Iterable[Row], source: Source, documents: Documents) -> Iterator[Document]:
    for row in rows:
        documents.rows_read += 1
        document = conversation(row, source)
        documents.characters_read += len(document.text)
        answers = [document.messages[index] for index in document.answers]
        if all(answer["content"].strip() or "tool_calls" in answer for answer in answers):
            yield document
        else:
            documents.dropped["blank"] += 1


def _documents(rows: Iterable[Row], source: Source, documents: Documents) -> Iterator[Document]:
    for row, text in _join_articles(_texts(rows, source.fields[0], documents)):
        if text.strip():
            yield Document(row.id, text, source.weight)
        else:
            documents.dropped["blank"] += 1


def _texts(rows: Iterable[Row], field: str, documents: Documents) -> Iterator[tuple[Row, str]]:
    """Rows with their text; nulls are counted as dropped, everything else that is no text is BadInput."""
    for row in rows:
        text = row.value
        if isinstance(text, dict):
            if field not in text:
                fields = [str(name) for name in text]
                near = difflib.get_close_matches(field, fields, n=1, cutoff=0.5)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                chats = [CHAT_HINT for name in fields if name in CHAT_FIELDS]
                raise BadInput(
                    f"{row.location}: no text field {field!r}.{hint} Fields found: {', '.join(fields)}. "
                    + (chats or ["Name the one that holds the text with `text:`."])[0]
                )
            text = text[field]
        documents.rows_read += 1
        if text is None:
            documents.dropped["null"] += 1
            continue
        if not isinstance(text, str):
            hint = f" {CHAT_HINT}" if isinstance(text, list) and field in CHAT_FIELDS else ""
            raise BadInput(f"{row.location}: the text must be a string, found {type(text).__name__}.{hint}")
        check_pairs(text, row.location)
        documents.characters_read += len(text)
        yield row, text


def _join_articles(rows: Iterator[tuple[Row, str]]) -> Iterator[tuple[Row, str]]:
    """The rows as they are, or joined to articles if the first non-empty one is a top-level heading."""
    head: list[tuple[Row, str]] = []
    for pair in rows:
        head.append(pair)
        if pair[1].strip():
            break
    if not head or not HEADING.fullmatch(head[-1][1]):
        yield from chain(head, rows)
        return
    first, lines = head[0][0], [""]
    for row, line in chain(head, rows):
        if HEADING.fullmatch(line) and any(map(str.strip, lines)):
            yield first, "".join(lines).strip()
            first, lines = row, []
        lines.append(line if line.endswith("\n") else line + "\n")  # so that words stay apart
    yield first, "".join(lines).strip()


# Synthetic English-like documents

MIN_WORDS = 60
ONSETS = [*"bcdfghklmnprstvw", "br", "ch", "dr", "gr", "st", "th", "tr"]
VOWELS = [*"aeiou", "ai", "ea", "ie", "ou"]
# choices: slot -> values. endings: of names. articles: kind -> the opening sentence and the others, of which
# some are left out; {name} is what the article is about.
PARTS = json.loads(Path(__file__).with_name("synthetic_text.json").read_text(encoding="utf-8"))
NAMED_LIKE = {"place": "place", "river": "place", "person": "person", "animal": "thing", "work": "person"}


def synthetic_documents(count: int, seed: int) -> Documents:
    """`count` articles of 60 to 150 words each about invented things, ids `made-<seed>-<number>`.

    Names are built from syllables and repeated within an article, so that a tokenizer and the tasks made from
    text have something to learn. Document i depends on (seed, i) alone.
    """
    names = {f"made-{seed}-{number}": number for number in range(count)}
    documents = Documents(Document(name, _article(seed, number)) for name, number in names.items())
    documents.rows_read = count
    documents.characters_read = sum(len(document.text) for document in documents)
    return documents


def synthetic_conversations(count: int, seed: int) -> Documents:
    """Conversations about the made documents: what is asked is how they begin, the answer their first
    sentence."""
    documents = synthetic_documents(count, seed)
    for index, document in enumerate(documents):
        start, answer = " ".join(document.text.split()[:4]), document.text.partition(". ")[0]
        turns = {"user": f"Go on: {start}", "assistant": answer}
        messages = [{"role": role, "content": content} for role, content in turns.items()]
        documents[index] = Conversation.of(document.id, messages)
    return documents


def _article(seed: int, number: int) -> str:
    rng = np.random.default_rng([seed, number])
    kind = _choose(rng, sorted(PARTS["articles"]))
    opening, *others = PARTS["articles"][kind]
    slots = _slots(rng, NAMED_LIKE[kind])
    selected = sorted(rng.permutation(len(others))[: int(rng.integers(4, len(others) + 1))].tolist())
    rest = [index for index in range(len(others)) if index not in selected]
    text = " ".join([opening, *(others[index] for index in selected)]).format(**slots)
    while len(text.split()) < MIN_WORDS:
        text += " " + others[rest.pop(0)].format(**slots)
    return text[0].upper() + text[1:]


def _slots(rng: np.random.Generator, named_like: str) -> dict[str, str | int]:
    """One value for every slot of an article, so that its sentences agree. The order of draws is fixed."""
    years = np.sort(rng.choice(np.arange(1650, 2020), size=4, replace=False)).tolist()
    slots: dict[str, str | int] = {key: _choose(rng, choices) for key, choices in PARTS["choices"].items()}
    slots |= dict(zip(("year", "middle", "later", "latest"), years, strict=True))
    slots |= {name: _name(rng, "place") for name in ("town", "town2", "river")}
    slots |= {name: _name(rng, "person", "") + "ia" for name in ("region", "region2")}
    slots |= {"name": _name(rng, named_like), "surname": _name(rng, "person")}
    slots |= {
        "first2": _choose(rng, PARTS["choices"]["first"]),
        "adjective2": _choose(rng, PARTS["choices"]["adjective"]),
    }
    slots |= {"few": _choose(rng, ["two", "three", "four", "five", "six", "seven"])}
    slots |= {"title": "The " + _choose(rng, ["Winter", "Garden", "Letters", "Last Summer", "Silent House"])}
    slots |= {"small": int(rng.integers(8, 60)), "medium": int(rng.integers(60, 900))}
    slots["large"] = f"{int(rng.integers(1000, 90000)):,}"
    return slots


def _name(rng: np.random.Generator, kind: str, ending: str | None = None) -> str:
    parts = [_choose(rng, ONSETS) + _choose(rng, VOWELS) for _ in range(int(rng.integers(1, 3)))]
    last = _choose(rng, PARTS["endings"][kind] if ending is None else ["r", "n", "l", "s", "v", "d"])
    middle = _choose(rng, ["n", "r", "l", ""]) if ending is None else ""
    return ("".join(parts) + middle + last).capitalize()


def _choose(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
