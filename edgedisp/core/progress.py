"""The progress callback, and progress on stderr: a live bar (Rich) on a terminal; elsewhere a plain line when
a stage starts and ends and at most one every ten seconds in between.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from edgedisp.core.stage_folder import Record

QUIET_S = 10.0

Progress = Callable[[int, int, str], None]
"""`progress(done, total, note)`: called by long work; `total` 0 means unknown. Must be cheap."""


def silent(done: int, total: int, note: str) -> None:
    """The progress callback that shows nothing."""


def warn(line: str) -> None:
    """One line on stderr, above a live bar: what a user should know and can be done without an answer."""
    sys.stderr.write(line + "\n")


def printable(text: str) -> str:
    """The text with every character that could move a terminal's cursor replaced by a space."""
    return "".join(character if character.isprintable() else " " for character in text)


def labelled(progress: Progress, label: str) -> Progress:
    """The same callback, with `label` before every note."""
    return lambda done, total, note: progress(done, total, f"{label}: {note}" if note else label)


def clock(seconds: float) -> str:
    """`75` -> `1:15`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class Screen:
    """Shows how a build goes; `screen.progress` is a progress callback."""

    def __init__(self, title: str) -> None:
        self.title = self._stage = title
        self._last_line = time.monotonic()
        self._first = 0.0, 0  # time and count of the first call of a stage, or of a part of it
        self._last = 0, -1  # count and total of the last call
        self._bar: Any = _live_bar() if sys.stderr.isatty() else None
        self._unchanged: list[str] = []

    def __enter__(self) -> Screen:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=None, note="")
        else:
            self._print(self.title)
        return self

    def __exit__(self, *error: object) -> None:
        self._print_unchanged()
        if self._bar is not None:
            self._bar.stop()

    def started(self, name: str, number: int, total: int) -> None:
        self._print_unchanged()
        self._stage, self._last_line = f"[{number:2}/{total}] {name}", time.monotonic()
        self._last = 0, -1
        if self._bar is not None:
            self._bar.reset(self._task, total=None, description=self._stage, note="")
        else:
            self._print(f"{self._stage} ...")

    def progress(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        is_new = total != self._last[1] or done < self._last[0]  # the stage's next part counts anew
        self._last = done, total
        if self._bar is not None:
            if is_new:
                self._bar.reset(self._task)
            self._bar.update(self._task, completed=done, total=total or None, note=note)
            return
        if is_new:  # a resumed stage starts in the middle: the speed is that since this call
            self._first = now, done
        if now - self._last_line < QUIET_S:
            return
        self._last_line = now
        seconds, count = now - self._first[0], done - self._first[1]
        remaining = f", {clock(seconds / count * (total - done))} left" if count > 0 and total else ""
        of = f"{done}/{total}" if total else str(done)
        self._print(f"{self._stage}: {of}{', ' + note if note else ''}{remaining}")

    def finished(self, name: str, record: Record) -> None:
        self._print(f"{self._stage}: done in {clock(record.seconds)}")
        for note in record.results.get("notes", ()):
            self._print(f"{self._stage}: {note}")

    def cached(self, name: str, record: Record) -> None:
        self._unchanged.append(name)

    def _print_unchanged(self) -> None:
        if self._unchanged:
            self._print(f"kept {len(self._unchanged)} finished stages: {', '.join(self._unchanged)}")
            self._unchanged = []

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def _live_bar() -> Any:
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        "{task.description}",
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        "left",
        progress.TimeRemainingColumn(),
        "{task.fields[note]}",
        console=Console(stderr=True),
        transient=True,
    )
