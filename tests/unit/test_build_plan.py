"""The stages of a recipe: own folders, keys that know nothing of other arms, one declaration for each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_build import write_recipe

from edgedisp.core.errors import BadInput
from edgedisp.core.files import data_folder
from edgedisp.pipeline import build_plan
from edgedisp.pipeline.stage import Stage, StageRunner, plain
from edgedisp.recipe import Recipe, load

BOTH = {"baseline/model", "dispersed/model"}
MEASURE = {f"ARM/measure-{precision}" for precision in ("torch", "fp32", "int8", "int4")}
MANY = "arms=[baseline, dispersed, neftune, {name: strong, dispersion: {weight: 1.0}}]"


def wikipedia(*overrides: str) -> Recipe:
    return load(data_folder("recipes") / "wikipedia.yaml", overrides)


def by_name(recipe: Recipe) -> dict[str, Stage]:
    return {stage.name: stage for stage in build_plan.stages(recipe, threads=2)}


def key(stage: Stage) -> Any:
    return plain(stage.options), dict(stage.inputs)


def changed(before: dict[str, Stage], after: dict[str, Stage]) -> set[str]:
    """Without the packages, whose manifests name the hash of the whole recipe."""
    common = [name for name in before if name in after and not name.endswith(("-x64", "-arm64"))]
    return {name for name in common if key(before[name]) != key(after[name])}


def test_an_arm_or_a_seed_more_changes_no_key_but_the_timings() -> None:
    before = by_name(wikipedia())
    for overrides in ((MANY,), ("seeds=3",), (MANY, "seeds=2"), ("arms=[dispersed, baseline]",)):
        after = by_name(wikipedia(*overrides))
        assert changed(before, after) <= {"latency"}
        assert set(before) <= set(after)


def test_a_training_depends_on_what_its_arm_adds_and_on_nothing_of_the_others() -> None:
    before = by_name(wikipedia(MANY))
    heavier = by_name(wikipedia(MANY, "train.dispersion.weight=0.5"))
    assert changed(before, heavier) == {"dispersed/model"}  # `strong` has a weight of its own
    arms = {name: plain(before[f"{name}/model"].options)["arm"] for name in ("baseline", "neftune", "strong")}
    assert arms["baseline"]["dispersion"] is None and arms["neftune"]["techniques"] == {"neftune": 5.0}
    assert arms["strong"]["dispersion"]["weight"] == 1.0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=2e-4", {"ARM/model"}),
        ("train.checkpoint_every=3", set()),
        ("train.watch_every=3", set()),
        ("data.context=128", {"base", "corpus", "items", "ARM/model", *MEASURE}),
        ("quantize.int4.group=64", {"ARM/int4"}),
        ("quantize.int4.calibration_tokens=8k", {"ARM/int4"}),
        ("evaluate.limit=9", {"items", *MEASURE}),
        ("evaluate.bootstrap=300", MEASURE),
        ("verify.int4_kl=3", {"ARM/measure-int4"}),
        ("latency.prompt=9", {"latency"}),
    ],
)
def test_a_changed_key_changes_the_stages_whose_options_hold_it(override: str, expected: set[str]) -> None:
    stages = changed(by_name(wikipedia()), by_name(wikipedia(override)))
    assert stages == {name.replace("ARM", arm) for name in expected for arm in ("baseline", "dispersed")}


def test_a_local_base_and_text_are_in_a_key_by_their_content(tmp_path: Path) -> None:
    base, text = tmp_path / "tiny", tmp_path / "text.jsonl"
    base.mkdir()
    (base / "config.json").write_text("{}")
    text.write_text("one")
    recipe = load(write_recipe(tmp_path, "tiny", text.name))

    def hashes() -> list[dict[str, str]]:
        stages = build_plan.base(recipe), replace(build_plan.corpus(recipe), inputs={})
        return [StageRunner(tmp_path).key(stage)["files"] for stage in stages]

    before = hashes()
    text.write_text("two")
    other_text = hashes()
    (base / "config.json").write_text("[]")
    assert [left == right for left, right in zip(before, other_text)] == [True, False]
    assert [left == right for left, right in zip(other_text, hashes())] == [False, True]


def test_auto_precision_is_in_a_trainings_key_as_this_machine_computes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that goes on elsewhere trains both twins anew rather than one in another arithmetic."""
    for fast, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(build_plan, "multiplies_bf16", lambda fast=fast: fast)
        auto, fixed = (
            plain(by_name(wikipedia(*overrides))["dispersed/model"].options)["train"]
            for overrides in ((), (f"train.precision={precision}",))
        )
        assert auto == fixed and auto["precision"] == precision


