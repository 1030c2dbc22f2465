"""`Arm`, one way of training, and `ArmRun`, one training: an arm with one seed.

    arms:
      - baseline                                    # plain cross-entropy
      - dispersed                                   # with train.dispersion
      - neftune                                     # a published technique at its usual strength
      - {name: strong, dispersion: {weight: 1.0}}   # keys laid over train.dispersion
      - {name: both, neftune: 10, dispersion: {}}   # techniques together

The runs of one seed are twins: the same tokens in the same order. An arm cannot have its own learning rate or
budget: arms must differ in their technique alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator

from edgedisp.recipe import values
from edgedisp.recipe.train_schema import Dispersion
from edgedisp.recipe.values import Section, accepts, choice

TECHNIQUES: dict[str, float | Literal["auto"]] = {
    "neftune": 5.0,
    "active_forgetting": "auto",
    "embedding_dropout": 0.1,
}
"""The techniques other than dispersion, and the strength that the plain name means: the smallest alpha of
the NEFTune paper; one reset after two thirds of the run, as in the dispersion paper (1,000 of its 1,526
steps); the embedding dropout of GPT-2."""
PLAIN_ARMS = ("baseline", "dispersed", *TECHNIQUES)
"""Arms that need no more than their name."""
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
            return _plain(choice(value, PLAIN_ARMS, also))
        if not isinstance(value, dict | Arm):
            raise ValueError(f"needs one of {', '.join(PLAIN_ARMS)}, or a mapping")
        if isinstance(value, dict) and list(value) == ["name"] and value["name"] in PLAIN_ARMS:
            return _plain(str(value["name"]))
        return value

    @model_validator(mode="after")
    def _does_what_its_name_says(self) -> Self:
        added = [key for key in ("dispersion", *TECHNIQUES) if getattr(self, key) is not None]
        promised = "dispersion" if self.name == "dispersed" else self.name
        if self.name == "baseline" and added:
            raise ValueError(f"a baseline adds nothing; give the arm with {added[0]} another name")
        if self.name != "baseline" and not added:
            raise ValueError(f"it names no technique; add one of dispersion, {', '.join(TECHNIQUES)}")
        if promised in ("dispersion", *TECHNIQUES) and added != [promised]:
            raise ValueError(f"an arm called '{self.name}' adds {promised} alone; give this one another name")
        return self

    @model_serializer(mode="wrap")
    def _short(self, serialize: SerializerFunctionWrapHandler) -> Any:
        """The plain name, or the keys that are set."""
        full = serialize(self)
        if self.dispersion is not None:
            full["dispersion"] = {key: full["dispersion"][key] for key in self._overrides}
        short = {key: value for key, value in full.items() if value is not None}
        return self.name if self.name in PLAIN_ARMS and short == _plain(self.name) else short

    def __str__(self) -> str:
        return self.name

    @property
    def _overrides(self) -> dict[str, Any]:
        """The arm's values of keys of train.dispersion, in the order of the section."""
        keys = self.dispersion.model_fields_set if self.dispersion else set()
        return {key: getattr(self.dispersion, key) for key in Dispersion.model_fields if key in keys}

    def run(self, shared: Dispersion | None, seed: int, replica: int, steps: int) -> ArmRun:
        """The training number `replica`. shared: train.dispersion; seed: of the recipe; steps: of the run.

        A seed of the token draw counts up with the replica, too.
        """
        dispersion = None
        if self.dispersion is not None and shared is not None:
            dispersion = shared.model_copy(update=self._overrides)
            if dispersion.seed is not None:
                dispersion = dispersion.model_copy(update={"seed": dispersion.seed + replica})
        strengths = {key: getattr(self, key) for key in TECHNIQUES}
        if self.active_forgetting == "auto":
            strengths["active_forgetting"] = max(1, round(AUTO_SHARE * steps))
        techniques = {key: strength for key, strength in strengths.items() if strength is not None}
        name = f"{self.name}-seed{seed + replica}" if replica else self.name
        return ArmRun(name, self.name, replica, seed + replica, dispersion, techniques)


def _plain(name: str) -> dict[str, Any]:
    if name == "dispersed":
        return {"name": name, "dispersion": {}}
    return {"name": name} | ({name: TECHNIQUES[name]} if name in TECHNIQUES else {})
