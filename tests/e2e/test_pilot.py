"""`edgedisp pilot`: the rule against numbers made by hand, and the real command on a tiny recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from edgedisp.commands.pilot import LOSS_FLOOR, Candidate, advice, make_recipe, run
from edgedisp.core.errors import BadInput, NotFinite
from edgedisp.core.progress import Screen
from edgedisp.core.results import Estimate
from edgedisp.core.stage_folder import Record, read
from edgedisp.pipeline import build_plan
from edgedisp.pipeline.stage import walk
from edgedisp.recipe import Dispersion, load

RECIPE = """\
name: tiny
seed: 1
model: {{base: {base}, architecture: llama}}
data: {{train: [{{source: {text}}}], heldout: 20%, context: 32}}
train: {{tokens: 2k, lr: 1e-3, batch: 4, watch_every: 0, dispersion: {{weight: 0.1, tokens: 16}}}}
"""
STEP = 128  # tokens of an optimizer step: batch 4 x context 32


def difference(value: float, half_width: float = 0.001) -> Estimate:
    return Estimate(value, value - half_width, value + half_width)


def candidate(weight: float, loss: float, cosine: float) -> Candidate:
    return Candidate("", Dispersion(weight=weight), difference(loss), difference(cosine))


def test_the_effect_follows_from_differences_that_are_sure_and_reach_the_floor() -> None:
    for loss, cosine, effect in (
        (0.0017, -0.001, "cosine unchanged, loss unchanged"),  # weight 0.1 at 80k tokens on SmolLM2-135M
        (-0.0017, -0.017, "disperses, loss unchanged"),  # weight 1
        (-0.005, -0.02, "disperses, loss better"),
        (-0.0049, 0.02, "condenses, loss unchanged"),
        (0.02, 0.0, "cosine unchanged, loss worse"),
    ):
        assert candidate(1, loss, cosine).effect == effect
    unsure = replace(candidate(1, 0, 0), loss=difference(-0.2, half_width=0.3), cosine=Estimate(-0.2))
    assert unsure.effect == "cosine unchanged, loss unchanged"


def test_lower_losses_rank_first_then_what_disperses_then_what_hurts_then_what_diverged() -> None:
    candidates = [
        Candidate("", Dispersion(weight=9), diverged="NaN"),
        candidate(8, 0.02, -0.3),
        candidate(7, 0.03, -0.4),
        candidate(6, -LOSS_FLOOR + 0.0001, -0.001),  # lower by too little: a tie
        candidate(5, 0.002, -0.02),
        candidate(4, -0.01, 0.0),
        candidate(3, -0.02, 0.0),
    ]
    ranked = sorted(candidates, key=lambda row: row.rank)
    assert [row.dispersion.weight for row in ranked] == [3, 4, 5, 6, 8, 7, 9]


def test_the_best_useful_setting_is_recommended_as_a_line_that_reads_back() -> None:
    useful = replace(candidate(3, 0.0, -0.03), dispersion=Dispersion(weight=3, layers=(0, 2), tokens=16))
    line = advice([useful, candidate(2, 0.02, 0.02)]).partition("under train: ")[2]
    read_back = YAML(typ="safe").load(line)["dispersion"]
    assert read_back == {"variant": "angular", "weight": 3, "layers": [0, 2], "tokens": 16}
    unsure = replace(candidate(2, 0, 0), cosine=difference(-0.2, half_width=0.3))
    assert unsure.rank < useful.rank and line in advice([unsure, useful])
    for nothing in (candidate(9, 0.02, -0.1), candidate(0.1, 0.0, 0.0)):
        assert "No setting can be recommended" in advice([nothing])


@pytest.fixture
def recipe(tmp_path: Path, text_file: Path, tiny_folder: dict[str, Path]) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(base=tiny_folder["llama"], text=text_file.name))
    return path


def test_every_weight_is_tried_with_all_layers_and_variants(recipe: Path) -> None:
    pilot = make_recipe(
        load(recipe), weights="0.03, 3", tokens="2k", layers="all,last_half", variants="angular,cosine"
    )
    names = [arm.name for arm in pilot.arms]
    assert len(set(names)) == 9 and names[:2] == ["baseline", "angular-all-0_03"]
    assert names[-1] == "cosine-last_half-3" and pilot.train.tokens == 15 * STEP
    assert [run.dispersion and run.dispersion.tokens for run in pilot.arm_runs] == [None] + 8 * [16]
    plain = load(recipe, ["train.dispersion=null", "arms=[baseline]"])
    assert [arm.name for arm in make_recipe(plain, weights="1", tokens="2k").arms][1:] == ["angular-all-1"]


def test_bad_input_ends_with_2_and_writes_nothing(edgedisp, recipe: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for options, words in (
        (["--weights", "0.1,x"], ["--weights: 'x': ", "a number, such as 0.1"]),
        (["--layers", "all,lst"], ["--layers: 'lst': ", "did you mean 'last'?"]),
        (["--variants", "cosin"], ["--variants: 'cosin'", "'cosine'"]),
        (["--tokens", "100"], ["--tokens 100: too few", "takes 128"]),
        (["--tokens", "many"], ["--tokens many", "a whole number"]),
    ):
        ended = edgedisp("pilot", recipe, "--out", tmp_path / "run", *options)
        assert ended.code == 2, ended
        assert all(word in ended.err for word in words), ended.err
        assert "Traceback" not in ended.err and not ended.out
        assert not (tmp_path / "run").exists()


def test_the_command_trains_and_measures_and_a_second_one_runs_nothing(  # type: ignore[no-untyped-def]
    edgedisp, recipe: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = ("pilot", recipe, "--smoke", "--weights", "0.1,30", "--out", run_dir)
    ended = edgedisp(*words)
    assert ended.code == 0, ended
    results = json.loads((run_dir / "pilot.json").read_text())
    assert results["tokens"] == 8 * STEP and len(results["candidates"]) == 2
    strong = next(row for row in results["candidates"] if row["dispersion"]["weight"] == 30)
    assert strong["cosine"]["high"] < 0
    for row in results["candidates"]:
        assert all(row[name]["low"] <= row[name]["value"] <= row[name]["high"] for name in ("loss", "cosine"))
        assert row["name"] in ended.out
    assert (run_dir / "pilot.png").read_bytes()[1:4] == b"PNG" and str(run_dir / "pilot.png") in ended.out
    assert not [*run_dir.rglob("*.partial")]

    again = edgedisp(*words, "--json")
    assert again.code == 0 and "kept 9 finished stages" in again.err
    assert json.loads(again.out) == {"run": str(run_dir), **results}


class Watcher(Screen):
    """Notes which stages were run."""

    def __init__(self) -> None:
        super().__init__("pilot")
        self.executed: list[str] = []

    def finished(self, name: str, record: Record) -> None:
        self.executed.append(name)


def test_an_interrupted_pilot_continues_and_another_weight_trains_what_is_new(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgedisp.pipeline import measure, training

    real_train, real_condensation, folder = training.train, measure.condensation, tmp_path / "run"

    def train(options: Any, *inputs: Any) -> dict[str, Any]:
        if options.arm.name == "angular-all-7":
            raise NotFinite("the loss is NaN")
        return real_train(options, *inputs)

    def interrupted(inputs: Any, *rest: Any) -> Any:
        if "reference" in inputs:
            raise KeyboardInterrupt
        return real_condensation(inputs, *rest)

    monkeypatch.setattr(training, "train", train)
    pilot = make_recipe(load(recipe), weights="0.1,7", tokens="256")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(measure, "condensation", interrupted)
        run(pilot, folder, Watcher())
    rest = Watcher()
    last = run(pilot, folder, rest)[-1]
    assert rest.executed == ["angular-all-0_1/measure-torch"]
    assert last.effect == "diverges" and last.loss is None and last.diverged == "the loss is NaN"
    assert not (folder / "angular-all-7" / "model.partial").exists()
    more = Watcher()
    run(make_recipe(load(recipe), weights="0.1,1", tokens="256"), folder, more)
    assert more.executed == ["angular-all-1/model", "angular-all-1/measure-torch"]
    with pytest.raises(BadInput, match=r"train\.tokens"):
        run(make_recipe(load(recipe), weights="0.1,1", tokens="512"), folder, Watcher())


def test_a_baseline_without_an_interval_ends_the_pilot_before_a_candidate_is_trained(
    recipe: Path, tmp_path: Path
) -> None:
    screen = Watcher()
    pilot = make_recipe(load(recipe, ["data.heldout=0.1%"]), weights="1", tokens="256")
    with pytest.raises(BadInput, match=r"data\.heldout: the baseline's loss .*has no interval"):
        run(pilot, tmp_path / "run", screen)
    assert screen.executed[-1] == "baseline/measure-torch"


def test_a_candidate_is_what_a_build_of_as_many_tokens_trains(recipe: Path, tmp_path: Path) -> None:
    run(make_recipe(load(recipe), weights="2", tokens="256"), tmp_path / "pilot", Watcher())
    built = load(recipe, ["train.tokens=256", "train.dispersion.weight=2"])
    stages = [build_plan.base(built), build_plan.corpus(built)]
    stages += [build_plan.training(built, arm) for arm in built.arm_runs]
    (tmp_path / "build").mkdir()
    records = {passed.name: passed.record for passed in walk(stages, tmp_path / "build", Watcher())}
    for name, arm in (("baseline", "baseline"), ("angular-all-2", "dispersed")):
        record = read(tmp_path / "pilot" / name / "model")
        assert (
            record and record.results["weights_sha256"] == records[f"{arm}/model"].results["weights_sha256"]
        )


def test_an_adapter_is_measured_as_the_recipe_trains_it(recipe: Path, tmp_path: Path) -> None:
    loaded = load(recipe, ["train.adapter.kind=lora", "train.lr=1e-2"])
    (row,) = run(make_recipe(loaded, weights="30", tokens="512"), tmp_path / "run", Watcher())
    assert row.signs[1] == -1
