"""How far single values of the hidden states stand out: what quantized activations suffer from.

- Sinks: the tokens that attention parks on. Their norms are up to 100 times the others'.
- Kurtosis: of each token's values over the features, averaged over tokens. 3 for normally distributed values;
  far more where some features are always large (Elhage et al., "Privileged Bases in the Transformer Residual
  Stream", 2023). Pearson's form, nothing subtracted.
- Max over median: the largest absolute value of the layer over the median one, over all tokens and features
  (Sun et al., "Massive Activations in Large Language Models", arXiv 2402.17762, sets 1,000 as its mark).
  The largest usually sits in a sink, so it is given with and without them.
"""

from __future__ import annotations

from torch import Tensor

SINK_NORM = 10.0
"""A token whose norm is more than so many times the sequence's median counts as an attention sink."""

SMALLEST = 1e-12
"""Keeps a layer of zeros from dividing by zero; its figures are then 0."""


def sinks(vectors: Tensor) -> Tensor:
    """Which tokens of `(tokens, features)` are attention sinks: bool `(tokens,)`, the first one always."""
    norms = vectors.norm(dim=-1)
    found = norms > SINK_NORM * norms.median()
    found[0] = True
    return found


def kurtosis(vectors: Tensor) -> float:
    """Mean over tokens of the kurtosis over features of `(tokens, features)`: m4 / m2^2."""
    centred = vectors.double()
    centred = centred - centred.mean(dim=-1, keepdim=True)
    squares = centred.square()
    spread = squares.mean(dim=-1).square().clamp_min(SMALLEST**2)
    return float((squares.square().mean(dim=-1) / spread).mean())


def max_over_median(vectors: Tensor) -> float:
    """Largest over median absolute value of `(tokens, features)`, the lower median of an even number."""
    sizes = vectors.abs().flatten()
    return float(sizes.max() / sizes.median().clamp_min(SMALLEST))
