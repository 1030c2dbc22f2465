"""Dispersion losses over the token vectors of one sequence: the smaller, the more the vectors differ.

`angular`, l2-repel, decorrelation and orthogonalization are of arXiv 2602.00217 (section 4); `cosine` is a
form of Diffuse and Disperse (arXiv 2506.09027). Differences from the code published with 2602.00217:

- Padding takes part in no pair, mean or spectrum, and pairs i = i are left out of l2-repel.
- Vectors are divided by their norm, there by the norm + 0.01; `angular` there also adds a constant 0.01.
- Decorrelation correlates features over tokens, not tokens over features.
- Means replace sums, so that no value grows with the length of the sequence or the number of features.
- The last layer's vectors are taken before the final norm (hooks.py), there after it.
- Everything is computed in float32 or better: in bfloat16 a cosine near 1 has steps of 0.004.

Every pair is in memory at once here; pairwise_kernel.py computes two of the losses without that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Loss = Callable[..., Tensor]
"""`(vectors, mask, *, temperature, clamp)` -> a value for each sequence, `(...)`: vectors `(..., tokens,
features)`, any floating dtype; mask `(..., tokens)`, true for a real token. Value and gradient are 0 for a
sequence without a pair. Raises ValueError for a mask that does not fit. Some have no use for `temperature` or
`clamp`."""

VARIANTS: dict[str, Loss] = {}
"""The losses by the name that a recipe uses."""

SHORTEST = 1e-6  # shorter vectors are treated as this long: a zero vector has no direction
ROUNDING_STEPS = 100  # a feature within so many rounding steps of its mean does not vary
NORM_PENALTY = 0.1  # of `l2_repel`, as in the paper's code


def has_pair(mask: Tensor) -> Tensor:
    """Which sequences have a pair of real tokens: `(..., tokens)` -> `(...)` bool."""
    return mask.bool().sum(dim=-1) > 1


def unit_vectors(vectors: Tensor) -> Tensor:
    """`vectors` divided by their norms; a zero vector stays zero."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(SHORTEST)


def precise(vectors: Tensor) -> Tensor:
    """In float32, or float64 if they are."""
    return vectors if vectors.dtype == torch.float64 else vectors.float()


def clamp_straight_through(values: Tensor, low: float, high: float) -> Tensor:
    """Clamp the value and pass the gradient through unchanged, also outside the bounds."""
    return values + (values.clamp(low, high) - values).detach()


def angular_distance(cosine: Tensor, clamp: float) -> Tensor:
    """`arccos(cosine) / pi` in [0, 1], of a cosine kept within [-1 + clamp, 1 - clamp], straight-through.

    The slope of the arc cosine grows without bound at +-1. Pairs outside the bounds keep the slope of the
    boundary, so they are still pushed apart. A clamp of 0 becomes the rounding step of the dtype.
    """
    edge = 1 - max(clamp, torch.finfo(cosine.dtype).eps)
    return torch.arccos(clamp_straight_through(cosine, -edge, edge)) / math.pi


def log_mean_exp_over_pairs(scores: Tensor, mask: Tensor) -> Tensor:
    """`log mean exp(scores)` over ordered pairs i != j of real tokens: `(..., N, N)` -> `(...)`, or -inf."""
    pairs = _pairs(mask)
    count = pairs.sum(dim=(-1, -2)).clamp_min(1).to(scores.dtype)
    return torch.logsumexp(torch.where(pairs, scores, -math.inf).flatten(-2), dim=-1) - count.log()


def _variant(formula: Loss) -> Loss:
    """Register a formula. It sees float32 or better, and zeros in place of padding."""

    @functools.wraps(formula)
    def loss(vectors: Tensor, mask: Tensor, **options: float) -> Tensor:
        if mask.shape != vectors.shape[:-1]:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)} and the vectors {tuple(vectors.shape)}; "
                f"the mask must have shape {tuple(vectors.shape[:-1])}, a value for each token"
            )
        mask = mask.bool()
        # A selection and no product: 0 * inf is NaN, and its gradient too.
        clean = torch.where(mask.unsqueeze(-1), precise(vectors), 0.0)
        with torch.autocast(device_type=vectors.device.type, enabled=False):
            values = formula(clean, mask, **options)
        return torch.where(has_pair(mask), values, 0.0)

    VARIANTS[formula.__name__] = loss
    return loss


