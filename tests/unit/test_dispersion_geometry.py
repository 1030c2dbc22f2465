"""The figures of one sequence at one layer, against their definitions written out by loops."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgedisp.dispersion import geometry
from edgedisp.dispersion.geometry import BINS, FIGURES, cosine_histogram, mean_cosine, measure_layer
from edgedisp.dispersion.outliers import kurtosis, max_over_median, sinks
from edgedisp.dispersion.spectrum import effective_rank, maximum_explainable_variance, singular_values

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


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_figure_is_its_definition_on_saved_hidden_states(
    architecture: str, tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder[architecture]).eval()
    ids = torch.randint(5, 100, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    np.save(tmp_path / "states.npy", torch.stack(states)[:, 0].numpy())
    for vectors in np.load(tmp_path / "states.npy"):
        measured, expected = measure_layer(torch.from_numpy(vectors)), looped_figures(vectors.astype(float))
        assert set(expected) == set(FIGURES)
        for figure, value in expected.items():
            assert measured[figure] == pytest.approx(value, rel=1e-5, abs=1e-5), figure


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


def test_the_mean_cosine_sees_directions_alone_and_takes_batches() -> None:
    vectors = randn(3, 10, 6)
    scaled = vectors * torch.rand(3, 10, 1, generator=torch.Generator().manual_seed(1)).add(0.1)
    torch.testing.assert_close(mean_cosine(scaled), torch.stack([mean_cosine(one) for one in vectors]))


def test_a_zero_vector_has_cosine_0_with_all_others() -> None:
    vectors = torch.ones(4, 3)
    vectors[2] = 0
    assert mean_cosine(vectors).item() == pytest.approx(3 / 6)  # three of the six pairs do without it


def test_the_histogram_in_blocks_is_the_one_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = randn(40, 5) + 0.5
    whole = cosine_histogram(vectors)
    assert whole.sum() == 40 * 39 // 2 and len(whole) == BINS
    directions = torch.nn.functional.normalize(vectors, dim=-1)
    above = torch.tensor([[i < j for j in range(40)] for i in range(40)])
    counted, _ = np.histogram((directions @ directions.T)[above].numpy(), bins=BINS, range=(-1, 1))
    assert np.abs(np.cumsum(whole.numpy()) - np.cumsum(counted)).max() <= 1  # rounding at a bin's edge
    monkeypatch.setattr(geometry, "ROWS", 7)
    assert np.abs(np.cumsum(cosine_histogram(vectors)) - np.cumsum(whole)).max() <= 1


def test_mean_removed_cosine_sees_through_a_common_offset() -> None:
    measured = measure_layer(randn(200, 64) + 10)
    assert measured["cosine_raw"] > 0.98
    assert abs(measured["cosine_mean_removed"]) < 0.02
    assert measured["maximum_explainable_variance"] > 0.98
    assert sum(measured["histogram"]) == 200 * 199 // 2


@pytest.mark.parametrize("tokens", [1, 3])
def test_too_few_tokens_are_an_error(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"{tokens} tokens are too few"):
        measure_layer(randn(tokens, 5))


def test_half_precision_is_measured_in_full() -> None:
    vectors = randn(12, 8).bfloat16()
    assert measure_layer(vectors) == measure_layer(vectors.float())


# ---------------------------------------------------------------- directions


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(2, 20), features=st.integers(2, 20), seed=st.integers(0, 99))
def test_singular_values_are_those_of_a_decomposition(tokens: int, features: int, seed: int) -> None:
    vectors = randn(tokens, features, seed=seed)
    expected = np.linalg.svd(vectors.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(singular_values(vectors).flip(0), expected, atol=1e-6 * expected[0])


def test_effective_rank_of_an_orthonormal_set_is_its_size() -> None:
    assert effective_rank(singular_values(torch.eye(6, 10))) == pytest.approx(6)
    assert effective_rank(singular_values(torch.eye(10, 6))) == pytest.approx(6)
    assert effective_rank(singular_values(torch.ones(6, 10))) == pytest.approx(1)


def test_maximum_explainable_variance_is_one_for_a_line_and_one_nth_for_an_orthonormal_set() -> None:
    assert maximum_explainable_variance(singular_values(torch.ones(6, 10))) == pytest.approx(1)
    assert maximum_explainable_variance(singular_values(torch.eye(6, 10))) == pytest.approx(1 / 6)


# ---------------------------------------------------------------- outliers


def test_a_token_of_huge_norm_counts_as_a_sink_wherever_it_stands() -> None:
    vectors = randn(60, 32)
    plain = measure_layer(vectors)
    vectors[20] *= 100
    measured = measure_layer(vectors)
    assert plain["sinks"] == 1 and measured["sinks"] == 2
    assert sinks(vectors).nonzero().flatten().tolist() == [0, 20]
    rest = torch.cat([vectors[1:20], vectors[21:]])
    assert measured["effective_rank"] == pytest.approx(effective_rank(singular_values(rest)))
    assert measured["cosine_sink_excluded"] == pytest.approx(mean_cosine(rest).item())
    assert measured["max_over_median"] > 10 * measured["max_over_median_sink_excluded"]


def test_kurtosis_of_normal_values_is_three_and_a_large_feature_raises_it() -> None:
    vectors = randn(20, 20_000)
    assert kurtosis(vectors) == pytest.approx(3, abs=0.05)
    vectors[:, 7] = 100
    assert kurtosis(vectors) > 1000
    assert kurtosis(3 * vectors[:, :50] + 1) == pytest.approx(kurtosis(vectors[:, :50]), rel=1e-5)


def test_kurtosis_is_scipys() -> None:
    from scipy import stats

    vectors = randn(5, 40) ** 3
    expected = stats.kurtosis(vectors.double().numpy(), axis=1, fisher=False).mean()
    assert kurtosis(vectors) == pytest.approx(expected, rel=1e-9)


def test_a_layer_of_zeros_gives_finite_figures() -> None:
    measured = measure_layer(torch.zeros(6, 4))
    assert all(math.isfinite(measured[figure]) for figure in FIGURES)
    assert max_over_median(torch.zeros(6, 4)) == 0
