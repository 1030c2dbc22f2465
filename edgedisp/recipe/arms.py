"""The trainings that follow from the arms and seeds of a recipe.

    arms:
      - baseline                                    # plain cross-entropy
      - dispersed                                   # with train.dispersion
      - neftune                                     # a published technique at its usual strength
      - {name: strong, dispersion: {weight: 1.0}}   # keys laid over train.dispersion
      - {name: both, neftune: 10, dispersion: {}}   # techniques together
    seeds: 3                                        # every arm three times

An `ArmRun` is one arm with one seed. The runs of one seed are twins: the same tokens in the same order.
An arm cannot have its own learning rate or budget: arms must differ in their technique alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgedisp.recipe.schema import Keys
from edgedisp.recipe.train_schema import TECHNIQUES, Arm, Dispersion

AUTO_SHARE = 2 / 3
"""Share of the run after which `active_forgetting: auto` draws the embedding anew."""


@dataclass(frozen=True)
class ArmRun:
    """One training: an arm with one seed.

    Attributes:
        name: its folder: `<arm>` for the first seed, `<arm>-seed<N>` for the others.
        replica: counts the seeds from 0; `seed` is this run's.
        dispersion: the whole section with the arm's keys laid over; None: off.
        active_forgetting: optimizer steps between two draws of the embedding; None: off.
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
        values = {key: getattr(self, key) for key in TECHNIQUES}
        return {key: value for key, value in values.items() if value is not None}

    @property
    def adds(self) -> dict[str, Any]:
        """What this training adds to plain cross-entropy, as JSON-able values; empty for the baseline."""
        section = self.dispersion
        dispersion = {} if section is None else {"dispersion": section.model_dump(mode="json")}
        return {**dispersion, **self.techniques}


def arm_runs(recipe: Keys) -> tuple[ArmRun, ...]:
    """Every training of a recipe: all arms with the first seed, then all with the second, and so on."""
    return tuple(_run(recipe, arm, replica) for replica in range(recipe.seeds) for arm in recipe.arms)


def same_training(runs: Sequence[ArmRun]) -> tuple[str, str] | None:
    """The names of the first two arms that would train alike, or None."""
    seen: dict[str, str] = {}
    for run in runs:
        if run.replica == 0 and seen.setdefault(repr(run.adds), run.arm) != run.arm:
            return seen[repr(run.adds)], run.arm
    return None


def _run(recipe: Keys, arm: Arm, replica: int) -> ArmRun:
    seed = recipe.seed + replica
    is_auto = arm.active_forgetting == "auto"
    forgetting = max(1, round(AUTO_SHARE * recipe.steps)) if is_auto else arm.active_forgetting
    return ArmRun(
        name=f"{arm.name}-seed{seed}" if replica else arm.name,
        arm=arm.name,
        replica=replica,
        seed=seed,
        dispersion=_laid_over(recipe.train.dispersion, arm, replica),
        neftune=arm.neftune,
        active_forgetting=forgetting if isinstance(forgetting, int) else None,
        embedding_dropout=arm.embedding_dropout,
    )


def _laid_over(shared: Dispersion | None, arm: Arm, replica: int) -> Dispersion | None:
    """train.dispersion with the arm's keys over it; a token-draw seed moves on with the replica."""
    if arm.dispersion is None or shared is None:
        return None
    laid = shared.model_copy(update={key: getattr(arm.dispersion, key) for key in arm.overrides})
    return laid if laid.seed is None else laid.model_copy(update={"seed": laid.seed + replica})