@_variant
def angular(vectors: Tensor, mask: Tensor, *, temperature: float = 1.0, clamp: float = 0.1) -> Tensor:
    """The paper's loss: `log mean exp(-D / temperature)`, D the angle of a pair over pi.

    A small temperature looks at the nearest pairs alone, a large one at the mean angle. About
    -1 / (2 temperature) for orthogonal vectors; with the defaults -0.144 for equal, -0.856 for opposite ones.
    """
    distance = angular_distance(_cosines(vectors), clamp)
    return log_mean_exp_over_pairs(-distance / temperature, mask)


@_variant
def cosine(vectors: Tensor, mask: Tensor, *, temperature: float = 1.0, clamp: float = 0.0) -> Tensor:
    """`log mean exp(-D / temperature)`, D = 1 - cosine; Diffuse and Disperse has D = -cosine."""
    clamped = clamp_straight_through(_cosines(vectors), -1 + clamp, 1 - clamp)
    return log_mean_exp_over_pairs((clamped - 1) / temperature, mask)


@_variant
def l2_repel(vectors: Tensor, mask: Tensor, *, temperature: float = 1.0, **_: float) -> Tensor:
    """`log mean exp(-|r_i - r_j|^2 / temperature) + 0.1 mean |r_i|^2`, r = z / (mean norm of the tokens).

    The paper's l2-repel with its norm penalty, but lengths are measured in mean norms of the sequence: raw
    vectors, as in its code, fail at norms of hundreds, where one pair takes the whole gradient. 0.1 for equal
    vectors, near 0.1 - 2 / temperature for orthogonal ones. Attention sinks dominate the penalty.
    """
    unit = vectors.norm(dim=-1).sum(dim=-1) / mask.sum(dim=-1).clamp_min(1)
    scaled = vectors / unit.clamp_min(SHORTEST)[..., None, None]
    squared = scaled.square().sum(dim=-1)
    inner = scaled @ scaled.transpose(-1, -2)
    distance = squared.unsqueeze(-1) + squared.unsqueeze(-2) - 2 * inner
    penalty = NORM_PENALTY * squared.sum(dim=-1) / mask.sum(dim=-1).clamp_min(1)
    return log_mean_exp_over_pairs(-distance / temperature, mask) + penalty


