"""The progress callback, and progress on stderr: a live bar (Rich) on a terminal; elsewhere a plain line when
a stage starts and ends and at most one every ten seconds in between.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from edgedisp.core.stage_folder import Record

QUIET_S = 10.0
SPEED_PERIOD_S = 3600.0  # steps of a training can take minutes

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
        from rich import progress
        from rich.console import Console

        self.title = self._stage = title
        self._is_live = sys.stderr.isatty()
        self._last_line = time.monotonic()
        self._unchanged: list[str] = []
        self._bar = progress.Progress(
            "{task.description}",
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            "left",
            progress.TimeRemainingColumn(),
            "{task.fields[note]}",
            console=Console(stderr=True),
            transient=True,
            speed_estimate_period=SPEED_PERIOD_S,
            get_time=time.monotonic,
        )
        self._begin()

    def __enter__(self) -> Screen:
        if self._is_live:
            self._bar.start()
        else:
            self._print(self.title)
        return self

    def __exit__(self, *error: object) -> None:
        self._print_unchanged()
        if self._is_live:
            self._bar.stop()

    def started(self, name: str, number: int, total: int) -> None:
        self._print_unchanged()
        self._stage, self._last_line = f"[{number:2}/{total}] {name}", time.monotonic()
        self._begin()
        if not self._is_live:
            self._print(f"{self._stage} ...")

    def progress(self, done: int, total: int, note: str) -> None:
        if (total or None) != self._task.total or done < self._task.completed:
            self._begin(total or None)  # the stage's next part has a speed of its own
        self._bar.update(self._task.id, completed=done, note=note)
        now = time.monotonic()
        if self._is_live or now - self._last_line < QUIET_S:
            return
        self._last_line = now
        seconds = self._task.time_remaining
        left = f", {clock(seconds)} left" if seconds else ""
        count = f"{done}/{total}" if total else str(done)
        self._print(f"{self._stage}: {count}{', ' + note if note else ''}{left}")

    def finished(self, name: str, record: Record) -> None:
        self._print(f"{self._stage}: done in {clock(record.seconds)}")
        for note in record.results.get("notes", ()):
            self._print(f"{self._stage}: {note}")

    def cached(self, name: str) -> None:
        self._unchanged.append(name)

    def _begin(self, total: int | None = None) -> None:
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.add_task(self._stage, total=total, note="")
        self._task = self._bar.tasks[0]

    def _print_unchanged(self) -> None:
        if self._unchanged:
            self._print(f"kept {len(self._unchanged)} finished stages: {', '.join(self._unchanged)}")
            self._unchanged = []

    def _print(self, line: str) -> None:
        if self._is_live:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()
