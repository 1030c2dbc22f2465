"""Compute a dispersion term layer by layer while a model runs.

Hooks on the decoder layers compute the values of a few layers as soon as their outputs are there, and put
nodes into the autograd graph; `loss` computes what still waits, and averages. In the backward pass a node
runs when its layers' turn comes, so the gradients of a few layers are alive at a time, not those of all. What
is kept for it are the drawn vectors (draw.py; without a draw the layers' outputs, which the next layers keep
anyway) and small matrices (blockwise.py).

Gradient checkpointing: transformers (from 5.23) recomputes the inside of a layer, where these hooks do not
stand. Where an implementation recomputes the hooks too, they notice that a backward pass is under way and the
value is not counted again. Hooks inside reentrant checkpointing see no gradients, which `loss` refuses.

Layers that a pass skips (`layerdrop`) do not count in its mean over layers.

Which sequences count is decided by the mask alone: those with two tokens to compare. So a trainer can weigh
the micro-batches of a step before it runs them (`Dispersion.sequences`).

Random numbers (draw.py): the model's dropout and data order never notice whether dispersion is on;
micro-batches, data-parallel processes and resumed runs draw what one unbroken run with big batches draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgedisp.dispersion.blockwise import FORMS, blockwise
from edgedisp.dispersion.config import DispersionConfig
from edgedisp.dispersion.draw import Tokens, taking_part
from edgedisp.dispersion.loss import BY_SEQUENCE, counted


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a causal language model, bare or wrapped by peft.

    They are the module list that is as long as `config.num_hidden_layers`.
    Raises ValueError for a model without such a list.
    """
    config = getattr(model, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {depth} transformer layers to watch")


def select_layers(choice: str | Sequence[int], depth: int) -> list[int]:
    """Indices (from 0) of the layers named by `all`, `first_half`, `last_half`, `last`, or a list.

    Raises ValueError for another word, an index outside the model, or a choice of no layer: a misspelt
    choice must not mean `all`.
    """
    named = {
        "all": range(depth),
        "first_half": range(depth // 2),
        "last_half": range(depth // 2, depth),
        "last": range(depth - 1, depth),
    }
    if isinstance(choice, str) and choice not in named:
        raise ValueError(f"layers {choice!r} is not one of {', '.join(named)} or a list of indices")
    chosen = sorted(set(named[choice] if isinstance(choice, str) else choice))
    outside = [index for index in chosen if not 0 <= index < depth]
    if outside:
        raise ValueError(f"layers {outside} are outside the model, which has layers 0 to {depth - 1}")
    if not chosen:
        raise ValueError(f"layers {choice!r} names no layer of a model that has {depth}")
    return chosen


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def hidden_states(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of `layers` (before any final norm) of each forward pass inside the block.

    Yields a dict, layer index -> `(batch, tokens, features)`; clear it between passes.
    Index -1 stands for the input of the first layer (the embedding output).
    """
    blocks = decoder_layers(model)
    seen: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            seen[index] = _tensor(output)

        return blocks[index].register_forward_hook(hook)

    def keep_embedding(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen[-1] = args[0] if args else kwargs["hidden_states"]

    handles: list[Any] = []
    try:
        handles.extend(keep(index) for index in layers if index >= 0)
        if -1 in layers:
            handles.append(blocks[0].register_forward_pre_hook(keep_embedding, with_kwargs=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        seen.clear()


# Layers whose values are computed together: one at a time, starting small operations takes longer than doing
# them; all at once, their vectors and gradients would be a percent of a training step's memory.
TOGETHER = 10


class _Pass:
    """One forward pass: what it was begun with, and the values of the layers so far."""

    def __init__(self, mask: Tensor | None, first_sequence: int) -> None:
        self.mask, self.first_sequence = mask, first_sequence
        self.length: int | None = None  # of the sequences that the model was called with, as far as known
        self.is_prepared = False  # by the first layer, which sets the next two
        self.tokens: Tokens  # those that take part
        self.products: str  # see blockwise.py
        self.waiting: list[tuple[int, Tensor]] = []  # place and output of layers without a value yet
        self.places: list[int] = []  # of the layers with a value
        self.values: list[Tensor] = []  # theirs, a vector for each group
        self.is_over = False


class Dispersion:
    """The dispersion term of a training loss, averaged over sequences and watched layers.

        term = DispersionConfig(weight=0.1).collector()
        with term.watch(model):
            outputs = model(input_ids, attention_mask=mask, labels=labels)
            loss = outputs.loss + term.weight * term.loss()

    Forward passes without gradients (evaluation, generation) are not looked at, and those whose `loss` nobody
    asks for are not counted. Under CPU autocast to bfloat16 the products of token vectors round their inputs
    like all others, and add up in float32.
    """

    def __init__(self, config: DispersionConfig) -> None:
        self.config, self.weight = config, config.weight
        self._pass: _Pass | None = None
        self._begun: _Pass | None = None
        self._next_sequence = 0
        self._skipped: int | Tensor = 0
        self._chosen: list[int] = []
        self._has_run = False  # any chosen layer, since the watch began
        self._places: list[int] = []  # of the layers in `_values`
        self._values = torch.empty(0)

    @property
    def skipped_sequences(self) -> int:
        """Sequences so far with fewer than two tokens to compare. They count as 0 and not in the mean."""
        return int(self._skipped)

    def sequences(self, mask: Tensor) -> Tensor:
        """How many sequences of a mask `(batch, tokens)` count in the mean; a scalar."""
        return counted(taking_part(mask.bool(), self.config.exclude_sink)).sum()

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[Dispersion]:
        """Compute the term in every training forward pass of `model` inside the block.

        Raises ValueError if the model has no list of layers or lacks a chosen one.
        """
        blocks = decoder_layers(model)
        self._chosen, self._has_run = select_layers(self.config.layers, len(blocks)), False
        handles = [model.register_forward_pre_hook(self._start, with_kwargs=True)]
        try:
            for place, index in enumerate(self._chosen):
                handles.append(blocks[index].register_forward_hook(self._hook(place)))
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._pass = self._begun = None

    def begin(self, mask: Tensor | None = None, first_sequence: int | None = None) -> None:
        """Say what the next forward pass is; without it, the mask is the call's own `attention_mask`.

        Args:
            mask: `(batch, tokens)`, true or 1 for a real token.
            first_sequence: number of the batch's first sequence among all that training sees; it decides
                which tokens are drawn. None counts on.
        """
        self._begun = _Pass(mask, self._next_sequence if first_sequence is None else first_sequence)

    def loss(self) -> Tensor:
        """The mean over layers and sequences of the forward pass just made; scalar, float32 or better.

        0 if the pass left out every chosen layer. Raises ValueError if no training forward pass was seen, if
        it was asked for before, or if no chosen layer was ever seen to run with gradients.
        """
        now = self._pass
        if now is None or now.is_over:
            raise ValueError("no forward pass to compute the dispersion of: run the model inside watch()")
        now.is_over = True
        if now.waiting:
            self._compute(now, is_last=True)
        self._places, values, now.values = now.places, now.values, []
        if not values:
            self._values = torch.empty(0)
            if self._has_run:
                return torch.zeros(())
            raise ValueError(
                "none of the chosen layers ran with gradients, so there is no dispersion to compute; before "
                "transformers 5.23, reentrant gradient checkpointing hides them (set use_reentrant to False)"
            )
        self._has_run = True
        self._next_sequence = now.first_sequence + now.tokens.batch
        self._skipped = self._skipped + (now.tokens.batch - now.tokens.sequences)
        together = torch.cat([value.to(values[0].device) for value in values])
        self._values = together.detach()
        return together.mean()

    def by_layer(self) -> dict[int, float]:
        """Value of each layer, counted from 0, that ran in the pass whose `loss` was asked for last."""
        found = zip((self._chosen[place] for place in self._places), self._values.tolist())
        return dict(sorted(found))

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or _in_backward():
            return
        self._pass = self._begun or _Pass(None, self._next_sequence)
        self._begun = None
        self._pass.length = _length(args, kwargs)
        if self._pass.mask is None:
            self._pass.mask = _attention_mask(args, kwargs)

    def _hook(self, place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            if not torch.is_grad_enabled() or (_in_backward() and not _saved_are_packed()):
                return
            if self._begun is not None and not _in_backward():  # the call went to a part of the watched model
                self._pass, self._begun = self._begun, None
            if self._pass is not None and (_in_backward() or not self._pass.is_over):
                self._take(self._pass, place, _tensor(output))

        return hook

    def _take(self, now: _Pass, place: int, state: Tensor) -> None:
        """Compute the values of the layers that wait, when there are enough of them or no more to come."""
        if not now.is_prepared:
            layers = len(self._chosen)
            now.tokens = Tokens(self.config, layers, state, now.mask, now.length, now.first_sequence)
            now.products = "bf16" if _is_bf16_autocast(state.device.type) else "none"
            now.is_prepared = True
        if _saved_are_packed():
            # As inside a checkpointed region. The recomputation has to save what was saved here, so this
            # layer is computed at once and alone. It may be the last.
            value = self._value(now, [(place, state)], is_last=True)
            if not _in_backward():
                now.places.append(place)
                now.values.append(value)
            return
        # A full group waits until another layer comes: as the model may skip layers, it could be the last.
        together = TOGETHER if self.config.variant in FORMS else 1
        if now.waiting and (len(now.waiting) == together or not _alike(now.waiting[0][1], state)):
            self._compute(now, is_last=False)
        now.waiting.append((place, state))
        # Long sequences, without a draw, fill the processor alone.
        if not now.tokens.are_drawn or place == len(self._chosen) - 1:
            self._compute(now, is_last=True)

    def _compute(self, now: _Pass, is_last: bool) -> None:
        """The values of the layers that wait; `is_last` as in draw.py."""
        waiting, now.waiting = now.waiting, []
        now.places.extend(place for place, _ in waiting)
        now.values.append(self._value(now, waiting, is_last))

    def _value(self, now: _Pass, layers: list[tuple[int, Tensor]], is_last: bool) -> Tensor:
        """The mean over sequences at each of these layers; `(layers,)`."""
        config = self.config
        places, states = [place for place, _ in layers], [state for _, state in layers]
        vectors, mask = now.tokens.of(states, places, is_last)
        options = {"temperature": config.temperature, "clamp": config.clamp}
        if config.variant in FORMS:
            values = blockwise(config.variant, vectors, mask, products=now.products, **options)
        else:
            with torch.autocast(vectors.device.type, enabled=False):
                whole = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
                values = BY_SEQUENCE[config.variant](vectors, whole if mask is None else mask, **options)
        # Sequences that do not count have value 0. So has one that counts but loses its pairs to sinks here:
        # what a micro-batch weighs must not depend on its vectors.
        sums, count = values.view(len(places), -1).sum(dim=1), now.tokens.sequences
        return sums / (count.clamp_min(1).to(sums.device) if isinstance(count, Tensor) else max(count, 1))


def _attention_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The padding mask of a causal language model's call, `(batch, tokens)`, or None."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Length of the sequences in a causal language model's call, ids or embeddings, if it can be told."""
    for given in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")):
        if isinstance(given, Tensor) and given.dim() > 1:
            return given.shape[1]
    return None


def _in_backward() -> bool:
    """Whether autograd is running a backward pass, as when a checkpointed layer is recomputed."""
    return bool(torch._C._current_graph_task_id() != -1)


def _saved_are_packed() -> bool:
    """Whether hooks on saved tensors are active, as inside `torch.utils.checkpoint`."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.device == other.device


def _is_bf16_autocast(device: str) -> bool:
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
