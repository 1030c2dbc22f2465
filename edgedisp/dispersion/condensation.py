"""How condensed a model's token vectors are: figures by layer, their trend with depth, and intervals.

In deep layers the token vectors of a sequence crowd into a narrow cone (embedding condensation, arXiv
2602.00217). `profile` measures FIGURES of each sequence at each layer, as transformers lists hidden states:
0 is the embedding output, the last one is after the final norm. `summary` gives their means, and the rank
correlation of a layer's mean cosine with its depth. Intervals are a bootstrap over sequences, with the
percentiles that Student's t needs, times sqrt(n / (n - 1)) (Hesterberg, The American Statistician 69, 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch
from torch import Tensor, nn

from edgedisp.core.progress import Progress, silent
from edgedisp.core.results import Condensation, Estimate, LayerProfile
from edgedisp.dispersion.hooks import SINK_NORM, hidden_states
from edgedisp.dispersion.losses import smaller_gram, unit_vectors

BINS = 40  # of the histogram, over cosine -1 .. 1
RESAMPLES = 2000
FIGURES = (
    "cosine_raw", "cosine_sink_excluded", "cosine_mean_removed", "effective_rank",
    "maximum_explainable_variance", "kurtosis", "max_over_median", "max_over_median_sink_excluded", "sinks",
)  # fmt: skip
"""Of one sequence at one layer:

- `cosine_raw`: mean over all pairs of tokens, as in the paper; `cosine_sink_excluded`: without sinks;
  `cosine_mean_removed`: also centred. If this is low while raw is high, the cone is a common offset.
- `effective_rank` (Roy & Vetterli, EUSIPCO 2007): exp of the entropy of the singular values over their sum.
- `maximum_explainable_variance` (Ethayarajh, arXiv 1909.00512, definition 3): s_1^2 / sum(s_i^2), uncentred.
- `kurtosis` over the features, mean over tokens: 3 for normal values (Elhage et al., 2023).
- `max_over_median` of the absolute values (Sun et al., arXiv 2402.17762), with and without sinks.
- `sinks`: the first token and those with a norm above 10 medians; not in rank, variance and kurtosis.
"""

States = Callable[[Tensor], Sequence[Tensor]]
"""Token ids int64 `(tokens,)` -> depth + 1 tensors `(tokens, features)`, transformers' `hidden_states`."""

Statistic = Callable[[Tensor], Tensor]  # curves (..., layers) -> (...) or (..., layers)


@dataclass(frozen=True)
class Profile:
    """figures: name -> [sequence][layer]. histograms: counts of pairwise cosines [layer][bin], summed over
    sequences."""

    figures: dict[str, list[list[float]]]
    histograms: list[list[int]]
    tokens: int

    def values(self, figure: str) -> Tensor:
        """float64 `(sequences, layers)`."""
        return torch.tensor(self.figures[figure], dtype=torch.float64)


def mean_cosine(vectors: Tensor) -> Tensor:
    """Mean cosine of the pairs of different tokens: `(..., tokens, features)` -> float64 `(...)`. N unit
    vectors with the sum s have the mean (|s|^2 - N) / (N (N - 1)). A zero vector has cosine 0."""
    directions = unit_vectors(vectors.double())
    tokens = vectors.shape[-2]
    with_itself = directions.square().sum(dim=(-2, -1))  # N, less the zero vectors
    pairs = directions.sum(dim=-2).square().sum(dim=-1) - with_itself
    return pairs / (tokens * (tokens - 1))


def cosine_histogram(vectors: Tensor) -> Tensor:
    """Counts of the pairs by cosine: `(tokens, features)` -> int64 `(BINS,)` over -1 .. 1."""
    directions = unit_vectors(vectors.float())
    cosines = (directions @ directions.T).clamp(-1, 1)
    above = torch.ones_like(cosines, dtype=torch.bool).triu(diagonal=1)
    return torch.histc(cosines[above], bins=BINS, min=-1, max=1).long()


