"""FSDP, and builds under torchrun: real processes, which talk through gloo."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from launched_fit import check_equal, launch_trainings, log_of, main, needs_gloo, torchrun, train
from tiny_build import write_recipe

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.pipeline.stage import Stage, follow

SETTINGS = (
    "train.precision=fp32", "precisions=[fp32]", "targets=[]", "evaluate.tasks=[heldout_perplexity]",
)  # fmt: skip


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


def test_a_process_that_waits_ends_when_its_launcher_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getppid", itertools.count().__next__)
    with pytest.raises(BuildFailed, match=r"the launcher ended while .*base was waited for"):
        follow([Stage("base", "a module:a function", 1, {}, every_process=True)], tmp_path)


@needs_gloo
def test_two_processes_make_one_run(text_file: Path, tiny_folder: dict[str, Path], edgedisp) -> None:  # type: ignore[no-untyped-def]
    folder = text_file.parent
    words: list[str | Path] = ["build", write_recipe(folder, tiny_folder["llama"], text_file.name)]
    words += [word for setting in SETTINGS for word in ("--set", setting)]
    runs = folder / "alone", folder / "run"
    assert edgedisp(*words, "--out", runs[0]).code == 0
    ended = torchrun("-m", "edgedisp", *words, "--out", runs[1])
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.splitlines()[-1] == f"report: {runs[1] / 'report.html'}"
    assert ended.stderr.count("baseline/model: done") == 1 and "Warning" not in ended.stderr
    names = [{path.relative_to(run) for path in run.rglob("*")} for run in runs]
    assert names[0] == names[1] and not any(path.suffix == ".partial" for path in names[1])
    records = [
        json.loads((run / "dispersed" / "model" / "record.json").read_text())["results"] for run in runs
    ]
    assert [record["processes"] for record in records] == [1, 2]
    for before, after in zip(*(record["log"] for record in records), strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
        assert after["dispersion"] == pytest.approx(before["dispersion"], abs=1e-5)


@needs_gloo
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("batch: 4", "bach: 4"), "tiny.yaml:8: train.bach: unknown key; did you mean 'batch'?"),
        (("batch: 4", "batch: 5"), "2 processes cannot share a step of train.batch 5 x train.accumulate 1"),
        (("lr: 1e-3", "lr: 1e-3, distributed: {fsdp: full_shard}"), "train.distributed: FSDP needs GPUs"),
    ],
)
def test_a_mistake_ends_all_with_one_message_and_nothing_written(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    if "GPUs" in message and torch.cuda.is_available():
        pytest.skip("there are GPUs")
    recipe = write_recipe(tmp_path, "nowhere", "text.jsonl")
    recipe.write_text(recipe.read_text().replace(*change))
    ended = torchrun("-m", "edgedisp", "build", recipe, "--out", tmp_path / "run")
    assert ended.returncode == 1  # torchrun's own, whatever its processes end with
    assert "exitcode  : 2 " in ended.stderr
    messages = [line for line in ended.stderr.splitlines() if line.startswith("edgedisp:")]
    assert len(messages) == 1 and message in messages[0] and ended.stdout == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.yaml"]
