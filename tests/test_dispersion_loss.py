"""The losses against their formulas written out by loops, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedisp.dispersion.loss import VARIANTS, angular, cosine

LOSSES = list(VARIANTS)


def by_loops(
    name: str, vectors: torch.Tensor, mask: torch.Tensor, temperature: float, clamp: float
) -> list[float]:
    """`log mean_{i != j} exp(-D / temperature)` with Python numbers."""
    values = []
    for sequence, real in zip(vectors.tolist(), mask.tolist()):
        kept = [vector for vector, keep in zip(sequence, real) if keep]
        terms = []
        for i, left in enumerate(kept):
            for j, right in enumerate(kept):
                if i != j:
                    dot = sum(a * b for a, b in zip(left, right))
                    cos = dot / (math.hypot(*left) * math.hypot(*right))
                    cos = min(max(cos, -1 + clamp), 1 - clamp)
                    distance = math.acos(cos) / math.pi if name == "angular" else 1 - cos
                    terms.append(math.exp(-distance / temperature))
        values.append(math.log(sum(terms) / len(terms)) if terms else 0.0)
    return values


def random_case(
    seed: int, batch: int = 3, tokens: int = 7, features: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(batch, tokens, features, generator=generator, dtype=torch.float64)
    lengths = torch.randint(2, tokens + 1, (batch, 1), generator=generator)
    return vectors, torch.arange(tokens)[None] < lengths


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_value_is_the_formula_written_out_by_loops(name: str, temperature: float) -> None:
    vectors, mask = random_case(0)
    value = VARIANTS[name](vectors, mask, temperature=temperature, clamp=0.1)
    expected = torch.tensor(by_loops(name, vectors, mask, temperature, 0.1), dtype=torch.float64)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_the_derivative_of_the_value(name: str) -> None:
    vectors, mask = random_case(1, batch=2, tokens=5, features=4)
    vectors.requires_grad_()
    # Random vectors stay inside a clamp of 0.001, where straight-through and true gradient are one.
    assert torch.autograd.gradcheck(lambda z: VARIANTS[name](z, mask, clamp=0.001), (vectors,))


@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_neither_value_nor_gradient(name: str) -> None:
    vectors, _ = random_case(2, batch=1, tokens=6)
    padded = torch.cat([vectors, 100 * torch.ones(1, 3, 5, dtype=torch.float64)], dim=1)
    mask = torch.arange(9)[None] < 6
    plain, with_padding = vectors.clone().requires_grad_(), padded.clone().requires_grad_()
    left = VARIANTS[name](plain, mask[:, :6])
    right = VARIANTS[name](with_padding, mask)
    torch.testing.assert_close(left, right, rtol=1e-13, atol=0)
    left.sum().backward()
    right.sum().backward()
    assert plain.grad is not None and with_padding.grad is not None
    torch.testing.assert_close(with_padding.grad[:, :6], plain.grad, rtol=1e-12, atol=1e-15)
    assert torch.equal(with_padding.grad[:, 6:], torch.zeros(1, 3, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", LOSSES)
def test_a_sequence_without_a_pair_has_value_zero_and_a_finite_gradient(name: str) -> None:
    vectors, _ = random_case(3)
    vectors.requires_grad_()
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 0] = True  # one token, then none at all
    mask[2] = True
    value = VARIANTS[name](vectors, mask)
    assert value[0] == 0 and value[1] == 0 and value[2] != 0
    value.sum().backward()
    assert vectors.grad is not None and vectors.grad.isfinite().all()
    assert torch.equal(vectors.grad[:2], torch.zeros_like(vectors.grad[:2]))


def test_equal_vectors_have_a_finite_gradient_and_the_clamped_value() -> None:
    vectors = torch.ones(1, 4, 3, dtype=torch.float64, requires_grad=True)
    value = angular(vectors, torch.ones(1, 4, dtype=torch.bool), clamp=0.1)
    assert value.item() == pytest.approx(-math.acos(0.9) / math.pi)
    value.sum().backward()
    assert vectors.grad is not None and vectors.grad.isfinite().all()


def test_pairs_beyond_the_clamp_are_still_pulled_apart() -> None:
    vectors = torch.tensor([[[1.0, 0.0], [1.0, 0.05]]], requires_grad=True)  # cosine 0.9988 > 0.9
    angular(vectors, torch.ones(1, 2, dtype=torch.bool), clamp=0.1).sum().backward()
    assert vectors.grad is not None
    moved = (vectors - 0.1 * vectors.grad).detach()
    assert torch.cosine_similarity(moved[0, 0], moved[0, 1], dim=0) < 0.9987


def test_orthogonal_vectors_give_minus_one_half_over_temperature() -> None:
    value = angular(torch.eye(4)[None], torch.ones(1, 4, dtype=torch.bool), temperature=2.0)
    assert value.item() == pytest.approx(-0.25, abs=1e-6)


def test_bfloat16_vectors_are_compared_in_float32() -> None:
    vectors, mask = random_case(4)
    value = angular(vectors.bfloat16(), mask)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, angular(vectors.bfloat16().float(), mask))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(LOSSES), scale=st.floats(0.01, 1000))
def test_token_order_and_scale_do_not_matter(seed: int, name: str, scale: float) -> None:
    vectors, mask = random_case(seed)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    loss = VARIANTS[name]
    torch.testing.assert_close(loss(vectors[:, order] * scale, mask[:, order]), loss(vectors, mask))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(LOSSES))
def test_each_sequence_has_its_own_value(seed: int, name: str) -> None:
    vectors, mask = random_case(seed)
    alone = [VARIANTS[name](vectors[i : i + 1], mask[i : i + 1]) for i in range(len(vectors))]
    torch.testing.assert_close(VARIANTS[name](vectors, mask), torch.cat(alone))


def test_cosine_form_needs_no_clamp_at_equal_vectors() -> None:
    value = cosine(torch.ones(1, 3, 2), torch.ones(1, 3, dtype=torch.bool))
    assert value.item() == pytest.approx(0.0, abs=1e-6)
