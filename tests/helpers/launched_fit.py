"""Trainings of a tiny model in one process or under torchrun, and their comparison.

    python tests/helpers/launched_fit.py BASE OUT ddp|fsdp

`whole`: unbroken; `broken`: stopped in step 6, after a checkpoint at step 3, and continued, without the
dispersion term; `stopped`: left there. In one process without a launcher it is the run to compare with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

STEPS = 8
needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="no gloo"
)


class Stopped(Exception):
    """Instead of a signal, so that one launch can be stopped and continued."""


def torchrun(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Two processes of one command."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*launch, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)


def launch_trainings(base: Path, out: Path, mode: str) -> None:
    ended = torchrun(Path(__file__), base, out, mode)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Warning" not in ended.stderr and "[transformers]" not in ended.stderr


def log_of(run: Path) -> Any:
    return json.loads((run / "log.json").read_text())


def check_equal(expected: Path, run: Path) -> None:
    """The same log and weights, to float tolerance."""
    from training import flat, open_tiny

    before, after = (log_of(folder)["log"] for folder in (expected, run))
    assert len(before) == len(after) == STEPS
    for name, tolerance in (("loss", 5e-6), ("dispersion", 1e-6), ("grad_norm", 1e-5), ("lr", 0.0)):
        values = [row[name] for row in before]
        assert [row[name] for row in after] == pytest.approx(values, abs=tolerance), name
    weights = [flat(open_tiny(folder / "model")) for folder in (expected, run)]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-6)


def train(base: Path, run: Path, mode: str, *, weight: float | None, stop_after: int | None = None) -> None:
    """Train in this process's share and leave model and log in `run`; Stopped after that step."""
    from training import fit_and_gather, open_tiny

    from edgedisp.core.distributed import is_main_process
    from edgedisp.dispersion.losses import DispersionConfig

    def progress(done: int, total: int, note: str) -> None:
        if done == stop_after:
            raise Stopped

    model = open_tiny(base)
    options = {"steps": STEPS, "batch": 2, "accumulate": 2, "checkpoint_every": 3, "precision": "fp32"}
    options["dispersion"] = None if weight is None else DispersionConfig(tokens=8, weight=weight)
    options["distributed"] = {"fsdp": "full_shard"} if mode == "fsdp" else None
    result, weights = fit_and_gather(model, run / "checkpoints", progress=progress, **options)
    if is_main_process():
        if weights is not None:
            model = open_tiny(base)
            model.load_state_dict(weights)
        model.save_pretrained(run / "model")
        facts = {"chunked": result.chunked_cross_entropy, "resumed_from": result.resumed_from}
        log = {"log": result.log, **facts, "sharded": bool(weights)}
        (run / "log.json").write_text(json.dumps(log))


def main(base: Path, out: Path, mode: str) -> None:
    from edgedisp.train.trainer import leave_processes

    torch.set_num_threads(1)
    if mode == "fsdp":  # accelerate passes FSDP over on CPUs; torch's own works there with gloo
        from accelerate.state import DistributedType, PartialState

        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # type: ignore
    train(base, out / "whole", mode, weight=1.0)
    for run, weight in (("broken", None), ("stopped", 1.0)):
        with pytest.raises(Stopped):
            train(base, out / run, mode, weight=weight, stop_after=5)
    train(base, out / "broken", mode, weight=None)
    leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
