"""Dispersion losses over the token vectors of one sequence: small when the vectors point apart.

Every function takes vectors `(..., tokens, features)` and a mask `(..., tokens)` (true for a real token)
and gives a value for each sequence, shape `(...)`: `log mean_{i != j} exp(-D(i, j) / temperature)` over
the ordered pairs of real tokens. The paper (arXiv 2602.00217, section 4) writes a sum in place of the
mean; the two differ by the constant `log(N (N - 1))`. The mean is used because its value does not depend
on the length of the sequence.

Two things differ from the paper's public code. Padding takes part in no pair. And the vectors are divided
by their exact norm, not by norm + 0.01, so that the loss does not depend on their scale.
Left for later: l2-repel, decorrelation, orthogonalization and spectral entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# A vector shorter than this is treated as this long: the direction of a zero vector is undefined.
SHORTEST = 1e-6


def cosine_matrix(vectors: Tensor) -> Tensor:
    """Cosine of every pair: `(..., tokens, features)` -> `(..., tokens, tokens)`, float32 or better."""
    # In bfloat16 a cosine near 1 has steps of 0.004, coarser than the differences that the loss pulls on.
    vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
    directions = vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(SHORTEST)
    return directions @ directions.transpose(-1, -2)


def clamp_straight_through(values: Tensor, low: float, high: float) -> Tensor:
    """Clamp the value and pass the gradient through unchanged, also outside the bounds."""
    return values + (values.clamp(low, high) - values).detach()


def log_mean_exp_over_pairs(scores: Tensor, mask: Tensor) -> Tensor:
    """`log mean exp(scores)` over ordered pairs i != j of real tokens: `(..., N, N)` -> `(...)`.

    A sequence with fewer than two real tokens has no pair; its value is 0 and carries no gradient.
    """
    pairs = mask.unsqueeze(-1) & mask.unsqueeze(-2)
    pairs = pairs & ~torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    count = pairs.sum(dim=(-1, -2))
    # An all-masked row would give log(0) = -inf and a NaN gradient: let such a sequence see zeros instead.
    visible = pairs | (count == 0)[..., None, None]
    scores = torch.where(visible, scores, torch.full_like(scores, -math.inf))
    value = torch.logsumexp(scores.flatten(-2), dim=-1) - count.clamp_min(1).to(scores.dtype).log()
    return torch.where(count > 0, value, torch.zeros_like(value))


def angular(vectors: Tensor, mask: Tensor, *, temperature: float = 1.0, clamp: float = 0.1) -> Tensor:
    """The paper's loss: `D = arccos(cosine) / pi`, in [0, 1].

    `clamp` = t keeps the cosine within [-1 + t, 1 - t] when the arc cosine is taken, since its slope grows
    without bound at +-1; pairs outside keep the slope of the boundary (straight-through).
    The value is smallest, about -1 / (2 temperature), when the vectors are orthogonal or opposed.
    """
    cosine = clamp_straight_through(cosine_matrix(vectors), -1 + clamp, 1 - clamp)
    return log_mean_exp_over_pairs(-torch.arccos(cosine) / (math.pi * temperature), mask)


def cosine(vectors: Tensor, mask: Tensor, *, temperature: float = 1.0, clamp: float = 0.0) -> Tensor:
    """The form of Diffuse-and-Disperse (arXiv 2506.09027): `D = 1 - cosine`, in [0, 2].

    `clamp` is taken for the sake of one signature and works as in `angular`; no clamp is needed, as the
    slope is 1 everywhere.
    """
    clamped = clamp_straight_through(cosine_matrix(vectors), -1 + clamp, 1 - clamp)
    return log_mean_exp_over_pairs((clamped - 1) / temperature, mask)


VARIANTS: dict[str, Callable[..., Tensor]] = {"angular": angular, "cosine": cosine}
"""The losses by the name that a recipe uses."""
