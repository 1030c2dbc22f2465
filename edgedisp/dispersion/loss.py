"""Dispersion losses over the token vectors of one sequence: the smaller, the more the vectors differ.

One public function per variant, all with one signature: vectors `(..., tokens, features)` and a mask
`(..., tokens)`, true for a real token, give a scalar, the mean over those sequences (all leading dimensions:
layers, batch) that have at least two real tokens, so at least one pair. Without any such sequence the value
is 0 and so is the gradient. `BY_SEQUENCE` holds the same losses before that mean.

With z_i the real tokens of a sequence, c_ij their cosines and D_ij = arccos(c_ij) / pi:

| variant | value of a sequence | range |
|---|---|---|
| angular | log mean_{i != j} exp(-D_ij / temperature) | -1 / temperature .. 0 |
| cosine | log mean_{i != j} exp((c_ij - 1) / temperature) | -2 / temperature .. 0 |
| l2_repel | log mean_{i != j} exp(-|r_i - r_j|^2 / temperature) + 0.1 mean |r_i|^2, r_i = z_i / mean norm | |
| decorrelation | mean_{m != n} q_mn^2, q_mn the correlation of two features over the tokens | 0 .. 1 |
| orthogonalization | mean_{i != j} max(0, 1/2 - D_ij)^2 | 0 .. 1/4 |
| spectral_entropy | -log(effective rank) of the directions z_i / |z_i| | -log(features) .. 0 |

None depends on the unit of the vectors. Hidden states of language models have norms from 100 to 20,000,
growing with depth, and the next layer normalises them away. A loss that saw the unit would mean something
else in every layer, and longer vectors alone could lower it. Means stand where the papers write sums, so
that no value grows with the length of the sequence or the number of features.

`angular` is the loss of arXiv 2602.00217 (section 4); l2-repel, decorrelation and orthogonalization are
its alternatives; `cosine` is a form of Diffuse and Disperse (arXiv 2506.09027). What differs from the code
published with 2602.00217, and why:

- Padding takes part in no pair, mean or spectrum; there it does.
- Vectors are divided by their norm, there by the norm + 0.01, which ties the value to the unit.
- l2-repel leaves out the pairs i = i. Their distance is 0, so next to raw squared distances of thousands they
  are the whole sum, and nothing is repelled. Without them vectors need a unit: see `l2_repel`.
- Decorrelation correlates features over tokens, as the name says, and not tokens over features.
- Everything is computed in float32 or better, also under autocast: in bfloat16 a cosine near 1 has steps of
  0.004, coarser than the differences that these losses pull on.

Left out: the draw of tokens and the attention sink (collect.py), and sums over pairs without the N x N
matrix (blockwise.py). Here every pair is held at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[..., Tensor]
"""`(vectors, mask, *, temperature, clamp) -> Tensor`; see the top of this file."""

VARIANTS: dict[str, Loss] = {}
"""The losses by the name that a recipe uses: a scalar, the mean over the sequences that have a pair."""

BY_SEQUENCE: dict[str, Loss] = {}
"""The same losses, one value for each sequence, shape `(...)`; 0 for a sequence without a pair."""

# A vector shorter than this is treated as this long: the direction of a zero vector is undefined.
SHORTEST = 1e-6

# A feature that deviates from its mean by less than so many rounding steps of its size does not vary.
ROUNDING_STEPS = 100

NORM_PENALTY = 0.1
"""Weight of the norm penalty in `l2_repel`, that of the paper's code."""


def counted(mask: Tensor) -> Tensor:
    """Which sequences have a pair of real tokens: `(..., tokens)` -> `(...)` bool."""
    return mask.bool().sum(dim=-1) > 1


def cosine_matrix(vectors: Tensor) -> Tensor:
    """Cosine of every pair: `(..., tokens, features)` -> `(..., tokens, tokens)`, float32 or better."""
    directions = _directions(_precise(vectors))
    return directions @ directions.transpose(-1, -2)


def clamp_straight_through(values: Tensor, low: float, high: float) -> Tensor:
    """Clamp the value and pass the gradient through unchanged, also outside the bounds."""
    return values + (values.clamp(low, high) - values).detach()


