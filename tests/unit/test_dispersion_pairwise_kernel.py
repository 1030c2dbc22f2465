"""The loss by blocks against the whole matrix: one value, one gradient, on every road."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgedisp.dispersion import pairwise_kernel
from edgedisp.dispersion.losses import angular_distance, log_mean_exp_over_pairs, unit_vectors
from edgedisp.dispersion.pairwise_kernel import FORMS, pairwise_loss


def vectors_and_mask(
    batch: int, tokens: int, features: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # A common offset, so that cosines spread over positive values as in a language model.
    vectors = torch.randn(batch, tokens, features, generator=generator, dtype=dtype) + 0.7
    return vectors.requires_grad_(), torch.rand(batch, tokens, generator=generator) > 0.25


def whole(
    form: str, vectors: torch.Tensor, mask: torch.Tensor, temperature: float, clamp: float
) -> torch.Tensor:
    """The loss by autograd over the matrix of all pairs."""
    directions = unit_vectors(torch.where(mask.unsqueeze(-1), vectors, 0.0))
    cosines = directions @ directions.mT
    if form == "angular":
        distance = angular_distance(cosines, clamp)
    else:
        distance = 1 - cosines - (cosines.clamp(clamp - 1, 1 - clamp) - cosines).detach()
    values = log_mean_exp_over_pairs(-distance / temperature, mask)
    return torch.where(mask.sum(dim=-1) > 1, values, 0.0)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(2, 9), st.integers(0, 10_000)),
    block=st.integers(1, 16),
    clamp=st.sampled_from([0.0, 0.1, 0.5]),
    temperature=st.sampled_from([0.05, 0.7]),
    form=st.sampled_from(FORMS),
    masked=st.booleans(),
)
def test_value_and_gradient_equal_the_plain_form_whatever_the_shape_and_the_block(
    shape: tuple[int, int, int, int], block: int, clamp: float, temperature: float, form: str, masked: bool
) -> None:
    """Padding holds NaN; short and masked sequences have no pair."""
    vectors, mask = vectors_and_mask(*shape)
    if masked:
        vectors.data[~mask] = math.nan
    real = mask if masked else torch.ones_like(mask)
    weights = torch.arange(1.0, len(mask) + 1, dtype=torch.float64)  # sequences must not be mixed up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairwise_kernel, "BLOCK", block)
        value = pairwise_loss(form, vectors, mask if masked else None, temperature=temperature, clamp=clamp)
        (gradient,) = torch.autograd.grad((value * weights).sum(), vectors)
    plain = whole(form, vectors, real, temperature, clamp)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad((plain * weights).sum(), vectors)[0])


def test_up_to_a_block_the_slopes_are_saved_and_beyond_it_no_matrix_of_tokens() -> None:
    for tokens, is_saved in ((256, True), (257, False)):
        vectors, _ = vectors_and_mask(1, tokens, 4)
        function = pairwise_loss("angular", vectors).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
        shapes = [tuple(saved.shape) for saved in function.saved_tensors if saved is not None]
        assert ((1, tokens, tokens) in shapes) == is_saved and len(shapes) == 2 + is_saved


def test_rounded_products_stay_near_and_the_setting_is_put_back() -> None:
    vectors, _ = vectors_and_mask(2, 200, 64, dtype=torch.float32)
    before = torch.backends.mkldnn.matmul.fp32_precision
    rounded = pairwise_loss("angular", vectors, precision="bf16")
    rounded.sum().backward()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    torch.testing.assert_close(rounded, pairwise_loss("angular", vectors), atol=5e-4, rtol=0)


@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("beside", [0.0, 1.0])
def test_a_second_derivative_is_refused(tokens: int, beside: float) -> None:
    """Also that of a sum with a term which has one: the dispersion's part must not be left out unnoticed."""
    vectors, _ = vectors_and_mask(1, tokens, 8)
    value = pairwise_loss("angular", vectors).sum() + beside * vectors.pow(3).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(value, vectors, create_graph=True)
