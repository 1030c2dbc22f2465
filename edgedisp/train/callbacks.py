"""NEFTune, embedding dropout, active forgetting, quantization-aware training: callbacks for any Trainer.

Noise and dropout depend on (seed, number of the sequence), a fresh embedding on (seed, step), through
generators of their own: the model's dropout stays what it is without them, a resumed run continues exactly,
and micro-batches or data-parallel processes change nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.optimization import get_scheduler
from transformers.trainer_callback import TrainerCallback

from edgedisp.train.quantized_weights import Rounding, Weight, weights_of


def callbacks_for(techniques: Mapping[str, float], seed: int) -> list[TrainerCallback]:
    """The callbacks of an arm: `neftune` alpha, `embedding_dropout` rate, `active_forgetting` steps."""
    kinds: dict[str, Callable[[Any, int], TrainerCallback]] = {
        "neftune": NoisyEmbedding,
        "embedding_dropout": EmbeddingDropout,
        "active_forgetting": ActiveForgetting,
    }
    return [kinds[name](value, seed) for name, value in techniques.items()]


class TrainingTechnique(TrainerCallback):
    """A callback that changes the model while it trains.

    A Trainer calls no callback when a training ends with an error: `trainer.fit` calls `detach` itself.
    """

    def detach(self) -> None:
        """Take the technique off the model, if a training is running."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()


class _OnEmbedding(TrainingTechnique):
    """Changes the embedding's output in training passes; counts the sequences of the run."""

    def __init__(self, strength: float, seed: int) -> None:
        self.strength, self.seed = strength, seed
        self._first_sequence = 0  # of the next micro-batch of this process
        self._stride = 1  # sequences between two micro-batches of this process
        self._hook: Any = None

    def change(self, row: Tensor, generator: torch.Generator) -> Tensor:
        """The embedding (tokens, features) of one sequence."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._hook = kwargs["model"].get_input_embeddings().register_forward_hook(self._change)

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stride = args.train_batch_size * args.world_size
        micro_batches = state.global_step * args.gradient_accumulation_steps
        self._first_sequence = micro_batches * self._stride + args.process_index * args.train_batch_size

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first_sequence += self._stride

    def _change(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if not (module.training and torch.is_grad_enabled()):
            return None
        names = [(self.seed, type(self).__name__, self._first_sequence + row) for row in range(len(output))]
        return torch.stack(
            [self.change(row, _generator(row.device, name)) for row, name in zip(output, names)]
        )


class NoisyEmbedding(_OnEmbedding):
    """NEFTune (Jain et al., arXiv 2310.05914): uniform noise of at most strength / sqrt(tokens x features) on
    the embedding's output. The paper uses 5, 10 and 15."""

    def change(self, row: Tensor, generator: torch.Generator) -> Tensor:
        bound = self.strength / math.sqrt(row.numel())
        return row + torch.empty_like(row).uniform_(-bound, bound, generator=generator)


class EmbeddingDropout(_OnEmbedding):
    """Each number of the embedding's output is 0 with probability `strength`, the others / (1 - strength)."""

    def change(self, row: Tensor, generator: torch.Generator) -> Tensor:
        keep = 1 - self.strength
        return row * torch.empty_like(row).bernoulli_(keep, generator=generator) / keep


