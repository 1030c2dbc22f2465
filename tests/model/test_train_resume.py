"""A run that is killed and continued is the unbroken run, and a checkpoint belongs to one run alone."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgedisp.core.errors import BadInput
from edgedisp.core.stage_folder import file_digest
from edgedisp.dispersion.config import DispersionConfig
from edgedisp.train import checkpoints as saved
from edgedisp.train.techniques import NoisyEmbedding
from edgedisp.train.trainer import Fit, TrainSettings, fit, last_checkpoint

BLOCKS = np.random.default_rng(0).integers(3, 400, (64, 24)).astype(np.uint32)
SETTINGS = TrainSettings(steps=10, lr=1e-3, batch=2, accumulate=2, checkpoint_every=3)


def open_tiny(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


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
    """The whole of a process's life: go on from what is in `run`, die or leave the weights there."""
    torch.set_num_threads(1)
    if kill == "while writing":
        die_while_writing(step)

    def progress(done: int, total: int, note: str) -> None:
        if kill == "between steps" and done == step:
            die()

    found = last_checkpoint(run / "checkpoints")
    with (run / "resumed_from.txt").open("a") as file:
        print(found.name if found else "nothing", file=file)
    model = open_tiny(base)
    done = fit(
        model,
        BLOCKS,
        SETTINGS,
        checkpoints=run / "checkpoints",
        dispersion=DispersionConfig(tokens=8),
        progress=progress,
    )
    model.save_pretrained(run / "model")
    (run / "log.json").write_text(json.dumps(done.log))


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
    killed = -signal.SIGKILL
    assert in_a_process(base, broken, "between steps", 2) == killed  # before any checkpoint
    assert in_a_process(base, broken, "while writing", 6) == killed
    torn = broken / "checkpoints" / "checkpoint-6"
    assert (torn / "optimizer.pt").is_file() and saved.read(torn) is None
    assert in_a_process(base, broken, "between steps", 8) == killed
    assert in_a_process(base, broken) == 0
    resumed = (broken / "resumed_from.txt").read_text().split()
    assert resumed == ["nothing", "nothing", "checkpoint-3", "checkpoint-6"]
    weights = [file_digest(run / "model" / "model.safetensors") for run in (whole, broken)]
    assert weights[0] == weights[1]
    assert weights[0] != file_digest(base / "model.safetensors")
    logs = [json.loads((run / "log.json").read_text()) for run in (whole, broken)]
    assert logs[0] == logs[1] and len(logs[0]) == SETTINGS.steps


def run(folder: Path, checkpoints: Path, **changes: Any) -> tuple[Any, Fit]:
    settings = TrainSettings(**{"steps": 6, "lr": 1e-3, "batch": 4, "checkpoint_every": 2, **changes})
    model = open_tiny(folder)
    return model, fit(model, BLOCKS, settings, checkpoints=checkpoints, dispersion=DispersionConfig(tokens=8))


def test_the_log_of_a_resumed_run_is_that_of_the_whole(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int, note: str) -> None:
        if done == 5:
            raise Killed

    settings = TrainSettings(steps=6, lr=1e-3, batch=4, checkpoint_every=2)
    term = DispersionConfig(tokens=8)
    model = open_tiny(tiny_folder["llama"])
    with pytest.raises(Killed):
        fit(model, BLOCKS, settings, checkpoints=tmp_path / "cut", dispersion=term, progress=kill)
    whole, rows = run(tiny_folder["llama"], tmp_path / "whole")
    resumed, done = run(tiny_folder["llama"], tmp_path / "cut", checkpoint_every=5)  # may differ
    assert done.resumed_from == 4
    assert done.log == rows.log
    assert torch.equal(flat(resumed), flat(whole))


