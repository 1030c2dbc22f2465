"""The losses against their formulas in numpy, in float64, and what the mask promises."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from edgedisp.dispersion.losses import VARIANTS, angular_distance, log_mean_exp_over_pairs, spectral_entropy

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "dispersion.json"

LOSSES = ["angular", "cosine", "l2_repel", "decorrelation", "orthogonalization", "spectral_entropy"]
every_loss = pytest.mark.parametrize("name", LOSSES)


def random_case(seed: int, batch: int = 3, tokens: int = 7, features: int = 5) -> tuple[Tensor, Tensor]:
    """Float64 vectors, and a mask with at least two real tokens of each sequence at random places."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(batch, tokens, features, generator=generator, dtype=torch.float64)
    lengths = torch.randint(2, tokens + 1, (batch, 1), generator=generator)
    order = torch.rand(batch, tokens, generator=generator).argsort(dim=1)
    return vectors, order < lengths


def everything(vectors: Tensor) -> Tensor:
    return torch.ones(vectors.shape[:-1], dtype=torch.bool)


def gradient(name: str, vectors: Tensor, mask: Tensor) -> Tensor:
    leaf = vectors.clone().requires_grad_()
    return torch.autograd.grad(VARIANTS[name](leaf, mask).sum(), leaf)[0]


def by_numpy(name: str, rows: np.ndarray, temperature: float, clamp: float) -> float:
    """The loss of one sequence's real tokens."""
    apart = ~np.eye(len(rows), dtype=bool)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    gram = (rows / norms) @ (rows / norms).T
    cosines = gram[apart].clip(-1 + clamp, 1 - clamp)
    if name == "angular":
        return float(np.log(np.exp(-np.arccos(cosines) / math.pi / temperature).mean()))
    if name == "cosine":
        return float(np.log(np.exp((cosines - 1) / temperature).mean()))
    if name == "orthogonalization":
        return float((np.maximum(0, 0.5 - np.arccos(cosines) / math.pi) ** 2).mean())
    if name == "l2_repel":
        scaled = rows / norms.mean()
        squares = np.square(scaled[:, None] - scaled[None]).sum(axis=-1)[apart]
        penalty = np.square(scaled).sum(axis=-1).mean()
        return float(np.log(np.exp(-squares / temperature).mean()) + 0.1 * penalty)
    if name == "decorrelation":
        correlations = np.corrcoef(rows.T)
        return float(np.square(correlations[~np.eye(len(correlations), dtype=bool)]).mean())
    return -float(stats.entropy(np.linalg.eigvalsh(gram).clip(0)))


@every_loss
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("shape", [(7, 5), (4, 6)])  # more tokens than features, and fewer
def test_value_is_the_formula_in_numpy(name: str, temperature: float, shape: tuple[int, int]) -> None:
    vectors, mask = random_case(0, 3, *shape)
    vectors[:, 1] = vectors[:, 0] * 2  # a pair that the clamp moves
    mask[:, :2] = True
    expected = [by_numpy(name, rows[real].numpy(), temperature, 0.1) for rows, real in zip(vectors, mask)]
    values = VARIANTS[name](vectors, mask, **{} if temperature == 1 else {"temperature": temperature})
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-12)


@every_loss
@pytest.mark.parametrize("shape", [(5, 4), (3, 6)])
def test_gradient_is_the_derivative_of_the_value(name: str, shape: tuple[int, int]) -> None:
    vectors, mask = random_case(1, 2, *shape)
    vectors.requires_grad_()
    # Random vectors stay inside a clamp of 0.001, where straight-through and true gradient are one.
    assert torch.autograd.gradcheck(lambda z: VARIANTS[name](z, mask, clamp=0.001), (vectors,))


def test_spectral_entropy_has_its_gradient_where_eigenvalues_coincide() -> None:
    # Three vectors at one angle have eigenvalues 1 + 2c, 1 - c, 1 - c; the gradient is not 0 there.
    equiangular = (torch.eye(3, 5) + 0.4).double()
    # Orthogonal vectors, each there twice: eigenvalues 2, 2, 0, 0.
    twins = torch.eye(2, 5).double().repeat(2, 1)
    for vectors in (equiangular, twins):
        leaf = vectors[None].clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda z: spectral_entropy(z, everything(z)), (leaf,))
    assert gradient("spectral_entropy", equiangular[None], everything(equiangular[None])).norm() > 0.1


def of_papers_defaults(vectors: Tensor) -> dict[str, Tensor]:
    """Its defaults divide by the norm + 0.01 and clamp at 0.25; angular_spread carries a constant 0.01."""
    shorter = vectors / (vectors.norm(dim=-1, keepdim=True) + 0.01)
    distance = angular_distance(shorter @ shorter.mT, 0.25)
    apart = ~torch.eye(distance.shape[-1], dtype=torch.bool)
    return {
        "angular_spread": log_mean_exp_over_pairs(-distance, everything(vectors)).mean() + 0.01,
        "orthogonalization": (0.5 - distance).clamp_min(0).square()[:, apart].mean(),
        # It correlates tokens over features where edgedisp correlates features over tokens.
        "decorrelation": VARIANTS["decorrelation"](vectors.mT.contiguous()).mean(),
    }


