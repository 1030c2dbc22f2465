"""The arms of a recipe: the ways of training that are compared, and the trainings that follow from them.

    arms:
      - baseline                                    # plain cross-entropy
      - dispersed                                   # with train.dispersion
      - neftune                                     # a published technique at its usual strength
      - {name: strong, dispersion: {weight: 1.0}}   # keys laid over train.dispersion
      - {name: both, neftune: 10, dispersion: {}}   # techniques together
    seeds: 3                                        # every arm three times

An arm is a name and what its training adds to plain cross-entropy; all else is shared. With `seeds: n` each
arm is trained n times, with the seeds `seed`, `seed + 1`, ... One such training is an `ArmRun`. It keeps what
it makes in a folder of its own: `<arm>` for the first seed, `<arm>-seed<N>` for the others. The trainings of
one seed, over all arms, are twins: the same tokens in the same order.

Left out on purpose: another learning rate or budget in one arm. Arms that differ in more than their technique
cannot be compared; that is what a second recipe is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from edgedisp.recipe.kinds import ArmName, Between0And1, Forgetting, Positive, Works
from edgedisp.recipe.section import Section
from edgedisp.recipe.training import Dispersion

if TYPE_CHECKING:
    from edgedisp.recipe.schema import Recipe

USUAL: dict[str, float | Literal["auto"]] = {
    "neftune": 5.0,
    "active_forgetting": "auto",
    "embedding_dropout": 0.1,
}
"""The techniques beside dispersion, and the strength that the plain name stands for: the smallest alpha of
the NEFTune paper; one reset after two thirds of the run, as in the dispersion paper (1,000 of its 1,526
steps); the embedding dropout of GPT-2."""

PLAIN = ("baseline", "dispersed", *USUAL)
"""Arms that need no more than their name."""

AUTO_SHARE = 2 / 3
"""Share of the run after which `active_forgetting: auto` draws the embedding anew."""


class Arm(Section):
    """One arm: a plain name, or a name with at least one technique."""

    name: ArmName = Field(description="names the arm and its folder")
    dispersion: Annotated[Dispersion, Works("a mapping with any keys of train.dispersion")] | None = Field(
        default=None, description="the dispersion loss, these keys laid over train.dispersion; null: off"
    )
    neftune: Positive | None = Field(
        default=None, description="alpha of the noise on the embedding's output (NEFTune)", examples=["5.0"]
    )
    active_forgetting: Forgetting | None = Field(
        default=None,
        description="steps between two fresh draws of the token embedding; auto: one, after two thirds",
        examples=["100"],
    )
    embedding_dropout: Between0And1 | None = Field(
        default=None, description="rate of the dropout on the embedding's output", examples=["0.1"]
    )

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        """A plain name, alone or as a mapping's only key, stands for its technique at the usual strength."""
        if isinstance(value, str):
            if value not in PLAIN:
                also = "or a mapping such as {name: strong, dispersion: {weight: 1.0}}"
                raise PydanticCustomError("choice", "{choices}", {"choices": list(PLAIN), "also": also})
            return _plain(value)
        if isinstance(value, dict) and list(value) == ["name"] and value["name"] in PLAIN:
            return _plain(str(value["name"]))
        return value

    @model_validator(mode="after")
    def _does_what_its_name_says(self) -> Self:
        added = [key for key in ("dispersion", *USUAL) if getattr(self, key) is not None]
        if self.name == "baseline" and added:
            raise _refuse(f"a baseline adds nothing; give the arm with {added[0]} another name")
        if self.name != "baseline" and not added:
            raise _refuse("it names no technique")
        promised = "dispersion" if self.name == "dispersed" else self.name
        if promised in ("dispersion", *USUAL) and added != [promised]:
            raise _refuse(f"an arm called '{self.name}' adds {promised} alone; give this one another name")
        return self

    @model_serializer(mode="wrap")
    def _short(self, written: SerializerFunctionWrapHandler) -> Any:
        """As short as it may be written: the plain name, or the keys that are set."""
        full = written(self)
        if self.dispersion is not None:
            full["dispersion"] = {key: full["dispersion"][key] for key in self.overrides}
        kept = {key: value for key, value in full.items() if value is not None}
        return self.name if self.name in PLAIN and kept == _plain(self.name) else kept

    def __str__(self) -> str:
        return self.name

    @property
    def overrides(self) -> tuple[str, ...]:
        """Keys of train.dispersion that this arm was given another value for, in the order of the section."""
        given = set() if self.dispersion is None else self.dispersion.model_fields_set
        return tuple(key for key in Dispersion.model_fields if key in given)


