"""FSDP, and builds under torchrun: real processes, which talk through gloo."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launched_fit import check_equal, launch_trainings, log_of, main, needs_gloo, torchrun, train

from edgedisp.cli import main as build_alone
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.recipe import Recipe


@needs_gloo
def test_a_divided_model_trains_like_a_whole_one_and_comes_back_whole(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    base, threads = tiny_folder["llama"], torch.get_num_threads()
    main(base, tmp_path / "alone", "ddp")
    torch.set_num_threads(threads)
    launch_trainings(base, tmp_path, "fsdp")
    for run in ("whole", "broken"):
        check_equal(tmp_path / "alone" / run, tmp_path / run)
    facts = log_of(tmp_path / "broken")
    assert facts["resumed_from"] == 3 and facts["sharded"] and facts["chunked"]
    with pytest.raises(BadInput, match="cannot be continued from FSDP to DDP"):
        train(base, tmp_path / "stopped", "ddp", weight=1.0)


def test_a_process_that_waits_ends_when_its_launcher_is_gone(tmp_path: Path) -> None:
    from edgedisp.pipeline.stage import _wait

    with pytest.raises(BuildFailed, match=r"the launcher ended while .*base was waited for"):
        _wait(tmp_path / "base", {}, launcher=os.getppid() + 1)


def test_fsdp_is_refused_where_it_cannot_divide() -> None:
    plain: dict[str, Any] = {
        "name": "x",
        "model": {"base": "x/y", "architecture": "llama"},
        "data": {"train": [{"source": "t.jsonl"}], "context": 64},
        "train": {"tokens": 10_000, "lr": 1e-3, "distributed": {"fsdp": "full_shard"}},
    }
    assert Recipe.model_validate(plain).train.distributed is not None
    with pytest.raises(ValueError, match="FSDP cannot divide a quantized base"):
        Recipe.model_validate({**plain, "train": {**plain["train"], "adapter": {"kind": "qlora"}}})
    with pytest.raises(ValueError, match="active_forgetting draws all of it anew"):
        Recipe.model_validate({**plain, "arms": ["baseline", {"name": "forget", "active_forgetting": 5}]})


RECIPE = """\
name: tiny
seed: 1
model: {{base: {base}, architecture: llama}}
data: {{train: [{{source: text.jsonl}}], heldout: 20%, context: 64}}
train: {{tokens: 2k, lr: 1e-3, batch: 4, precision: fp32, dispersion: {{tokens: 16}}}}
precisions: [fp32]
evaluate: {{tasks: [heldout_perplexity], limit: 6}}
latency: {{prompt: 8, generate: 4, repetitions: 1, threads: 1}}
"""


@needs_gloo
def test_two_processes_make_one_run(
    text_file: Path, tiny_folder: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = text_file.parent
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(base=tiny_folder["llama"]))
    words = ["build", str(path), "--smoke", "--out"]
    monkeypatch.setattr(sys, "argv", ["edgedisp", *words, str(folder / "alone")])
    build_alone()
    ended = torchrun("-m", "edgedisp", *words, folder / "run")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.splitlines()[-1] == f"report: {folder / 'run' / 'report.html'}"
    assert ended.stderr.count("baseline/model: done") == 1 and "Warning" not in ended.stderr
    assert not list((folder / "run").rglob("*.partial"))
    files = [
        {p.relative_to(run).as_posix() for p in run.rglob("*")} for run in (folder / "alone", folder / "run")
    ]
    assert files[0] == files[1]
    records = [
        json.loads((folder / run / "dispersed" / "model" / "record.json").read_text())["results"]
        for run in ("alone", "run")
    ]
    assert [record["processes"] for record in records] == [1, 2]
    for before, after in zip(*(record["log"] for record in records), strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
        assert after["dispersion"] == pytest.approx(before["dispersion"], abs=1e-5)


@needs_gloo
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("batch: 4", "bach: 4"), "tiny.yaml:5: train.bach: unknown key; did you mean 'batch'?"),
        (("batch: 4", "batch: 5"), "2 processes cannot share a step of train.batch 5 x train.accumulate 1"),
        (("precision: fp32", "distributed: {fsdp: full_shard}"), "train.distributed: FSDP needs GPUs"),
    ],
)
def test_a_mistake_ends_all_with_one_message_and_nothing_written(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    if "GPUs" in message and torch.cuda.is_available():
        pytest.skip("there are GPUs")
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(base="nowhere").replace(*change))
    ended = torchrun("-m", "edgedisp", "build", path, "--out", tmp_path / "run")
    assert ended.returncode == 1  # torchrun's own, whatever its processes end with
    assert "exitcode  : 2 " in ended.stderr
    messages = [line for line in ended.stderr.splitlines() if line.startswith("edgedisp:")]
    assert len(messages) == 1 and message in messages[0] and ended.stdout == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.yaml"]
