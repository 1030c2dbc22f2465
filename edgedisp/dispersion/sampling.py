"""Which tokens of a forward pass take part in the dispersion loss, and their vectors.

Padding takes no part, nor do vectors that a model puts before its tokens (peft's prompt tuning). Which tokens
are sampled depends on (seed, number of the sequence, layer) and the number of real tokens alone, through
generators of this module: the global random streams stay untouched.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from edgedisp.dispersion.losses import DispersionConfig, has_pair

SINK_NORM = 10.0  # medians of a sequence's norms, above which a token counts as an attention sink

# Where sparse gradients can be added to dense ones; elsewhere (MPS) zeros are written out.
SPARSE_DEVICES = ("cpu", "cuda")


class TokenSample:
    """The tokens of one forward pass that take part, over `layers` watched layers.

    state: a layer's output. mask: `(batch, tokens)`, true or 1 for a real token; None: all. length: of the
    sequences in the model's call, where known. first_sequence: number of the batch's first sequence.
    Raises ValueError for an output that is not `(batch, tokens, features)`, or a mask that does not fit it.
    """

    def __init__(
        self,
        config: DispersionConfig,
        layers: int,
        state: Tensor,
        mask: Tensor | None,
        length: int | None,
        first_sequence: int,
    ) -> None:
        if state.dim() != 3:
            raise ValueError(
                f"the layers' outputs are {tuple(state.shape)} and not (batch, tokens, features); dispersion "
                "does not work for models whose layers hand on several streams (Gemma 3n)"
            )
        device = state.device.type
        is_bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        self.precision = "bf16" if is_bf16 else "none"  # of the products of vectors
        self.batch, self.tokens = state.shape[:2]
        self.exclude_sink = config.exclude_sink
        virtual = max(self.tokens - length, 0) if length else 0
        real = None if mask is None else mask.to(state.device).bool()
        if real is not None and real.shape != (text := (self.batch, self.tokens - virtual)):
            raise ValueError(f"the mask is {tuple(real.shape)}, the token vectors are {text}")
        if real is not None and device == "cpu" and bool(real.all()):
            real = None  # spares a copy of the vectors at every layer
        if real is None and (virtual or config.exclude_sink):
            real = torch.ones(self.batch, self.tokens - virtual, dtype=torch.bool, device=state.device)
        self.sequences: Tensor | int = self.batch if self.tokens > 1 else 0  # how many count in the mean
        self.mask: Tensor | None = None  # of the candidates (batch, tokens), or (layers, batch, n) sampled
        if real is not None:
            self.mask = candidates(real, config.exclude_sink)
            self.sequences = has_pair(self.mask).sum()
            real, self.mask = pad(real, (virtual, 0)), pad(self.mask, (virtual, 0))
        self.picks: Tensor | None = None  # (layers, batch, n) int64, token indices
        if config.tokens is not None and config.tokens < self.tokens:
            every = torch.ones(self.batch, self.tokens, dtype=torch.bool)
            masks = [every if mask is None else mask.cpu() for mask in (real, self.mask)]
            picks = sample_tokens(config.tokens, layers, masks[0], masks[1], config.seed, first_sequence)
            self.picks = picks.to(state.device)
            if self.mask is not None:
                self.mask = self.mask.expand(layers, -1, -1).gather(2, self.picks)

    def vectors(self, outputs: list[tuple[int, Tensor]], is_last: bool) -> tuple[Tensor, Tensor | None]:
        """Vectors `(layers * batch, n, features)` and which of them are real; None: all.

        outputs: position among the watched layers, and `(batch, tokens, features)`, all of one shape and
        dtype; a single one without sampling. `is_last`: no watched layer follows the last of them.
        """
        layers, states = [layer for layer, _ in outputs], [state for _, state in outputs]
        vectors = states[0]
        if self.picks is not None:
            picks = self.picks[layers].flatten(1).to(vectors.device)  # (layers, batch * n)
            sequence = torch.arange(self.batch, device=vectors.device)
            sequence = sequence.repeat_interleave(self.picks.shape[2]).expand_as(picks)
            sampled: Tensor = _Gather.apply(torch.stack([sequence, picks], dim=1), is_last, *states)
            vectors = sampled.view(len(layers) * self.batch, -1, sampled.shape[-1])
        if self.mask is None:
            return vectors, None
        mask = self.mask if self.picks is None else self.mask[layers].flatten(0, 1)
        mask = mask.to(vectors.device)
        if self.exclude_sink:
            norms = torch.linalg.vector_norm(vectors.detach().float(), dim=-1)
            median = torch.where(mask, norms, math.nan).nanmedian(dim=1, keepdim=True).values
            mask = mask & ~(norms > SINK_NORM * median)
        return vectors, mask


def candidates(real: Tensor, exclude_sink: bool) -> Tensor:
    """Which real tokens `(batch, tokens)` may be sampled: not the first real one if sinks are excluded."""
    return real & (real.cumsum(dim=1) > 1) if exclude_sink else real


def sample_tokens(
    count: int, layers: int, real: Tensor, candidates: Tensor, seed: int, first_sequence: int
) -> Tensor:
    """Tokens that each layer samples of each sequence, int64 `(layers, batch, count)`, in rising order.

    count: at most `tokens`. real, candidates: `(batch, tokens)` bool on the CPU; others than candidates are a
    last resort. seed, first_sequence: the sample depends on them; rows of the batch count on.
    """
    keys = torch.full((layers, *real.shape), -1.0)
    for row, mask in enumerate(real):
        # One stream a sequence, as long as its real tokens: padding shifts nothing. On the CPU, so that CPU
        # and GPU runs sample the same tokens.
        mixed = hashlib.blake2b(repr((seed, first_sequence + row)).encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed))
        keys[:, row, mask] = torch.rand(layers, int(mask.sum()), generator=generator)
    keys.masked_fill_(~candidates, -1.0)
    return keys.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values


class _Gather(torch.autograd.Function):
    """Rows of the outputs of some layers: `(layers, batch * n, features)`, with sparse gradients.

    indices: `(layers, 2, batch * n)`, sequence and token. A dense gradient, zero nearly everywhere, would
    move more memory than the whole loss. Autograd adds a sparse one to the dense gradient from the layers
    after it; the last watched layer's output may have no other gradient, so it gets a dense one.
    """

    @staticmethod
    def forward(ctx: Any, indices: Tensor, is_last: bool, *states: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.shape, ctx.is_last = states[0].shape, is_last
        _, tokens, features = states[0].shape
        sampled = states[0].new_empty(len(states), indices.shape[2], features)
        for state, row, out in zip(states, indices[:, 0] * tokens + indices[:, 1], sampled):
            torch.index_select(state.reshape(-1, features), 0, row, out=out)
        return sampled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        slopes = list[Tensor]()
        for layer, (index, values) in enumerate(zip(indices, gradient)):
            if gradient.device.type in SPARSE_DEVICES and not (ctx.is_last and layer == len(indices) - 1):
                # Rising and none twice is what coalesced means.
                slope = torch.sparse_coo_tensor(
                    index, values, ctx.shape, check_invariants=False, is_coalesced=True
                )
            else:
                slope = values.new_zeros(ctx.shape).index_put_((index[0], index[1]), values)
            slopes.append(slope)
        return None, None, *slopes
