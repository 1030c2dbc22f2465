"""Trainings of tiny models: one call of `fit` with the defaults that the tests share."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM
from transformers.trainer_callback import TrainerCallback

from edgedisp.core.progress import Progress, silent
from edgedisp.core.results import Training
from edgedisp.recipe import Train
from edgedisp.train.trainer import FitOptions, fit

BLOCKS = np.random.default_rng(0).integers(3, 400, (64, 24)).astype(np.uint32)
OPTIONS = {field.name for field in fields(FitOptions)}


def open_tiny(folder: Path, **changes: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def fit_tiny(model: Any, output_dir: Path, **changes: Any) -> Training:
    return fit_and_gather(model, output_dir, **changes)[0]


def fit_and_gather(
    model: Any, output_dir: Path, *, blocks: np.ndarray = BLOCKS, progress: Progress = silent, **changes: Any
) -> tuple[Training, dict[str, torch.Tensor] | None]:
    """`fit` with options and keys of `train` mixed: 6 steps of 4 sequences in bf16 unless told otherwise."""
    values = {"steps": 6, "seed": 0, "tokens": 1, "lr": 1e-3, "batch": 4, "precision": "bf16", **changes}
    options = FitOptions(output_dir=output_dir, **{name: values.pop(name) for name in OPTIONS & set(values)})
    return fit(model, blocks, Train(**values), options, progress)


class Interrupt(TrainerCallback):
    """Ends a training with KeyboardInterrupt in the middle of a step, counted from 0."""

    def __init__(self, step: int = 0) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Gradients(TrainerCallback):
    """The gradient that every optimizer step uses, as one vector."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parameters = kwargs["model"].parameters()
        self.seen.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
