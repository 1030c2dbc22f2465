"""`Recipe`: the whole of it, what follows from it (steps, identity), and its way back to YAML."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, PrivateAttr, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from edgedisp.recipe.arms import PLAIN, Arm, ArmRun, arm_runs, unique_names
from edgedisp.recipe.clashes import clashes
from edgedisp.recipe.kinds import FolderName, Precision, Seed, Seeds, Target, Unique, Works
from edgedisp.recipe.quantizing import Quantize
from edgedisp.recipe.section import Section
from edgedisp.recipe.sections import Data, Evaluate, Latency, Model, Verify
from edgedisp.recipe.training import Train
from edgedisp.recipe.written import to_yaml

ONLOOKERS = ("watch_every", "report_to", "checkpoint_every")
"""Keys of `train` that change no weight: with another value, a finished training is kept."""


@dataclass(frozen=True)
class Origin:
    """Where a recipe was read, and whether `smoke` cut it down.

    Recipes are equal wherever they lie, so the path takes no part in the comparison. `smoke` does: the same
    keys then mean a tiny random model instead of the base.
    """

    path: Path | None = field(default=None, compare=False)
    smoke: bool = False


class Recipe(Section):
    """One build: a base model, its text, and what is made of them. `load` reads it from YAML."""

    name: FolderName = Field(description="names the run's folder", examples=["my-model"])
    seed: Seed = Field(default=0, description="seed of data order, training and scoring")
    model: Model = Field(description="where training starts")
    data: Data = Field(description="the text")
    train: Train = Field(description="the training of each arm")
    arms: Annotated[
        tuple[
            Annotated[Arm, Works(f"one of {', '.join(PLAIN)}, or a mapping with a name and techniques")], ...
        ],
        AfterValidator(unique_names),
    ] = Field(
        default_factory=lambda: (Arm.model_validate("baseline"), Arm.model_validate("dispersed")),
        min_length=1,
        description="the ways of training that are compared with the baseline",
        examples=["[baseline, dispersed, neftune]"],
    )
    seeds: Seeds = Field(
        default=1, description="trainings of every arm, with the seeds seed, seed + 1, ...", examples=["3"]
    )
    precisions: Annotated[tuple[Precision, ...], Unique] = Field(
        default=("fp32", "int8", "int4"),
        min_length=1,
        description="the bundles that are checked, scored and timed",
    )
    quantize: Quantize = Field(default_factory=Quantize, description="how int8 and int4 are made")
    verify: Verify = Field(default_factory=Verify, description="how far a bundle may be from the torch model")
    evaluate: Evaluate = Field(default_factory=Evaluate, description="what is scored")
    latency: Latency = Field(default_factory=Latency, description="what is timed")
    targets: Annotated[tuple[Target, ...], Unique] = Field(
        default=(),
        description="devices (profiles in export/targets) for which each arm's measured bundle is packed",
        examples=["[phone-arm64]"],
    )
    _origin: Origin = PrivateAttr(default=Origin())

    @model_validator(mode="after")
    def _possible(self, info: ValidationInfo) -> Self:
        # `load` looks for clashes itself, so that it can report them beside other problems.
        found = [] if info.context == "clashes apart" else clashes(self)
        if found:
            words = "; ".join(f"{'.'.join(map(str, clash.keys[0]))}: {clash.words}" for clash in found)
            raise PydanticCustomError("clash", "{words}", {"words": words})
        return self

    @property
    def path(self) -> Path | None:
        """The file this recipe was read from; None for one made in Python."""
        return self._origin.path

    @property
    def is_smoke(self) -> bool:
        """True for a recipe that `smoke` made: its base is to be replaced by a tiny random twin."""
        return self._origin.smoke

    @property
    def folder(self) -> Path:
        """The folder that relative paths in the recipe start from."""
        return self.path.parent if self.path else Path()

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one optimizer step: batch x accumulate x context."""
        return self.train.batch * self.train.accumulate * self.data.context

    @property
    def steps(self) -> int:
        """Whole optimizer steps that `train.tokens` pays for, at least 1."""
        return self.train.tokens // self.tokens_per_step

    @property
    def arm_runs(self) -> tuple[ArmRun, ...]:
        """Every training: all arms with the first seed, then all with the second, and so on."""
        return arm_runs(self)

    def identity(self) -> dict[str, Any]:
        """What decides the trained weights: model, data, seed and train, as JSON-able values.

        Of `train`, what only looks on (watch_every, report_to) and how often is saved are left out.
        """
        kept = self.model_dump(mode="json", include={"model", "data", "seed", "train"})
        for onlooker in ONLOOKERS:
            del kept["train"][onlooker]
        return kept

    @property
    def hash8(self) -> str:
        """Suffix of the run folder: first 8 digits of the SHA-256 of `identity()` as canonical JSON.

        Precisions, quantization, tasks, latency, arms, seeds and targets leave it unchanged, so they reuse
        the run: an arm or a seed that is added trains what is new.
        """
        return hash8(self.identity())

    def to_yaml(self) -> str:
        """The resolved recipe, every key with its value; `load` reads it back to an equal Recipe."""
        return to_yaml(self.model_dump(mode="json"))


def hash8(identity: dict[str, Any]) -> str:
    """First 8 digits of the SHA-256 of what `Recipe.identity` gives, as canonical JSON."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]
