"""The figures of one sequence at one layer, against numpy and scipy; intervals; differences of profiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from edgedisp.dispersion.condensation import (
    BINS,
    FIGURES,
    Profile,
    cosine_histogram,
    estimates,
    kendall,
    measure_layer,
    profile,
    spearman,
    student_t,
    summary,
)

Vectors = NDArray[np.float64]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosines(vectors: Vectors) -> Vectors:
    """Of every pair of different rows."""
    directions = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (directions @ directions.T)[np.triu_indices(len(vectors), 1)]


def by_definition(vectors: Vectors) -> dict[str, float]:
    norms = np.linalg.norm(vectors, axis=1)
    is_sink = norms > 10 * np.sort(norms)[(len(norms) - 1) // 2]
    is_sink[0] = True
    rest, sizes = vectors[~is_sink], np.sort(np.abs(vectors).ravel())
    sizes_of_rest, singular = np.sort(np.abs(rest).ravel()), np.linalg.svd(rest, compute_uv=False)
    return {
        "cosine_raw": cosines(vectors).mean(),
        "cosine_sink_excluded": cosines(rest).mean(),
        "cosine_mean_removed": cosines(rest - rest.mean(axis=0)).mean(),
        "effective_rank": math.exp(stats.entropy(singular)),
        "maximum_explainable_variance": singular[0] ** 2 / (singular**2).sum(),
        "kurtosis": stats.kurtosis(rest, axis=1, fisher=False).mean(),
        "max_over_median": sizes[-1] / sizes[(len(sizes) - 1) // 2],
        "max_over_median_sink_excluded": sizes_of_rest[-1] / sizes_of_rest[(len(sizes_of_rest) - 1) // 2],
        "sinks": float(is_sink.sum()),
    }


@pytest.mark.parametrize("shape", [(20, 16), (12, 30)])
def test_every_figure_is_its_definition(shape: tuple[int, int]) -> None:
    vectors = randn(*shape) + 0.5
    vectors[7] *= 40
    measured, expected = measure_layer(vectors), by_definition(vectors.double().numpy())
    assert set(expected) == set(FIGURES)
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_the_histogram_counts_each_pair_once() -> None:
    vectors = randn(40, 5) + 0.5
    whole = cosine_histogram(vectors)
    assert whole.sum() == 40 * 39 // 2 and len(whole) == BINS
    directions = torch.nn.functional.normalize(vectors, dim=-1)
    above = torch.tensor([[i < j for j in range(40)] for i in range(40)])
    counted, _ = np.histogram((directions @ directions.T)[above].numpy(), bins=BINS, range=(-1, 1))
    assert np.abs(np.cumsum(whole.numpy()) - np.cumsum(counted)).max() <= 1  # rounding at a bin's edge


def test_a_layer_of_zeros_gives_finite_figures() -> None:
    measured = measure_layer(torch.zeros(6, 4))
    assert all(math.isfinite(measured[figure]) for figure in FIGURES)


# ---------------------------------------------------------------- rank correlations

curves = st.lists(st.integers(-4, 4), min_size=3, max_size=9).filter(lambda values: len(set(values)) > 1)


@settings(max_examples=60, deadline=None)
@given(curves)
def test_both_correlations_are_scipys_ties_included(values: list[int]) -> None:
    curve, depth = torch.tensor(values, dtype=torch.float64), range(len(values))
    assert spearman(curve).item() == pytest.approx(stats.spearmanr(values, depth).statistic, abs=1e-12)
    assert kendall(curve).item() == pytest.approx(stats.kendalltau(values, depth).statistic, abs=1e-12)


# ---------------------------------------------------------------- intervals


def test_students_t_is_scipys_from_four_degrees_of_freedom_on() -> None:
    for confidence in (0.8, 0.95, 0.99):
        tail = 0.5 + confidence / 2
        for freedom in (4, 7, 15, 100):
            expected = stats.t.ppf(tail, freedom)
            assert student_t(stats.norm.ppf(tail), freedom) == pytest.approx(expected, rel=0.03)
        assert student_t(stats.norm.ppf(tail), 15) == pytest.approx(stats.t.ppf(tail, 15), rel=1e-3)


def test_an_interval_of_eight_sequences_covers_the_truth_about_as_often_as_it_says() -> None:
    before = torch.random.get_rng_state()
    columns = torch.randn(8, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = estimates(lambda mean: mean, columns)
    covered = sum(row.low < 0 < row.high for row in results if row.low is not None and row.high is not None)
    assert 0.91 < covered / 300 < 0.985  # plain percentiles: 0.88
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [row.value for row in results] == pytest.approx(columns.mean(dim=0).tolist())
    assert not estimates(lambda mean: mean, torch.ones(1, 3, dtype=torch.float64))[0].has_interval


# ---------------------------------------------------------------- differences


def random_profile(offset: float, layers: int = 3, rows: int = 6) -> Profile:
    """A profile of random vectors around a common offset that grows with depth."""

    def states(block: torch.Tensor) -> list[torch.Tensor]:
        noise = randn(layers + 1, 30, 12, seed=int(block[0]))
        return [noise[layer] + offset * layer / layers for layer in range(layers + 1)]

    return profile(states, torch.arange(rows).unsqueeze(1).expand(rows, 30))


def test_differences_are_paired_by_sequence() -> None:
    first, second = random_profile(1.0), random_profile(1.1)
    before, result = summary(first), summary(second, first)
    change = result.change
    assert change is not None and [row.layer for row in change.layers] == [0, 1, 2, 3]
    unchanged = change.layers[0].figures["cosine_raw"]  # the same vectors
    assert (unchanged.value, unchanged.low, unchanged.high) == (0, 0, 0)
    plain, after, paired = (row.layers[2].figures["cosine_raw"] for row in (before, result, change))
    assert plain.value is not None and after.value is not None and paired.low is not None
    assert paired.value == pytest.approx(after.value - plain.value) and paired.low > 0
    # The same noise is in both, so the pairs say more than the two intervals do.
    assert (paired.half_width or 0) < (plain.half_width or 0) / 2
    means = [row.mean_cosine.value for row in (before, result, change)]
    assert means[2] == pytest.approx((means[1] or 0) - (means[0] or 0))


def test_models_of_different_depth_are_compared_as_a_whole() -> None:
    shallow, deep = random_profile(1.0, layers=3), random_profile(1.0, layers=5)
    change = summary(deep, shallow).change
    assert change is not None and change.layers == []
    means = [summary(each).mean_cosine.value or 0 for each in (shallow, deep)]
    assert change.mean_cosine.value == pytest.approx(means[1] - means[0])
    assert change.correlations["kendall"].has_interval
