"""Compute a dispersion term layer by layer while a model runs.

Hooks on the decoder layers compute the values of a few layers as soon as their outputs are there, and put
nodes into the autograd graph; `loss` only averages. In the backward pass a node runs when its layers' turn
comes, so the gradients of a few layers are alive at a time, not those of all. What is kept for it are the
drawn vectors (draw.py; without a draw the layers' outputs, which the next layers keep anyway) and small
matrices (blockwise.py).

Gradient checkpointing: transformers recomputes the inside of a layer, where these hooks do not stand. Where
an implementation recomputes the hooks too, they notice that a backward pass is under way and the value is
not counted again.

Random numbers: which tokens are drawn depends on (seed, number of the sequence, layer) alone, through
generators of the collector's own. The model's dropout and data order never notice whether dispersion is on;
micro-batches, data-parallel processes and resumed runs draw what one unbroken run with big batches draws.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgedisp.dispersion.blockwise import FORMS, blockwise
from edgedisp.dispersion.config import DispersionConfig
from edgedisp.dispersion.draw import Picks
from edgedisp.dispersion.loss import BY_SEQUENCE
from edgedisp.dispersion.outliers import SINK_NORM


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

    Raises ValueError for another word or an index outside the model: a misspelt choice must not mean `all`.
    """
    named = {
        "all": range(depth),
        "first_half": range(depth // 2),
        "last_half": range(depth // 2, depth),
        "last": range(depth - 1, depth),
    }
    if isinstance(choice, str):
        if choice not in named:
            raise ValueError(f"layers {choice!r} is not one of {', '.join(named)} or a list of indices")
        return list(named[choice])
    outside = [index for index in choice if not 0 <= index < depth]
    if outside:
        raise ValueError(f"layers {outside} are outside the model, which has layers 0 to {depth - 1}")
    return sorted(set(choice))


def _stream(*numbers: int) -> int:
    """A seed for each combination of numbers; neighbouring steps and layers get unrelated streams."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest())


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

    def keep(index: int) -> nn.Module:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            seen[index] = _tensor(output)

        return blocks[index].register_forward_hook(hook)  # type: ignore[return-value]

    def keep_embedding(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen[-1] = args[0] if args else kwargs["hidden_states"]

    handles = [keep(index) for index in layers if index >= 0]
    if -1 in layers:
        handles.append(blocks[0].register_forward_pre_hook(keep_embedding, with_kwargs=True))  # type: ignore[arg-type]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[operator]
        seen.clear()


# Layers whose values are computed together: one at a time, starting small operations takes longer than doing
# them; all at once, their vectors and gradients would be a percent of a training step's memory.
TOGETHER = 10


class _Pass:
    """One forward pass: which tokens take part, and the values of the layers so far."""

    def __init__(self, mask: Tensor | None, first_sequence: int) -> None:
        self.mask, self.first_sequence = mask, first_sequence
        self.picks: Picks | None = None  # the tokens that take part; None: all of them
        # Which of those are real: (layers, batch, n), without picks (batch, tokens); None: all of them.
        self.real: Tensor | None = None
        self.waiting: list[tuple[int, Tensor]] = []  # place and output of layers without a value yet
        self.values: list[Tensor] = []  # of the layers in order, a vector for each group
        self.is_prepared = False


class Dispersion:
    """The dispersion term of a training loss, averaged over sequences and watched layers.

        term = DispersionConfig(weight=0.1).collector()
        with term.watch(model):
            outputs = model(input_ids, attention_mask=mask, labels=labels)
            loss = outputs.loss + term.weight * term.loss()

    Forward passes without gradients (evaluation, generation) are not looked at. Under CPU autocast to
    bfloat16 the products of token vectors round their inputs like all others, and add up in float32.
    """

    def __init__(self, config: DispersionConfig) -> None:
        self.config, self.weight = config, config.weight
        self._pass: _Pass | None = None
        self._begun: _Pass | None = None
        self._next_sequence = 0
        self._skipped: int | Tensor = 0
        self._chosen: list[int] = []
        self._values = torch.empty(0)

    @property
    def skipped_sequences(self) -> int:
        """Sequences so far with fewer than two tokens to compare. They count as 0 and not in the mean."""
        return int(self._skipped)

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[Dispersion]:
        """Compute the term in every training forward pass of `model` inside the block.

        Raises ValueError if the model has no list of layers or lacks a chosen one.
        """
        blocks = decoder_layers(model)
        self._chosen = select_layers(self.config.layers, len(blocks))
        handles = [model.register_forward_pre_hook(self._start, with_kwargs=True)]
        for place, index in enumerate(self._chosen):
            handles.append(blocks[index].register_forward_hook(self._hook(place)))
        try:
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

        Raises ValueError if no training forward pass was seen, or if it was asked for before.
        """
        if self._pass is None or not self._pass.values:
            raise ValueError("no forward pass to compute the dispersion of: run the model inside watch()")
        values, self._pass.values = self._pass.values, []
        together = torch.cat([value.to(values[0].device) for value in values])
        self._values = together.detach()
        return together.mean()

    def by_layer(self) -> dict[int, float]:
        """Value of each watched layer, counted from 0, in the pass whose `loss` was asked for last."""
        return dict(zip(self._chosen, self._values.tolist()))

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or _in_backward():
            return
        self._pass = self._begun or _Pass(None, self._next_sequence)
        self._begun = None
        if self._pass.mask is None:
            self._pass.mask = _attention_mask(args, kwargs)

    def _hook(self, place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            if not torch.is_grad_enabled() or (_in_backward() and not _saved_are_packed()):
                return
            if self._begun is not None and not _in_backward():  # the call went to a part of the watched model
                self._pass, self._begun = self._begun, None
            if self._pass is not None:
                self._take(self._pass, place, _tensor(output))

        return hook

    def _take(self, now: _Pass, place: int, state: Tensor) -> None:
        """Compute the values of the layers that wait, when there are enough of them or no more to come."""
        if not now.is_prepared:
            self._prepare(now, state, len(self._chosen))
        if now.waiting and not _alike(now.waiting[0][1], state):
            now.values.append(self._value(now))
        now.waiting.append((place, state))
        # Where saved tensors are packed, as inside a checkpointed region, nothing may wait: the recomputation
        # has to save what was saved here. Long sequences fill the processor alone.
        alone = _saved_are_packed() or now.picks is None or self.config.variant not in FORMS
        if alone or len(now.waiting) == TOGETHER or place == len(self._chosen) - 1:
            values = self._value(now)
            if not _in_backward():
                now.values.append(values)

    def _prepare(self, now: _Pass, state: Tensor, layers: int) -> None:
        """Which tokens count, and which of them each layer draws."""
        batch, tokens = state.shape[:2]
        real = now.mask
        if real is not None:
            real = real.to(state.device).bool()
            if real.shape != (batch, tokens):
                raise ValueError(f"the mask is {tuple(real.shape)}, the token vectors are {(batch, tokens)}")
            if real.device.type == "cpu" and bool(real.all()):
                real = None  # spares a copy of the vectors at every layer
        if self.config.exclude_sink:
            real = torch.ones(batch, tokens, dtype=torch.bool, device=state.device) if real is None else real
            real = real & (real.cumsum(dim=1) > 1)  # the first REAL token, also under left padding
        now.real, now.is_prepared = real, True
        self._next_sequence = now.first_sequence + batch
        if real is not None:
            self._skipped = self._skipped + (real.sum(dim=1) < 2).sum()
        elif tokens < 2:
            self._skipped = self._skipped + batch
        if self.config.tokens is not None and self.config.tokens < tokens:
            picks = self._picks(now.first_sequence, batch, tokens, layers, real).to(state.device)
            now.picks = Picks(picks, tokens)
            now.real = None if real is None else real.expand(layers, -1, -1).gather(2, picks)

    def _picks(self, first: int, batch: int, tokens: int, layers: int, real: Tensor | None) -> Tensor:
        """Tokens of each layer and sequence, `(layers, batch, n)`, in rising order; padding last resort."""
        keys = torch.empty(layers, batch, tokens)
        for row in range(batch):
            # On the CPU, so that CPU and GPU runs draw the same tokens.
            generator = torch.Generator().manual_seed(_stream(self.config.seed, first + row))
            keys[:, row] = torch.rand(layers, tokens, generator=generator)
        if real is not None:
            keys.masked_fill_(~real.cpu(), -1.0)
        count = self.config.tokens or tokens
        return keys.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values

    def _value(self, now: _Pass) -> Tensor:
        """The mean over sequences at each layer that waits; `(layers,)`."""
        config, waiting = self.config, now.waiting
        now.waiting = []
        places, states = [place for place, _ in waiting], [state for _, state in waiting]
        if now.picks is None:
            (vectors,) = states
        else:
            vectors = now.picks.draw(states, places, places[-1] == len(self._chosen) - 1)
        mask = self._mask(now, places, vectors)
        options = {"temperature": config.temperature, "clamp": config.clamp}
        if config.variant in FORMS:
            products = "bf16" if _is_bf16_autocast(vectors.device.type) else "none"
            values = blockwise(config.variant, vectors, mask, products=products, **options)
        else:
            with torch.autocast(vectors.device.type, enabled=False):
                whole = torch.ones(vectors.shape[:2], dtype=torch.bool, device=vectors.device)
                values = BY_SEQUENCE[config.variant](vectors, whole if mask is None else mask, **options)
        values = values.view(len(places), -1)
        if mask is None:
            return values.mean(dim=1)
        # Sequences without a pair have value 0 and do not count in the mean.
        counted = (mask.sum(dim=1) > 1).view(len(places), -1).sum(dim=1)
        return values.sum(dim=1) / counted.clamp_min(1)

    def _mask(self, now: _Pass, places: list[int], vectors: Tensor) -> Tensor | None:
        """Which of the vectors count, `(layers * batch, n)`; None: all of them."""
        if now.real is None:
            return None
        masks = [now.real if now.picks is None else now.real[place] for place in places]
        mask = torch.cat(masks).to(vectors.device)
        return mask & ~_sinks(vectors.detach(), mask) if self.config.exclude_sink else mask


def _sinks(vectors: Tensor, mask: Tensor) -> Tensor:
    """Which tokens are far longer than the median of their sequence's, `(batch, n)`."""
    norms = torch.linalg.vector_norm(vectors.float(), dim=-1)
    median = torch.where(mask, norms, math.nan).nanmedian(dim=1, keepdim=True).values
    return norms > SINK_NORM * median


def _attention_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The padding mask of a causal language model's call, `(batch, tokens)`, or None."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


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
