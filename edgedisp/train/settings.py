"""What a training run is told, and what it leaves behind."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class TrainSettings:
    """The optimisation of one arm; both arms of a twin get the same one. Fields as in a recipe's `train`.

    `fused_head` computes the cross-entropy without keeping the logits (fused_head.py), where the model
    allows it. `compile` runs the transformer layers compiled (compiled.py).
    """

    steps: int
    lr: float
    batch: int = 4
    accumulate: int = 1
    warmup: float = 0.1
    schedule: str = "cosine"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    precision: str = "bf16"
    gradient_checkpointing: bool = False
    checkpoint_every: int | None = None
    seed: int = 0
    fused_head: bool = True
    compile: bool = False

    @property
    def save_steps(self) -> int:
        """Optimizer steps between checkpoints: about four in a run, and at least ten steps apart."""
        return self.checkpoint_every or max(10, math.ceil(self.steps / 5))


@dataclass
class Fit:
    """What a training run leaves behind.

    `log` has a row per optimizer step (`step`, `loss` = cross-entropy in nats per token, `dispersion`, `lr`,
    `grad_norm`), `watched` one per look at the condensation (watch.py). `skipped_sequences` counts
    sequences too short for the dispersion loss, `fused_head` says whether the logits were spared. `weights`
    is None where the model given holds them; one that FSDP has divided does not, and they are here: in the
    leading process, on the CPU, as a state dict.
    """

    log: list[dict[str, float | int | None]]
    seconds: float
    tokens: int
    resumed_from: int
    peak_memory_bytes: int
    watched: list[dict[str, Any]] = field(default_factory=list)
    skipped_sequences: int = 0
    fused_head: bool = False
    weights: dict[str, Tensor] | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Of this process: steps done before a resume are not counted."""
        new = self.tokens * (1 - self.resumed_from / len(self.log)) if self.log else 0
        return new / self.seconds if self.seconds and new else None

    @property
    def watch_seconds(self) -> float:
        """Seconds of the whole run spent looking at the condensation; part of `seconds` unless resumed."""
        return math.fsum(row["seconds"] for row in self.watched)