class ActiveForgetting(TrainingTechnique):
    """Draws the token embedding anew every `every` steps, but not after the last (arXiv 2307.01163).

    Its optimizer state is emptied, and each stretch between resets goes through the learning rate schedule. A
    tied head is drawn anew with it. The fresh values are normal with the model's `initializer_range` (0.02
    where it has none) as standard deviation, and zero for a padding token. Raises ValueError when training
    begins, for an embedding that is frozen or divided among processes.
    """

    def __init__(self, every: float, seed: int) -> None:
        self.every, self.seed = int(every), seed
        self._before: Tensor | None = None  # the embedding before the optimizer's step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        weight = kwargs["model"].get_input_embeddings().weight
        if not weight.requires_grad:
            raise ValueError("the embedding is frozen (an adapter?), so it would not learn after a reset")
        if type(weight.data) is not Tensor:
            raise ValueError("the embedding is divided among processes; active forgetting needs it whole")

    def detach(self) -> None:
        self._before = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.every:
            self._before = kwargs["model"].get_input_embeddings().weight.detach().clone()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Scale the embedding's update to its own learning rate: AdamW's update is proportional to the rate,
        weight decay included, so no parameter group of its own is needed."""
        if self._before is None:
            return
        before, self._before = self._before, None
        weight = kwargs["model"].get_input_embeddings().weight
        groups = kwargs["optimizer"].param_groups
        rate = next(group["lr"] for group in groups if any(p is weight for p in group["params"]))
        if rate > 0:
            scale = args.learning_rate * self._schedule(args, state) / rate
            with torch.no_grad():
                weight.copy_(torch.lerp(before, weight, scale))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % self.every == 0 and step < state.max_steps:
            self._forget(kwargs["model"], kwargs["optimizer"], step)

    def _schedule(self, args: Any, state: Any) -> float:
        """The run's schedule as a share of its peak, at the present step of the stretch since the reset."""
        since = state.global_step % self.every
        length = min(self.every, state.max_steps - (state.global_step - since))
        warmup = args.get_warmup_steps(state.max_steps) / state.max_steps
        schedule = get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0),
            num_warmup_steps=round(warmup * length),
            num_training_steps=length,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs or {},
        )
        share: float = schedule.lr_lambdas[0](since)
        return share

    @torch.no_grad()
    def _forget(self, model: Any, optimizer: Any, step: int) -> None:
        """Fresh values, and moments and step count as before a first step."""
        embedding = model.get_input_embeddings()
        # Drawn on the CPU, so that a run on another device starts its stretches alike.
        generator = _generator(torch.device("cpu"), (self.seed, type(self).__name__, step))
        deviation = getattr(model.config, "initializer_range", None) or 0.02
        fresh = torch.empty(embedding.weight.shape).normal_(0, deviation, generator=generator)
        if getattr(embedding, "padding_idx", None) is not None:
            fresh[embedding.padding_idx] = 0
        embedding.weight.copy_(fresh)
        for value in optimizer.state.get(embedding.weight, {}).values():
            if isinstance(value, Tensor):
                value.zero_()


def _generator(device: torch.device, name: tuple[int, str, int]) -> torch.Generator:
    """A stream for each (seed, technique, number); neighbouring numbers have unrelated ones."""
    mixed = hashlib.blake2b(repr(name).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(mixed))


class QuantizationAware(TrainingTechnique):
    """Trains under the rounding of a bundle, with the straight-through estimator (arXiv 1308.3432).

    During each step the weights are replaced by rounded ones, whose gradient is then applied to the weights
    themselves. The swap is around a whole step, so accumulation, tied weights, gradient checkpointing and
    compiled layers need no special case. Under bf16 autocast the products see the rounded weights in bf16.
    Activations are not rounded, though accuracy level 4 rounds them to 8 bits at run time.

    layers, embedding_and_head: round those weights. start: share of the run after which rounding begins.
    begin: called with the model before the first rounded step, which it may change (calibration); True: that
    step was in an earlier process, so its results must be used again.

    Raises ValueError when training begins for weights that cannot be replaced (divided by FSDP, stored
    quantized), or an adapter with dropout, which never computes with the merged weight.
    """

    def __init__(
        self,
        layers: Rounding,
        embedding_and_head: Rounding,
        *,
        start: float = 0.0,
        begin: Callable[[Any, bool], None] | None = None,
    ) -> None:
        self.start = start
        self._roundings, self._begin = (layers, embedding_and_head), begin
        self._has_begun = False
        self._resumed_at = 0
        self._weights: list[Weight] = []
        self._full_precision: list[Tensor] = []  # values of the weights while rounded ones stand in for them

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        weights = list(weights_of(kwargs["model"], *self._roundings))
        for weight in weights:
            weight.check_replaceable()
        self._weights = weights
        self._has_begun, self._resumed_at = False, state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step / state.max_steps < self.start:
            return
        if not self._has_begun and self._begin is not None:
            last, model = self._resumed_at - 1, kwargs["model"]  # last step of the process before this one
            self._begin(getattr(model, "module", model), last >= 0 and last / state.max_steps >= self.start)
        self._has_begun = True
        self._full_precision = [weight.parameter.data for weight in self._weights]
        with torch.no_grad():
            for weight in self._weights:
                weight.parameter.data = weight.rounded()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore()

    def detach(self) -> None:
        self._restore()
        self._weights = []

    def _restore(self) -> None:
        for weight, values in zip(self._weights, self._full_precision):
            weight.parameter.data = values
        self._full_precision = []