def measure_layer(vectors: Tensor) -> dict[str, float]:
    """FIGURES of one sequence at one layer: `(tokens, features)`, at least 4 tokens, no padding."""
    vectors = vectors.float()
    norms = vectors.norm(dim=-1)
    is_sink = norms > SINK_NORM * norms.median()
    is_sink[0] = True
    rest = vectors[~is_sink]
    singular = _singular_values(rest)
    share, squares = singular / singular.sum().clamp_min(1e-300), singular.square()
    deviations = (rest.double() - rest.double().mean(dim=-1, keepdim=True)).square()
    kurtosis = deviations.square().mean(dim=-1) / deviations.mean(dim=-1).square().clamp_min(1e-24)
    sizes, sizes_of_rest = vectors.abs(), rest.abs()
    figures = {
        "cosine_raw": mean_cosine(vectors),
        "cosine_sink_excluded": mean_cosine(rest),
        "cosine_mean_removed": mean_cosine(rest - rest.mean(dim=0)),
        "effective_rank": torch.exp(-torch.special.xlogy(share, share).sum()),
        "maximum_explainable_variance": squares.max() / squares.sum().clamp_min(1e-300),
        "kurtosis": kurtosis.mean(),
        "max_over_median": sizes.max() / sizes.median().clamp_min(1e-12),
        "max_over_median_sink_excluded": sizes_of_rest.max() / sizes_of_rest.median().clamp_min(1e-12),
        "sinks": is_sink.sum(),
    }
    return {name: float(value) for name, value in figures.items()}


def _singular_values(vectors: Tensor) -> Tensor:
    """Float64, rising, by the smaller Gram matrix. Exact to 1e-7 of the largest, the rounding of float32."""
    squares = torch.linalg.eigvalsh(smaller_gram(vectors.double()))
    noise = squares[-1] * len(squares) * torch.finfo(torch.float64).eps
    return squares.where(squares > noise, 0.0).sqrt()


@torch.inference_mode()
def profile(states: States, blocks: Tensor, progress: Progress = silent) -> Profile:
    """Measure every layer over every sequence of `blocks`: `(sequences, tokens)` int64, without padding."""
    figures: dict[str, list[list[float]]] = {name: [] for name in FIGURES}
    histograms = torch.zeros(())
    for number, block in enumerate(blocks, start=1):
        layers = states(block)
        rows = [measure_layer(vectors) for vectors in layers]
        for name in FIGURES:
            figures[name].append([row[name] for row in rows])
        histograms = histograms + torch.stack([cosine_histogram(vectors).cpu() for vectors in layers])
        progress(number, len(blocks), "")
    return Profile(figures, histograms.long().tolist(), blocks.numel())


def measure_model(model: nn.Module, blocks: Tensor, progress: Progress = silent) -> Profile:
    """The profile of a causal language model of transformers in evaluation mode, without its head."""
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]  # every causal language model has it
    device = next(model.parameters()).device
    with hidden_states(model) as states:

        def run(block: Tensor) -> list[Tensor]:
            decoder(input_ids=block[None].to(device), use_cache=False)
            return [state[0] for state in states]

        return profile(run, blocks, progress)


