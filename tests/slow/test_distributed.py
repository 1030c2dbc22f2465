"""Several processes, one result: torchrun starts real ones, which talk through gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import assume, given
from hypothesis import strategies as st
from launched_fit import CHANGES, main, open_base, train
from torch.utils.data import BatchSampler, SequentialSampler

from edgedisp.cli import main as build_alone
from edgedisp.core.distributed import Place, place, split
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.recipe import Recipe
from edgedisp.train.checkpoints import newest

HERE = Path(__file__).resolve().parents[1] / "helpers"
needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="no gloo"
)


def torchrun(*words: str | Path, count: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=240,
    )


# --- who is who, and who takes what ---


def test_without_a_launcher_there_is_one_process() -> None:
    assert place({}) == Place(0, 1) and place({}).leads
    assert place({"WORLD_SIZE": "4", "RANK": "3"}) == Place(0, 1)  # a cluster's own variables
    found = place({"LOCAL_RANK": "1", "RANK": "3", "WORLD_SIZE": "4"})
    assert found == Place(3, 4) and not found.leads
    with pytest.raises(BadInput, match="WORLD_SIZE=many: not numbers"):
        place({"LOCAL_RANK": "0", "WORLD_SIZE": "many"})


small = st.integers(1, 12)


@given(small, small, small)
def test_the_processes_together_take_the_same_step(batch: int, accumulate: int, count: int) -> None:
    try:
        own_batch, own_accumulate = split(batch, accumulate, count)
    except BadInput:
        assert (batch * accumulate) % count
        return
    assert own_batch * own_accumulate * count == batch * accumulate
    assert own_batch == batch or own_accumulate == 1 or accumulate % count  # micro-batches are dealt first


@given(small, small, small, st.integers(1, 3))
def test_each_step_reads_the_blocks_of_a_single_process_and_numbers_them_so(
    batch: int, accumulate: int, count: int, steps: int
) -> None:
    """accelerate deals out the batches; the numbers are those that mixin.py and techniques.py compute."""
    try:
        own_batch, own_accumulate = split(batch, accumulate, count)
    except BadInput:
        assume(False)
    step = batch * accumulate
    sampler = BatchSampler(SequentialSampler(range(steps * step)), own_batch, drop_last=False)
    for index in range(count):
        shard = list(BatchSamplerShard(sampler, count, index, split_batches=False, even_batches=True))
        assert len(shard) == steps * own_accumulate
        for micro, blocks in enumerate(shard):
            first = (micro * count + index) * own_batch
            assert blocks == list(range(first, first + own_batch))
            assert first // step == blocks[-1] // step == micro // own_accumulate


def test_a_number_of_processes_that_does_not_fit_is_refused_with_those_that_do() -> None:
    assert split(4, 8, 8) == (4, 1) and split(1, 32, 8) == (1, 4) and split(4, 1, 2) == (2, 1)
    assert split(4, 2, 8) == (1, 1)
    with pytest.raises(BadInput, match=r"^3 processes .*batch 4 x train.accumulate 1; start 1, 2 or 4 pro"):
        split(4, 1, 3)


# --- training ---


def log_of(run: Path) -> Any:
    return json.loads((run / "log.json").read_text())


def check_equal(one: Path, other: Path, weights: float) -> None:
    logs = [log_of(run)["log"] for run in (one, other)]
    assert len(logs[0]) == len(logs[1]) == CHANGES["steps"]
    for name, tolerance in (("loss", 5e-6), ("dispersion", 1e-6), ("grad_norm", 1e-5), ("lr", 0.0)):
        for before, after in zip(*logs):
            assert after[name] == pytest.approx(before[name], abs=tolerance), (name, before["step"])
    models = [open_base(run / "model") for run in (one, other)]
    for left, right in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(left, right, rtol=0, atol=weights)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_folder: dict[str, Path]) -> Path:
    """The same trainings in this one process."""
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("alone")
    main(tiny_folder["llama"], out, "ddp")
    torch.set_num_threads(threads)
    return out


def launched(base: Path, out: Path, mode: str) -> None:
    done = torchrun(HERE / "launched_fit.py", base, out, mode)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr and "[transformers]" not in done.stderr


@needs_gloo
def test_data_parallel_training_is_that_of_one_process(
    tiny_folder: dict[str, Path], tmp_path: Path, alone: Path
) -> None:
    """Sampled tokens (8 of 24), both terms, two trainings in a row, stopped and continued."""
    base = tiny_folder["llama"]
    launched(base, tmp_path, "ddp")
    check_equal(alone / "whole", tmp_path / "whole", 1e-6)
    check_equal(alone / "broken", tmp_path / "broken", 1e-6)
    assert log_of(tmp_path / "broken")["resumed_from"] == 3 and log_of(tmp_path / "whole")["fused"]
    # A checkpoint of two processes, continued by one; its streams of random numbers are two.
    found = newest(tmp_path / "stopped" / "checkpoints")
    assert found is not None and {"rng_state_0.pth", "rng_state_1.pth"} <= {
        path.name for path in found.folder.iterdir()
    }
    train(base, tmp_path / "stopped", "ddp", weight=1.0)
    assert log_of(tmp_path / "stopped")["resumed_from"] == 3
    check_equal(alone / "whole", tmp_path / "stopped", 1e-6)


@needs_gloo
def test_a_divided_model_trains_like_a_whole_one_and_comes_back_whole(
    tiny_folder: dict[str, Path], tmp_path: Path, alone: Path
) -> None:
    launched(tiny_folder["llama"], tmp_path, "fsdp")
    check_equal(alone / "whole", tmp_path / "whole", 1e-6)
    check_equal(alone / "broken", tmp_path / "broken", 1e-6)
    facts = log_of(tmp_path / "broken")
    assert facts["resumed_from"] == 3 and facts["divided"] and facts["fused"]
    with pytest.raises(BadInput, match=r"another run, which differs in weights \('divided \(FSDP\)' there"):
        train(tiny_folder["llama"], tmp_path / "stopped", "ddp", weight=1.0)
    assert newest(tmp_path / "stopped" / "checkpoints") is not None


def test_training_divided_for_another_number_of_processes_is_refused(tiny_folder: dict[str, Path]) -> None:
    from edgedisp.train.distributed import Sharding, Share, check_divided

    class Passed:
        is_fsdp_enabled = False

    with pytest.raises(ValueError, match="does not divide a model"):
        check_divided(Passed(), Share(2, 1, 1, Sharding()))  # type: ignore[arg-type]
    assert Share(1, 1, 1, Sharding()).arguments() == Share(1, 1, 1).arguments()  # one process ignores it


def test_a_process_that_waits_ends_when_its_launcher_is_gone(tmp_path: Path) -> None:
    from edgedisp.follow import _wait

    with pytest.raises(BuildFailed, match=r"the launcher ended while .*base was waited for"):
        _wait(tmp_path / "base", {}, launcher=os.getppid() + 1)


# --- recipes ---

PLAIN = {
    "name": "x",
    "model": {"base": "x/y", "architecture": "llama"},
    "data": {"train": [{"source": "t.jsonl"}], "context": 64},
}


def recipe(arms: list[Any] | None = None, **train_keys: Any) -> Recipe:
    made = {
        **PLAIN,
        "train": {"tokens": 10_000, "lr": 1e-3, "distributed": {"fsdp": "full_shard"}, **train_keys},
    }
    return Recipe.model_validate({**made, "arms": arms} if arms else made)


def test_fsdp_is_refused_where_it_cannot_divide() -> None:
    assert recipe().train.distributed is not None
    with pytest.raises(ValueError, match="FSDP cannot divide a quantized base"):
        recipe(adapter={"kind": "qlora"})
    with pytest.raises(ValueError, match="active_forgetting draws all of it anew"):
        recipe(arms=["baseline", {"name": "forget", "active_forgetting": 5}])


# --- builds ---

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


def shape(value: Any) -> Any:
    """The keys of a JSON value, and the kinds of what they hold."""
    if isinstance(value, Mapping):
        return {key: shape(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [shape(item) for item in value[:1]]
    return (
        "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
    )


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
    done = torchrun("-m", "edgedisp", *words, folder / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"report: {folder / 'run' / 'report.html'}"
    assert done.stderr.count("baseline/model: done") == 1 and "Warning" not in done.stderr
    assert not list((folder / "run").rglob("*.partial"))
    files = [
        {p.relative_to(run).as_posix() for p in run.rglob("*")} for run in (folder / "alone", folder / "run")
    ]
    assert files[0] == files[1]
    reports = [json.loads((folder / run / "report.json").read_text()) for run in ("alone", "run")]
    assert shape(reports[0]) == shape(reports[1])
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
    done = torchrun("-m", "edgedisp", "build", path, "--out", tmp_path / "run")
    assert done.returncode == 1  # torchrun's own, whatever its processes end with
    assert "exitcode  : 2 " in done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("edgedisp:")]
    assert len(said) == 1 and message in said[0] and done.stdout == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.yaml"]
