"""`DispersionConfig` refuses what cannot work and says what would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgedisp.dispersion.hooks import decoder_layers, select_layers
from edgedisp.dispersion.losses import DispersionConfig
from edgedisp.recipe import Dispersion


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"variant": "angluar"}, r"variant is 'angluar'; it needs one of angular, cosine"),
        ({"weight": -0.1}, r"weight is -0.1; it needs a number of at least 0"),
        ({"weight": float("nan")}, r"weight is nan"),
        ({"temperature": 0.04}, r"temperature is 0.04; it needs a number of at least 0.05"),
        ({"temperature": float("inf")}, r"temperature is inf"),
        ({"clamp": -0.1}, r"clamp is -0.1"),
        ({"tokens": 1}, r"tokens is 1; it needs at least 2, or None for all"),
        ({"clamp": 1.0}, r"clamp is 1.0; it needs a number from 0 to below 1"),
        ({"layers": "early_half"}, r"layers is 'early_half'; it needs all, first_half, last_half, last, or"),
        ({"layers": [0, -1]}, r"layers is \(0, -1\)"),
        ({"layers": [1, 1]}, r"layers is \(1, 1\).*none twice"),
        ({"layers": []}, r"layers is \(\)"),
    ],
)
def test_what_cannot_work_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DispersionConfig(**wrong)


def test_the_least_values_work_and_the_defaults_are_those_of_a_recipe() -> None:
    DispersionConfig(weight=0.0, temperature=0.05, tokens=2, clamp=0.0)
    config, section = DispersionConfig(), Dispersion().model_dump(exclude={"seed", "on"})
    assert {key: getattr(config, key) for key in section} == section and config.seed == 0


def test_layers_are_named_or_counted_from_zero() -> None:
    assert DispersionConfig(layers=[2, 0]).layers == (2, 0) == DispersionConfig(layers=(2, 0)).layers
    assert select_layers("first_half", 5) == [0, 1] and select_layers("last_half", 5) == [2, 3, 4]
    assert select_layers("last", 5) == [4] and select_layers([3, 1], 5) == [1, 3]
    with pytest.raises(ValueError, match=r"layers \[5\] are outside"):
        select_layers([0, 5], 5)
    with pytest.raises(ValueError, match=r"layers 'first_half' names no layer of a model that has 1"):
        select_layers("first_half", 1)
    with pytest.raises(ValueError, match="has no list"):
        decoder_layers(torch.nn.Linear(2, 2))
