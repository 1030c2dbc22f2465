"""How sure a figure over a handful of sequences is: a bootstrap over sequences, and rank correlations.

The sequence is what is drawn anew, because the tokens of one sequence are not independent. Every figure of a
measurement is computed from the same draws, so a figure of all layers (a correlation with depth) has its
interval from the same resampling as the layers themselves, and two models over the same sequences are
compared pair by pair.

Percentiles of a bootstrap over few sequences are too narrow: for 8 they cover 88 % in place of 95 %. They
are moved outwards as Hesterberg (The American Statistician 69, 2015) proposes: to the percentiles that
Student's t would need, times sqrt(n / (n - 1)).

The correlations are written here because this room has no scipy; the tests compare them with it.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

DRAWS = 2000


def draws(sequences: int, seed: int = 0, count: int = DRAWS) -> Tensor:
    """How much each sequence weighs in each draw: float64 `(count, sequences)`, rows summing to 1."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(sequences, (count, sequences), generator=generator)
    weights = torch.zeros(count, sequences, dtype=torch.float64)
    weights.scatter_add_(1, picked, torch.ones_like(picked, dtype=torch.float64))
    return weights / sequences


def interval(
    drawn: Tensor, estimate: Tensor, sequences: int, confidence: float = 0.95
) -> tuple[Tensor, Tensor]:
    """(low, high) of a statistic from its values in every draw: `(count, ...)` and `(...)` -> `(...)` twice.

    The interval holds the estimate: rank correlations are lower in nearly every draw than in the whole, since
    noise can only disturb an order. Raises ValueError for a single sequence, which says nothing of others.
    """
    if sequences < 2:
        raise ValueError("one sequence: no interval can be given")
    normal = NormalDist()
    stretch = _student_t(normal.inv_cdf(0.5 + confidence / 2), sequences - 1)
    tail = 1 - normal.cdf(stretch * math.sqrt(sequences / (sequences - 1)))
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=drawn.dtype), dim=0)
    return torch.minimum(low, estimate), torch.maximum(high, estimate)


def _student_t(z: float, freedom: int) -> float:
    """Student's t with the normal quantile z's probability, by Fisher and Cornish's series.

    Right to 0.3 % from 4 degrees of freedom on; too small below, where the interval is all draws anyway.
    """
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last dimension, equal values sharing their mean rank: float64, same shape."""
    own, others = values.unsqueeze(-1), values.unsqueeze(-2)
    below, equal = (others < own).sum(dim=-1), (others == own).sum(dim=-1)
    return below.double() + (equal.double() + 1) / 2


def spearman(values: Tensor) -> Tensor:
    """Spearman's correlation of `(..., layers)` with the layers' order; 0 where all values are equal."""
    centred = ranks(values) - (values.shape[-1] + 1) / 2
    order = torch.arange(values.shape[-1], dtype=torch.float64) - (values.shape[-1] - 1) / 2
    spread = centred.square().sum(dim=-1) * order.square().sum()
    return (centred * order).sum(dim=-1) / spread.sqrt().clamp_min(1e-300)


def kendall(values: Tensor) -> Tensor:
    """Kendall's tau-b of `(..., layers)` with the layers' order; 0 where all values are equal."""
    steps = torch.sign(values.unsqueeze(-2) - values.unsqueeze(-1)).double()  # [..., earlier, later]
    above = steps.triu(diagonal=1)
    pairs = values.shape[-1] * (values.shape[-1] - 1) / 2
    untied = above.abs().sum(dim=(-2, -1))
    return above.sum(dim=(-2, -1)) / (pairs * untied).sqrt().clamp_min(1e-300)
