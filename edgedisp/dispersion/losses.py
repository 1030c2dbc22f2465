"""Dispersion losses over the token vectors of one sequence: the smaller, the more the vectors differ.

`angular`, l2-repel, decorrelation and orthogonalization are of arXiv 2602.00217 (section 4); `cosine` is a
form of Diffuse and Disperse (arXiv 2506.09027). docs/training.md says what differs from the code published
with 2602.00217. Everything is computed in float32 or better: in bfloat16 a cosine near 1 has steps of 0.004.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgedisp.dispersion.pairwise_kernel import FORMS, LEAST_TEMPERATURE, SHORTEST, pairwise_loss, precise

Loss = Callable[..., Tensor]
"""`(vectors, mask=None, *, temperature, clamp, precision)` -> a value for each sequence, `(batch,)`: vectors
`(batch, tokens, features)`, any floating dtype; mask `(batch, tokens)`, true for a real token, None for all.
Value and gradient are 0 for a sequence without a pair. Some have no use for an option."""

VARIANTS: dict[str, Loss] = {form: functools.partial(pairwise_loss, form) for form in FORMS}
"""The losses by the name that a recipe uses."""

ROUNDING_STEPS = 100  # a feature within so many rounding steps of its mean does not vary
NORM_PENALTY = 0.1  # of `l2_repel`


def unit_vectors(vectors: Tensor) -> Tensor:
    """`vectors` divided by their norms; a zero vector stays zero."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(SHORTEST)


def angular_distance(cosine: Tensor, clamp: float) -> Tensor:
    """`arccos(cosine) / pi` in [0, 1], of a cosine clamped to [-1 + clamp, 1 - clamp].

    The slope of the arc cosine grows without bound at +-1. Pairs outside the bounds keep the slope of the
    boundary, so they are still pushed apart. A clamp of 0 becomes the rounding step of the dtype.
    """
    edge = 1 - max(clamp, torch.finfo(cosine.dtype).eps)
    return torch.arccos(cosine + (cosine.clamp(-edge, edge) - cosine).detach()) / math.pi


def log_mean_exp_over_pairs(scores: Tensor, mask: Tensor) -> Tensor:
    """`log mean exp(scores)` over ordered pairs i != j of real tokens: `(..., N, N)` -> `(...)`, or -inf."""
    pairs = _pairs(mask)
    count = pairs.sum(dim=(-1, -2)).clamp_min(1).to(scores.dtype)
    return torch.logsumexp(torch.where(pairs, scores, -math.inf).flatten(-2), dim=-1) - count.log()


