"""The knapsack against every combination there is."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgedisp.quantize.mixed_precision import knapsack, picks_at

OPTION = st.tuples(st.integers(0, 20), st.integers(0, 60))  # whole numbers add up exactly


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Costs and losses [items, options]."""
    options = draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(OPTION, min_size=options, max_size=options), min_size=1, max_size=5))
    table = np.array(rows)
    return table[..., 0], table[..., 1].astype(float)


@given(tables(), st.integers(0, 100))
def test_the_least_loss_of_all_combinations_wins(table: tuple[np.ndarray, np.ndarray], budget: int) -> None:
    costs, losses = table
    combinations = [
        (sum(cost[i] for cost, i in zip(costs, picks)), sum(loss[i] for loss, i in zip(losses, picks)))
        for picks in itertools.product(range(costs.shape[1]), repeat=len(costs))
    ]
    least, picks = knapsack(costs, losses, budget)
    for limit, value in enumerate(least):
        assert value == min((loss for cost, loss in combinations if cost <= limit), default=np.inf)
    if np.isfinite(least[budget]):
        cells = range(len(costs)), list(picks_at(costs, picks, budget))
        assert costs[cells].sum() <= budget and losses[cells].sum() == least[budget]
