"""Drawn token vectors and their gradients against torch's own gather."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgedisp.dispersion.draw import Picks, choose


def states_and_tokens(
    layers: int, batch: int, length: int, n: int, dtype: torch.dtype = torch.float64
) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    states = torch.randn(layers, batch, length, 5, generator=generator).to(dtype).unbind()
    keys = torch.rand(layers, batch, length, generator=generator)
    tokens = keys.topk(n, dim=-1).indices.sort(dim=-1).values
    return [state.clone().requires_grad_() for state in states], tokens


def gathered(states: list[torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    everywhere = tokens[..., None].expand(-1, -1, -1, states[0].shape[-1])
    return torch.cat([state.gather(1, where) for state, where in zip(states, everywhere)])


def check_alike(drawn: torch.Tensor, plain: torch.Tensor, states: list[torch.Tensor]) -> None:
    """Values, and gradients: another comes from elsewhere, as a layer's output has one from later layers."""
    assert torch.equal(drawn, plain)
    slopes = []
    for each in (drawn, plain):
        elsewhere = sum(state.sin().sum() for state in states)
        slopes.append(torch.autograd.grad(each.pow(3).sum() + elsewhere, states))
    for ours, reference in zip(*slopes):
        torch.testing.assert_close(ours, reference)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.booleans(), st.data())
def test_a_draw_is_a_gather_with_the_same_gradient(
    layers: int, batch: int, length: int, is_last: bool, data: st.DataObject
) -> None:
    states, tokens = states_and_tokens(layers, batch, length, data.draw(st.integers(1, length)))
    drawn = Picks(tokens, length).draw(states, range(layers), is_last)
    plain = gathered(states, tokens)
    check_alike(drawn, plain, states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_last_layer_gets_a_dense_gradient(dtype: torch.dtype) -> None:
    states, tokens = states_and_tokens(2, 2, 9, 3, dtype)
    Picks(tokens, 9).draw(states, [0, 1], is_last=True).sum().backward()
    gradients = [state.grad for state in states]
    assert [gradient.layout for gradient in gradients if gradient is not None] == [
        torch.sparse_coo,
        torch.strided,
    ]
    for state, gradient, where in zip(states, gradients, tokens):
        assert gradient is not None
        expected = torch.zeros_like(state).scatter_(1, where[:, :, None].expand(-1, -1, 5), 1.0)
        assert torch.equal(gradient.to_dense(), expected)
        assert gradient.dtype == dtype


def test_some_layers_draw_their_own_tokens() -> None:
    states, tokens = states_and_tokens(3, 2, 9, 4)
    drawn = Picks(tokens, 9).draw(states[1:], [1, 2], is_last=False)
    assert torch.equal(drawn, gathered(states[1:], tokens[1:]))


@pytest.mark.parametrize("layers", [[0, 2], [0, 2, 1, 3], [1, 1]])
def test_layers_with_gaps_or_in_another_order_draw_their_own_tokens(layers: list[int]) -> None:
    states, tokens = states_and_tokens(4, 2, 9, 4)
    chosen = [states[layer] for layer in layers]
    drawn, plain = Picks(tokens, 9).draw(chosen, layers, is_last=True), gathered(chosen, tokens[layers])
    check_alike(drawn, plain, states)


def test_a_draw_has_the_second_derivative_of_a_gather() -> None:
    states, tokens = states_and_tokens(2, 2, 9, 4)
    found = []
    for draw in (lambda s: Picks(tokens, 9).draw(s, [0, 1], is_last=True), lambda s: gathered(s, tokens)):
        between = [state.sin() for state in states]
        value = draw(between).pow(3).sum() + sum(state.pow(3).sum() for state in between)
        slopes = torch.autograd.grad(value, states, create_graph=True)
        found.append(torch.autograd.grad(sum(slope.square().sum() for slope in slopes), states))
    for ours, reference in zip(*found):
        torch.testing.assert_close(ours.to_dense(), reference)


def test_every_layer_chooses_anew_and_without_repetition() -> None:
    tokens = choose(40, (3, 2, 100), seed=0, first_sequence=0)
    assert tokens.shape == (3, 2, 40)
    assert (tokens.diff(dim=-1) > 0).all()
    assert not torch.equal(tokens[0], tokens[1]) and not torch.equal(tokens[0, 0], tokens[0, 1])


def test_padding_is_chosen_for_want_of_real_tokens_only() -> None:
    real = torch.arange(10)[None] < 4
    for first in range(20):
        assert choose(4, (1, 1, 10), real, seed=0, first_sequence=first).tolist() == [[[0, 1, 2, 3]]]


def test_a_gradient_that_others_hold_is_not_written_to() -> None:
    (state,), tokens = states_and_tokens(1, 2, 9, 3)
    beside = torch.zeros_like(state, requires_grad=True)
    through, upstream = state * 1.0, torch.ones_like(state)
    drawn = Picks(tokens, 9).draw([through], [0], is_last=False)
    # An addition hands one and the same gradient to both of its terms.
    torch.autograd.backward([through + beside, drawn], [upstream, torch.full_like(drawn, 10.0)])
    assert torch.equal(upstream, torch.ones_like(state))
    assert beside.grad is not None and torch.equal(beside.grad, torch.ones_like(state))
    assert state.grad is not None and state.grad.sum() == state.numel() + 10 * drawn.numel()
