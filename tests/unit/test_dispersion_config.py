"""`DispersionConfig` refuses what cannot work and says what would."""

from __future__ import annotations

from typing import Any

import pytest

from edgedisp.dispersion.collect import Dispersion
from edgedisp.dispersion.config import DispersionConfig


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"variant": "angluar"}, r"variant is 'angluar'; it needs one of angular, cosine"),
        ({"weight": -0.1}, r"weight is -0.1; it needs a number of at least 0"),
        ({"weight": float("nan")}, r"weight is nan"),
        ({"temperature": 0}, r"temperature is 0; it needs a number above 0"),
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
def test_what_cannot_work_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DispersionConfig(**wrong)


def test_a_config_makes_fresh_collectors() -> None:
    config = DispersionConfig(weight=0.3, layers=[2, 0])
    first, second = config.collector(), config.collector()
    assert isinstance(first, Dispersion) and first is not second and first.weight == 0.3
    assert config.layers == (2, 0)