def angular_distance(cosine: Tensor, clamp: float) -> Tensor:
    """`arccos(cosine) / pi` in [0, 1], of a cosine kept within [-1 + clamp, 1 - clamp], straight-through.

    The slope of the arc cosine grows without bound at +-1, where equal tokens and every token with itself
    lie. Pairs outside the bounds keep the slope of the boundary, so they are still pushed apart. A clamp of
    0 becomes the rounding step of the dtype, for a finite slope.
    """
    edge = 1 - max(clamp, torch.finfo(cosine.dtype).eps)
    return torch.arccos(clamp_straight_through(cosine, -edge, edge)) / math.pi


def log_mean_exp_over_pairs(scores: Tensor, mask: Tensor) -> Tensor:
    """`log mean exp(scores)` over ordered pairs i != j of real tokens: `(..., N, N)` -> `(...)`.

    A sequence with fewer than two real tokens has no pair; its value is 0 and carries no gradient.
    """
    pairs = _pairs(mask)
    count = pairs.sum(dim=(-1, -2))
    # An all-masked row would give log(0) = -inf and a NaN gradient: let such a sequence see zeros instead.
    visible = pairs | (count == 0)[..., None, None]
    scores = torch.where(visible, scores, torch.full_like(scores, -math.inf))
    value = torch.logsumexp(scores.flatten(-2), dim=-1) - count.clamp_min(1).to(scores.dtype).log()
    return torch.where(count > 0, value, torch.zeros_like(value))


def _variant(formula: Loss) -> Loss:
    """Register a formula under its name, and turn it into the public function that gives a scalar.

    The formula itself sees checked arguments, vectors of float32 or better, and zeros in place of padding,
    whatever stood there; it gives a value for each sequence, which counts only where there is a pair.
    """

    @functools.wraps(formula)
    def by_sequence(vectors: Tensor, mask: Tensor, **options: float) -> Tensor:
        _check(vectors, mask, **options)
        mask = mask.bool()
        # A selection and no product: 0 * inf is NaN, and its gradient too.
        clean = torch.where(mask.unsqueeze(-1), _precise(vectors), 0.0)
        with torch.autocast(device_type=vectors.device.type, enabled=False):
            values = formula(clean, mask, **options)
        return torch.where(counted(mask), values, 0.0)

    @functools.wraps(formula)
    def mean(vectors: Tensor, mask: Tensor, **options: float) -> Tensor:
        values = by_sequence(vectors, mask, **options)
        return values.sum() / counted(mask).sum().clamp_min(1)

    BY_SEQUENCE[formula.__name__] = by_sequence
    VARIANTS[formula.__name__] = mean
    return mean


@_variant
def angular(vectors: Tensor, mask: Tensor, *, temperature: float = 1.0, clamp: float = 0.1) -> Tensor:
    """The paper's loss: `log mean exp(-D / temperature)`, D the angle of a pair over pi.

    Args:
        vectors: `(..., tokens, features)`, any floating dtype; computed in float32 or better.
        mask: `(..., tokens)`, true for a real token.
        temperature: a small one looks at the nearest pairs alone, a large one at the mean angle.
        clamp: in [0, 1); see `angular_distance`.
    Raises ValueError for a temperature or clamp out of bounds, or a mask that does not fit the vectors.

    About -1 / (2 temperature) for orthogonal vectors.
    """
    distance = angular_distance(cosine_matrix(vectors), clamp)
    return log_mean_exp_over_pairs(-distance / temperature, mask)


@_variant
def cosine(vectors: Tensor, mask: Tensor, *, temperature: float = 1.0, clamp: float = 0.0) -> Tensor:
    """The cosine form of Diffuse and Disperse: `log mean exp(-D / temperature)`, D = 1 - cosine in [0, 2].

    That paper writes D = -cosine, which differs by the constant 1 / temperature. Arguments and errors as
    in `angular`. No clamp is needed, as the slope is 1 everywhere; one that is given works the same way.
    """
    clamped = clamp_straight_through(cosine_matrix(vectors), -1 + clamp, 1 - clamp)
    return log_mean_exp_over_pairs((clamped - 1) / temperature, mask)


