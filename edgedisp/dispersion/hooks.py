"""Compute the dispersion loss layer by layer while a model runs.

Forward hooks collect the layers' outputs, and `DispersionLoss.loss` computes their values. Layers are those
of transformers' `hidden_states[1:]`, as in the paper's code: the last one is the decoder's output, after its
final norm. Which tokens are sampled depends on (seed, number of the sequence, layer) and the number of real
tokens alone, through generators of this module: the global random streams stay untouched.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from edgedisp.dispersion.losses import VARIANTS, DispersionConfig
from edgedisp.dispersion.pairwise_kernel import FORMS

# Layers computed together: one at a time, starting small operations takes longer than doing them.
GROUP = 10
SINK_NORM = 10.0  # medians of a sequence's norms, above which a token counts as an attention sink
# Where sparse gradients can be added to dense ones; elsewhere (MPS) zeros are written out.
SPARSE_DEVICES = ("cpu", "cuda")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a causal language model, bare or wrapped by peft: the module list that is as
    long as `config.num_hidden_layers`. Raises ValueError for a model without such a list."""
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {depth} transformer layers to watch")


def layer_outputs(model: nn.Module) -> list[tuple[nn.Module, Callable[[Any], Tensor]]]:
    """Of each layer the module that gives transformers' hidden state of it, and how that is read from the
    module's output. Of the last layer it is the decoder, which runs the blocks and then the final norm."""
    layers = decoder_layers(model)
    around = [module for module in model.modules() if layers in module.modules()]
    decoder = [module for module in around if not isinstance(module, nn.ModuleList | nn.ModuleDict)][-1]
    return [*((layer, _tensor) for layer in layers[:-1]), (decoder, _last_hidden_state)]


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
def hidden_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect transformers' `hidden_states` inside the block: the embedding output, and the output of every
    layer, of the last one after the final norm.

    Yields a list of `(batch, tokens, features)`, which each forward pass fills anew.
    """
    states = list[Tensor]()

    def start(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        states[:] = [args[0] if args else kwargs["hidden_states"]]

    with ExitStack() as stack:
        stack.callback(states.clear)
        stack.callback(decoder_layers(model)[0].register_forward_pre_hook(start, with_kwargs=True).remove)
        for module, read in layer_outputs(model):
            hook = module.register_forward_hook(lambda *call, read=read: states.append(read(call[-1])))
            stack.callback(hook.remove)
        yield states


@dataclass
class _Pass:
    """A forward pass. Layers are named by their position among the watched ones."""

    mask: Tensor | None  # (batch, tokens), true or 1 for a real token; None: all are
    sample: TokenSample | None = None  # set by the first watched layer
    waiting: list[tuple[int, Tensor]] = field(default_factory=list)  # layers without a value yet, and outputs
    layers: list[int] = field(default_factory=list)  # with a value
    values: list[Tensor] = field(default_factory=list)  # a vector for each group


class DispersionLoss:
    """The dispersion term of a training loss, averaged over sequences and watched layers; see the package.

    Forward passes without gradients (evaluation, generation) are ignored, and those whose `loss` is never
    asked for are not counted. A sequence with fewer than two tokens to compare counts as 0. Layers but the
    last that a pass skips (`layerdrop`) are not in the mean; one that skips all the watched is 0, and not
    counted. Under CPU autocast to bfloat16 the products of token vectors round their inputs like all others,
    and add up in float32.

    next_sequence: number, among all that training sees, of the first sequence in the next pass, which decides
    what tokens are sampled. It counts on by itself. mask: the tokens that take part; None: by the
    call's `attention_mask`.
    """

    def __init__(self, config: DispersionConfig) -> None:
        self.config, self.weight = config, config.weight
        self.next_sequence = 0
        self.mask: Tensor | None = None
        self._pass: _Pass | None = None
        self._is_training = False  # whether the model's newest pass has gradients
        self._layers: list[int] = []  # that are watched
        self._last: tuple[list[int], Tensor] = [], torch.empty(0)  # layers and values of the last pass

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[DispersionLoss]:
        """Compute the term in every training forward pass of `model` inside the block; padding is what the
        call's `attention_mask` says. Raises ValueError if the model lacks one of the layers."""
        outputs = layer_outputs(model)
        self._layers = select_layers(self.config.layers, len(outputs))
        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(self._start, with_kwargs=True).remove)
            for position, index in enumerate(self._layers):
                module, read = outputs[index]
                hook = module.register_forward_hook(partial(self._collect, position, read))
                stack.callback(hook.remove)
            yield self

    def loss(self) -> Tensor:
        """The mean over layers and sequences of the last forward pass; scalar, float32 or better. Raises
        ValueError if there was no training forward pass, or its loss was already returned."""
        current, self._pass = self._pass, None
        if current is None:
            raise ValueError("no forward pass to compute the dispersion of: run the model inside watch()")
        if current.sample is None:
            self._last = [], torch.empty(0)
            return torch.zeros(())
        self._compute(current, current.sample)
        self.next_sequence += current.sample.batch
        together = torch.cat([value.to(current.values[0].device) for value in current.values])
        self._last = current.layers, together.detach()
        return together.mean()

    def by_layer(self) -> dict[int, float]:
        """Value of each layer, counted from 0, that ran in the pass of the last `loss`."""
        layers, values = self._last
        return dict(sorted(zip((self._layers[position] for position in layers), values.tolist())))

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._is_training = torch.is_grad_enabled() and not _in_backward()
        if self._is_training:
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            mask = mask if self.mask is None else self.mask
            self._pass = _Pass(mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)

    def _collect(
        self, position: int, read: Callable[[Any], Tensor], module: nn.Module, args: object, output: Any
    ) -> None:
        current = self._pass
        if current is None or not self._is_training or _in_backward():
            return
        if not torch.is_grad_enabled():
            raise ValueError(
                f"layer {self._layers[position]} ran without gradients, so it has no dispersion to compute; "
                "reentrant gradient checkpointing does that (set use_reentrant to False)"
            )
        state = read(output)
        if current.sample is None:
            first = self.next_sequence
            current.sample = TokenSample(self.config, self._layers, state, current.mask, first)
        current.waiting.append((position, state))
        # Without sampling at once, so that the gradients of all tokens are alive for one layer at a time.
        is_due = current.sample.picks is None or position == len(self._layers) - 1
        if is_due and not _in_checkpoint():
            self._compute(current, current.sample)

    def _compute(self, current: _Pass, sample: TokenSample) -> None:
        """The values of the waiting layers, as means over the sequences."""
        config, waiting = self.config, current.waiting
        options = {"temperature": config.temperature, "clamp": config.clamp, "precision": sample.precision}
        size = GROUP if config.variant in FORMS and sample.picks is not None else 1
        # A projection after the last layer (OPT-350M) changes the number of features.
        for _, outputs in groupby(waiting, key=lambda output: (output[1].device, output[1].shape[-1])):
            alike = list(outputs)
            for start in range(0, len(alike), size):
                group = alike[start : start + size]
                vectors, mask = sample.vectors(group, is_last=group[-1] is waiting[-1])
                values = VARIANTS[config.variant](vectors, mask, **options)
                current.layers += [position for position, _ in group]
                current.values.append(values.view(len(group), -1).sum(dim=1) / sample.batch)
        current.waiting = []


