"""Scores that were computed before, by model and by what was asked: scoring can be stopped and go on, and a
task or an item that is added costs only itself.

One SQLite file. A model is named by a hash of everything a score depends on (files, runtime, processor), an
item by a hash of the very tokens asked. Values are exact: a score read back equals the one computed.
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
_AT_ONCE = 500  # names in one query; SQLite allows 999


class ScoreCache:
    """What one model scored. Raises BadInput for a file that is no cache, BuildFailed where the disk is full
    or another program holds it."""

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
        for start in range(0, len(items), _AT_ONCE):
            part = items[start : start + _AT_ONCE]
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
        """SQLite's own errors as ours."""
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


def name_of(asked: Any) -> str:
    """The hash that names what was asked: anything with a faithful repr, such as tuples of token ids."""
    return hashlib.sha256(repr(asked).encode()).hexdigest()
