"""A page that measures, seen from this side: what arrives until its figures and scores are complete.

The page sends a step before each turn and all figures so far after it (`uploads.py`), then scores in pieces.
Whoever opened it, a browser here or one on a phone, knows more than the page does: whether it can still
answer, and what the machine did during a turn. That is `Watch`; the waiting, the partial result and the
errors are the same.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from edgedisp.bench.devices import DeviceLost
from edgedisp.bench.page_plan import PagePlan, measured
from edgedisp.bench.page_scores import Collected
from edgedisp.bench.page_server import PageServer
from edgedisp.bench.uploads import Figures, Scores, Step, Trouble
from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress

MEMORY_SHARE = 0.8  # of what is available, for all bundles that a page holds open


class Watch(Protocol):
    """What is known of the browser that has the page open, beside what the page sends."""

    def gone(self) -> str | None:
        """Why no more can come; None while it may. Asked about twice a second."""

    def hint(self) -> str:
        """What to add where nothing has been heard for too long."""

    def begins(self) -> None:
        """A turn begins."""

    def ended(self) -> dict[str, Any]:
        """What was seen of the machine during the turn that has ended; {} where nothing was."""


@dataclass
class Opened:
    """A page that was opened by us: its plan, where it sends to, the device as it is told of, its scores.

    `machine` makes the whole description of what the page told of it. `first_s`: the longest wait for its
    first word, where that is shorter than for the rest.
    """

    plan: PagePlan
    server: PageServer
    watch: Watch
    device: str
    machine: Callable[[dict[str, Any]], dict[str, Any]]
    timeout_s: float
    first_s: float | None = None
    scores: Collected = field(init=False)

    def __post_init__(self) -> None:
        self.scores = Collected(self.plan.requests)

    def collect(self, progress: Progress) -> tuple[Figures, list[dict[str, Any]]]:
        """Wait for the complete figures and all of `scores`; with each turn, what was seen meanwhile.

        Raises BuildFailed where the page says that it cannot go on, is gone, or silent for `timeout_s`:
        DeviceLost where something was timed until then.
        """
        figures: Figures | None = None
        seen: list[dict[str, Any]] = []
        heard = time.monotonic()
        patience_s = self.first_s or self.timeout_s
        while figures is None or not (figures.complete and self.scores.complete):
            try:
                upload = self.server.received.get(timeout=0.5).upload
            except queue.Empty:
                if why := self.watch.gone():
                    raise self._failed(why, figures, seen) from None
                if time.monotonic() - heard > patience_s:
                    why = f"nothing heard for {patience_s:g} s{self.watch.hint()}"
                    raise self._failed(why, figures, seen) from None
                continue
            heard, patience_s = time.monotonic(), self.timeout_s
            if isinstance(upload, Step):
                progress(upload.done, upload.total, upload.note)
                self.watch.begins()  # a turn begins after the step is told
            elif isinstance(upload, Trouble):
                raise self._failed(f"the page could not go on: {upload.message}", figures, seen)
            elif isinstance(upload, Scores):
                self.scores.take(upload)
            else:
                if len(upload.repetitions) > len(seen):
                    seen.append(self.watch.ended())
                figures = upload
        return figures, seen

    def _failed(self, why: str, figures: Figures | None, seen: list[dict[str, Any]]) -> BuildFailed:
        """The error, with the partial result if there is one."""
        message = f"device {self.device}: {why}"
        if figures is None or not figures.repetitions:
            return BuildFailed(message)
        partial = measured(self.plan, figures, device=self.device, readings=seen)
        machine = self.machine(partial["machine"])
        return DeviceLost(message, {**partial, **self.scores.result(), "machine": machine, "lost": why})
