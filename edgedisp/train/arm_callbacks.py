"""Other ways to train than dispersion, as callbacks for any transformers Trainer.

- `NoisyEmbedding`: NEFTune (Jain et al., arXiv 2310.05914). Uniform noise in [-1, 1] times
  alpha / sqrt(tokens x features) on the embedding's output. The paper uses alpha 5, 10 and 15.
- `EmbeddingDropout`: each number of the embedding's output is 0 with probability p, the others / (1 - p).
- `ActiveForgetting` (Chen et al., arXiv 2307.01163): every K steps the token embedding is drawn anew, its
  optimizer state is emptied, and its learning rate goes through the schedule once more.

Noise and dropout depend on (seed, number of the sequence), a fresh embedding on (seed, step), through
separate generators: the model's dropout stays what it is without them, a resumed run continues exactly, and
micro-batches or data-parallel processes change nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.optimization import get_scheduler
from transformers.trainer_callback import TrainerCallback


def callbacks_for(techniques: Mapping[str, float], seed: int) -> tuple[TrainerCallback, ...]:
    """The callbacks of an arm: `neftune` alpha, `embedding_dropout` rate, `active_forgetting` steps.

    Raises ValueError for another name, or a value that is out of bounds.
    """
    kinds = {
        "neftune": NoisyEmbedding,
        "embedding_dropout": EmbeddingDropout,
        "active_forgetting": ActiveForgetting,
    }
    if unknown := [name for name in techniques if name not in kinds]:
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(kinds)}")
    return tuple(kinds[name](value, seed) for name, value in techniques.items())


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

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._first = 0  # number of the first sequence of the step, for this process
        self._stride = 1  # sequences between two micro-batches of this process
        self._micro_batch = 0
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._hook = kwargs["model"].get_input_embeddings().register_forward_hook(self._change)

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stride = args.train_batch_size * args.world_size
        self._first = state.global_step * args.gradient_accumulation_steps * self._stride
        self._first += args.process_index * args.train_batch_size
        self._micro_batch = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._micro_batch += 1

    def _change(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        if not (module.training and torch.is_grad_enabled()):
            return None
        random, first = torch.empty_like(output, requires_grad=False), self._first
        first += self._micro_batch * self._stride
        for number, row in enumerate(random, start=first):
            self.draw(row, _generator(output.device, self.seed, type(self).__name__, number))
        return self.apply(output, random)

    def draw(self, row: Tensor, generator: torch.Generator) -> None:
        """Fill `row` (tokens, features) with the random numbers of one sequence."""
        raise NotImplementedError

    def apply(self, output: Tensor, random: Tensor) -> Tensor:
        """`output` (batch, tokens, features) changed."""
        raise NotImplementedError


class NoisyEmbedding(_OnEmbedding):
    """NEFTune: noise of at most alpha / sqrt(tokens x features). Raises ValueError for alpha <= 0."""

    def __init__(self, alpha: float, seed: int) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha}, but needs to be above 0")
        super().__init__(seed)
        self.alpha = alpha

    def draw(self, row: Tensor, generator: torch.Generator) -> None:
        bound = self.alpha / math.sqrt(row.numel())
        row.uniform_(-bound, bound, generator=generator)

    def apply(self, output: Tensor, random: Tensor) -> Tensor:
        return output + random


class EmbeddingDropout(_OnEmbedding):
    """Dropout on the embedding's output. Raises ValueError unless the rate is above 0 and below 1."""

    def __init__(self, rate: float, seed: int) -> None:
        if not 0 < rate < 1:
            raise ValueError(f"rate is {rate}, but needs to be above 0 and below 1")
        super().__init__(seed)
        self.rate = rate

    def draw(self, row: Tensor, generator: torch.Generator) -> None:
        row.bernoulli_(1 - self.rate, generator=generator)

    def apply(self, output: Tensor, random: Tensor) -> Tensor:
        return output * random / (1 - self.rate)


class ActiveForgetting(TrainingTechnique):
    """Draws the token embedding anew every `every` optimizer steps, but never after the last one.

    Each stretch between resets goes through the learning rate schedule. A tied head is drawn anew with the
    embedding. The fresh values are normal with the model's `initializer_range` (0.02 where it has none) as
    standard deviation, and zero for a padding token. Raises ValueError unless `every` is at least 1, and,
    when training begins, for an embedding that is frozen or divided among processes.
    """

    def __init__(self, every: float, seed: int) -> None:
        if every < 1:
            raise ValueError(f"every is {every}, but needs to be at least 1 step")
        self.every, self.seed = int(every), seed
        self._before: Tensor | None = None  # the embedding before the optimizer's step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        weight = _embedding(kwargs["model"])
        if not weight.requires_grad:
            raise ValueError("the embedding is frozen (an adapter?), so it would not learn after a reset")
        if type(weight.data) is not Tensor:
            raise ValueError("the embedding is divided among processes; active forgetting needs it whole")

    def detach(self) -> None:
        self._before = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.every:
            self._before = _embedding(kwargs["model"]).detach().clone()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Scale the embedding's update to its own learning rate: AdamW's update is proportional to the rate,
        weight decay included, so no parameter group of its own is needed."""
        if self._before is None:
            return
        before, self._before = self._before, None
        weight = _embedding(kwargs["model"])
        groups = kwargs["optimizer"].param_groups
        used = next(group["lr"] for group in groups if any(p is weight for p in group["params"]))
        if used > 0:
            scale = args.learning_rate * self._schedule(args, state) / used
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

    def _forget(self, model: Any, optimizer: Any, step: int) -> None:
        """Fresh values, and moments and step count as before a first step."""
        embedding = model.get_input_embeddings()
        weight = embedding.weight
        # Drawn on the CPU, so that a run on another device starts its stretches alike.
        generator = _generator(torch.device("cpu"), self.seed, type(self).__name__, step)
        deviation = getattr(model.config, "initializer_range", None) or 0.02
        fresh = torch.empty(weight.shape).normal_(0, deviation, generator=generator)
        if getattr(embedding, "padding_idx", None) is not None:
            fresh[embedding.padding_idx] = 0
        with torch.no_grad():
            weight.copy_(fresh)
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor):
                value.zero_()


def _embedding(model: Any) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight
    return weight


def _generator(device: torch.device, seed: int, kind: str, number: int) -> torch.Generator:
    """A stream for each (seed, kind, number); neighbouring numbers have unrelated ones."""
    mixed = hashlib.blake2b(repr((seed, kind, number)).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(mixed))
