"""`Arm`, one way of training, and `ArmRun`, one training: an arm with one seed.

    arms: [baseline, dispersed, {name: both, neftune: 10, dispersion: {weight: 1.0}}]

A plain name stands for its technique at the usual strength; keys of `dispersion` are laid over
train.dispersion. The runs of one seed are twins: the same tokens in the same order. Arms differ in their
technique alone, never in learning rate or budget.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import field_serializer, model_validator

from edgedisp.recipe import values
from edgedisp.recipe.schema import Dispersion
from edgedisp.recipe.values import Section, accepts, choice

TECHNIQUES = ("neftune", "active_forgetting", "embedding_dropout")
PLAIN_ARMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "dispersed": {"dispersion": {}},
    "neftune": {"neftune": 5.0},
    "active_forgetting": {"active_forgetting": "auto"},
    "embedding_dropout": {"embedding_dropout": 0.1},
}
"""Arms that need no more than their name -> what it means: the smallest alpha of the NEFTune paper; one reset
after two thirds of the run, as in the dispersion paper (1,000 of its 1,526 steps); the dropout of GPT-2."""
AUTO_SHARE = 2 / 3
"""Share of the run after which `active_forgetting: auto` draws the embedding anew."""


@dataclass(frozen=True)
class ArmRun:
    """One training.

    name: its folder, `<arm>` for the first seed, `<arm>-seed<N>` for the others. replica counts the seeds
    from 0. dispersion: the whole section with the arm's keys laid over; None: off. techniques: those
    other than dispersion that are on, with their strength; active_forgetting in optimizer steps.
    """

    name: str
    arm: str
    replica: int
    seed: int
    dispersion: Dispersion | None = None
    techniques: dict[str, float] = field(default_factory=dict)

    @property
    def adds(self) -> dict[str, Any]:
        """What this training adds to plain cross-entropy, as JSON-able values; empty for the baseline."""
        section = self.dispersion
        dispersion = {} if section is None else {"dispersion": section.model_dump(mode="json")}
        return {**dispersion, **self.techniques}


class Arm(Section):
    """One arm: a plain name, or a name with at least one technique."""

    name: values.ArmName
    """names the arm and its folder"""
    dispersion: Annotated[
        Dispersion | None, accepts("a mapping with any keys of train.dispersion, or null")
    ] = None
    """the dispersion loss, these keys laid over train.dispersion; null: off"""
    neftune: values.Positive | None = None
    """alpha of the noise on the embedding's output (NEFTune)"""
    active_forgetting: values.Forgetting | None = None
    """steps between two fresh draws of the token embedding; auto: one, after two thirds"""
    embedding_dropout: values.Between0And1 | None = None
    """rate of the dropout on the embedding's output"""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        """A plain name, alone or as a mapping's only key, stands for its technique at the usual strength."""
        if isinstance(value, str):
            also = "or a mapping such as {name: strong, dispersion: {weight: 1.0}}"
            value = {"name": choice(value, tuple(PLAIN_ARMS), also)}
        if isinstance(value, dict) and list(value) == ["name"]:
            return value | PLAIN_ARMS.get(str(value["name"]), {})
        return value

    @model_validator(mode="after")
    def _does_what_its_name_says(self) -> Self:
        added = {key for key in ("dispersion", *TECHNIQUES) if getattr(self, key) is not None}
        promised = PLAIN_ARMS.get(self.name, added)
        if added != set(promised):
            words = f"adds {', '.join(promised)} alone" if promised else "adds nothing"
            raise ValueError(f"an arm called '{self.name}' {words}; give this one another name")
        if not added and self.name != "baseline":
            raise ValueError(f"it names no technique; add one of dispersion, {', '.join(TECHNIQUES)}")
        return self

    @field_serializer("dispersion")
    def _overrides(self, section: Dispersion | None) -> dict[str, Any] | None:
        """The arm's keys of train.dispersion alone: those laid over the section."""
        return None if section is None else section.model_dump(mode="json", exclude_unset=True)

    def __str__(self) -> str:
        return self.name

    def run(self, shared: Dispersion | None, seed: int, replica: int, steps: int | None) -> ArmRun:
        """The training number `replica`. shared: train.dispersion; seed: of the recipe; steps: of the run,
        if they are known.

        A seed of the token draw counts up with the replica, too.
        """
        dispersion = None
        if self.dispersion is not None and shared is not None:
            overrides = self.dispersion.model_fields_set
            dispersion = shared.model_copy(update={key: getattr(self.dispersion, key) for key in overrides})
            if dispersion.seed is not None:
                dispersion = dispersion.model_copy(update={"seed": dispersion.seed + replica})
        strengths = {key: getattr(self, key) for key in TECHNIQUES}
        if self.active_forgetting == "auto":
            strengths["active_forgetting"] = max(1, round(AUTO_SHARE * (steps or 0)))
        techniques = {key: strength for key, strength in strengths.items() if strength is not None}
        name = f"{self.name}-seed{seed + replica}" if replica else self.name
        return ArmRun(name, self.name, replica, seed + replica, dispersion, techniques)
