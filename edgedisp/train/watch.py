"""Look at the condensation as training goes on, a dozen times in a run, without disturbing it.

The measuring function is handed in (`quick_condensation` over a few fixed blocks),
as this room knows no other. It runs after an optimizer step, in evaluation mode and without gradients, on
random streams that are put back afterwards: the weights of a run are bit-identical with and without it.

What it costs is measured with it: each row has its `seconds`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from edgedisp.train.transformers_trainer import TrainerCallback


class Watch(TrainerCallback):
    """Calls `measure(model)` before the first step, every `every` optimizer steps and after the last one.

    Args:
        measure: model -> `{"cosine_by_layer": [floats], "embedding_variance": float}`, or other JSON-able
            figures.
        every: optimizer steps between two looks, at least 1.

    `rows` collects `{"step": n, **figures, "seconds": s}`; step 0 is the model as it came.
    """

    def __init__(self, measure: Callable[[nn.Module], dict[str, Any]], every: int) -> None:
        if every < 1:
            raise ValueError(f"a watch looks every {every} steps; it needs at least 1")
        self.measure, self.every = measure, every
        self.rows: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0 and not self.rows:
            self._look(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._look(kwargs["model"], state.global_step)
            control.should_log = True

    def to_log(self, step: int) -> dict[str, float]:
        """The figures of this step as flat numbers for a log, empty if there was no look at it."""
        if not self.rows or self.rows[-1]["step"] != step:
            return {}
        logged: dict[str, float] = {}
        for name, value in self.rows[-1].items():
            if isinstance(value, list):
                logged |= {f"{name}/{index:02d}": number for index, number in enumerate(value)}
                logged[f"{name}/mean"] = sum(value) / len(value)
            elif name not in ("step", "seconds"):
                logged[name] = value
        return logged

    def _look(self, model: nn.Module, step: int) -> None:
        started = time.perf_counter()
        with undisturbed(model), torch.no_grad():
            figures = self.measure(model)
        self.rows.append({"step": step, **figures, "seconds": time.perf_counter() - started})


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module's own mode and torch's random streams afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