class TokenSample:
    """The tokens of one forward pass that take part in each of the watched `layers`; `state` is of one.
    Raises ValueError for an output that is not `(batch, tokens, features)`, or a mask that does not fit."""

    def __init__(
        self,
        config: DispersionConfig,
        layers: list[int],
        state: Tensor,
        mask: Tensor | None,
        first_sequence: int,
    ) -> None:
        if state.dim() != 3:
            raise ValueError(
                f"the layers' outputs are {tuple(state.shape)} and not (batch, tokens, features); dispersion "
                "does not work for models whose layers hand on several streams (Gemma 3n)"
            )
        device, (self.batch, tokens, _) = state.device, state.shape
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        self.precision = "bf16" if dtype == torch.bfloat16 else "none"  # of the products of vectors
        self.exclude_sink = config.exclude_sink
        real = torch.ones(self.batch, tokens, dtype=torch.bool) if mask is None else mask.cpu().bool()
        if real.shape != (self.batch, tokens):
            raise ValueError(f"the mask is {tuple(real.shape)}, the token vectors are {(self.batch, tokens)}")
        candidates = real & (real.cumsum(dim=1) > 1) if config.exclude_sink else real
        self.picks: Tensor | None = None  # (layers, 2, batch * n) int64, sequence and token
        if config.tokens is not None and config.tokens < tokens:
            stream = config.seed, first_sequence
            picks = sample_tokens(config.tokens, layers, real, candidates, stream)
            candidates = candidates.expand(len(layers), -1, -1).gather(2, picks)
            sequence = torch.arange(self.batch).repeat_interleave(config.tokens).expand(len(layers), -1)
            self.picks = torch.stack([sequence, picks.flatten(1)], dim=1).to(device)
        # (batch, tokens), or (layers, batch, n) where sampled. None, for all, spares a copy of the vectors.
        self.mask = None if candidates.all() and not config.exclude_sink else candidates.to(device)

    def vectors(self, outputs: list[tuple[int, Tensor]], is_last: bool) -> tuple[Tensor, Tensor | None]:
        """Vectors `(layers * batch, n, features)` and which of them are real; None: all.

        outputs: position among the watched layers, and `(batch, tokens, features)`; a single one without
        sampling. is_last: no watched layer follows the last of them.
        """
        layers, states = [layer for layer, _ in outputs], [state for _, state in outputs]
        vectors, mask = states[0], self.mask
        if self.picks is not None:
            sampled: Tensor = _Gather.apply(self.picks[layers].to(vectors.device), is_last, *states)
            vectors = sampled.view(len(layers) * self.batch, -1, sampled.shape[-1])
            mask = None if mask is None else mask[layers].flatten(0, 1)
        if mask is None:
            return vectors, None
        mask = mask.to(vectors.device)
        if self.exclude_sink:
            norms = torch.linalg.vector_norm(vectors.detach().float(), dim=-1)
            median = torch.where(mask, norms, math.nan).nanmedian(dim=1, keepdim=True).values
            mask = mask & ~(norms > SINK_NORM * median)
        return vectors, mask