@_variant
def l2_repel(vectors: Tensor, mask: Tensor, *, temperature: float = 1.0, clamp: float = 0.0) -> Tensor:
    """`log mean exp(-|r_i - r_j|^2 / temperature) + 0.1 mean |r_i|^2`, r = z / (mean norm of the tokens).

    The paper's l2-repel with its norm penalty, weighted as in its code, but with lengths measured in mean
    norms of the sequence. Its code takes raw vectors, which does not work here for two reasons:

    - At norms of hundreds a squared distance is near 1e5. Every exponential but the largest vanishes, and one
      pair takes the whole gradient. In SmolLM2-135M the raw value goes from -7 in the first layer to -16,000
      in the last, and its gradient from a thousand times that of `angular` to ten million times.
    - With the pairs i = i left out nothing bounds the loss from below. Unless two tokens are nearly equal
      (cosine above 0.95), longer vectors gain more by their distances than 0.1 mean |z|^2 costs.

    In mean norms, distances are of order 1 (2 - 2 cosine for equal norms) in every layer and model, the loss
    is bounded, and longer vectors gain nothing. The penalty then weighs unequal norms:
    `mean |r|^2 = 1 + (standard deviation of the norms / their mean)^2`. The code of Diffuse and Disperse
    divides squared distances by the number of features, which is the same for entries of mean square 1.

    0.1 for equal vectors; near 0.1 - 2 / temperature for orthogonal ones of equal norm. An attention
    sink of 80 times the norm of 255 others adds 1.5 of penalty: exclude it if it is to stay as it is.
    Arguments and errors as in `angular`; `clamp` is checked and not used.
    """
    unit = vectors.norm(dim=-1).sum(dim=-1) / mask.sum(dim=-1).clamp_min(1)
    scaled = vectors / unit.clamp_min(SHORTEST)[..., None, None]
    squared = scaled.square().sum(dim=-1)
    inner = scaled @ scaled.transpose(-1, -2)
    distance = squared.unsqueeze(-1) + squared.unsqueeze(-2) - 2 * inner
    penalty = NORM_PENALTY * squared.sum(dim=-1) / mask.sum(dim=-1).clamp_min(1)
    return log_mean_exp_over_pairs(-distance / temperature, mask) + penalty


@_variant
def decorrelation(vectors: Tensor, mask: Tensor, *, temperature: float = 1.0, clamp: float = 0.0) -> Tensor:
    """Mean squared correlation of two different features over the real tokens of the sequence.

    The paper's sum of squared off-diagonal covariances after standardising, divided by their number
    `features * (features - 1)`, so that the value does not grow with the width of the model: 0 for
    uncorrelated features, 1 when one number decides them all, about 1 / (tokens - 1) for independent draws.
    A feature that does not vary has no correlation and counts as 0.

    Each feature is centred, so an offset common to all tokens, which is most of a cone, goes unseen. An
    attention sink alone decides the variance of many features: exclude it.
    Arguments and errors as in `angular`; `temperature` and `clamp` are checked and not used.
    """
    count = mask.sum(dim=-1).clamp_min(1)[..., None, None]
    mean = vectors.sum(dim=-2, keepdim=True) / count
    centred = torch.where(mask.unsqueeze(-1), vectors - mean, 0.0)
    variance = centred.square().sum(dim=-2, keepdim=True) / count
    size = vectors.square().sum(dim=-2, keepdim=True) / count
    varies = variance > (ROUNDING_STEPS * torch.finfo(vectors.dtype).eps) ** 2 * size
    # A product with 0 and no selection, so that a NaN stays one.
    standard = centred * torch.where(varies, variance, 1.0).rsqrt() * varies
    # The squares of the features x features and of the tokens x tokens products have the same sum.
    everything = (_smaller_gram(standard) / count).square().sum(dim=(-1, -2))
    diagonal = (standard.square().sum(dim=-2) / count.squeeze(-1)).square().sum(dim=-1)
    features = vectors.shape[-1]
    return (everything - diagonal) / max(features * (features - 1), 1)


