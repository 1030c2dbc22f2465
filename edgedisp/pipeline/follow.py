"""Non-zero ranks join each training stage and wait for rank 0 with the others.

They compute the same keys as rank 0 as far as the last training, and wait for a stage that is not shared by
looking for its record in the run folder: no process waits in a collective operation with a time limit while
rank 0 downloads, quantizes or scores. They write their part of a checkpoint (the state of their random
streams, or of their shard) and nothing else. All must see the run folder: one machine or one file system.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import silent
from edgedisp.core.stage_folder import Record, is_started, read
from edgedisp.pipeline.build_plan import stages
from edgedisp.pipeline.stage import Walk
from edgedisp.recipe import Recipe

POLL_S = 0.2


def follow(recipe: Recipe, run: Path, threads: int) -> int:
    """Take part in every training that has to be made; returns in how many.

    Raises BuildFailed if the launcher is gone, and whatever training raises.
    """
    launcher = os.getppid()
    way = Walk(run)
    joined = 0
    everything = stages(recipe, threads)
    last = max(index for index, stage in enumerate(everything) if stage.every_process)
    for stage in everything[: last + 1]:
        key = way.key(stage)
        folder = run / stage.name
        record = _wait(folder, key, launcher, or_started=stage.every_process)
        if record is None:
            joined += 1
            output_dir = folder.with_name(f"{folder.name}.partial")
            stage.run(way.records, output_dir, silent)
            record = _wait(folder, key, launcher)
        if record is not None:
            way.records[stage.name] = record
    if joined:
        from edgedisp.train.trainer import leave_processes

        leave_processes()
    return joined


def _wait(folder: Path, key: dict[str, Any], launcher: int, *, or_started: bool = False) -> Record | None:
    """The record of the stage, once it is finished; None once rank 0 has started it, if that will do."""
    while True:
        record = read(folder)
        if record is not None and record.key == key:
            return record
        if or_started and is_started(folder, key):
            return None
        if os.getppid() != launcher:
            raise BuildFailed(f"the launcher ended while {folder} was waited for")
        time.sleep(POLL_S)
