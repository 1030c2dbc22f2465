"""How condensed the token vectors of one sequence are at one layer: the definitions.

Embedding condensation (arXiv 2602.00217): in deep layers the token vectors of a sequence crowd into a
narrow cone, so their pairwise cosines rise. One number hides two confounders, so three are given:

- `cosine_raw`: all tokens, as in the paper;
- `cosine_sink_excluded`: without the attention sinks, which point their own way: the first token, and any
  whose norm is more than 10 times the median (in Llama-like models also end-of-text tokens; up to 100 times);
- `cosine_mean_removed`: sink-excluded and centred on the sequence's mean vector. If this is low while raw is
  high, the cone is a common offset and not a loss of variety.

How many directions the tokens other than sinks use is told twice (spectrum.py), and how far single values
stand out is told by the outlier profile (outliers.py). What many sequences and layers say together is made in
profile.py.

A mean cosine needs no matrix of pairs: N unit vectors with the sum s have the mean (|s|^2 - N) / (N (N - 1)).
Only the histogram looks at every pair, a block of rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgedisp.dispersion.loss import SHORTEST
from edgedisp.dispersion.outliers import kurtosis, max_over_median, sinks
from edgedisp.dispersion.spectrum import effective_rank, maximum_explainable_variance, singular_values

BINS = 40
"""Histogram bins over cosine -1 .. 1."""

ROWS = 512
"""Rows of the cosine matrix held at a time: 8 MB of float32 for 4,096 tokens."""

FEWEST_TOKENS = 4
"""A sequence of fewer tokens has no pair left without its sinks, or one that says nothing."""

FIGURES = (
    "cosine_raw",
    "cosine_sink_excluded",
    "cosine_mean_removed",
    "effective_rank",
    "maximum_explainable_variance",
    "kurtosis",
    "max_over_median",
    "max_over_median_sink_excluded",
    "sinks",
)
"""What `measure_layer` gives beside the histogram; every one is averaged over sequences."""


def _directions(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(SHORTEST)


def mean_cosine(vectors: Tensor) -> Tensor:
    """Mean cosine of the pairs of different tokens, in O(tokens x features).

    `(..., tokens, features)`, at least 2 tokens -> float64 `(...)`. A zero vector has cosine 0 with all.
    """
    directions = _directions(vectors.double())
    tokens = vectors.shape[-2]
    with_itself = directions.square().sum(dim=(-2, -1))  # a token each, but for zero vectors
    pairs = directions.sum(dim=-2).square().sum(dim=-1) - with_itself
    return pairs / (tokens * (tokens - 1))


def cosine_histogram(vectors: Tensor) -> Tensor:
    """Counts of the unordered pairs by cosine: `(tokens, features)` -> int64 `(BINS,)` over -1 .. 1."""
    directions = _directions(vectors.float())
    counts = torch.zeros(BINS, dtype=torch.int64, device=vectors.device)
    for start in range(0, len(directions), ROWS):
        rows = directions[start : start + ROWS] @ directions[start:].T
        above = torch.ones_like(rows, dtype=torch.bool).triu(diagonal=1)
        counts += torch.histc(rows[above].clamp(-1, 1), bins=BINS, min=-1, max=1).long()
    return counts


def measure_layer(vectors: Tensor) -> dict[str, Any]:
    """The figures of one sequence at one layer: `(tokens, features)`, tokens >= 4, no padding.

    Returns FIGURES as floats and `histogram`, a list of BINS counts. `sinks` counts the tokens left out of
    the sink-excluded figures, the first one included. Raises ValueError for fewer than 4 tokens.
    """
    if len(vectors) < FEWEST_TOKENS:
        raise ValueError(f"{len(vectors)} tokens are too few to measure: at least {FEWEST_TOKENS} are needed")
    vectors = vectors.float()
    left_out = sinks(vectors)
    rest = vectors[~left_out]
    singular = singular_values(rest)
    return {
        "cosine_raw": float(mean_cosine(vectors)),
        "cosine_sink_excluded": float(mean_cosine(rest)),
        "cosine_mean_removed": float(mean_cosine(rest - rest.mean(dim=0))),
        "effective_rank": effective_rank(singular),
        "maximum_explainable_variance": maximum_explainable_variance(singular),
        "kurtosis": kurtosis(rest),
        "max_over_median": max_over_median(vectors),
        "max_over_median_sink_excluded": max_over_median(rest),
        "sinks": float(left_out.sum()),
        "histogram": cosine_histogram(vectors).tolist(),
    }