def test_each_seed_is_trained_exported_and_scored_and_the_first_also_timed_and_packaged() -> None:
    recipe = wikipedia("seeds=2", "seed=4")
    stages = by_name(recipe)
    assert stages["dispersed/model"].options.arm.seed == 4
    assert stages["dispersed-seed5/model"].options.arm.seed == 5
    for name in ("model", "fp32", "int8", "int4", "measure-torch", "measure-int4"):
        assert f"dispersed-seed5/{name}" in stages
    assert stages["dispersed/measure-int4"].options.hidden_states
    assert not stages["dispersed-seed5/measure-int4"].options.hidden_states
    assert "dispersed-seed5/phone-arm64" not in stages
    assert set(stages["latency"].inputs.values()) == {
        f"{arm}/{precision}" for arm in ("baseline", "dispersed") for precision in recipe.precisions
    }


def test_the_untouched_base_is_quantized_scored_and_timed_like_an_arm_and_changes_none() -> None:
    gptq, aware = "quantize.int4.method=gptq", "train.quantization_aware=int4"
    for overrides in ((gptq,), (gptq, aware), ("quantize.budget=100MB",)):
        before, after = by_name(wikipedia(*overrides)), by_name(wikipedia(*overrides, "evaluate.base=true"))
        assert changed(before, after) == {"latency"}
        untrained = {
            name.removeprefix("untrained/"): stage for name, stage in after.items() if name not in before
        }
        assert set(untrained) == {"fp32", "int8", "int4", *(name.removeprefix("ARM/") for name in MEASURE)}
        assert untrained["fp32"].inputs["model"] == untrained["int4"].inputs["model"] == "base"
        assert (
            untrained["measure-int4"].inputs["bundle"]
            == after["latency"].inputs["base/int4"]
            == "untrained/int4"
        )
    assert not by_name(wikipedia(gptq, aware, "evaluate.base=true"))["untrained/int4"].options.is_trained


@pytest.mark.parametrize(
    "overrides",
    [
        (MANY, "seeds=3"),
        ("arms=[neftune, dispersed, baseline]", "seeds=2", "train.adapter.kind=qlora"),
        ("arms=[neftune, embedding_dropout]", "train.adapter.kind=lora"),
        ("arms=[dispersed, baseline]", "quantize.budget=100MB", "evaluate.base=true"),
    ],
)
def test_every_stage_comes_after_those_it_reads_under_a_name_of_its_own(overrides: tuple[str, ...]) -> None:
    recipe = wikipedia(*overrides)
    stages = build_plan.stages(recipe, threads=2)
    order = [stage.name for stage in stages]
    assert len(order) == len(set(order))
    for index, stage in enumerate(stages):
        assert set(stage.inputs.values()) <= set(order[:index])
    tops = {name.split("/")[0] for name in order} - {"budget"}
    base = {"untrained"} if recipe.evaluate.base else set()
    assert tops - base == {"base", "corpus", "items", "latency", *(run.name for run in recipe.arm_runs)}


def test_a_reporter_that_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_plan, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"train.report_to: wandb is not installed: pip install wandb"):
        build_plan.stages(wikipedia("train.report_to=[wandb]"), threads=2)


def test_a_budget_makes_the_int4_bundle_again_and_nothing_else() -> None:
    goal = "quantize.budget=100MB"
    budget = by_name(wikipedia(goal))
    assert changed(by_name(wikipedia()), budget) == {"baseline/int4", "dispersed/int4"}
    assert budget["dispersed/int4"].inputs["decider"] == "baseline/int4"
    assert not changed(budget, by_name(wikipedia(goal, "quantize.int4.group=64")))  # the search finds groups
    assert changed(budget, by_name(wikipedia(goal, "quantize.int4.method=rtn")))


def test_a_changed_grid_or_merge_merges_again_and_trains_nothing_again() -> None:
    qlora = "train.adapter.kind=qlora"
    before = by_name(wikipedia(qlora))
    for override in ("quantize.int4.group=64", "train.adapter.merge=full", "precisions=[fp32]"):
        remade = changed(before, by_name(wikipedia(qlora, override)))
        assert remade >= BOTH and not remade & {"baseline/adapter", "dispersed/adapter"}
    assert not BOTH & changed(before, by_name(wikipedia(qlora, "quantize.int8.group=64")))
    assert before["dispersed/model"].inputs["decider"] == "baseline/model"  # its audit holds for all arms
    for stages in (before, by_name(wikipedia(qlora, "train.adapter.merge=full"))):
        assert "decider" not in stages["baseline/model"].inputs
    assert "decider" not in by_name(wikipedia("train.adapter.kind=lora"))["dispersed/model"].inputs


def test_options_of_the_bundle_train_again_where_training_sees_them() -> None:
    aware, group = "train.quantization_aware=int4", "quantize.int4.group=16"
    before = by_name(wikipedia(aware))
    assert changed(before, by_name(wikipedia(aware, group))) >= BOTH
    assert not BOTH & changed(before, by_name(wikipedia(aware, "quantize.int4.accuracy_level=0")))
    assert not BOTH & changed(by_name(wikipedia()), by_name(wikipedia(group)))