@_variant
def decorrelation(vectors: Tensor, mask: Tensor, **_: float) -> Tensor:
    """Mean squared correlation of two different features over the real tokens of the sequence.

    The paper's sum of squared off-diagonal covariances after standardising, divided by their number: 0 for
    uncorrelated features, 1 when one number decides them all. A feature that does not vary counts as 0.
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
def orthogonalization(vectors: Tensor, mask: Tensor, *, clamp: float = 0.1, **_: float) -> Tensor:
    """`mean max(0, 1/2 - D)^2` over pairs, D the angle over pi: pairs beyond a right angle are left alone."""
    gap = (0.5 - angular_distance(_cosines(vectors), clamp)).clamp_min(0)
    pairs = _pairs(mask)
    return torch.where(pairs, gap.square(), 0.0).sum(dim=(-1, -2)) / pairs.sum(dim=(-1, -2)).clamp_min(1)


@_variant
def spectral_entropy(vectors: Tensor, mask: Tensor, **_: float) -> Tensor:
    """`sum p log p`, p the eigenvalues of the tokens' cosine matrix over their sum: -log(effective rank).

    The matrix-based entropy of Giraldo, Rao and Principe (2014) at order 1: from 0, all vectors in one line,
    down to -log(min(tokens, features)). Costs min(tokens, features)^3 for each sequence and layer.
    """
    gram = _smaller_gram(unit_vectors(vectors))
    # The decomposition refuses NaN and inf; the value shall be NaN, for the training loop to find.
    finite = gram.isfinite().all(dim=-1).all(dim=-1)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # The gradient of eigenvalues alone, unlike that of eigenvectors, exists also where eigenvalues coincide.
    spectrum = torch.linalg.eigvalsh(torch.where(finite[..., None, None], gram, identity))
    share = spectrum / spectrum.sum(dim=-1, keepdim=True).clamp_min(SHORTEST)
    # What is 0 up to rounding adds nothing (p log p -> 0) and gets no gradient; padding adds such zeros.
    share = torch.where(share > torch.finfo(share.dtype).eps, share, 1.0)
    return torch.where(finite, (share * share.log()).sum(dim=-1), math.nan)


def _cosines(vectors: Tensor) -> Tensor:
    """Of every pair: `(..., tokens, features)` -> `(..., tokens, tokens)`."""
    directions = unit_vectors(vectors)
    return directions @ directions.transpose(-1, -2)


def _pairs(mask: Tensor) -> Tensor:
    """The ordered pairs i != j of real tokens: `(..., N)` -> `(..., N, N)`."""
    itself = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return mask.unsqueeze(-1) & mask.unsqueeze(-2) & ~itself


def _smaller_gram(rows: Tensor) -> Tensor:
    """`X X'` or `X' X`, whichever is smaller: their eigenvalues other than 0 are the same."""
    tokens, features = rows.shape[-2:]
    return rows @ rows.transpose(-1, -2) if tokens <= features else rows.transpose(-1, -2) @ rows


# ---------------------------------------------------------------- options

LAYER_WORDS = ("all", "first_half", "last_half", "last")


@dataclass(frozen=True)
class DispersionConfig:
    """Which loss, how strong, over which layers and tokens.

    Attributes:
        variant: a name in VARIANTS.
        weight: lambda in `CE + lambda * L`; 0 or more.
        layers: `all`, `first_half`, `last_half`, `last`, or indices from 0; never the embedding output.
        temperature: tau of the loss, above 0.
        tokens: how many tokens of each sequence are sampled, anew for each layer and step; None takes all.
            The paper takes 256. With 64, the gradient of SmolLM2-135M's weights has a cosine of 0.999 with
            that of all pairs of 256 tokens, for a sixteenth of the products (benchmarks/dispersion_cost.py).
        clamp: cosines are kept in [clamp - 1, 1 - clamp]; from 0 to below 1. See `angular_distance`.
        exclude_sink: leave attention sinks out: the first token of a sequence, and any whose norm is more
            than 10 times the median.
        seed: of the token sampling, which has random streams of its own.

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
        if isinstance(self.layers, list | range):
            object.__setattr__(self, "layers", tuple(self.layers))
        tokens, seed = self.tokens, self.seed
        layers = f"{', '.join(LAYER_WORDS)}, or indices from 0, none twice"
        self._need("variant", self.variant in list(VARIANTS), f"one of {', '.join(VARIANTS)}")
        self._need("weight", 0 <= self.weight < math.inf, "a number of at least 0")
        self._need("temperature", 0 < self.temperature < math.inf, "a number above 0")
        is_count = tokens is None or (isinstance(tokens, int) and tokens >= 2)
        self._need("tokens", is_count, "a whole number of at least 2, or None for all")
        self._need("clamp", 0 <= self.clamp < 1, "a number from 0 to below 1")
        self._need("seed", isinstance(seed, int) and seed >= 0, "a whole number of at least 0")
        self._need("layers", _are_layers(self.layers), layers)

    def _need(self, field: str, is_valid: bool, what: str) -> None:
        if not is_valid:
            raise ValueError(f"dispersion {field} is {getattr(self, field)!r}; it needs {what}")


def _are_layers(layers: object) -> bool:
    if not isinstance(layers, tuple):
        return layers in LAYER_WORDS
    return 0 < len(layers) == len(set(layers)) and all(isinstance(i, int) and i >= 0 for i in layers)
