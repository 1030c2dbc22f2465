"""Other ways to train than dispersion, as callbacks for any transformers Trainer.

- `NoisyEmbedding`: NEFTune (Jain et al., arXiv 2310.05914). Uniform noise in [-1, 1] times
  alpha / sqrt(tokens x features) on the embedding's output. The paper uses alpha 5, 10 and 15; the dispersion
  paper's code 1.
- `EmbeddingDropout`: each number of the embedding's output is 0 with probability p, the others are divided by
  1 - p.
- `ActiveForgetting` (Chen et al., arXiv 2307.01163): every K steps the token embedding is drawn anew from the
  distribution it is initialised from, its optimizer state is emptied, and its learning rate goes through the
  schedule once more, while the rest of the model trains on.

Noise and dropout work on what the embedding module returns, so after the factor sqrt(features) that Gemma
puts into that module, and before GPT-2 adds positions. They act in training passes alone.

Random numbers come from generators of these classes' own. Noise and dropout depend on (seed, number of the
sequence), a fresh embedding on (seed, step). So the model's own dropout draws what it draws without them, a
resumed run continues exactly, and micro-batches or data-parallel processes change nothing.

Active forgetting, the choices:
- Reset after step K, 2K, ..., but never after the last step, which would leave noise. The last stretch may be
  shorter than K: the dispersion paper resets once, after 1,000 of 1,526 steps.
- Up to the first reset the run is the baseline's, bit by bit. Chen et al. restart the embedding's learning
  rate from the start of each stretch of K, so the first differs there too; they also let the last stretch
  end in the middle of its schedule, where here each ends its schedule.
- The embedding's own learning rate needs no parameter group of its own (checkpoints stay those of a plain
  run): an AdamW update is proportional to the learning rate, weight decay included, so it is scaled after the
  step.
- A head that is tied to the embedding is one tensor with it and is drawn anew with it, as in both papers. A
  head of its own is left alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edgedisp.train.transformers_trainer import TrainerCallback, get_scheduler


def callbacks_for(techniques: Mapping[str, float], seed: int) -> tuple[TrainerCallback, ...]:
    """The callbacks of an arm: `neftune` alpha, `embedding_dropout` rate, `active_forgetting` steps.

    Raises ValueError for another name, or a value that is out of bounds.
    """
    made: list[TrainerCallback] = []
    for name, value in techniques.items():
        if name == "neftune":
            made.append(NoisyEmbedding(value, seed))
        elif name == "embedding_dropout":
            made.append(EmbeddingDropout(value, seed))
        elif name == "active_forgetting":
            made.append(ActiveForgetting(int(value), seed))
        else:
            raise ValueError(f"{name!r} is not one of neftune, embedding_dropout, active_forgetting")
    return tuple(made)


class Technique(TrainerCallback):
    """A callback that changes the model while it trains.

    A Trainer tells its callbacks nothing when a training ends with an error: `trainer.fit` calls `detach`
    itself, and under other Trainers the next training with the same callback does.
    """

    def detach(self) -> None:
        """Take the technique off the model and forget the training, if there is one."""
        raise NotImplementedError

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self.detach()

    def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self.detach()


class _OnEmbedding(Technique):
    """Changes the embedding's output in training passes; knows the number of each sequence in the run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._first = 0  # number of the first sequence of the step, for this process
        self._stride = 1  # sequences between two micro-batches of this process
        self._micro = 0
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        super().on_train_begin(args, state, control, **known)
        self._hook = known["model"].get_input_embeddings().register_forward_hook(self._change)

    def detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self._stride = args.train_batch_size * args.world_size
        self._first = state.global_step * args.gradient_accumulation_steps * self._stride
        self._first += args.process_index * args.train_batch_size
        self._micro = 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self._micro += 1

    def _change(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        """The hook. Measuring passes (eval mode, or without gradients) are left alone."""
        if not (module.training and torch.is_grad_enabled()):
            return None
        return self.changed(output, self._generators(output))

    def _generators(self, output: Tensor) -> Iterator[torch.Generator]:
        """One for each sequence of the micro-batch."""
        first = self._first + self._micro * self._stride
        for number in range(first, first + len(output)):
            yield _generator(output.device, self.seed, type(self).__name__, number)

    def changed(self, output: Tensor, generators: Iterator[torch.Generator]) -> Tensor:
        """`output` (batch, tokens, features) changed, with one generator for each sequence."""
        raise NotImplementedError


class NoisyEmbedding(_OnEmbedding):
    """NEFTune: noise of at most alpha / sqrt(tokens x features) on each number of the embedding's output.

    Raises ValueError unless alpha is above 0.
    """

    def __init__(self, alpha: float, seed: int) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha}, but needs to be above 0")
        super().__init__(seed)
        self.alpha = alpha

    def changed(self, output: Tensor, generators: Iterator[torch.Generator]) -> Tensor:
        bound = self.alpha / math.sqrt(output.shape[-2] * output.shape[-1])
        noise = torch.empty_like(output, requires_grad=False)
        for row, generator in zip(noise, generators):
            row.uniform_(-bound, bound, generator=generator)
        return output + noise


