"""What the processes of a launch do that do not lead: they take part in training, and wait for the rest.

Process 0 walks all stages. The others walk as far as the last training, by the same keys. A stage that is not
theirs they wait for by looking for its record in the run folder, so it may take hours: no process waits in
a collective operation with a time limit while another downloads, quantizes or scores. After the last training
they end, and process 0 goes on alone.

They write nothing into the run folder beside their part of a checkpoint (the state of their random streams,
or of their shard), and remove and rename nothing.

All processes must see the run folder: one machine, or machines that share a file system.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import silent
from edgedisp.core.stage_folder import Record, begun, read
from edgedisp.pipeline import Stage, Work, stages
from edgedisp.recipe import Recipe

LOOK_S = 0.2  # seconds between two looks


def follow(recipe: Recipe, run: Path, threads: int) -> int:
    """Take part in every training that has to be made; returns in how many.

    Raises BuildFailed if the launcher is gone, and whatever training raises.
    """
    launcher = os.getppid()
    records: dict[str, Record] = {}
    part = 0
    for stage in _shared(stages(recipe, threads)):
        key = stage.key(records)
        folder = run / stage.name
        record = _wait(folder, key, launcher, or_begun=stage.every_process)
        if record is None:
            part += 1
            own = folder.with_name(f"{folder.name}.partial")
            stage.work(Work(own, {name: records[name].folder for name in stage.reads}, silent))
            record = _wait(folder, key, launcher)
        if record is not None:
            records[stage.name] = record
    if part:
        from edgedisp.stages import leave_processes

        leave_processes()
    return part


def _shared(walked: list[Stage]) -> list[Stage]:
    """The stages up to the last in which every process takes part."""
    last = max(index for index, stage in enumerate(walked) if stage.every_process)
    return walked[: last + 1]


def _wait(folder: Path, key: dict[str, Any], launcher: int, *, or_begun: bool = False) -> Record | None:
    """The record of the stage, once it is finished; None once process 0 has begun it, if that will do."""
    while True:
        record = read(folder)
        if record is not None and record.key == key:
            return record
        if or_begun and begun(folder, key):
            return None
        if os.getppid() != launcher:
            raise BuildFailed(f"the launcher ended while {folder} was waited for")
        time.sleep(LOOK_S)