def test_one_whole_checkpoint_is_kept(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    run(tiny_folder["llama"], tmp_path)
    assert [path.name for path in saved.found(tmp_path)] == ["checkpoint-6"]


def test_a_checkpoint_that_is_not_whole_is_passed_over_for_the_one_before(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    run(tiny_folder["llama"], tmp_path, steps=2)
    good = tmp_path / "checkpoint-2"
    for number, spoil in enumerate(("unmarked", "short", "gone"), start=3):
        copy = tmp_path / f"checkpoint-{number}"
        shutil.copytree(good, copy)
        optimizer = copy / "optimizer.pt"
        if spoil == "unmarked":
            (copy / saved.MARKER).rename(copy / saved.CLAIM)
        elif spoil == "short":
            optimizer.write_bytes(optimizer.read_bytes()[:-1])
        else:
            optimizer.unlink()
        assert saved.read(copy) is None
    assert last_checkpoint(tmp_path) == good
    # They would also be taken for the newest ones if they stayed.
    _, done = run(tiny_folder["llama"], tmp_path, steps=2)
    assert done.resumed_from == 2
    assert saved.found(tmp_path) == [good]


STATE: dict[str, Any] = {"rows": [], "watched": [], "skipped_sequences": 0, "run": {}}


def two_checkpoints(folder: Path) -> tuple[Path, Path]:
    """Whole ones, of steps 2 and 4."""
    pair = folder / "checkpoint-2", folder / "checkpoint-4"
    for one in pair:
        one.mkdir()
        (one / "weights").write_bytes(b"1234")
        saved.mark(one, STATE)
    return pair


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "7", '{"sizes": []}', '{"sizes": {}}', b"\xff"]
    + [json.dumps({**STATE, "sizes": {"weights": 4}} | damage) for damage in (
        {"sizes": {}}, {"sizes": {"weights": None}}, {"rows": [5]}, {"watched": None}, {"run": None},
        {"skipped_sequences": "0"},
    )],
)  # fmt: skip
def test_a_checkpoint_with_a_damaged_marker_is_passed_over_for_the_one_before(
    tmp_path: Path, content: str | bytes
) -> None:
    whole, damaged = two_checkpoints(tmp_path)
    assert last_checkpoint(tmp_path) == damaged
    (damaged / saved.MARKER).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert last_checkpoint(tmp_path) == whole
    saved.keep_only(tmp_path, whole)
    assert saved.found(tmp_path) == [whole]


