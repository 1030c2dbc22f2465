"""Quantization-aware training: every forward and backward pass sees the weights as the bundle will hold them.

Before each optimizer step the weights are replaced by rounded ones; the gradient of those is then applied to
the weights themselves, as if rounding were the identity (the straight-through estimator, Bengio et al. 2013,
arXiv 1308.3432). So the weights settle where rounding costs least. What is rounded is what a bundle
quantizes: the linear maps of the layers, the embedding and the head, a tied one once.

The rounding itself is handed in: it is the code that makes the bundle, on the same grid. Nothing here knows
about grids. The swap happens around a whole step instead of inside the modules, so it costs one rounding per
step whatever the accumulation, and tied weights, gradient checkpointing, the fused head, compiled layers and
data parallelism need no special case.

LoRA: the frozen weight W is replaced by Q(W + s B A) - s B A. The adapter adds s B A itself, so the layer
computes with Q of the merged weight, and A and B get the straight-through gradient.

    start   the share of the run after which rounding begins (0: from the first step)
    ramp    the share of the run over which it fades in: W + share * (Q(W) - W)

Between the steps, in checkpoints and afterwards, the model holds the weights themselves. A rounding that is
chosen for the model as it is when rounding begins (calibrated scales) is made by `begin`, which also may
change the weights; whoever hands it in keeps what it finds, so that a resumed run continues exactly.

Left out: weights that FSDP has divided, and bases that are stored quantized (QLoRA), whose weights cannot be
replaced. Activations are not rounded, though accuracy level 4 rounds them to 8 bits at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgedisp.train.rounded import Rounding, Weight, check_replaceable, weights_of
from edgedisp.train.techniques import Technique


class QuantizationAware(Technique):
    """A callback for any transformers Trainer; the module's docstring says what it does.

    Args:
        body: rounds the linear maps of the layers.
        ends: rounds the embedding and the head.
        grid: names the rounding; a checkpoint of a run with another one is not resumed from.
        start, ramp: shares of the run, at least 0 and together at most 1.
        begin: called with the model before the first rounded step; True: that step was in an earlier process.

    Raises ValueError for other shares, and when training begins for weights that cannot be replaced, or an
    adapter with dropout, which computes with other weights than the merged ones.
    """

    def __init__(
        self,
        body: Rounding,
        ends: Rounding,
        *,
        grid: str,
        start: float = 0.0,
        ramp: float = 0.0,
        begin: Callable[[Any, bool], None] | None = None,
    ) -> None:
        if start < 0 or ramp < 0 or start + ramp > 1:
            raise ValueError(f"start {start} and ramp {ramp} need to be at least 0 and together at most 1")
        self.grid, self.start, self.ramp = grid, start, ramp
        self._body, self._ends, self._begin = body, ends, begin
        self._has_begun = False
        self._resumed_at = 0
        self._weights: list[Weight] = []
        self._masters: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        super().on_train_begin(args, state, control, **known)
        weights = list(weights_of(known["model"], self._body, self._ends))
        for weight in weights:
            check_replaceable(weight)
        self._weights = weights
        self._has_begun, self._resumed_at = False, state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        strength = self.strength(state.global_step / state.max_steps)
        if strength <= 0:
            return
        if not self._has_begun:
            self._has_begun = True
            self._prepare(known["model"], state)
        self.round(strength)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self.restore()

    def strength(self, done: float) -> float:
        """How far weights are moved to their rounded values when the share `done` of the run lies behind."""
        if done < self.start:
            return 0.0
        return min(1.0, (done - self.start) / self.ramp) if self.ramp else 1.0

    def _prepare(self, model: Any, state: Any) -> None:
        if self._begin is None:
            return
        before = max(0, self._resumed_at - 1)  # the last step of the processes before this one
        continued = self._resumed_at > 0 and self.strength(before / state.max_steps) > 0
        training = model.training
        self._begin(getattr(model, "module", model), continued)
        model.train(training)

    @torch.no_grad()
    def round(self, strength: float = 1.0) -> None:
        """Replace the weights by rounded ones."""
        self.restore()
        self._masters = [weight.parameter.data for weight in self._weights]
        for weight in self._weights:
            weight.parameter.data = weight.rounded(strength)

    def restore(self) -> None:
        """Put the weights themselves back, if they were replaced."""
        masters, self._masters = self._masters, []
        for weight, master in zip(self._weights, masters):
            weight.parameter.data = master

    def detach(self) -> None:
        self.restore()
        self._weights = []
