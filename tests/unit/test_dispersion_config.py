"""`DispersionConfig` refuses what cannot work and says what would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgedisp.dispersion.hooks import decoder_layers, select_layers
from edgedisp.dispersion.losses import DispersionConfig


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"variant": "angluar"}, r"variant is 'angluar'; it needs one of angular, cosine"),
        ({"weight": -0.1}, r"weight is -0.1; it needs a number of at least 0"),
        ({"weight": float("nan")}, r"weight is nan"),
        ({"temperature": 0}, r"temperature is 0; it needs a number above 0"),
        ({"temperature": float("inf")}, r"temperature is inf"),
        ({"weight": float("inf")}, r"weight is inf"),
        ({"clamp": -0.1}, r"clamp is -0.1"),
        ({"seed": 0.5}, r"seed is 0.5"),
        ({"layers": [0, -1]}, r"layers is \(0, -1\)"),
        ({"layers": [0.5]}, r"layers is \(0.5,\)"),
        ({"tokens": 1}, r"tokens is 1; it needs a whole number of at least 2, or None for all"),
        ({"tokens": 2.5}, r"tokens is 2.5"),
        ({"clamp": 1.0}, r"clamp is 1.0; it needs a number from 0 to below 1"),
        ({"layers": "early_half"}, r"layers is 'early_half'; it needs all, first_half, last_half, last, or"),
        ({"layers": [1, 1]}, r"layers is \(1, 1\).*none twice"),
        ({"layers": []}, r"layers is \(\)"),
        ({"layers": 3}, r"layers is 3; it needs all, first_half"),
        ({"layers": None}, r"layers is None; it needs all, first_half"),
        ({"variant": ["angular"]}, r"variant is \['angular'\]; it needs one of"),
        ({"seed": -1}, r"seed is -1"),
    ],
)
def test_what_cannot_work_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DispersionConfig(**wrong)


def test_values_at_the_bounds_work() -> None:
    assert DispersionConfig() == DispersionConfig("angular", 0.1, "all", 1.0, 64, 0.1, False, 0)
    assert len({DispersionConfig(), DispersionConfig(), DispersionConfig(seed=1)}) == 2  # frozen: a key
    config = DispersionConfig(weight=0, tokens=2, clamp=0, seed=0, layers=[0], temperature=1e-9)
    assert config.layers == (0,) and DispersionConfig(tokens=None, layers=range(2)).layers == (0, 1)


def test_layers_are_named_or_counted_from_zero() -> None:
    assert DispersionConfig(layers=[2, 0]).layers == (2, 0)
    assert select_layers("first_half", 5) == [0, 1] and select_layers("last_half", 5) == [2, 3, 4]
    assert select_layers("last", 5) == [4] and select_layers([3, 1], 5) == [1, 3]
    with pytest.raises(ValueError, match=r"layers \[5\] are outside"):
        select_layers([0, 5], 5)
    with pytest.raises(ValueError, match=r"layers 'first_half' names no layer of a model that has 1"):
        select_layers("first_half", 1)
    with pytest.raises(ValueError, match="has no list"):
        decoder_layers(torch.nn.Linear(2, 2))
