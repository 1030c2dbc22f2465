"""What a pilot tries: every weight with every choice of layers and every variant, rung by rung.

A rung has a number of optimizer steps; the last has all that `--tokens` pays for, the one before half, and so
on. Half of the candidates, rounded up, can go on from each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

from edgedisp.core.errors import BadInput
from edgedisp.recipe import Dispersion, Recipe
from edgedisp.recipe.smoke import STEPS as SMOKE_STEPS
from edgedisp.recipe.units import read_number, read_whole
from edgedisp.recipe.values import LAYER_NAMES, VARIANTS, near

HALVINGS = 2  # unless asked for; then a first rung has a quarter of the tokens

_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Candidate:
    """One setting of the dispersion loss. `layers`: a name, or layers counted from 0."""

    variant: str
    layers: str | tuple[int, ...]
    weight: float

    @property
    def name(self) -> str:
        """Names its folder; a recipe's own list of layers, of which there is one at most, is `listed`."""
        return (
            f"{self.variant}-{self.layers if isinstance(self.layers, str) else 'listed'}-{self.weight:.15g}"
        )

    def laid_over(self, shared: Dispersion) -> Dispersion:
        """The recipe's section with this setting in it."""
        own = {"variant": self.variant, "layers": self.layers, "weight": self.weight}
        return Dispersion.model_validate({**shared.model_dump(), **own})


@dataclass(frozen=True)
class Pilot:
    """What is to be done. `recipe` has the pilot's tokens; `steps` are the optimizer steps of each rung."""

    recipe: Recipe
    recipe_tokens: int
    dispersion: Dispersion
    candidates: tuple[Candidate, ...]
    steps: tuple[int, ...]

    def tokens(self, steps: int) -> int:
        """Tokens of so many optimizer steps."""
        return steps * self.recipe.tokens_per_step

    @property
    def trainings(self) -> list[tuple[int, int]]:
        """For each rung: trainings at most, the baseline's among them, and tokens of each."""
        counts = [len(self.candidates)]
        while len(counts) < len(self.steps):
            counts.append(half(counts[-1]))
        return [(count + 1, self.tokens(steps)) for count, steps in zip(counts, self.steps)]


def half(count: int) -> int:
    """How many of `count` candidates can go on."""
    return math.ceil(count / 2)


def plan(
    recipe: Recipe,
    *,
    weights: str,
    tokens: str,
    layers: str | None = None,
    variants: str | None = None,
    halvings: int | None = None,
) -> Pilot:
    """The pilot that the options ask for; lists are separated by commas.

    `layers` and `variants` None take the recipe's own. `halvings` None: two, or fewer where candidates or
    steps do not suffice. Raises BadInput for what cannot be tried.
    """
    shared = recipe.train.dispersion or Dispersion()
    tried = [
        Candidate(variant, chosen, weight)
        for variant, chosen, weight in product(
            _named("--variants", variants, VARIANTS) if variants is not None else [shared.variant],
            _named("--layers", layers, LAYER_NAMES) if layers is not None else [shared.layers],
            _weights(weights),
        )
    ]
    steps = _tokens(tokens) // recipe.tokens_per_step
    if recipe.is_smoke:
        steps = min(steps, SMOKE_STEPS)
    rungs = _rungs(recipe, tokens, steps, len(tried), halvings)
    train = recipe.train.model_copy(update={"tokens": rungs[-1] * recipe.tokens_per_step})
    whole = recipe.model_copy(update={"train": train})
    return Pilot(whole, recipe.train.tokens, shared, tuple(tried), rungs)


def _rungs(recipe: Recipe, tokens: str, steps: int, count: int, halvings: int | None) -> tuple[int, ...]:
    """Optimizer steps of each rung, the shortest first."""
    most = math.ceil(math.log2(count))
    if halvings is not None and halvings > most:
        tried = "1 candidate is" if count == 1 else f"{count} candidates are"
        raise BadInput(f"--halvings {halvings}: {tried} down to one after {most}; give {most} or less")
    fewest = 2 ** (halvings or 0)
    if steps < fewest:
        train = recipe.train
        needed = fewest * recipe.tokens_per_step
        asked = f" with --halvings {halvings}" if halvings else ""
        raise BadInput(
            f"--tokens {tokens}: too few{asked}: the first rung would have no optimizer step, which takes "
            f"{recipe.tokens_per_step:,} tokens (batch {train.batch} x accumulate {train.accumulate} x "
            f"context {recipe.data.context}); needs at least {needed}"
        )
    if halvings is None:
        halvings = min(HALVINGS, most, int(math.log2(steps)))
    return tuple(steps // 2**left for left in range(halvings, -1, -1))


def _weights(text: str) -> list[float]:
    found = []
    for word in _words("--weights", text, "0.03,0.1,0.3"):
        try:
            weight = read_number(word)
        except ValueError as problem:
            hint = f" ({problem})" if str(problem) else ""
            raise BadInput(
                f"--weights {text}: '{word}' is no number{hint}; write them as 0.03,0.1,0.3"
            ) from None
        if weight <= 0:
            why = (
                "a weight of 0 is the baseline, which is always trained" if weight == 0 else "it is negative"
            )
            raise BadInput(f"--weights {text}: found {word} ({why}); needs numbers above 0")
        found.append(weight)
    return _distinct("--weights", text, found, "{:g}".format)


def _named(option: str, text: str, choices: Sequence[str]) -> list[str]:
    words = _words(option, text, ",".join(choices[:2]))
    for word in words:
        if word not in choices:
            guess = near(word, choices)
            meant = f"did you mean '{guess}'? " if guess else ""
            raise BadInput(f"{option} {text}: '{word}' is not known; {meant}(choices: {', '.join(choices)})")
    return _distinct(option, text, words, str)


def _words(option: str, text: str, example: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise BadInput(f"{option} '{text}': a value is missing; write them with commas between, as {example}")
    return words


def _distinct(option: str, text: str, found: list[_Kind], said: Callable[[_Kind], str]) -> list[_Kind]:
    twice = [value for place, value in enumerate(found) if value in found[:place]]
    if twice:
        raise BadInput(f"{option} {text}: {said(twice[0])} stands there twice; name each once")
    return found


def _tokens(text: str) -> int:
    try:
        tokens = read_whole(text)
    except ValueError as problem:
        hint = f" ({problem})" if str(problem) else ""
        raise BadInput(f"--tokens {text}: is no whole number{hint}; write it as 20k") from None
    if tokens < 1:
        raise BadInput(f"--tokens {text}: needs a whole number of at least 1, such as 20k")
    return tokens
