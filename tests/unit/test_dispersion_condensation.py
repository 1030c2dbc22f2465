"""The figures of one sequence at one layer, against numpy and scipy; intervals; differences of profiles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from edgedisp.dispersion import condensation
from edgedisp.dispersion.condensation import (
    BINS,
    FIGURES,
    bootstrap_interval,
    compare,
    cosine_histogram,
    kendall,
    measure_layer,
    profile,
    spearman,
    student_t,
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


def test_the_histogram_in_blocks_is_the_one_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = randn(40, 5) + 0.5
    whole = cosine_histogram(vectors)
    assert whole.sum() == 40 * 39 // 2 and len(whole) == BINS
    directions = torch.nn.functional.normalize(vectors, dim=-1)
    above = torch.tensor([[i < j for j in range(40)] for i in range(40)])
    counted, _ = np.histogram((directions @ directions.T)[above].numpy(), bins=BINS, range=(-1, 1))
    assert np.abs(np.cumsum(whole.numpy()) - np.cumsum(counted)).max() <= 1  # rounding at a bin's edge
    monkeypatch.setattr(condensation, "ROWS", 7)
    assert np.abs(np.cumsum(cosine_histogram(vectors)) - np.cumsum(whole)).max() <= 1


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
    generator, hits = torch.Generator().manual_seed(0), 0
    before = torch.random.get_rng_state()
    for _ in range(300):
        low, high = bootstrap_interval(
            torch.randn(8, generator=generator, dtype=torch.float64), lambda mean: mean
        ) or (torch.tensor(0), torch.tensor(0))
        hits += bool(low < 0 < high)
    assert 0.91 < hits / 300 < 0.985  # plain percentiles: 0.88
    assert torch.equal(torch.random.get_rng_state(), before)
    assert bootstrap_interval(torch.ones(1, 3), lambda mean: mean) is None


# ---------------------------------------------------------------- differences


def random_profile(offset: float, layers: int = 3, rows: int = 6, seed: int = 0) -> dict[str, Any]:
    """A profile of random vectors around a common offset that grows with depth."""

    def states(block: torch.Tensor) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(int(block[0]) + 1000 * seed)
        noise = torch.randn(layers + 1, 30, 12, generator=generator)
        return [noise[layer] + offset * layer / layers for layer in range(layers + 1)]

    return profile(states, torch.arange(rows).unsqueeze(1).expand(rows, 30))


def test_differences_are_paired_by_sequence() -> None:
    first, second = random_profile(1.0), random_profile(1.1)
    change = compare(first, second)
    assert [row["layer"] for row in change["layers"]] == [0, 1, 2]
    assert change["layers"][0]["cosine_raw"] == {"difference": 0, "low": 0, "high": 0}  # the same vectors
    difference = change["layers"][2]["cosine_raw"]
    before, after = (one["layers"][2]["cosine_raw"] for one in (first, second))
    assert difference["difference"] == pytest.approx(after - before)
    # The same noise is in both, so the pairs say more than the two intervals do.
    low, high = first["layers"][2]["intervals"]["cosine_raw"]
    assert (
        0 < difference["low"] < difference["high"]
        and difference["high"] - difference["low"] < (high - low) / 2
    )
    whole = change["mean_cosine"]
    assert whole["difference"] == pytest.approx(
        second["mean_cosine"]["value"] - first["mean_cosine"]["value"]
    )


def test_models_of_different_depth_are_compared_as_a_whole() -> None:
    shallow, deep = random_profile(1.0, layers=3), random_profile(1.0, layers=5)
    change = compare(shallow, deep)
    assert change["layers"] == [] and set(change["final_norm"]) == set(FIGURES)
    expected = deep["mean_cosine"]["value"] - shallow["mean_cosine"]["value"]
    assert change["mean_cosine"]["difference"] == pytest.approx(expected)
    assert math.isfinite(change["correlations"]["kendall"]["low"])


def test_profiles_over_other_sequences_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(random_profile(1.0), random_profile(1.0, rows=5))
