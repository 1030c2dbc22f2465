"""Take a few token vectors out of the outputs of layers, at little cost for those that stay.

The gradient of a draw is zero nearly everywhere. Written out as such, and added to the gradient of the
layer, it would move more memory than the whole dispersion loss. So it is a sparse tensor, which autograd adds
to the dense gradient that a layer's output has from the layers after it. An output that may have no other
gradient, as that of the last watched layer when nothing but the dispersion is differentiated, gets a dense
one: models cannot compute with sparse gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Where sparse tensors can be added to dense ones; elsewhere (MPS) zeros are written out.
SPARSE_DEVICES = ("cpu", "cuda")


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
        """Token vectors `(layers * batch, n, features)` of the outputs of neighbouring layers.

        Args:
            states: outputs `(batch, length, features)` of one shape and dtype.
            layers: which of `tokens` is each one's; rising by one.
            is_last: no layer whose gradient reaches the last of them draws after it.
        """
        chosen, device = slice(layers[0], layers[-1] + 1), states[0].device
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
