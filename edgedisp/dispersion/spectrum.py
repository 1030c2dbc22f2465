"""Over how many directions the token vectors of a sequence spread, from their singular values s_1 >= s_2 ...

- Effective rank (Roy & Vetterli, EUSIPCO 2007): exp of the entropy of s_i / sum(s). n equal singular values
  give n.
- Maximum explainable variance (Ethayarajh, arXiv 1909.00512, definition 3): s_1^2 / sum(s_i^2), the share
  that one direction can explain at best. There the vectors are the occurrences of one word in many sentences;
  here they are the tokens of one sequence. As in that formula, the mean is not removed: a common offset is
  just what it should see.

Both are taken of the tokens other than sinks: one token of a hundred times the norm would be all they saw.
"""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values(vectors: Tensor) -> Tensor:
    """Singular values of `(tokens, features)`, float64, in rising order.

    They are the roots of the eigenvalues of the smaller of the two Gram matrices, twice as fast as a singular
    value decomposition. In float64 that is exact to 1e-7 of the largest one, which is the rounding of float32
    vectors; what is below counts as 0.
    """
    wide = vectors.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    squares = torch.linalg.eigvalsh(gram)
    noise = squares[-1] * len(squares) * torch.finfo(torch.float64).eps
    return squares.where(squares > noise, torch.zeros_like(squares)).sqrt()


def effective_rank(singular: Tensor) -> float:
    """exp(entropy of the normalised singular values), between 1 and their number; 1 if all are 0."""
    share = singular / singular.sum().clamp_min(1e-300)
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def maximum_explainable_variance(singular: Tensor) -> float:
    """Share of the sum of squares that lies along the first singular direction; 0 if all are 0."""
    squares = singular.square()
    return float(squares.max() / squares.sum().clamp_min(1e-300))
