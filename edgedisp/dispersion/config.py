"""`DispersionConfig`: everything there is to choose about the dispersion term, as one checked argument."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgedisp.dispersion.loss import VARIANTS

if TYPE_CHECKING:
    from edgedisp.dispersion.collect import Dispersion

LAYER_WORDS = ("all", "first_half", "last_half", "last")


@dataclass(frozen=True)
class DispersionConfig:
    """Which loss, how strong, over which layers and tokens.

    Attributes:
        variant: a name in `loss.VARIANTS`.
        weight: lambda in `CE + lambda * L`; 0 or more.
        layers: `all`, `first_half`, `last_half`, `last`, or indices from 0; never the embedding output.
        temperature: tau of the loss, above 0.
        tokens: how many tokens of each sequence are drawn, anew for each layer and step; None takes all.
            The paper draws 256. With 64, the gradient of SmolLM2-135M's weights has a cosine of 0.999 with
            that of all pairs of 256 tokens, of 0.998 with that of 1,024, for a sixteenth of the products
            (`benchmarks/dispersion_cost.py`).
        clamp: cosines are held within [clamp - 1, 1 - clamp]; from 0 to below 1. See `loss.angular`.
        exclude_sink: leave attention sinks out: the first token of a sequence, and any whose norm is more
            than 10 times the median (they are up to 100 times longer and point their own way).
        seed: of the token draw, which has a stream of its own.

    Raises ValueError naming the field, what it holds and what works.
    """

    variant: str = "angular"
    weight: float = 0.1
    layers: str | Sequence[int] = "all"
    temperature: float = 1.0
    tokens: int | None = 64
    clamp: float = 0.1
    exclude_sink: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        known = isinstance(self.variant, str) and self.variant in VARIANTS
        _demand(known, "variant", self.variant, f"one of {', '.join(VARIANTS)}")
        _demand(_is_number(self.weight) and self.weight >= 0, "weight", self.weight, "a number of at least 0")
        _demand(
            _is_number(self.temperature) and self.temperature > 0,
            "temperature",
            self.temperature,
            "a number above 0",
        )
        _demand(
            self.tokens is None or (_is_whole(self.tokens) and self.tokens >= 2),
            "tokens",
            self.tokens,
            "a whole number of at least 2, or None for all",
        )
        _demand(
            _is_number(self.clamp) and 0 <= self.clamp < 1, "clamp", self.clamp, "a number from 0 to below 1"
        )
        _demand(_is_whole(self.seed) and self.seed >= 0, "seed", self.seed, "a whole number of at least 0")
        words = f"{', '.join(LAYER_WORDS)}, or indices from 0, none twice"
        if isinstance(self.layers, str):
            _demand(self.layers in LAYER_WORDS, "layers", self.layers, words)
        else:
            _demand(isinstance(self.layers, Iterable), "layers", self.layers, words)
            object.__setattr__(self, "layers", tuple(self.layers))
            fine = all(_is_whole(layer) and layer >= 0 for layer in self.layers)
            _demand(fine and 0 < len(self.layers) == len(set(self.layers)), "layers", self.layers, words)

    def collector(self) -> Dispersion:
        """A fresh collector, which computes this term in a model's forward passes."""
        from edgedisp.dispersion.collect import Dispersion

        return Dispersion(self)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _demand(fine: bool, field: str, value: object, works: str) -> None:
    if not fine:
        raise ValueError(f"dispersion {field} is {value!r}; it needs {works}")