@torch.no_grad()
def quick_condensation(model: nn.Module, blocks: Tensor) -> list[float]:
    """The raw mean cosine over sequences by layer, cheap enough to look at while a model trains.

    model: in evaluation mode, bare or wrapped by peft. blocks: `(sequences, tokens)` int64, without padding.
    """
    with hidden_states(model) as states:
        model(input_ids=blocks.to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
        return [float(mean_cosine(state).mean()) for state in states]


# ---------------------------------------------------------------- means over sequences


def summary(measured: Profile, reference: Profile | None = None) -> Condensation:
    """Means over sequences with 95 % intervals; with a reference also `change`, measured - reference, paired
    by sequence. It has no `layers` if the models differ in depth."""
    change = None if reference is None else _condensation(measured, reference)
    sequences = len(measured.figures["sinks"])
    return replace(_condensation(measured), sequences=sequences, tokens=measured.tokens, change=change)


def _condensation(measured: Profile, reference: Profile | None = None) -> Condensation:
    """Of one profile, or of the difference of two."""

    def estimate(statistic: Statistic, figure: str = "cosine_raw") -> list[Estimate]:
        before = None if reference is None else reference.values(figure)
        return estimates(statistic, measured.values(figure), before)

    rows, histograms = list[LayerProfile](), measured.histograms
    if reference is None or len(reference.histograms) == len(histograms):
        columns = zip(*(estimate(lambda mean: mean, name) for name in FIGURES))
        rows = [
            LayerProfile(layer, dict(zip(FIGURES, column)), () if reference else tuple(histograms[layer]))
            for layer, column in enumerate(columns)
        ]
    return Condensation(
        rows,
        estimate(lambda curve: curve[..., 1:].mean(dim=-1))[0],  # without the embedding
        {"spearman": estimate(spearman)[0], "kendall": estimate(kendall)[0]},
    )


def estimates(statistic: Statistic, measured: Tensor, reference: Tensor | None = None) -> list[Estimate]:
    """`statistic(mean over sequences)`, or measured - reference of it, and 95 % intervals, one a value.

    measured: float64 `(sequences, layers)`. A single sequence has no interval. An interval contains its
    estimate: rank correlations are lower in nearly every draw, as noise disturbs an order.
    """
    count = len(measured)

    def values(weights: Tensor) -> Tensor:
        result = statistic(weights @ measured)
        return result if reference is None else result - statistic(weights @ reference)

    estimate = values(torch.full((count,), 1 / count, dtype=torch.float64))
    if count < 2:
        return [Estimate(value) for value in estimate.reshape(-1).tolist()]
    picks = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(RESAMPLES, count, dtype=torch.float64)
    weights.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
    t = student_t(NormalDist().inv_cdf(0.975), count - 1)
    tail = 1 - NormalDist().cdf(t * math.sqrt(count / (count - 1)))
    tails = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.quantile(values(weights / count), tails, dim=0)
    bounds = torch.stack([estimate, torch.minimum(low, estimate), torch.maximum(high, estimate)])
    return [Estimate(*column) for column in bounds.reshape(3, -1).T.tolist()]


def student_t(z: float, freedom: int) -> float:
    """Student's t with the normal quantile z's probability (Fisher and Cornish): right to 0.3 % from 4
    degrees of freedom on; too small below, where the interval is all draws anyway."""
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def spearman(values: Tensor) -> Tensor:
    """Spearman's correlation of `(..., layers)` with the layers' order; 0 where all values are equal."""
    rows, columns = values.unsqueeze(-1), values.unsqueeze(-2)
    ranks = (columns < rows).sum(dim=-1) + ((columns == rows).sum(dim=-1) + 1) / 2  # ties share a mean rank
    centred = ranks.double() - (values.shape[-1] + 1) / 2
    order = torch.arange(values.shape[-1], dtype=torch.float64) - (values.shape[-1] - 1) / 2
    spread = centred.square().sum(dim=-1) * order.square().sum()
    return (centred * order).sum(dim=-1) / spread.sqrt().clamp_min(1e-300)


def kendall(values: Tensor) -> Tensor:
    """Kendall's tau-b of `(..., layers)` with the layers' order; 0 where all values are equal."""
    signs = torch.sign(values.unsqueeze(-2) - values.unsqueeze(-1)).double()  # [..., earlier, later]
    above = signs.triu(diagonal=1)
    pairs = values.shape[-1] * (values.shape[-1] - 1) / 2
    untied = above.abs().sum(dim=(-2, -1))
    return above.sum(dim=(-2, -1)) / (pairs * untied).sqrt().clamp_min(1e-300)