def test_a_checkpoint_of_another_program_is_refused_and_left_alone(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    ours = tmp_path / "elsewhere" / "checkpoint-2"
    saved.begin(ours)
    (ours / "weights").write_bytes(b"1234")
    saved.mark(ours, STATE)
    foreign = tmp_path / "run" / "checkpoint-500"
    for kind in ("folder", "file", "link"):
        shutil.rmtree(foreign.parent, ignore_errors=True)
        foreign.parent.mkdir()
        if kind == "folder":
            foreign.mkdir()
            (foreign / "model.safetensors").write_bytes(b"x")
        elif kind == "file":
            foreign.write_bytes(b"x")
        else:
            foreign.symlink_to(ours)
        with pytest.raises(BadInput, match=r"checkpoint-500: is no checkpoint of edgedisp, .*; move it"):
            run(tiny_folder["llama"], foreign.parent, steps=2)
        saved.keep_only(foreign.parent, None)
        assert [path.name for path in foreign.parent.iterdir()] == ["checkpoint-500"]
        assert kind == "file" or list(foreign.iterdir())
    assert saved.read(ours) is not None


def test_what_a_killed_process_leaves_of_a_checkpoint_is_ours(tmp_path: Path) -> None:
    for step in (2, 4):
        saved.begin(saved.folder_of(tmp_path, step))
    (tmp_path / "checkpoint-4" / "weights").write_bytes(b"12")
    (tmp_path / "checkpoint-6").mkdir()
    saved.check_own(tmp_path)
    saved.keep_only(tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_still_ours_when_its_removal_is_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved.folder_of(tmp_path, 2)
    saved.begin(folder)
    for name in ("a", "b", "c"):
        (folder / name).write_bytes(b"1234")
    saved.mark(folder, STATE)
    removed: list[Path] = []
    unlink = Path.unlink

    def cut_short(self: Path, missing_ok: bool = False) -> None:
        if len(removed) == 2:  # the marker and one more
            raise KeyboardInterrupt
        removed.append(self)
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", cut_short)
    with pytest.raises(KeyboardInterrupt):
        saved.keep_only(tmp_path, None)
    monkeypatch.undo()
    assert removed[0].name == saved.MARKER and len(list(folder.iterdir())) == 3
    assert saved.read(folder) is None
    saved.check_own(tmp_path)


def test_a_copy_under_another_name_is_no_checkpoint_of_the_run(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    run(tiny_folder["llama"], tmp_path, steps=2)
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-1-old")
    assert run(tiny_folder["llama"], tmp_path, steps=2)[1].resumed_from == 2
    assert saved.read(tmp_path / "checkpoint-1-old") is not None


def test_a_folder_half_removed_is_not_taken_for_a_checkpoint(tmp_path: Path) -> None:
    _, new = two_checkpoints(tmp_path)
    assert last_checkpoint(tmp_path) == new
    saved.keep_only(tmp_path, new)
    assert saved.found(tmp_path) == [new]
    (tmp_path / "checkpoint-later").mkdir()
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert last_checkpoint(tmp_path) == new


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("lr", r"differs in lr \(0.001 there, 0.002 here\)"),
        ("seed", r"differs in seed \(0 there, 1 here\)"),
        ("dispersion", r"differs in dispersion \(DispersionConfig\(.*weight=0.1.* there, None here\)"),
        ("tokens", "differs in tokens;"),
        ("weights", "differs in initial weights;"),
        ("frozen", "differs in initial weights;"),
        ("untied", r"differs in initial weights, model.tie_word_embeddings \(True there, None here\)"),
        ("config", r"differs in model.attention_dropout \(0.0 there, 0.5 here\)"),
        ("callbacks", r"differs in callbacks \(\[\] there, \[\('NoisyEmbedding', .*'alpha': 5.0.*\] here\)"),
        ("documents", r"differs in end_of_text \(None there, 7 here\)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    tiny_folder: dict[str, Path], tmp_path: Path, what: str, words: str
) -> None:
    run(tiny_folder["llama"], tmp_path, steps=2)
    model, blocks, options = open_tiny(tiny_folder["llama"]), BLOCKS, dict[str, Any]()
    options["dispersion"] = DispersionConfig(tokens=8)
    changes: dict[str, Any] = {}
    if what in ("lr", "seed"):
        changes = {"lr": 2e-3} if what == "lr" else {"seed": 1}
    elif what == "dispersion":
        options["dispersion"] = None
    elif what == "tokens":
        blocks = BLOCKS.copy()
        blocks[1, 3] += 1
    elif what == "weights":
        with torch.no_grad():
            model.model.norm.weight[0] += 1e-6
    elif what == "frozen":
        model.model.norm.weight.requires_grad_(False)
    elif what == "untied":
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    elif what == "config":
        model.config.attention_dropout = 0.5
    elif what == "callbacks":
        options["callbacks"] = [NoisyEmbedding(5.0, seed=0)]
    else:
        options["end_of_text"] = 7
    settings = TrainSettings(**{"steps": 2, "lr": 1e-3, "batch": 4, "checkpoint_every": 2, **changes})
    with pytest.raises(BadInput, match=f"checkpoint-2: is a checkpoint of another run, which {words}"):
        fit(model, blocks, settings, checkpoints=tmp_path, **options)
    assert last_checkpoint(tmp_path) is not None


def test_where_a_model_was_opened_and_by_which_release_is_no_part_of_its_run(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    settings = TrainSettings(steps=2, lr=1e-3)
    here = open_tiny(tiny_folder["llama"])
    before = saved.run_identity(here, BLOCKS, settings)
    shutil.copytree(tiny_folder["llama"], tmp_path / "copy")
    there = open_tiny(tmp_path / "copy")
    there.config.transformers_version = "5.99"
    there.config.an_option_of_later = False
    assert saved.run_identity(there, BLOCKS, settings) == before
    assert str(tiny_folder["llama"]) not in json.dumps(before)
    here.save_pretrained(tmp_path / "saved")  # as the Trainer does, which writes into the config
    assert saved.run_identity(here, BLOCKS, settings) == before
