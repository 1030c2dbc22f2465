"""Arms and seeds as stages: own folders, keys that know nothing of other arms, one order for twins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedisp.core.paths import data_folder
from edgedisp.pipeline import Stage, stages
from edgedisp.recipe import ArmRun, Recipe, load
from edgedisp.stages.training import _in_order

MANY = "arms=[baseline, dispersed, neftune, {name: strong, dispersion: {weight: 1.0}}]"


def quickstart(*overrides: str) -> Recipe:
    return load(data_folder("recipes") / "quickstart.yaml", overrides)


def by_name(recipe: Recipe) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages(recipe, threads=2)}


def keyed(stage: Stage) -> tuple[Any, ...]:
    return stage.section, stage.reads


def test_an_arm_or_a_seed_more_changes_no_key_but_the_timings() -> None:
    before = by_name(quickstart())
    for overrides in ((MANY,), ("seeds=3",), (MANY, "seeds=2"), ("arms=[dispersed, baseline]",)):
        after = by_name(quickstart(*overrides))
        changed = {name for name in before if keyed(before[name]) != keyed(after[name])}
        assert changed <= {"latency"}
        assert set(before) <= set(after)


def test_a_training_depends_on_what_its_arm_adds_and_on_nothing_of_the_others() -> None:
    before = by_name(quickstart(MANY))
    heavier = by_name(quickstart(MANY, "train.dispersion.weight=0.5"))
    changed = {
        name for name in before if name.endswith("/model") and keyed(before[name]) != keyed(heavier[name])
    }
    assert changed == {"dispersed/model"}  # `strong` has a weight of its own
    assert "dispersion" not in before["neftune/model"].section["train"]
    assert before["neftune/model"].section["techniques"] == {"neftune": 5.0}
    assert before["strong/model"].section["train"]["dispersion"]["weight"] == 1.0
    assert "techniques" not in before["dispersed/model"].section


def test_auto_precision_is_in_a_trainings_key_as_this_machine_computes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So a run that goes on elsewhere trains both twins anew rather than one in another arithmetic."""
    for fast, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("edgedisp.pipeline.training.multiplies_bf16", lambda fast=fast: fast)
        keys = [
            by_name(quickstart(*asked))["dispersed/model"].section["train"]
            for asked in ((), (f"train.precision={precision}",))
        ]
        assert keys[0] == keys[1] and keys[0]["precision"] == precision


def test_each_seed_is_trained_exported_and_scored_and_the_first_also_timed_and_packed() -> None:
    recipe = quickstart("seeds=2", "seed=4")
    found = by_name(recipe)
    assert found["dispersed/model"].section["seed"] == 4
    assert found["dispersed-seed5/model"].section["seed"] == 5
    for name in ("model", "fp32", "int8", "int4", "measure-torch", "measure-int4"):
        assert f"dispersed-seed5/{name}" in found
    assert found["dispersed-seed5/measure-int4"].section == {
        **found["dispersed/measure-int4"].section,
        "in_depth": False,
    }
    assert "dispersed-seed5/phone-arm64" not in found
    assert set(found["latency"].reads) == {
        f"{arm}/{precision}" for arm in ("baseline", "dispersed") for precision in recipe.precisions
    }


@pytest.mark.parametrize(
    "overrides",
    [
        (MANY, "seeds=3"),
        ("arms=[neftune, dispersed, baseline]", "seeds=2", "train.adapter.kind=qlora"),
        ("arms=[neftune, embedding_dropout]", "train.adapter.kind=lora"),
    ],
)
def test_every_stage_comes_after_those_it_reads_and_all_training_before_the_rest(
    overrides: tuple[str, ...],
) -> None:
    recipe = quickstart(*overrides)
    order = [stage.name for stage in stages(recipe, threads=2)]
    assert len(order) == len(set(order))
    for place, stage in enumerate(stages(recipe, threads=2)):
        assert set(stage.reads) <= set(order[:place])
    kind = "model" if recipe.train.adapter is None else "adapter"
    trained = [f"{run.name}/{kind}" for run in recipe.arm_runs]
    assert order[3 : 3 + len(trained)] == trained


def test_twins_read_one_order_and_seeds_differ() -> None:
    packed = np.arange(60, dtype=np.uint16).reshape(20, 3)
    first, second, third = (
        _in_order(packed, ArmRun(f"a-{seed}", "a", replica, seed)) for replica, seed in enumerate((7, 8, 9))
    )
    twin = _in_order(packed, ArmRun("b-8", "b", 1, 8, neftune=5.0))
    assert first is packed and np.array_equal(second, twin)
    assert not np.array_equal(second, packed) and not np.array_equal(second, third)
    for shuffled in (second, third):
        assert np.array_equal(np.sort(shuffled[:, 0]), packed[:, 0]) and shuffled.dtype == packed.dtype


def test_a_run_folder_cannot_hold_two_stages_under_one_name(tmp_path: Path) -> None:
    recipe = quickstart(MANY, "seeds=3")
    tops = {name.split("/")[0] for name in by_name(recipe)}
    assert tops == {"base", "corpus", "items", "latency", *(run.name for run in recipe.arm_runs)}