@_variant
def orthogonalization(
    vectors: Tensor, mask: Tensor, *, temperature: float = 1.0, clamp: float = 0.1
) -> Tensor:
    """`mean max(0, 1/2 - D)^2` over pairs, D the angle over pi: pairs beyond a right angle are left alone.

    Arguments and errors as in `angular`; `temperature` is checked and not used.
    """
    gap = (0.5 - angular_distance(cosine_matrix(vectors), clamp)).clamp_min(0)
    pairs = _pairs(mask)
    return torch.where(pairs, gap.square(), 0.0).sum(dim=(-1, -2)) / pairs.sum(dim=(-1, -2)).clamp_min(1)


@_variant
def spectral_entropy(
    vectors: Tensor, mask: Tensor, *, temperature: float = 1.0, clamp: float = 0.0
) -> Tensor:
    """`sum p log p`, p the eigenvalues of the tokens' cosine matrix over their sum: -log(effective rank).

    This is the matrix-based entropy of Giraldo, Rao and Principe (2014) at order 1. From 0, all vectors in
    one line, down to -log(min(tokens, features)), no direction before another. It differs from the
    effective rank that geometry.py reports (Roy and Vetterli 2007) in two ways: directions are taken and not
    vectors, since one attention sink would be most of the spectrum; and eigenvalues, the squares of the
    singular values, whose entropy has a gradient also where a singular value is 0.

    Costs an eigenvalue decomposition, min(tokens, features)^3, for each sequence and layer.
    Arguments and errors as in `angular`; `temperature` and `clamp` are checked and not used.
    """
    gram = _smaller_gram(_directions(vectors))
    # The decomposition refuses NaN and inf with an error about convergence. The value shall be NaN, as in
    # the other losses, for the training loop to find.
    finite = gram.isfinite().all(dim=-1).all(dim=-1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    safe = torch.where(finite[..., None, None], gram, identity)
    # The gradient of eigenvalues alone, sum_k g_k u_k u_k', exists also where eigenvalues coincide, unlike
    # that of eigenvectors: g is then the same for all of them, and their projector is unique.
    spectrum = torch.linalg.eigvalsh(safe)
    share = spectrum / spectrum.sum(dim=-1, keepdim=True).clamp_min(SHORTEST)
    # What is 0 up to rounding adds nothing (p log p -> 0) and gets no gradient; padding adds such zeros.
    share = torch.where(share > torch.finfo(share.dtype).eps, share, 1.0)
    return torch.where(finite, (share * share.log()).sum(dim=-1), math.nan)


def _precise(vectors: Tensor) -> Tensor:
    return vectors if vectors.dtype == torch.float64 else vectors.float()


def _directions(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(SHORTEST)


def _pairs(mask: Tensor) -> Tensor:
    """The ordered pairs i != j of real tokens: `(..., N)` -> `(..., N, N)`."""
    itself = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return mask.unsqueeze(-1) & mask.unsqueeze(-2) & ~itself


def _smaller_gram(rows: Tensor) -> Tensor:
    """`X X'` or `X' X`, whichever is smaller: their eigenvalues other than 0 are the same."""
    tokens, features = rows.shape[-2:]
    return rows @ rows.transpose(-1, -2) if tokens <= features else rows.transpose(-1, -2) @ rows


def _check(vectors: Tensor, mask: Tensor, temperature: float = 1.0, clamp: float = 0.0) -> None:
    if vectors.dim() < 2 or not vectors.is_floating_point():
        raise ValueError(
            f"vectors are {vectors.dtype} of shape {tuple(vectors.shape)}; "
            "they must be floating point, (..., tokens, features)"
        )
    if mask.shape != vectors.shape[:-1]:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)} and the vectors {tuple(vectors.shape)}; "
            f"the mask must have shape {tuple(vectors.shape[:-1])}, a value for each token"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature} does not work; it must be a finite number above 0")
    if not 0 <= clamp < 1:
        raise ValueError(f"clamp {clamp} does not work; it must be at least 0 and below 1")
