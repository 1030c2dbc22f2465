"""NEFTune, embedding dropout, active forgetting, quantization-aware training: callbacks for any Trainer.

Random numbers depend on (seed, number of the sequence or step), through generators of their own: the model's
dropout stays what it is, a resumed run continues exactly, and data-parallel processes change nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback

from edgedisp.train.quantized_weights import Rounding, Weight, weights_of


class _OnEmbedding(TrainerCallback):
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
        self.on_train_end(args, state, control)
        self._hook = kwargs["model"].get_input_embeddings().register_forward_hook(self._change)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()

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


class ActiveForgetting(TrainerCallback):
    """Draws the token embedding anew every `every` steps, but not after the last (arXiv 2307.01163).

    Its optimizer state is emptied, and each stretch between resets goes through the whole schedule of the
    learning rate. The fresh values are normal with the model's `initializer_range` (0.02 where it has none),
    and zero for a padding token. The embedding has to be whole and trainable: a recipe refuses all else.
    """

    def __init__(self, every: float, seed: int) -> None:
        self.every, self.seed = int(every), seed
        self._before: Tensor | None = None  # the embedding before the optimizer's step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.every:
            self._before = kwargs["model"].get_input_embeddings().weight.detach().clone()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Scale the embedding's update to its own learning rate: AdamW's update is proportional to the rate,
        weight decay included, so no parameter group of its own is needed."""
        before, self._before = self._before, None
        schedule = kwargs["lr_scheduler"].lr_lambdas[0]  # step -> share of the peak
        if before is None or (share := schedule(state.global_step)) == 0:
            return
        since = state.global_step % self.every
        length = min(self.every, state.max_steps - (state.global_step - since))  # of this stretch
        weight = kwargs["model"].get_input_embeddings().weight
        with torch.no_grad():
            weight.copy_(torch.lerp(before, weight, schedule(since * state.max_steps / length) / share))

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fresh values, and moments and step count as before a first step."""
        step, model = state.global_step, kwargs["model"]
        if step % self.every or step == state.max_steps:
            return
        embedding = model.get_input_embeddings()
        # Drawn on the CPU, so that a run on another device starts its stretches alike.
        generator = _generator(torch.device("cpu"), (self.seed, type(self).__name__, step))
        deviation = getattr(model.config, "initializer_range", None) or 0.02
        fresh = torch.empty(embedding.weight.shape).normal_(0, deviation, generator=generator)
        if getattr(embedding, "padding_idx", None) is not None:
            fresh[embedding.padding_idx] = 0
        embedding.weight.copy_(fresh)
        for value in kwargs["optimizer"].state.get(embedding.weight, {}).values():
            if isinstance(value, Tensor):
                value.zero_()


TECHNIQUES: dict[str, Callable[[float, int], TrainerCallback]] = {
    "neftune": NoisyEmbedding,
    "embedding_dropout": EmbeddingDropout,
    "active_forgetting": ActiveForgetting,
}
"""Key of an arm -> callback of its value (alpha, rate, steps) and the training's seed."""


def _generator(device: torch.device, name: tuple[int, str, int]) -> torch.Generator:
    """A stream for each (seed, technique, number); neighbouring numbers have unrelated ones."""
    mixed = hashlib.blake2b(repr(name).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(mixed))


class QuantizationAware(TrainerCallback):
    """Trains under the rounding of a bundle, with the straight-through estimator (arXiv 1308.3432).

    During each step the weights are replaced by rounded ones, whose gradient is then applied to the weights
    themselves. Activations are not rounded, though accuracy level 4 rounds them to 8 bits at run time.

    layers, embedding_and_head: round those weights. start: share of the run after which rounding begins.
    begin: called with the model before the first rounded step, which it may change (calibration); True: that
    step was in an earlier process, so its results must be used again.

    The weights have to be whole and float32, and an adapter without dropout: a recipe refuses all else.
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
        self._resumed_at = 0
        self._weights: list[Weight] = []
        self._full_precision: list[Tensor] = []  # values of the weights while rounded ones stand in for them

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._weights = list(weights_of(kwargs["model"], *self._roundings))
        self._resumed_at = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step / state.max_steps < self.start:
            return
        was_rounding = (step - 1) / state.max_steps >= self.start
        if self._begin is not None and (step == self._resumed_at or not was_rounding):
            model = kwargs["model"]
            self._begin(getattr(model, "module", model), was_rounding)
        self._full_precision = [weight.parameter.data for weight in self._weights]
        with torch.no_grad():
            for weight in self._weights:
                weight.parameter.data = weight.rounded()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for weight, values in zip(self._weights, self._full_precision):
            weight.parameter.data = values
        self._full_precision = []
