"""A run that is killed and continued is the unbroken run."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from training import fit_tiny, open_tiny

from edgedisp.core.errors import BadInput
from edgedisp.core.files import file_digest, read_json, sealed, write_json
from edgedisp.dispersion.losses import DispersionConfig
from edgedisp.train.trainer import MARKER, newest_checkpoint

KILLED = -signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_writing(step: int) -> None:
    """Half of the optimizer's file of that checkpoint is written when the process is killed."""
    whole = torch.save

    def torn(value: Any, path: Any, *args: Any, **options: Any) -> None:
        if not str(path).endswith(f"checkpoint-{step}/optimizer.pt"):
            whole(value, path, *args, **options)
            return
        buffer = io.BytesIO()
        whole(value, buffer)
        Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
        die()

    torch.save = torn


def train_in_this_process(base: Path, run: Path, kill: str, step: int) -> None:
    """Continue what is in `run`; die, or leave the weights there."""
    torch.set_num_threads(1)
    if kill == "while writing":
        die_while_writing(step)

    def progress(done: int, total: int, note: str) -> None:
        if kill == "between steps" and done == step:
            die()

    newest = newest_checkpoint(run / "checkpoints")
    with (run / "resumed_from.txt").open("a") as file:
        print(newest.name if newest else "nothing", file=file)
    model = open_tiny(base)
    term = DispersionConfig(tokens=8)
    options = {"steps": 10, "batch": 2, "accumulate": 2, "checkpoint_every": 3}
    result = fit_tiny(model, run / "checkpoints", progress=progress, dispersion=term, **options)
    model.save_pretrained(run / "model")
    (run / "log.json").write_text(json.dumps(result.log))


def in_a_process(base: Path, run: Path, kill: str = "never", step: int = 0) -> int:
    """Exit code of a process that trains; minus the signal's number if it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["edgedisp.train.trainer", "transformers.models.gpt2.modeling_gpt2"])
    process = context.Process(target=train_in_this_process, args=(base, run, kill, step))
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None
    return process.exitcode


def test_a_run_killed_at_three_points_ends_with_the_weights_of_the_unbroken_run(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    base = tiny_folder["gpt2"]
    assert open_tiny(base).config.resid_pdrop > 0  # dropout draws from the streams that are restored
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    assert in_a_process(base, whole) == 0
    assert in_a_process(base, broken, "between steps", 2) == KILLED  # before any checkpoint
    assert in_a_process(base, broken, "while writing", 6) == KILLED
    assert (broken / "checkpoints" / "checkpoint-6" / "optimizer.pt").is_file()
    assert in_a_process(base, broken, "between steps", 8) == KILLED
    assert in_a_process(base, broken) == 0
    resumed = (broken / "resumed_from.txt").read_text().split()
    assert resumed == ["nothing", "nothing", "checkpoint-3", "checkpoint-6"]
    weights = [file_digest(run / "model" / "model.safetensors") for run in (whole, broken)]
    assert weights[0] == weights[1] != file_digest(base / "model.safetensors")
    logs = [json.loads((run / "log.json").read_text()) for run in (whole, broken)]
    assert logs[0] == logs[1] and len(logs[0]) == 10
    assert [path.name for path in (broken / "checkpoints").iterdir()] == ["checkpoint-10"]


def test_a_checkpoint_that_is_not_whole_is_passed_over_for_the_one_before(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    model = open_tiny(tiny_folder["llama"])
    fit_tiny(model, tmp_path, steps=2, checkpoint_every=2)
    good = tmp_path / "checkpoint-2"
    shutil.copytree(good, tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / MARKER).unlink()
    assert newest_checkpoint(tmp_path) == good
    assert fit_tiny(model, tmp_path, steps=2, checkpoint_every=2).resumed_from == 2
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    path = good / MARKER
    write_json(path, sealed({**read_json(path), "is_sharded": True}))
    with pytest.raises(BadInput, match="cannot be continued from FSDP to DDP"):
        fit_tiny(model, tmp_path, steps=2)
    for file in (path, good / "optimizer.pt"):
        content = file.read_bytes()
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        assert newest_checkpoint(tmp_path) is None
        file.write_bytes(content)
