"""What walks through this room: rows as they were read, documents as they are used."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One entry of a source before anyone asked whether it holds text.

    place: where it stands, for messages (`text.jsonl line 7`). id: unique within its source. value: a string,
    or an object (dict) with fields.
    """

    place: str
    id: str
    value: Any


@dataclass(frozen=True)
class Document:
    """One text with a name. Scores are clustered by `id`, so two different texts need different ids."""

    id: str
    text: str


class Documents(list[Document]):
    """A plain list of documents that also says what was left out of it.

    dropped: how many were left out and why, for instance {"empty": 3, "duplicate": 1}.
    """

    def __init__(self, documents: Iterable[Document] = (), dropped: dict[str, int] | None = None) -> None:
        super().__init__(documents)
        self.dropped: dict[str, int] = dict(dropped or {})


def unique_id(name: str, taken: set[str]) -> str:
    """`name`, or `name#2`, `name#3` ... if it is taken; the answer is added to `taken`."""
    chosen, count = name, 1
    while chosen in taken:
        count += 1
        chosen = f"{name}#{count}"
    taken.add(chosen)
    return chosen
