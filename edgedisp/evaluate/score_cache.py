"""Scores that were computed before, by model and by the tokens asked, in one SQLite file.

An interrupted scoring continues, and an added task costs only itself. A model is named by a hash of
everything a score depends on (files, runtime, processor), an item by a hash of its tokens. Values are read
back exactly.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput, BuildFailed

FORM = 2  # raised when scores are computed in another way, so that older ones are not taken
_NAMES_PER_QUERY = 500  # SQLite allows 999


class ScoreCache:
    """The scores of one model. Raises BadInput for a file that is no cache, BuildFailed for a full disk or a
    locked file."""

    def __init__(self, path: Path, model: str) -> None:
        self.path, self.model = path, f"{FORM} {model}"
        with self._errors():
            self._connection = sqlite3.connect(path, timeout=60)
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS scores (model TEXT, item TEXT, found TEXT, "
                "PRIMARY KEY (model, item)) WITHOUT ROWID"
            )

    def read(self, items: Sequence[str]) -> dict[str, Any]:
        """Item -> its value, for those there are."""
        values: dict[str, Any] = {}
        for start in range(0, len(items), _NAMES_PER_QUERY):
            part = items[start : start + _NAMES_PER_QUERY]
            marks = ",".join("?" * len(part))
            with self._errors():
                rows = self._connection.execute(
                    f"SELECT item, found FROM scores WHERE model = ? AND item IN ({marks})",
                    (self.model, *part),
                )
                values |= {item: json.loads(text) for item, text in rows}
        return values

    def write(self, values: Mapping[str, Any]) -> None:
        """Store JSON-able values by item, all or none."""
        rows = [(self.model, item, json.dumps(value)) for item, value in values.items()]
        with self._errors(), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as problem:
            raise BuildFailed(
                f"{self.path}: scores cannot be kept there ({problem}); what is finished is kept, and the "
                "same command continues"
            ) from problem
        except sqlite3.Error as problem:
            raise BadInput(
                f"{self.path}: cannot be used as the store of scores ({problem}); delete it, and what it "
                "held is scored again"
            ) from problem


def name_of(content: Any) -> str:
    """The hash of anything with a faithful repr, such as tuples of token ids."""
    return hashlib.sha256(repr(content).encode()).hexdigest()
