"""Compute the dispersion loss layer by layer while a model runs.

Forward hooks on the decoder layers sample tokens (sampling.py) and compute the values of a few layers at a
time, so the gradients of a few layers are alive at a time, not those of all.

Layers that a pass skips (`layerdrop`) do not count in the mean over layers. Layers that are recomputed in the
backward pass with their hooks count once. Reentrant checkpointing hides layers, which `loss` refuses. Which
sequences count is decided by the mask alone, so a trainer can weigh micro-batches beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgedisp.dispersion.losses import VARIANTS, DispersionConfig, has_pair
from edgedisp.dispersion.pairwise_kernel import FORMS, pairwise_loss
from edgedisp.dispersion.sampling import TokenSample, candidates

# Layers computed together: one at a time, starting small operations takes longer than doing them; all at
# once, their vectors and gradients would be a percent of a training step's memory.
GROUP = 10


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a causal language model, bare or wrapped by peft: the module list that is as
    long as `config.num_hidden_layers`. Raises ValueError for a model without such a list."""
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {depth} transformer layers to watch")


def select_layers(choice: str | Sequence[int], depth: int) -> list[int]:
    """Indices (from 0) of the layers named by `all`, `first_half`, `last_half`, `last`, or a list. Raises
    ValueError for an index outside the model, or a choice of no layer."""
    words = {
        "all": range(depth),
        "first_half": range(depth // 2),
        "last_half": range(depth // 2, depth),
        "last": range(depth - 1, depth),
    }
    indices = sorted(set(words[choice] if isinstance(choice, str) else choice))
    if outside := [index for index in indices if not 0 <= index < depth]:
        raise ValueError(f"layers {outside} are outside the model, which has layers 0 to {depth - 1}")
    if not indices:
        raise ValueError(f"layers {choice!r} names no layer of a model that has {depth}")
    return indices


@contextmanager
def hidden_states(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of `layers` (before any final norm) of each forward pass inside the block.

    Yields a dict, layer index -> `(batch, tokens, features)`; clear it between passes.
    Index -1 stands for the input of the first layer (the embedding output).
    """
    blocks = decoder_layers(model)
    states: dict[int, Tensor] = {}

    def collect_output(index: int) -> Callable[..., None]:
        return lambda module, args, output: states.update({index: _first_tensor(output)})

    def collect_input(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        states[-1] = args[0] if args else kwargs["hidden_states"]

    with ExitStack() as stack:
        stack.callback(states.clear)
        for index in layers:
            if index < 0:
                handle = blocks[0].register_forward_pre_hook(collect_input, with_kwargs=True)
            else:
                handle = blocks[index].register_forward_hook(collect_output(index))
            stack.callback(handle.remove)
        yield states


@dataclass
class _Pass:
    """A forward pass. Layers are named by their position among the watched ones."""

    mask: Tensor | None  # (batch, tokens), true or 1 for a real token; None: all are
    first_sequence: int
    length: int | None = None  # of the sequences in the model's call, where known
    sample: TokenSample | None = None  # set by the first watched layer
    waiting: list[tuple[int, Tensor]] = field(default_factory=list)  # layers without a value yet, and outputs
    layers: list[int] = field(default_factory=list)  # with a value
    values: list[Tensor] = field(default_factory=list)  # a vector for each group
    is_over: bool = False


class DispersionLoss:
    """The dispersion term of a training loss, averaged over sequences and watched layers.

        term = DispersionLoss(DispersionConfig(weight=0.1))
        with term.watch(model):
            outputs = model(input_ids, attention_mask=mask, labels=labels)
            loss = outputs.loss + term.weight * term.loss()

    Forward passes without gradients (evaluation, generation) are ignored, and those whose `loss` is never
    asked for are not counted. Under CPU autocast to bfloat16 the products of token vectors round their inputs
    like all others, and add up in float32.
    """

    def __init__(self, config: DispersionConfig) -> None:
        self.config, self.weight = config, config.weight
        self._pass: _Pass | None = None
        self._next_pass: _Pass | None = None
        self._next_sequence = 0
        self._skipped: int | Tensor = 0
        self._layers: list[int] = []  # that are watched
        self._has_run = False  # any of them, since `watch`
        self._last: tuple[list[int], Tensor] = [], torch.empty(0)  # layers and values of the last pass

    @property
    def skipped_sequences(self) -> int:
        """Sequences so far with fewer than two tokens to compare. They count as 0 and not in the mean."""
        return int(self._skipped)

    def sequences(self, mask: Tensor) -> Tensor:
        """How many sequences of a mask `(batch, tokens)` count in the mean; a scalar."""
        return has_pair(candidates(mask.bool(), self.config.exclude_sink)).sum()

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[DispersionLoss]:
        """Compute the term in every training forward pass of `model` inside the block. Raises ValueError if
        the model has no list of layers or lacks one of those in the configuration."""
        blocks = decoder_layers(model)
        self._layers, self._has_run = select_layers(self.config.layers, len(blocks)), False
        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(self._start, with_kwargs=True).remove)
            for layer, index in enumerate(self._layers):
                stack.callback(blocks[index].register_forward_hook(self._hook(layer)).remove)
            try:
                yield self
            finally:
                self._pass = self._next_pass = None

    def begin(self, mask: Tensor | None = None, first_sequence: int | None = None) -> None:
        """Describe the next forward pass; without it, the mask is the call's own `attention_mask`.

        mask: `(batch, tokens)`, true or 1 for a real token. first_sequence: number of the batch's first
        sequence among all that training sees, which decides what tokens are sampled; None counts on.
        """
        self._next_pass = _Pass(mask, self._next_sequence if first_sequence is None else first_sequence)

    def loss(self) -> Tensor:
        """The mean over layers and sequences of the last forward pass; scalar, float32 or better.

        0 if the pass left out every watched layer. Raises ValueError if there was no training forward pass,
        if its loss was already returned, or if no watched layer ever ran with gradients.
        """
        current = self._pass
        if current is None or current.is_over:
            raise ValueError("no forward pass to compute the dispersion of: run the model inside watch()")
        current.is_over = True
        self._compute(current, is_last=True)
        values, current.values = current.values, []
        if not values or current.sample is None:
            self._last = [], torch.empty(0)
            if self._has_run:
                return torch.zeros(())
            raise ValueError(
                "none of the chosen layers ran with gradients, so there is no dispersion to compute; before "
                "transformers 5.23, reentrant gradient checkpointing hides them (set use_reentrant to False)"
            )
        self._has_run = True
        self._next_sequence = current.first_sequence + current.sample.batch
        self._skipped = self._skipped + (current.sample.batch - current.sample.sequences)
        together = torch.cat([value.to(values[0].device) for value in values])
        self._last = current.layers, together.detach()
        return together.mean()

    def by_layer(self) -> dict[int, float]:
        """Value of each layer, counted from 0, that ran in the pass of the last `loss`."""
        layers, values = self._last
        return dict(sorted(zip((self._layers[layer] for layer in layers), values.tolist())))

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or _in_backward():
            return
        self._pass, self._next_pass = self._next_pass or _Pass(None, self._next_sequence), None
        inputs = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        shapes = [value.shape for value in inputs if isinstance(value, Tensor) and value.dim() > 1]
        self._pass.length = shapes[0][1] if shapes else None
        if self._pass.mask is None:
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            self._pass.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _hook(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            if not torch.is_grad_enabled() or (_in_backward() and not _in_checkpoint()):
                return
            if self._next_pass is not None and not _in_backward():
                self._pass, self._next_pass = self._next_pass, None  # the call skipped the watched model
            if self._pass is not None and (_in_backward() or not self._pass.is_over):
                self._take(self._pass, layer, _first_tensor(output))

        return hook

    def _take(self, current: _Pass, layer: int, state: Tensor) -> None:
        """Compute the values of the waiting layers, when there are enough of them or no more to come."""
        if current.sample is None:
            mask, length, first = current.mask, current.length, current.first_sequence
            current.sample = TokenSample(self.config, len(self._layers), state, mask, length, first)
        sample = current.sample
        if _in_checkpoint():
            # The recomputation has to save what was saved here, so this layer is computed at once and alone.
            value = self._value(sample, [(layer, state)], is_last=True)
            if not _in_backward():
                current.layers.append(layer)
                current.values.append(value)
            return
        # A full group waits until another layer comes: as the model may skip layers, it could be the last.
        size = GROUP if self.config.variant in FORMS else 1
        other = current.waiting[0][1] if current.waiting else state
        is_alike = (other.shape, other.dtype, other.device) == (state.shape, state.dtype, state.device)
        if len(current.waiting) == size or not is_alike:
            self._compute(current, is_last=False)
        current.waiting.append((layer, state))
        # Long sequences, without sampling, keep the processor busy alone.
        if sample.picks is None or layer == len(self._layers) - 1:
            self._compute(current, is_last=True)

    def _compute(self, current: _Pass, is_last: bool) -> None:
        """The values of the waiting layers; `is_last`: no watched layer follows the last of them."""
        waiting, current.waiting = current.waiting, []
        if waiting and current.sample is not None:
            current.layers.extend(layer for layer, _ in waiting)
            current.values.append(self._value(current.sample, waiting, is_last))

    def _value(self, sample: TokenSample, layers: list[tuple[int, Tensor]], is_last: bool) -> Tensor:
        """The mean over sequences at each of these layers; `(layers,)`."""
        config = self.config
        vectors, mask = sample.vectors(layers, is_last)
        options = {"temperature": config.temperature, "clamp": config.clamp}
        if config.variant in FORMS:
            values = pairwise_loss(config.variant, vectors, mask, precision=sample.precision, **options)
        else:
            if mask is None:
                mask = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
            values = VARIANTS[config.variant](vectors, mask, **options)
        # Sequences that do not count have value 0. So has one that counts but loses its pairs to sinks here:
        # what a micro-batch weighs must not depend on its vectors.
        sums, count = values.view(len(layers), -1).sum(dim=1), sample.sequences
        return sums / (count.clamp_min(1).to(sums.device) if isinstance(count, Tensor) else max(count, 1))


def _first_tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _in_backward() -> bool:
    """Whether autograd is running a backward pass, as when a checkpointed layer is recomputed."""
    return bool(torch._C._current_graph_task_id() != -1)


def _in_checkpoint() -> bool:
    """Whether hooks on saved tensors are active, as inside `torch.utils.checkpoint`."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
