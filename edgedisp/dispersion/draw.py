"""Which tokens of a forward pass take part in the term, and their vectors out of the outputs of layers.

Padding takes no part. Nor do vectors that a model puts before the tokens it was called with, as in peft's
prompt tuning: they are parameters, the same in every sequence.

Which tokens are drawn depends on (seed, number of the sequence, layer) alone, through generators of this
module's own: the global random streams are not touched.

The gradient of a draw is zero nearly everywhere. Written out as such, and added to the gradient of the
layer, it would move more memory than the whole dispersion loss. So it is a sparse tensor, which autograd adds
to the dense gradient that a layer's output has from the layers after it. An output that may have no other
gradient, as that of the last watched layer when nothing but the dispersion is differentiated, gets a dense
one: models cannot compute with sparse gradients.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from edgedisp.dispersion.config import DispersionConfig
from edgedisp.dispersion.loss import counted
from edgedisp.dispersion.outliers import SINK_NORM

# Where sparse tensors can be added to dense ones; elsewhere (MPS) zeros are written out.
SPARSE_DEVICES = ("cpu", "cuda")


def taking_part(real: Tensor, exclude_sink: bool) -> Tensor:
    """Which real tokens `(batch, tokens)` take part as far as a mask tells: without the sink, if asked."""
    # The first REAL token, also under left padding.
    return real & (real.cumsum(dim=1) > 1) if exclude_sink else real


class Tokens:
    """The tokens of one forward pass that take part.

    Args:
        config: of the term.
        layers: how many are watched.
        state: the output of one of them.
        mask: `(batch, length)`, true or 1 for a real token; None: all are real.
        length: of the sequences that the model was called with, the last tokens of `state`; None: all of it.
        first_sequence: see `choose`.

    Attributes:
        batch: how many sequences there are.
        sequences: how many of them count: those with two tokens to compare, as far as a mask tells.

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
        self.batch, tokens = state.shape[:2]
        self.exclude_sink = config.exclude_sink
        before = max(tokens - length, 0) if length else 0
        real = None if mask is None else mask.to(state.device).bool()
        if real is not None and real.shape != (text := (self.batch, tokens - before)):
            raise ValueError(f"the mask is {tuple(real.shape)}, the token vectors are {text}")
        if real is not None and real.device.type == "cpu" and bool(real.all()):
            real = None  # spares a copy of the vectors at every layer
        if real is None and (before or config.exclude_sink):
            real = torch.ones(self.batch, tokens - before, dtype=torch.bool, device=state.device)
        self.sequences: Tensor | int = self.batch if tokens > 1 else 0
        if real is not None:
            real = taking_part(real, config.exclude_sink)
            self.sequences = counted(real).sum()
            real = pad(real, (before, 0))
        self._picks: Picks | None = None
        self._real = real  # of those that take part: (batch, tokens), drawn (layers, batch, n); None: all
        if config.tokens is not None and config.tokens < tokens:
            shape = (layers, self.batch, tokens)
            drawn = choose(config.tokens, shape, real, seed=config.seed, first_sequence=first_sequence)
            drawn = drawn.to(state.device)
            self._picks = Picks(drawn, tokens)
            self._real = None if real is None else real.expand(layers, -1, -1).gather(2, drawn)

    @property
    def are_drawn(self) -> bool:
        """Whether each layer has tokens of its own, so that not all take part."""
        return self._picks is not None

    def of(
        self, states: Sequence[Tensor], layers: Sequence[int], is_last: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Vectors `(layers * batch, n, features)`, and which of them are real; None: all. As `Picks.draw`.

        Without a draw `states` is a single one.
        """
        vectors = states[0] if self._picks is None else self._picks.draw(states, layers, is_last)
        if self._real is None:
            return vectors, None
        masks = [self._real if self._picks is None else self._real[layer] for layer in layers]
        mask = torch.cat(masks).to(vectors.device)
        return vectors, mask & ~_sinks(vectors.detach(), mask) if self.exclude_sink else mask


def _sinks(vectors: Tensor, mask: Tensor) -> Tensor:
    """Which tokens are far longer than the median of their sequence's, `(batch, n)`."""
    norms = torch.linalg.vector_norm(vectors.float(), dim=-1)
    median = torch.where(mask, norms, math.nan).nanmedian(dim=1, keepdim=True).values
    return norms > SINK_NORM * median


def choose(
    count: int, shape: tuple[int, int, int], real: Tensor | None = None, *, seed: int, first_sequence: int
) -> Tensor:
    """Tokens that each layer draws of each sequence, `(layers, batch, count)`, in rising order.

    Args:
        count: how many of a sequence, at most `tokens`.
        shape: layers, batch, tokens.
        real: `(batch, tokens)`, true where a token may be drawn; others are the last resort. None: all may.
        seed, first_sequence: the numbers that the draw depends on; rows of the batch count on.
    """
    layers, batch, tokens = shape
    keys = torch.empty(shape)
    for row in range(batch):
        # On the CPU, so that CPU and GPU runs draw the same tokens.
        generator = torch.Generator().manual_seed(_stream(seed, first_sequence + row))
        keys[:, row] = torch.rand(layers, tokens, generator=generator)
    if real is not None:
        keys.masked_fill_(~real.cpu(), -1.0)
    return keys.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values


def _stream(*numbers: int) -> int:
    """A seed for each combination of numbers; neighbouring ones get unrelated streams."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest())


class Picks:
    """Which tokens each layer draws.

    Args:
        tokens: `(layers, batch, n)`, int64: indices, rising and none twice within a sequence.
        length: of the sequences.
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        layers, batch, n = tokens.shape
        # For all layers at once, because starting small operations is what a draw costs.
        sequence = torch.arange(batch, device=tokens.device).repeat_interleave(n).expand(layers, -1)
        flat = tokens.reshape(layers, -1)
        self.n = n
        self._rows = sequence * length + flat  # (layers, batch * n), in a layer's flattened output
        self._places = torch.stack([sequence, flat], dim=1)  # (layers, 2, batch * n)

    def draw(self, states: Sequence[Tensor], layers: Sequence[int], is_last: bool) -> Tensor:
        """Token vectors `(layers * batch, n, features)` of the outputs of some layers.

        Args:
            states: outputs `(batch, length, features)` of one shape and dtype.
            layers: which of `tokens` is each one's.
            is_last: no layer whose gradient reaches the last of them draws after it.
        """
        first, device = layers[0], states[0].device
        run = range(first, first + len(layers))
        # A slice is a view; a model that skips layers leaves gaps, for which the rows are copied together.
        chosen = slice(run.start, run.stop) if list(layers) == list(run) else list(layers)
        rows, places = self._rows[chosen].to(device), self._places[chosen].to(device)
        drawn: Tensor = _Draw.apply(rows, places, is_last, *states)
        return drawn.view(-1, self.n, drawn.shape[-1])


class _Draw(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, is_last: bool, *states: Tensor) -> Tensor:
        ctx.save_for_backward(rows, places)
        ctx.shape, ctx.is_last = states[0].shape, is_last
        features = states[0].shape[-1]
        drawn = states[0].new_empty(*rows.shape, features)
        for state, row, where in zip(states, rows, drawn):
            torch.index_select(state.reshape(-1, features), 0, row, out=where)
        return drawn

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, places = ctx.saved_tensors
        is_sparse = [gradient.device.type in SPARSE_DEVICES] * len(rows)
        is_sparse[-1] &= not ctx.is_last
        slopes = [
            _sparse(place, values, ctx.shape) if sparse else _dense(row, values, ctx.shape)
            for row, place, values, sparse in zip(rows, places, gradient, is_sparse)
        ]
        return None, None, None, *slopes


def _sparse(places: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    # Rising and none twice is what coalesced means.
    return torch.sparse_coo_tensor(places, values, shape, check_invariants=False, is_coalesced=True)


def _dense(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return values.new_zeros(shape[0] * shape[1], shape[2]).index_copy_(0, rows, values).view(shape)
