"""This process among those of a launch by torchrun or accelerate launch.

Both launchers start the same command several times and tell each process by the environment who it is. Only
training is shared. Process 0 leads: it alone prints, holds the run's lock, writes, and makes every other
stage. The others follow (follow.py) and say nothing, as long as process 0 can say it.

Read from the environment rather than from torch, so that a build with nothing to do loads no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd

from edgedisp.core.errors import BadInput

GRACE_S = 10.0
"""How long a process other than the first waits before it tells of its failure. What it met, process 0 has
nearly always met too, and the launcher ends all processes within a second of the first that fails."""


@dataclass(frozen=True)
class Place:
    """Which process this is, from 0, and how many there are."""

    index: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        return self.index == 0


def place(environment: Mapping[str, str] | None = None) -> Place:
    """From RANK and WORLD_SIZE, if LOCAL_RANK says that a launcher set them (accelerate's rule too).

    Raises BadInput for values that are no numbers.
    """
    told = os.environ if environment is None else environment
    if "LOCAL_RANK" not in told:
        return Place()
    try:
        return Place(int(told.get("RANK", "0")), int(told.get("WORLD_SIZE", "1")))
    except ValueError:
        raise BadInput(
            f"RANK={told.get('RANK')} WORLD_SIZE={told.get('WORLD_SIZE')}: not numbers; "
            "torchrun and accelerate launch set them for several processes; for one, unset LOCAL_RANK"
        ) from None


def leads() -> bool:
    """Whether this process may print; unlike `place` it never raises."""
    return os.environ.get("RANK", "0") == "0" or "LOCAL_RANK" not in os.environ


def split(batch: int, accumulate: int, processes: int) -> tuple[int, int]:
    """(batch, accumulate) of each process, so that all together take the same step.

    A recipe's step is `batch x accumulate` sequences whatever the number of processes. The micro-batches are
    dealt out first; where they are too few, each is cut. That comes out even if the number of processes
    divides the number of sequences. Raises BadInput otherwise.
    """
    step = batch * accumulate
    if step % processes:
        works = [str(number) for number in range(1, min(step, 64) + 1) if step % number == 0]
        raise BadInput(
            f"{processes} processes cannot share a step of train.batch {batch} x train.accumulate "
            f"{accumulate}; start {_either(works)} processes, or set train.accumulate to a multiple of "
            f"{processes}"
        )
    dealt = gcd(accumulate, processes)
    return batch // (processes // dealt), accumulate // dealt


def _either(numbers: list[str]) -> str:
    return numbers[0] if len(numbers) == 1 else f"{', '.join(numbers[:-1])} or {numbers[-1]}"


def stand_back(seconds: float = GRACE_S) -> None:
    """Wait for the launcher to end this process, because another has failed; returns if it does not."""
    time.sleep(seconds)