def test_values_and_gradients_are_those_of_the_papers_code() -> None:
    """LM-Dispersion, commit 7e69e92, in float64. Its own values are exact to 4e-7."""
    variants = {"angular_spread": "angular", "orthogonalization": "orthogonalization"}
    for row in json.loads(GOLDEN.read_text(encoding="utf-8"))["tensors"]:
        leaf = torch.tensor(row["tensor"], dtype=torch.float64).view(row["shape"]).requires_grad_()
        defaults, references = of_papers_defaults(leaf), row["values"]
        # Of its l2_repel (lengths as they are, tokens paired with themselves) and entropy there is no equal.
        assert references.keys() == {*defaults, "l2_repel", "perplexity_entropy"}
        cases = [(defaults[name], references[name]["reference defaults"]) for name in defaults]
        for theirs, ours in variants.items():
            for clamp in (0.25, 0.1):
                value = VARIANTS[ours](leaf, everything(leaf), clamp=clamp).mean()
                cases.append((value, references[theirs][f"epsilon 0, clamp {clamp}"]))
        for value, expected in cases:
            (slope,) = torch.autograd.grad(value, leaf, retain_graph=True)
            assert value.item() == pytest.approx(expected["value"], abs=1e-6)
            assert slope.norm().item() == pytest.approx(expected["gradient_norm"], rel=1e-6, abs=1e-5)


PADDINGS = [("000111111", 1e30, 4), ("111111000", math.nan, 20), ("011011101", math.nan, 4)]


@every_loss
@pytest.mark.parametrize(("where", "garbage", "features"), PADDINGS)
def test_padding_changes_neither_value_nor_gradient(
    name: str, where: str, garbage: float, features: int
) -> None:
    vectors, _ = random_case(2, batch=1, tokens=6, features=features)
    mask = torch.tensor([[digit == "1" for digit in where]])
    padded = torch.full((1, 9, features), garbage, dtype=torch.float64)
    padded[mask] = vectors[0]
    torch.testing.assert_close(
        VARIANTS[name](padded, mask), VARIANTS[name](vectors, everything(vectors)), rtol=1e-12, atol=1e-13
    )
    with_padding = gradient(name, padded, mask)
    torch.testing.assert_close(
        with_padding[mask], gradient(name, vectors, everything(vectors))[0], rtol=1e-11, atol=1e-13
    )
    assert torch.equal(with_padding[~mask], torch.zeros(3, features, dtype=torch.float64))


def test_a_feature_that_varies_by_rounding_alone_counts_as_uncorrelated() -> None:
    vectors = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0))
    steps = vectors[..., 0] * torch.finfo(torch.float32).eps  # in step with the first feature

    def with_last(feature: torch.Tensor | float) -> torch.Tensor:
        changed = vectors.clone()
        changed[..., 3] = feature
        return VARIANTS["decorrelation"](changed)

    assert torch.equal(with_last(1000 * (1 + 50 * steps)), with_last(0.0))
    assert with_last(1000 * (1 + 400 * steps)) > with_last(0.0) + 0.1


@every_loss
def test_a_sequence_without_a_pair_has_value_zero_no_gradient_and_no_weight(name: str) -> None:
    vectors, _ = random_case(3)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 0] = True  # one token, then none at all
    mask[2] = True
    values = VARIANTS[name](vectors, mask)
    assert values[0] == 0 and values[1] == 0 and values[2] != 0
    slope = gradient(name, vectors, mask)
    assert torch.equal(slope[:2], torch.zeros_like(slope[:2])) and slope[2].norm() > 0


@every_loss
@pytest.mark.parametrize("clamp", [0.0, 0.1])
@pytest.mark.parametrize(
    "vector", [[1.0, 2.0, -1.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]], ids=["equal", "cosine_1", "zero"]
)
def test_equal_and_zero_vectors_have_a_finite_value_and_gradient(
    name: str, clamp: float, vector: list[float]
) -> None:
    vectors = torch.tensor(vector).repeat(1, 4, 1).requires_grad_()
    value = VARIANTS[name](vectors, everything(vectors), clamp=clamp)[0]
    value.backward()
    assert value.isfinite() and vectors.grad is not None and vectors.grad.isfinite().all()


@every_loss
def test_a_nan_in_a_real_token_makes_its_sequence_nan_alone(name: str) -> None:
    vectors, _ = random_case(6, features=9)
    vectors[1, 2, 3] = math.nan
    assert VARIANTS[name](vectors, everything(vectors)).isnan().tolist() == [False, True, False]


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    vectors, mask = random_case(4, tokens=16, features=12)
    vectors = vectors.to(dtype)
    slope = gradient(name, vectors, mask)
    leaf = vectors.clone().requires_grad_()  # where no gradient is asked for, eigenvalues alone may be found
    plain = VARIANTS[name](leaf, mask)  # in another way, which moves a last bit
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = VARIANTS[name](leaf, mask)
        inner = torch.ones(2, 2) @ torch.ones(2, 2)
    assert inner.dtype == torch.bfloat16  # autocast was on, and is again
    assert torch.equal(value, plain)
    assert torch.equal(torch.autograd.grad(value.sum(), leaf)[0], slope)
