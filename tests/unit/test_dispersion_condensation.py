"""The figures of one sequence at one layer, against their definitions written out by loops."""

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
    attention_sinks,
    bootstrap_interval,
    compare,
    cosine_histogram,
    effective_rank,
    kendall,
    mean_cosine,
    measure_layer,
    profile,
    singular_values,
    spearman,
    student_t,
)

Vectors = NDArray[np.float64]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the definitions, by loops


def dot(left: Vectors, right: Vectors) -> float:
    return sum(float(a) * float(b) for a, b in zip(left, right))


def looped_mean_cosine(vectors: Vectors) -> float:
    pairs = [(i, j) for i in range(len(vectors)) for j in range(i)]
    norms = [math.sqrt(dot(v, v)) for v in vectors]
    return sum(dot(vectors[i], vectors[j]) / (norms[i] * norms[j]) for i, j in pairs) / len(pairs)


def looped_sinks(vectors: Vectors) -> list[bool]:
    norms = [math.sqrt(dot(v, v)) for v in vectors]
    median = sorted(norms)[(len(norms) - 1) // 2]
    return [place == 0 or norm > 10 * median for place, norm in enumerate(norms)]


def looped_kurtosis(vectors: Vectors) -> float:
    found = []
    for vector in vectors:
        mean = sum(vector) / len(vector)
        second, fourth = (sum((x - mean) ** power for x in vector) / len(vector) for power in (2, 4))
        found.append(fourth / second**2)
    return float(sum(found) / len(found))


def looped_max_over_median(vectors: Vectors) -> float:
    sizes = sorted(abs(float(x)) for vector in vectors for x in vector)
    return sizes[-1] / sizes[(len(sizes) - 1) // 2]


def looped_figures(vectors: Vectors) -> dict[str, float]:
    left_out = looped_sinks(vectors)
    rest = np.array([vector for vector, out in zip(vectors, left_out) if not out])
    mean = np.array([sum(column) / len(rest) for column in rest.T])
    singular = np.linalg.svd(rest, compute_uv=False)
    shares = [float(value / sum(singular)) for value in singular]
    return {
        "cosine_raw": looped_mean_cosine(vectors),
        "cosine_sink_excluded": looped_mean_cosine(rest),
        "cosine_mean_removed": looped_mean_cosine(np.array([vector - mean for vector in rest])),
        "effective_rank": math.exp(-sum(share * math.log(share) for share in shares)),
        "maximum_explainable_variance": float(singular[0] ** 2 / sum(value**2 for value in singular)),
        "kurtosis": looped_kurtosis(rest),
        "max_over_median": looped_max_over_median(vectors),
        "max_over_median_sink_excluded": looped_max_over_median(rest),
        "sinks": float(sum(left_out)),
    }


def test_every_figure_is_its_definition() -> None:
    vectors = randn(20, 16) + 0.5
    vectors[7] *= 40
    measured, expected = measure_layer(vectors), looped_figures(vectors.double().numpy())
    assert set(expected) == set(FIGURES)
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


# ---------------------------------------------------------------- cosines


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(2, 12), features=st.integers(1, 9), offset=st.floats(0, 30), seed=st.integers(0, 99)
)
def test_the_mean_cosine_needs_no_matrix(tokens: int, features: int, offset: float, seed: int) -> None:
    vectors = randn(tokens, features, seed=seed) + offset
    assert mean_cosine(vectors).item() == pytest.approx(
        looped_mean_cosine(vectors.double().numpy()), abs=1e-9
    )


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


# ---------------------------------------------------------------- directions


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(2, 20), features=st.integers(2, 20), seed=st.integers(0, 99))
def test_singular_values_are_those_of_a_decomposition(tokens: int, features: int, seed: int) -> None:
    vectors = randn(tokens, features, seed=seed)
    expected = np.linalg.svd(vectors.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(vectors).flip(0), expected, atol=1e-6 * expected[0])


# ---------------------------------------------------------------- outliers


def test_a_token_of_huge_norm_counts_as_a_sink_wherever_it_stands() -> None:
    vectors = randn(60, 32)
    plain = measure_layer(vectors)
    vectors[20] *= 100
    measured = measure_layer(vectors)
    assert plain["sinks"] == 1 and measured["sinks"] == 2
    assert attention_sinks(vectors).nonzero().flatten().tolist() == [0, 20]
    rest = torch.cat([vectors[1:20], vectors[21:]])
    assert measured["effective_rank"] == pytest.approx(effective_rank(singular_values(rest)))
    assert measured["cosine_sink_excluded"] == pytest.approx(mean_cosine(rest).item())
    assert measured["max_over_median"] > 10 * measured["max_over_median_sink_excluded"]


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
    found = change["layers"][2]["cosine_raw"]
    before, after = (one["layers"][2]["cosine_raw"] for one in (first, second))
    assert found["difference"] == pytest.approx(after - before)
    # The same noise is in both, so the pairs say more than the two intervals do.
    low, high = first["layers"][2]["intervals"]["cosine_raw"]
    assert 0 < found["low"] < found["high"] and found["high"] - found["low"] < (high - low) / 2
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
