"""What torchrun starts in test_distributed.py: trainings of a tiny model, one after another in one process.

    python tests/launched_fit.py BASE OUT ddp|fsdp

`whole`: unbroken; `broken`: stopped in step 6, after a checkpoint at step 3, and continued, without the
dispersion term; `stopped`: left there. In one process without a launcher it is the run to compare with.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

BLOCKS = np.random.default_rng(0).integers(3, 400, (64, 24)).astype(np.uint32)
CHANGES: dict[str, Any] = {"batch": 2, "accumulate": 2, "steps": 8, "checkpoint_every": 3}


class Stopped(Exception):
    """Instead of a signal, so that one launch can be stopped and continued."""


def call_the_processes_gpus() -> None:
    """accelerate passes FSDP over on CPUs; torch's own works there with gloo."""
    from accelerate.state import DistributedType, PartialState

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # type: ignore


def open_base(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def train(base: Path, run: Path, mode: str, *, weight: float | None, stop_after: int | None = None) -> Any:
    """Train in this process's share and leave model and log in `run`; Stopped after that step."""
    from edgedisp.core.distributed import place, split
    from edgedisp.dispersion.config import DispersionConfig
    from edgedisp.train import distributed
    from edgedisp.train.trainer import TrainSettings, fit

    def progress(done: int, total: int, note: str) -> None:
        if done == stop_after:
            raise Stopped

    settings = TrainSettings(lr=1e-3, precision="fp32", **CHANGES)
    count = place().count
    sharding = distributed.Sharding() if mode == "fsdp" else None
    model = open_base(base)
    done = fit(
        model,
        BLOCKS,
        settings,
        checkpoints=run / "checkpoints",
        dispersion=None if weight is None else DispersionConfig(tokens=8, weight=weight),
        share=distributed.Share(count, *split(settings.batch, settings.accumulate, count), sharding),
        progress=progress,
    )
    if distributed.leads():
        if done.weights is not None:
            model = open_base(base)
            model.load_state_dict(done.weights)
        model.save_pretrained(run / "model")
        facts = {"fused": done.fused_head, "resumed_from": done.resumed_from, "divided": bool(done.weights)}
        (run / "log.json").write_text(json.dumps({"log": done.log, **facts}))
    return model


def main(base: Path, out: Path, mode: str) -> None:
    torch.set_num_threads(1)
    if mode == "fsdp":
        call_the_processes_gpus()
    train(base, out / "whole", mode, weight=1.0)
    for run, weight in (("broken", None), ("stopped", 1.0)):
        try:
            train(base, out / run, mode, weight=weight, stop_after=5)
        except Stopped:
            continue
        raise SystemExit("was not stopped")
    train(base, out / "broken", mode, weight=None)
    from edgedisp.train.distributed import leave

    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
