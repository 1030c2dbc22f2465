"""How condensed a model's token vectors are: figures by layer, their trend with depth, and intervals.

Embedding condensation (arXiv 2602.00217): in deep layers the token vectors of a sequence crowd into a narrow
cone, so their pairwise cosines rise. The figures of a sequence at a layer (FIGURES):

- `cosine_raw`: mean over all pairs of tokens, as in the paper; `cosine_sink_excluded`: without sinks;
  `cosine_mean_removed`: also centred. If this is low while raw is high, the cone is a common offset.
- `effective_rank` (Roy & Vetterli, EUSIPCO 2007): exp of the entropy of the singular values over their sum.
- `maximum_explainable_variance` (Ethayarajh, arXiv 1909.00512, definition 3): s_1^2 / sum(s_i^2), uncentred.
- `kurtosis` over the features, m4 / m2^2, mean over tokens: 3 for normal values (Elhage et al., 2023).
- `max_over_median` of the absolute values (Sun et al., arXiv 2402.17762, mark 1,000), with and without sinks.
- `sinks`: tokens counted as such. Rank, variance and kurtosis are of the other tokens.

The trend is the paper's (figure 2): the rank correlation of a layer's mean cosine with its depth, over the
hidden states as transformers lists them (embedding output first, the last block AFTER the final norm).

Intervals are a bootstrap over sequences, whose tokens are not independent. Percentiles of few sequences are
too narrow, so they are moved outwards (Hesterberg, The American Statistician 69, 2015) to those that
Student's t needs, times sqrt(n / (n - 1)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from edgedisp.core.progress import Progress, silent
from edgedisp.dispersion.hooks import decoder_layers, hidden_states
from edgedisp.dispersion.losses import unit_vectors
from edgedisp.dispersion.sampling import SINK_NORM

BINS = 40  # of the histogram, over cosine -1 .. 1
ROWS = 512  # of the cosine matrix in memory at a time: 8 MB of float32 for 4,096 tokens
FEWEST_TOKENS = 4  # fewer leave no pair without sinks, or one that says nothing
RESAMPLES = 2000
FIGURES = (
    "cosine_raw", "cosine_sink_excluded", "cosine_mean_removed", "effective_rank",
    "maximum_explainable_variance", "kurtosis", "max_over_median", "max_over_median_sink_excluded", "sinks",
)  # fmt: skip

States = Callable[[Tensor], Sequence[Tensor]]
"""Token ids int64 `(tokens,)` -> depth + 2 tensors `(tokens, features)`: embedding, blocks, final norm."""

Statistic = Callable[[Tensor], Tensor]
"""Of curves `(..., layers)`, one number each."""


def mean_cosine(vectors: Tensor) -> Tensor:
    """Mean cosine of the pairs of different tokens: `(..., tokens, features)` -> float64 `(...)`.

    N unit vectors with the sum s have the mean (|s|^2 - N) / (N (N - 1)). A zero vector has cosine 0.
    """
    directions = unit_vectors(vectors.double())
    tokens = vectors.shape[-2]
    with_itself = directions.square().sum(dim=(-2, -1))  # one a token, but for zero vectors
    pairs = directions.sum(dim=-2).square().sum(dim=-1) - with_itself
    return pairs / (tokens * (tokens - 1))


def cosine_histogram(vectors: Tensor) -> Tensor:
    """Counts of the pairs by cosine: `(tokens, features)` -> int64 `(BINS,)` over -1 .. 1."""
    directions = unit_vectors(vectors.float())
    counts = torch.zeros(BINS, dtype=torch.int64, device=vectors.device)
    for start in range(0, len(directions), ROWS):
        rows = directions[start : start + ROWS] @ directions[start:].T
        above = torch.ones_like(rows, dtype=torch.bool).triu(diagonal=1)
        counts += torch.histc(rows[above].clamp(-1, 1), bins=BINS, min=-1, max=1).long()
    return counts


def attention_sinks(vectors: Tensor) -> Tensor:
    """Which tokens of `(tokens, features)` are attention sinks: the first, and norms above 10 medians."""
    norms = vectors.norm(dim=-1)
    is_sink = norms > SINK_NORM * norms.median()
    is_sink[0] = True
    return is_sink


def singular_values(vectors: Tensor) -> Tensor:
    """Singular values of `(tokens, features)`, float64, in rising order, by the smaller Gram matrix. Exact to
    1e-7 of the largest one, the rounding of float32 vectors; what is below counts as 0."""
    wide = vectors.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    squares = torch.linalg.eigvalsh(gram)
    noise = squares[-1] * len(squares) * torch.finfo(torch.float64).eps
    return squares.where(squares > noise, torch.zeros_like(squares)).sqrt()


def effective_rank(singular: Tensor) -> float:
    """exp(entropy of the normalised singular values), between 1 and their number; 1 if all are 0."""
    share = singular / singular.sum().clamp_min(1e-300)
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def kurtosis(vectors: Tensor) -> float:
    """Mean over tokens of the kurtosis over features of `(tokens, features)`: m4 / m2^2; 0 for zeros."""
    centred = vectors.double()
    squares = (centred - centred.mean(dim=-1, keepdim=True)).square()
    return float((squares.square().mean(dim=-1) / squares.mean(dim=-1).square().clamp_min(1e-24)).mean())


def max_over_median(vectors: Tensor) -> float:
    """Largest over median absolute value of `(tokens, features)`, the lower median of an even number."""
    sizes = vectors.abs().flatten()
    return float(sizes.max() / sizes.median().clamp_min(1e-12))


def measure_layer(vectors: Tensor) -> dict[str, Any]:
    """FIGURES and `histogram` (BINS counts) of one sequence at one layer: `(tokens, features)`, no padding.
    Raises ValueError for fewer than 4 tokens."""
    if len(vectors) < FEWEST_TOKENS:
        raise ValueError(f"{len(vectors)} tokens are too few to measure: at least {FEWEST_TOKENS} are needed")
    vectors = vectors.float()
    is_sink = attention_sinks(vectors)
    rest = vectors[~is_sink]
    singular = singular_values(rest)
    squares = singular.square()
    return {
        "cosine_raw": float(mean_cosine(vectors)),
        "cosine_sink_excluded": float(mean_cosine(rest)),
        "cosine_mean_removed": float(mean_cosine(rest - rest.mean(dim=0))),
        "effective_rank": effective_rank(singular),
        "maximum_explainable_variance": float(squares.max() / squares.sum().clamp_min(1e-300)),
        "kurtosis": kurtosis(rest),
        "max_over_median": max_over_median(vectors),
        "max_over_median_sink_excluded": max_over_median(rest),
        "sinks": float(is_sink.sum()),
        "histogram": cosine_histogram(vectors).tolist(),
    }


def bootstrap_interval(values: Tensor, statistic: Statistic) -> list[Tensor] | None:
    """95 % [low, high] of `statistic(mean over sequences)`: `(sequences, ...)`; None for a single sequence.
    Contains the estimate: rank correlations are lower in nearly every draw, as noise disturbs an order."""
    count = len(values)
    if count < 2:
        return None
    picks = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(RESAMPLES, count, dtype=torch.float64)
    weights.scatter_add_(1, picks, torch.ones_like(picks, dtype=torch.float64))
    drawn, estimate = statistic(weights / count @ values), statistic(values.mean(dim=0))
    t = student_t(NormalDist().inv_cdf(0.975), count - 1)
    tail = 1 - NormalDist().cdf(t * math.sqrt(count / (count - 1)))
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=drawn.dtype), dim=0)
    return [torch.minimum(low, estimate), torch.maximum(high, estimate)]


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
    each, others = values.unsqueeze(-1), values.unsqueeze(-2)
    ranks = (others < each).sum(dim=-1) + ((others == each).sum(dim=-1) + 1) / 2  # ties share their mean rank
    centred = ranks.double() - (values.shape[-1] + 1) / 2
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


@contextmanager
def torch_states(model: nn.Module) -> Iterator[States]:
    """The hidden states of a causal language model of transformers, without the head and its logits."""
    layers = range(-1, len(decoder_layers(model)))
    decoder: nn.Module = model.get_decoder()  # type: ignore[operator]  # every causal language model has it
    device = next(model.parameters()).device
    with hidden_states(model, layers) as states:

        def run(block: Tensor) -> list[Tensor]:
            last = decoder(input_ids=block[None].to(device), use_cache=False).last_hidden_state
            return [*(states.pop(index)[0] for index in layers), last[0]]

        yield run


def measure_model(model: nn.Module, blocks: Tensor, progress: Progress = silent) -> dict[str, Any]:
    """The profile of a causal language model in evaluation mode over token blocks; see `profile`."""
    with torch_states(model) as states:
        return profile(states, blocks, progress)


@torch.inference_mode()
def profile(states: States, blocks: Tensor, progress: Progress = silent) -> dict[str, Any]:
    """Measure every layer over every sequence.

    Args:
        states: gives the hidden states of one sequence.
        blocks: `(sequences, tokens)` int64, full blocks without padding, tokens >= 4.
    Returns a dict, fit for JSON:
        layers: for each a dict of `layer`, FIGURES (means over sequences), `histogram` (summed), and
            `intervals`: figure -> [low, high], 95 %; empty for a single sequence.
        final_norm: the same of the last layer after the final norm.
        mean_cosine: raw, mean over the blocks' outputs: {value, low, high}.
        correlations: {spearman, kendall}, each {value, low, high}.
        sequences, tokens: how many; by_sequence: figure -> [sequence][layer, the final norm last].
    """
    measured: list[list[dict[str, Any]]] = []
    for done, block in enumerate(blocks, start=1):
        measured.append([measure_layer(vectors) for vectors in states(block)])
        progress(done, len(blocks), "")
    by_sequence = {name: [[layer[name] for layer in layers] for layers in measured] for name in FIGURES}
    histograms = torch.tensor([[layer["histogram"] for layer in layers] for layers in measured]).sum(dim=0)
    rows: list[dict[str, Any]] = [{"intervals": {}, "histogram": counts} for counts in histograms.tolist()]
    for name in FIGURES:
        values = torch.tensor(by_sequence[name], dtype=torch.float64)
        bounds = bootstrap_interval(values, lambda mean: mean)
        for layer, row in enumerate(rows):
            row[name] = float(values[:, layer].mean())
            if bounds is not None:
                row["intervals"][name] = [float(bound[layer]) for bound in bounds]
    return {
        "layers": [{"layer": layer, **row} for layer, row in enumerate(rows[:-1])],
        "final_norm": rows[-1],
        **_over_layers("value", [torch.tensor(by_sequence["cosine_raw"], dtype=torch.float64)]),
        "sequences": len(blocks),
        "tokens": int(blocks.numel()),
        "by_sequence": by_sequence,
    }


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """second - first, two profiles over the same sequences, with paired intervals.

    Returns `layers` (each `layer` and figure -> {difference, low, high}; empty if the models differ in
    depth), `final_norm`, `mean_cosine`, `correlations`. The bounds are None for a single sequence. Raises
    ValueError for profiles of different numbers of sequences or tokens: those were not the same text.
    """
    if any(first[size] != second[size] for size in ("sequences", "tokens")):
        raise ValueError("profiles of different numbers of sequences or tokens cannot be compared")
    depths = {len(each["layers"]) for each in (first, second)}
    rows: list[dict[str, Any]] = [{"layer": n} for n in range(depths.pop() if len(depths) == 1 else 0)]
    last: dict[str, Any] = {}
    figures = {
        name: [torch.tensor(each["by_sequence"][name], dtype=torch.float64) for each in (first, second)]
        for name in FIGURES
    }
    for name, (before, after) in figures.items():
        for layer, row in ((-1, last), *enumerate(rows)):
            row[name] = _estimate("difference", after[:, layer] - before[:, layer], lambda mean: mean)
    return {"layers": rows, "final_norm": last, **_over_layers("difference", figures["cosine_raw"])}


def _estimate(name: str, values: Tensor, statistic: Statistic) -> dict[str, float | None]:
    """{name, low, high} of a statistic of the mean over sequences."""
    bounds = bootstrap_interval(values, statistic)
    low, high = (None, None) if bounds is None else map(float, bounds)
    return {name: float(statistic(values.mean(dim=0))), "low": low, "high": high}


def _over_layers(name: str, curves: list[Tensor]) -> dict[str, Any]:
    """`mean_cosine` and `correlations` of a model's mean cosines `(sequences, layers + 1)`, the final norm
    last, or the differences between two models."""
    widths = [curve.shape[1] for curve in curves]

    def estimate(statistic: Statistic) -> dict[str, float | None]:
        def of_all(mean: Tensor) -> Tensor:
            parts = [statistic(part) for part in mean.split(widths, dim=-1)]
            return parts[-1] - parts[0] if len(parts) > 1 else parts[0]

        return _estimate(name, torch.cat(curves, dim=1), of_all)

    def as_listed(curve: Tensor) -> Tensor:
        return torch.cat([curve[..., :-2], curve[..., -1:]], dim=-1)

    return {
        "mean_cosine": estimate(lambda curve: curve[..., 1:-1].mean(dim=-1)),
        "correlations": {
            "spearman": estimate(lambda curve: spearman(as_listed(curve))),
            "kendall": estimate(lambda curve: kendall(as_listed(curve))),
        },
    }


@torch.no_grad()
def quick_condensation(model: nn.Module, blocks: Tensor) -> dict[str, list[float]]:
    """`cosine_by_layer`, cheap enough to look at while a model trains: the raw mean cosine, averaged over
    sequences; index 0 is the embedding output, i the output of the i-th block.

    model: in evaluation mode, bare or wrapped by peft. blocks: `(sequences, tokens)` int64, without padding.
    """
    layers = range(-1, len(decoder_layers(model)))
    with hidden_states(model, layers) as states:
        model(input_ids=blocks.to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
        return {"cosine_by_layer": [float(mean_cosine(states[index]).mean()) for index in layers]}