def _variant(formula: Loss) -> Loss:
    """Register a formula. It sees float32 or better, and zeros in place of padding."""

    @functools.wraps(formula)
    def loss(vectors: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
        mask = torch.ones_like(vectors[..., 0], dtype=torch.bool) if mask is None else mask.bool()
        # A selection and no product: 0 * inf is NaN, and its gradient too.
        clean = torch.where(mask.unsqueeze(-1), precise(vectors), 0.0)
        with torch.autocast(device_type=vectors.device.type, enabled=False):
            values = formula(clean, mask, **options)
        return torch.where(mask.sum(dim=-1) > 1, values, 0.0)

    VARIANTS[formula.__name__] = loss
    return loss


@_variant
def l2_repel(vectors: Tensor, mask: Tensor, *, temperature: float = 1.0, **_: object) -> Tensor:
    """`log mean exp(-|r_i - r_j|^2 / temperature) + 0.1 mean |r_i|^2`, r = z / (mean norm of the tokens).

    The paper's has r = z, which fails at norms of hundreds, where one pair takes the whole gradient, and its
    code takes the mean over features too in the penalty. 0.1 for equal vectors, near 0.1 - 2 / temperature
    for orthogonal ones. Attention sinks dominate the penalty.
    """
    count = mask.sum(dim=-1).clamp_min(1)
    unit = vectors.norm(dim=-1).sum(dim=-1) / count
    scaled = vectors / unit.clamp_min(SHORTEST)[..., None, None]
    squared = scaled.square().sum(dim=-1)
    distance = squared.unsqueeze(-1) + squared.unsqueeze(-2) - 2 * (scaled @ scaled.mT)
    penalty = NORM_PENALTY * squared.sum(dim=-1) / count
    return log_mean_exp_over_pairs(-distance / temperature, mask) + penalty


@_variant
def decorrelation(vectors: Tensor, mask: Tensor, **_: object) -> Tensor:
    """Mean squared correlation of two different features over the real tokens of the sequence: 0 for
    uncorrelated features, 1 when one number decides them all. A feature that does not vary counts as 0."""
    count = mask.sum(dim=-1).clamp_min(1)[..., None, None]
    mean = vectors.sum(dim=-2, keepdim=True) / count
    centred = torch.where(mask.unsqueeze(-1), vectors - mean, 0.0)
    variance = centred.square().sum(dim=-2, keepdim=True) / count
    size = vectors.square().sum(dim=-2, keepdim=True) / count
    varies = variance > (ROUNDING_STEPS * torch.finfo(vectors.dtype).eps) ** 2 * size
    # A product with 0 and no selection, so that a NaN stays one.
    standard = centred * torch.where(varies, variance, 1.0).rsqrt() * varies
    # The squares of the features x features and of the tokens x tokens products have the same sum.
    everything = (smaller_gram(standard) / count).square().sum(dim=(-1, -2))
    diagonal = (standard.square().sum(dim=-2) / count.squeeze(-1)).square().sum(dim=-1)
    features = vectors.shape[-1]
    return (everything - diagonal) / max(features * (features - 1), 1)


@_variant
def orthogonalization(vectors: Tensor, mask: Tensor, *, clamp: float = 0.1, **_: object) -> Tensor:
    """`mean max(0, 1/2 - D)^2` over pairs, D the angle over pi: pairs beyond a right angle are left alone."""
    directions, pairs = unit_vectors(vectors), _pairs(mask)
    gap = (0.5 - angular_distance(directions @ directions.mT, clamp)).clamp_min(0)
    return torch.where(pairs, gap.square(), 0.0).sum(dim=(-1, -2)) / pairs.sum(dim=(-1, -2)).clamp_min(1)


@_variant
def spectral_entropy(vectors: Tensor, mask: Tensor, **_: object) -> Tensor:
    """`sum p log p`, p the eigenvalues of the tokens' cosine matrix over their sum: -log(effective rank),
    from 0, all vectors in one line, down to -log(min(tokens, features)) (Giraldo, Rao and Principe, 2014)."""
    gram = smaller_gram(unit_vectors(vectors))
    # The decomposition refuses NaN and inf; the value shall be NaN, for the training loop to find.
    finite = gram.isfinite().all(dim=-1).all(dim=-1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # The gradient of eigenvalues alone, unlike that of eigenvectors, exists also where eigenvalues coincide.
    spectrum = torch.linalg.eigvalsh(torch.where(finite[..., None, None], gram, identity))
    share = spectrum / spectrum.sum(dim=-1, keepdim=True).clamp_min(SHORTEST)
    # What is 0 up to rounding adds nothing (p log p -> 0) and gets no gradient; padding adds such zeros.
    share = torch.where(share > torch.finfo(share.dtype).eps, share, 1.0)
    return torch.where(finite, (share * share.log()).sum(dim=-1), math.nan)


def _pairs(mask: Tensor) -> Tensor:
    """The ordered pairs i != j of real tokens: `(..., N)` -> `(..., N, N)`."""
    itself = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return mask.unsqueeze(-1) & mask.unsqueeze(-2) & ~itself


def smaller_gram(rows: Tensor) -> Tensor:
    """`X X'` or `X' X`, whichever is smaller: their eigenvalues other than 0 are the same."""
    tokens, features = rows.shape[-2:]
    return rows @ rows.mT if tokens <= features else rows.mT @ rows


# ---------------------------------------------------------------- options

LAYER_WORDS = ("all", "first_half", "last_half", "last")


@dataclass(frozen=True)
class DispersionConfig:
    """Which loss, how strong, over which layers and tokens.

    variant: a name in VARIANTS. weight: lambda in `CE + lambda * L`. layers: `all`, `first_half`,
    `last_half`, `last`, or indices from 0, the last one's after the final norm; never the embedding output.
    temperature: tau of the loss. tokens: how many tokens of each sequence are sampled, anew for each layer
    and step (the paper: 256); None takes all. clamp: cosines are clamped to [clamp - 1, 1 - clamp], see
    `angular_distance`. exclude_sink: leave out attention sinks: the first token, and any of more than 10
    times the median norm. seed: of the sampling.

    Raises ValueError naming the field, its value and what works.
    """

    variant: str = "angular"
    weight: float = 0.1
    layers: str | Sequence[int] = "all"
    temperature: float = 1.0
    tokens: int | None = 64
    clamp: float = 0.1
    exclude_sink: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        layers = self.layers
        if not isinstance(layers, str):
            object.__setattr__(self, "layers", layers := tuple(layers))
        is_layers = layers in LAYER_WORDS or (
            isinstance(layers, tuple) and 0 < len(layers) == len(set(layers)) and min(layers) >= 0
        )
        checks = {
            "variant": (self.variant in VARIANTS, f"one of {', '.join(VARIANTS)}"),
            "weight": (0 <= self.weight < math.inf, "a number of at least 0"),
            "temperature": (
                LEAST_TEMPERATURE <= self.temperature < math.inf,
                f"a number of at least {LEAST_TEMPERATURE}",
            ),
            "tokens": (self.tokens is None or self.tokens >= 2, "at least 2, or None for all"),
            "clamp": (0 <= self.clamp < 1, "a number from 0 to below 1"),
            "layers": (is_layers, f"{', '.join(LAYER_WORDS)}, or indices from 0, none twice"),
        }
        for name, (is_valid, what) in checks.items():
            if not is_valid:
                raise ValueError(f"dispersion {name} is {getattr(self, name)!r}; it needs {what}")
