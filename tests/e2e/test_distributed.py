"""Several processes, one training: who takes what of a step, and data parallelism under torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from launched_fit import check_equal, launch_trainings, log_of, main, needs_gloo, train
from torch.utils.data import BatchSampler, SequentialSampler

from edgedisp.core.distributed import get_world_size, is_main_process, split
from edgedisp.core.errors import BadInput
from edgedisp.train.trainer import newest_checkpoint


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # a cluster's own variables
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert (get_world_size(), is_main_process()) == (1, True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (get_world_size(), is_main_process()) == (4, False)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(BadInput, match="WORLD_SIZE=many: not a number"):
        get_world_size()


small = st.integers(1, 12)


@given(small, small, small, st.integers(1, 3))
def test_each_step_reads_the_blocks_of_a_single_process_and_numbers_them_so(
    batch: int, accumulate: int, count: int, steps: int
) -> None:
    """accelerate deals out the batches; numbers as in dispersion_trainer.py and callbacks.py."""
    step = batch * accumulate
    if step % count:
        with pytest.raises(BadInput, match=rf"^{count} processes .*; set train.accumulate to a multiple of"):
            split(batch, accumulate, count)
        return
    share, micro_batches = split(batch, accumulate, count)
    assert share * micro_batches * count == step
    assert share == batch or micro_batches == 1 or accumulate % count  # micro-batches are dealt first
    sampler = BatchSampler(SequentialSampler(range(steps * step)), share, drop_last=False)
    for index in range(count):
        shard = list(BatchSamplerShard(sampler, count, index, split_batches=False, even_batches=True))
        assert len(shard) == steps * micro_batches
        for micro, blocks in enumerate(shard):
            first = (micro * count + index) * share
            assert blocks == list(range(first, first + share))
            assert first // step == blocks[-1] // step == micro // micro_batches


@needs_gloo
def test_data_parallel_training_is_that_of_one_process(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    """Sampled tokens (8 of 24), both terms, two trainings in a row, stopped and continued."""
    base, threads = tiny_folder["llama"], torch.get_num_threads()
    main(base, tmp_path / "alone", "ddp")
    torch.set_num_threads(threads)
    launch_trainings(base, tmp_path, "ddp")
    check_equal(tmp_path / "alone" / "whole", tmp_path / "whole")
    check_equal(tmp_path / "alone" / "broken", tmp_path / "broken")
    assert log_of(tmp_path / "broken")["resumed_from"] == 3 and log_of(tmp_path / "whole")["chunked"]
    # A checkpoint of two processes, continued by one; its streams of random numbers are two.
    newest = newest_checkpoint(tmp_path / "stopped" / "checkpoints")
    assert newest is not None
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in newest.iterdir()}
    train(base, tmp_path / "stopped", "ddp", weight=1.0)
    assert log_of(tmp_path / "stopped")["resumed_from"] == 3
    check_equal(tmp_path / "alone" / "whole", tmp_path / "stopped")
