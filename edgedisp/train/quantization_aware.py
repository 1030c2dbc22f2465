"""Quantization-aware training: the steps see the weights as the bundle will store them.

Before each step the weights are replaced by rounded ones, and the gradient of those is applied to the weights
themselves (the straight-through estimator, Bengio et al. 2013, arXiv 1308.3432). The swap happens around a
whole step, so accumulation, tied weights, gradient checkpointing and compiled layers need no special case.
Under bf16 autocast the products see the rounded weights in bf16. Activations are not rounded, though accuracy
level 4 rounds them to 8 bits at run time.

LoRA: the frozen weight W is replaced by Q(W + s B A) - s B A. The adapter adds s B A itself, so the layer
computes with Q of the merged weight, and A and B get the straight-through gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgedisp.train.arm_callbacks import TrainingTechnique
from edgedisp.train.quantized_weights import Rounding, Weight, weights_of


class QuantizationAware(TrainingTechnique):
    """A callback for any transformers Trainer.

    Args:
        body: rounds the linear maps of the layers.
        ends: rounds the embedding and the head.
        start: share of the run, from 0 to 1, after which rounding begins.
        begin: called with the model before the first rounded step, which it may change (calibration); True:
            that step was in an earlier process, so its results must be used again.

    Raises ValueError for another share, and when training begins for weights that cannot be replaced (divided
    by FSDP, stored quantized), or an adapter with dropout, which never computes with the merged weight.
    """

    def __init__(
        self,
        body: Rounding,
        ends: Rounding,
        *,
        start: float = 0.0,
        begin: Callable[[Any, bool], None] | None = None,
    ) -> None:
        if not 0 <= start <= 1:
            raise ValueError(f"start is {start}, but needs to be from 0 to 1")
        self.start = start
        self._body, self._ends, self._begin = body, ends, begin
        self._has_begun = False
        self._resumed_at = 0
        self._weights: list[Weight] = []
        self._masters: list[Tensor] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        weights = list(weights_of(kwargs["model"], self._body, self._ends))
        for weight in weights:
            _check_replaceable(weight)
        self._weights = weights
        self._has_begun, self._resumed_at = False, state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step / state.max_steps < self.start:
            return
        if not self._has_begun:
            self._has_begun = True
            self._prepare(kwargs["model"], state)
        self.round()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.restore()

    def _prepare(self, model: Any, state: Any) -> None:
        if self._begin is None:
            return
        last = self._resumed_at - 1  # step of the processes before this one
        continued = last >= 0 and last / state.max_steps >= self.start
        training = model.training
        self._begin(getattr(model, "module", model), continued)
        model.train(training)

    @torch.no_grad()
    def round(self) -> None:
        """Replace the weights by rounded ones."""
        self.restore()
        self._masters = [weight.parameter.data for weight in self._weights]
        for weight in self._weights:
            weight.parameter.data = weight.rounded()

    def restore(self) -> None:
        """Put the weights themselves back, if they were replaced."""
        masters, self._masters = self._masters, []
        for weight, master in zip(self._weights, masters):
            weight.parameter.data = master

    def detach(self) -> None:
        self.restore()
        self._weights = []


def _check_replaceable(weight: Weight) -> None:
    parameter, name = weight.parameter, weight.name
    if type(parameter.data) is not Tensor:
        raise ValueError(f"{name} is divided among processes (FSDP); rounding in training needs it whole")
    if parameter.dtype != torch.float32:
        raise ValueError(f"{name} is stored as {parameter.dtype}; rounding in training needs float32")
    dropouts = [] if weight.adapter is None else weight.adapter.lora_dropout.values()
    if any(getattr(dropout, "p", 0) for dropout in dropouts):
        raise ValueError("the adapter has dropout, so no step computes with the merged weight")