def sample_tokens(
    count: int, layers: Sequence[int], real: Tensor, candidates: Tensor, stream: tuple[int, int]
) -> Tensor:
    """Tokens that each layer samples of each sequence, int64 `(layers, batch, count)`, in rising order.

    count: at most `tokens`. real, candidates: `(batch, tokens)` bool on the CPU; others than candidates are a
    last resort. stream: seed, and number of the first row's sequence; the rows after it count on.
    """
    # In float64, so that no two keys are equal: which of them comes first could depend on padding.
    keys = torch.full((len(layers), *real.shape), -1.0, dtype=torch.float64)
    seed, first_sequence = stream
    for row, mask in enumerate(real):
        # One stream a sequence, as long as its real tokens: padding shifts nothing. On the CPU, so that CPU
        # and GPU runs sample the same tokens.
        mixed = hashlib.blake2b(repr((seed, first_sequence + row)).encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed))
        size = max(layers) + 1, int(mask.sum())  # a layer's draw does not depend on the other layers
        keys[:, row, mask] = torch.rand(size, generator=generator, dtype=torch.float64)[list(layers)]
    keys.masked_fill_(~candidates, -1.0)
    return keys.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values


class _Gather(torch.autograd.Function):
    """Rows of the outputs of some layers: `(layers, batch * n, features)`, with sparse gradients.

    indices: `(layers, 2, batch * n)`, sequence and token, rising. A dense gradient, zero nearly everywhere,
    would move more memory than the whole loss. Autograd adds a sparse one to the dense gradient from the
    layers after it; the last watched layer's output may have no other gradient, so it gets a dense one.
    """

    @staticmethod
    def forward(ctx: Any, indices: Tensor, is_last: bool, *states: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape, ctx.is_last = states[0].shape, is_last
        rows = indices[:, 0] * ctx.shape[1] + indices[:, 1]
        return torch.stack([state.flatten(0, 1).index_select(0, row) for state, row in zip(states, rows)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        slopes = list[Tensor]()
        for layer, (index, values) in enumerate(zip(indices, gradient), start=1):
            if gradient.device.type in SPARSE_DEVICES and not (ctx.is_last and layer == len(indices)):
                # Rising and none twice is what coalesced means.
                slope = torch.sparse_coo_tensor(
                    index, values, ctx.shape, check_invariants=False, is_coalesced=True
                )
            else:
                slope = values.new_zeros(ctx.shape).index_put_((index[0], index[1]), values)
            slopes.append(slope)
        return None, None, *slopes


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _last_hidden_state(output: Any) -> Tensor:
    state = getattr(output, "last_hidden_state", None)
    if isinstance(state, Tensor):
        return state
    raise ValueError(
        "the module around the layers returns no last_hidden_state, as decoders of transformers do, so the "
        "last layer's vectors after the final norm are unknown; leave the last layer out of `layers`"
    )


def _in_backward() -> bool:
    """Whether autograd is running a backward pass, as when a checkpointed layer is recomputed."""
    return bool(torch._C._current_graph_task_id() != -1)


def _in_checkpoint() -> bool:
    """Whether hooks on saved tensors are active: a recomputation would have to save what is saved here."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