def _plain(name: str) -> dict[str, Any]:
    if name == "dispersed":
        return {"name": name, "dispersion": {}}
    return {"name": name} | ({name: USUAL[name]} if name in USUAL else {})


def _refuse(hint: str) -> PydanticCustomError:
    return PydanticCustomError("hint", "{hint}", {"hint": hint})


def unique_names(arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
    """The arms; refused if two names differ in case alone, as their folders might be one."""
    names = [arm.name.casefold() for arm in arms]
    twice = [arm.name for index, arm in enumerate(arms) if names[index] in names[:index]]
    if twice:
        raise PydanticCustomError("duplicate", "{twice}", {"twice": twice[0]})
    return arms


@dataclass(frozen=True)
class ArmRun:
    """One training: an arm with one seed.

    `name` is its folder; `replica` counts the seeds from 0, and `seed` is this one's. `dispersion` is the
    whole section with the arm's keys laid over, None where it is off; of the techniques, those that are off
    are None. `active_forgetting` is in optimizer steps.
    """

    name: str
    arm: str
    replica: int
    seed: int
    dispersion: Dispersion | None = None
    neftune: float | None = None
    active_forgetting: int | None = None
    embedding_dropout: float | None = None

    @property
    def techniques(self) -> dict[str, float | int]:
        """The techniques beside dispersion that are on, with their strength."""
        values = {key: getattr(self, key) for key in USUAL}
        return {key: value for key, value in values.items() if value is not None}

    @property
    def adds(self) -> dict[str, Any]:
        """What this training adds to plain cross-entropy, as JSON-able values; empty for the baseline."""
        dispersion = (
            {} if self.dispersion is None else {"dispersion": self.dispersion.model_dump(mode="json")}
        )
        return {**dispersion, **self.techniques}


def arm_runs(recipe: Recipe) -> tuple[ArmRun, ...]:
    """Every training of a recipe: all arms with the first seed, then all with the second, and so on."""
    return tuple(_run(recipe, arm, replica) for replica in range(recipe.seeds) for arm in recipe.arms)


def _run(recipe: Recipe, arm: Arm, replica: int) -> ArmRun:
    seed = recipe.seed + replica
    return ArmRun(
        name=f"{arm.name}-seed{seed}" if replica else arm.name,
        arm=arm.name,
        replica=replica,
        seed=seed,
        dispersion=_laid_over(recipe.train.dispersion, arm, replica),
        neftune=arm.neftune,
        active_forgetting=_steps(arm, recipe.steps),
        embedding_dropout=arm.embedding_dropout,
    )


def _laid_over(shared: Dispersion | None, arm: Arm, replica: int) -> Dispersion | None:
    """train.dispersion with the arm's keys over it; a seed of its own moves on with the replica."""
    if arm.dispersion is None or shared is None:
        return None
    own = {key: getattr(arm.dispersion, key) for key in arm.overrides}
    laid = shared.model_copy(update=own)
    return laid if laid.seed is None else laid.model_copy(update={"seed": laid.seed + replica})


def _steps(arm: Arm, steps: int) -> int | None:
    if arm.active_forgetting == "auto":
        return max(1, round(AUTO_SHARE * steps))
    return arm.active_forgetting


def same_training(runs: Sequence[ArmRun]) -> tuple[str, str] | None:
    """The first two arms that would train alike, or None."""
    seen: dict[str, str] = {}
    for run in runs:
        if run.replica == 0 and seen.setdefault(repr(run.adds), run.arm) != run.arm:
            return seen[repr(run.adds)], run.arm
    return None