class EmbeddingDropout(_OnEmbedding):
    """Dropout on the embedding's output, its expectation kept.

    Raises ValueError unless the rate is above 0 and below 1.
    """

    def __init__(self, rate: float, seed: int) -> None:
        if not 0 < rate < 1:
            raise ValueError(f"rate is {rate}, but needs to be above 0 and below 1")
        super().__init__(seed)
        self.rate = rate

    def changed(self, output: Tensor, generators: Iterator[torch.Generator]) -> Tensor:
        kept = torch.empty_like(output, requires_grad=False)
        for row, generator in zip(kept, generators):
            row.bernoulli_(1 - self.rate, generator=generator)
        return output * kept / (1 - self.rate)


class ActiveForgetting(Technique):
    """Draws the token embedding anew every `every` optimizer steps; the module's docstring has the choices.

    The fresh values are normal with the model's `initializer_range` (0.02 where it has none) as standard
    deviation, and zero for a padding token. Raises ValueError unless `every` is at least 1, and, when
    training begins, for an embedding that is frozen or divided among processes.
    """

    def __init__(self, every: int, seed: int) -> None:
        if every < 1:
            raise ValueError(f"every is {every}, but needs to be at least 1 step")
        self.every, self.seed = every, seed
        self._before: Tensor | None = None  # the embedding before the optimizer's step

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        super().on_train_begin(args, state, control, **known)
        weight = _embedding(known["model"])
        if not weight.requires_grad:
            raise ValueError("the embedding is frozen (an adapter?), so it would not learn after a reset")
        if type(weight.data) is not Tensor:
            raise ValueError(
                "the embedding is divided among processes (FSDP); active forgetting needs it whole"
            )

    def detach(self) -> None:
        self._before = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        if state.global_step >= self.every:
            self._before = _embedding(known["model"]).detach().clone()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        if self._before is None:
            return
        before, self._before = self._before, None
        weight = _embedding(known["model"])
        used = next(
            group["lr"]
            for group in known["optimizer"].param_groups
            if any(one is weight for one in group["params"])
        )
        if used > 0:
            wanted = args.learning_rate * self._schedule(args, state)
            with torch.no_grad():
                weight.copy_(torch.lerp(before, weight, wanted / used))

    def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        done = state.global_step
        if done % self.every == 0 and done < state.max_steps:
            self._forget(known["model"], known["optimizer"], done)

    def _schedule(self, args: Any, state: Any) -> float:
        """The run's schedule as a share of its peak, at the present step of the stretch since the reset."""
        since = state.global_step % self.every
        length = min(self.every, state.max_steps - (state.global_step - since))
        warmup = args.get_warmup_steps(state.max_steps) / state.max_steps
        nobody = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = get_scheduler(
            args.lr_scheduler_type,
            nobody,
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
