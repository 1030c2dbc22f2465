"""Rank and world size of a launch by torchrun or accelerate launch, read from its environment variables.

Only training is shared: rank 0 alone prints, holds the run's lock, writes, and runs every other stage; the
others follow it (pipeline/stage.py). No torch is needed, so that a build with nothing to do does not load it.
"""

from __future__ import annotations

import os
from math import gcd

from edgedisp.core.errors import BadInput


def get_world_size() -> int:
    """Processes of the launch; 1 without a launcher. Raises BadInput where the variable is no number."""
    if "LOCAL_RANK" not in os.environ:  # a cluster's own RANK and WORLD_SIZE mean something else
        return 1
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal():
        raise BadInput(f"WORLD_SIZE={value}: not a number; for one process, unset LOCAL_RANK")
    return int(value)


def is_main_process() -> bool:
    """Whether this is rank 0, which alone prints and writes."""
    return os.environ.get("RANK", "0") == "0" or "LOCAL_RANK" not in os.environ


def split(batch: int, accumulate: int, processes: int) -> tuple[int, int]:
    """(batch, accumulate) of each process, so that all together take the same step.

    The micro-batches are dealt out first; where they are too few, each is cut. Raises BadInput if the number
    of processes does not divide the number of sequences, `batch x accumulate`.
    """
    if batch * accumulate % processes:
        raise BadInput(
            f"{processes} processes cannot share a step of train.batch {batch} x train.accumulate "
            f"{accumulate}; set train.accumulate to a multiple of {processes}, or start fewer"
        )
    dealt = gcd(accumulate, processes)
    return batch // (processes // dealt), accumulate // dealt
