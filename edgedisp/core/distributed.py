"""This process among those of a launch by torchrun or accelerate launch, which number them by variables.

Only training is shared: process 0 alone prints, holds the run's lock, writes, and runs every other stage; the
others follow it (pipeline/stage.py). No torch is needed, so that a build with nothing to do does not load it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from edgedisp.core.errors import BadInput


@dataclass(frozen=True)
class Place:
    """Which process this is, from 0, and how many there are."""

    index: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        return self.index == 0


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """From RANK and WORLD_SIZE, if LOCAL_RANK says that a launcher set them. BadInput for no numbers."""
    if "LOCAL_RANK" not in environment:
        return Place()
    rank, count = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
    try:
        return Place(int(rank), int(count))
    except ValueError:
        message = f"RANK={rank} WORLD_SIZE={count}: not numbers; for one process, unset LOCAL_RANK"
        raise BadInput(message) from None


def leads() -> bool:
    """Whether this process may print; unlike `place` it never raises."""
    return os.environ.get("RANK", "0") == "0" or "LOCAL_RANK" not in os.environ


def split(batch: int, accumulate: int, processes: int) -> tuple[int, int]:
    """(batch, accumulate) of each process, so that all together take the same step.

    The micro-batches are dealt out first; where they are too few, each is cut. Raises BadInput if the number
    of processes does not divide the number of sequences, `batch x accumulate`.
    """
    step = batch * accumulate
    if step % processes:
        counts = ", ".join(str(number) for number in range(1, min(step, 64) + 1) if step % number == 0)
        raise BadInput(
            f"{processes} processes cannot share a step of train.batch {batch} x train.accumulate "
            f"{accumulate}; start {counts} processes, or set train.accumulate to a multiple of {processes}"
        )
    dealt = gcd(accumulate, processes)
    return batch // (processes // dealt), accumulate // dealt


def wait_for_launcher(seconds: float = 10.0) -> None:
    """Give the launcher time to end this process: process 0 has nearly always failed alike and reports it."""
    time.sleep(seconds)
