"""The rows of a source, the documents made of them, and the count of what was read and dropped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One entry of a source before its text is looked for.

    place: where it stands, for messages (`text.jsonl:7`). id: unique within its source. value: a string, or
    an object (dict) with fields.
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
    """A list of documents that also counts what it was made from.

    rows_read, characters_read: of the source. dropped: reason -> rows that became no document ("null",
    "blank", "duplicate"). files_skipped: file of a folder -> why it was not read.
    """

    def __init__(self, documents: Iterable[Document] = (), dropped: dict[str, int] | None = None) -> None:
        super().__init__(documents)
        self.rows_read = 0
        self.characters_read = 0
        self.dropped: dict[str, int] = dict(dropped or {})
        self.files_skipped: dict[str, str] = {}

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def add(self, other: Documents) -> None:
        """Append another source's documents and counts."""
        self.extend(other)
        self.rows_read += other.rows_read
        self.characters_read += other.characters_read
        self.files_skipped |= other.files_skipped
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count

    def counts(self) -> dict[str, Any]:
        """The record of the reading, as JSON."""
        return {
            "rows_read": self.rows_read,
            "documents": len(self),
            "dropped": self.dropped,
            "characters_read": self.characters_read,
            "characters": sum(len(document.text) for document in self),
            "files_skipped": self.files_skipped,
        }

    def notes(self) -> list[str]:
        """One line each on dropped rows and skipped files, for the screen; empty if everything was used."""
        lines = []
        if self.dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
            lines.append(f"text: {sum(self.dropped.values())} of {self.rows_read} rows dropped ({reasons})")
        if self.files_skipped:
            shown = [f"{name} ({reason})" for name, reason in list(self.files_skipped.items())[:3]]
            more = ", ..." if len(self.files_skipped) > 3 else ""
            lines.append(f"text: {len(self.files_skipped)} files not read: {', '.join(shown)}{more}")
        return lines


def unique_id(name: str, taken: set[str]) -> str:
    """`name`, or `name#2`, `name#3` ... if it is taken; the answer is added to `taken`."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}#{count}"
    taken.add(candidate)
    return candidate
