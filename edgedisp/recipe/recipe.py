"""`Recipe`: the keys with their rules, and what follows from them: steps, trainings, identity."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import PrivateAttr, ValidationError, ValidationInfo, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from ruamel.yaml import YAML

from edgedisp.recipe.arms import ArmRun, arm_runs
from edgedisp.recipe.rules import problems
from edgedisp.recipe.schema import Keys

ONLOOKERS = ("watch_every", "report_to", "checkpoint_every")
"""Keys of `train` that change no weight: with another value, a finished training is kept."""


@dataclass(frozen=True)
class Origin:
    """Where a recipe was read (not compared), and whether `smoke` cut it down (compared: another base)."""

    path: Path | None = field(default=None, compare=False)
    smoke: bool = False


class Recipe(Keys):
    """One build: a base model, its text, and what is made of them. `load` reads it from YAML."""

    _origin: Origin = PrivateAttr(default=Origin())

    @model_validator(mode="after")
    def _rules(self, info: ValidationInfo) -> Self:
        broken = problems(self, smoke=info.context == "smoke")
        if broken:
            raise ValidationError.from_exception_data(
                "Recipe",
                [
                    InitErrorDetails(
                        type=PydanticCustomError("rule", "{words}", {"words": words}), loc=key, input=None
                    )
                    for key, words in broken
                ],
            )
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
    def arm_runs(self) -> tuple[ArmRun, ...]:
        """Every training: all arms with the first seed, then all with the second, and so on."""
        return arm_runs(self)

    def identity(self) -> dict[str, Any]:
        """What names the run: model, data, seed and train, without ONLOOKERS, as JSON-able values."""
        values = self.model_dump(mode="json", include={"model", "data", "seed", "train"})
        for key in ONLOOKERS:
            del values["train"][key]
        return values

    @property
    def hash8(self) -> str:
        """Suffix of the run folder, from `identity`: another precision, task, arm or seed reuses the run."""
        return hash8(self.identity())

    def to_yaml(self) -> str:
        """The resolved recipe, every key with its value; `load` reads it back to an equal Recipe."""
        yaml = YAML()
        yaml.width = 10**6  # never fold: a folded line is hard to read and to search
        stream = io.StringIO()
        yaml.dump(self.model_dump(mode="json"), stream)
        return stream.getvalue()


def hash8(identity: dict[str, Any]) -> str:
    """First 8 digits of the SHA-256 of `identity` as canonical JSON."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:8]
