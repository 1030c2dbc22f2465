"""`DispersionConfig`: the options of the dispersion loss, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgedisp.dispersion.losses import VARIANTS

LAYER_WORDS = ("all", "first_half", "last_half", "last")


@dataclass(frozen=True)
class DispersionConfig:
    """Which loss, how strong, over which layers and tokens.

    Attributes:
        variant: a name in `losses.VARIANTS`.
        weight: lambda in `CE + lambda * L`; 0 or more.
        layers: `all`, `first_half`, `last_half`, `last`, or indices from 0; never the embedding output.
        temperature: tau of the loss, above 0.
        tokens: how many tokens of each sequence are sampled, anew for each layer and step; None takes all.
            The paper takes 256. With 64, the gradient of SmolLM2-135M's weights has a cosine of 0.999 with
            that of all pairs of 256 tokens, for a sixteenth of the products (benchmarks/dispersion_cost.py).
        clamp: cosines are kept in [clamp - 1, 1 - clamp]; from 0 to below 1. See `losses.angular`.
        exclude_sink: leave attention sinks out: the first token of a sequence, and any whose norm is more
            than 10 times the median.
        seed: of the token sampling, which has random streams of its own.

    Raises ValueError naming the field, its value and what works.
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
        if isinstance(self.layers, list | range):
            object.__setattr__(self, "layers", tuple(self.layers))
        rules = {
            "variant": (self.variant in list(VARIANTS), f"one of {', '.join(VARIANTS)}"),
            "weight": (0 <= self.weight < math.inf, "a number of at least 0"),
            "temperature": (0 < self.temperature < math.inf, "a number above 0"),
            "tokens": (
                self.tokens is None or (isinstance(self.tokens, int) and self.tokens >= 2),
                "a whole number of at least 2, or None for all",
            ),
            "clamp": (0 <= self.clamp < 1, "a number from 0 to below 1"),
            "seed": (isinstance(self.seed, int) and self.seed >= 0, "a whole number of at least 0"),
            "layers": (_are_layers(self.layers), f"{', '.join(LAYER_WORDS)}, or indices from 0, none twice"),
        }
        for field, (is_valid, works) in rules.items():
            if not is_valid:
                raise ValueError(f"dispersion {field} is {getattr(self, field)!r}; it needs {works}")


def _are_layers(layers: object) -> bool:
    if not isinstance(layers, tuple):
        return layers in LAYER_WORDS
    return 0 < len(layers) == len(set(layers)) and all(isinstance(i, int) and i >= 0 for i in layers)
