"""`edgedisp pilot`: the rule against numbers made by hand, and the real command on a tiny recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from edgedisp.commands.pilot import (
    LOSS_FLOOR,
    Candidate,
    Pilot,
    advice,
    direction,
    plan,
    ranked,
    recipe_line,
    run,
)
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Screen
from edgedisp.core.results import Estimate
from edgedisp.core.stage_folder import Record, read
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


def test_a_difference_counts_if_its_interval_excludes_0_and_it_reaches_the_floor() -> None:
    assert direction(difference(0.006), 0.005) == 1
    assert direction(difference(-0.005), 0.005) == -1
    assert direction(difference(-0.0049), 0.005) == 0  # sure, but too small to matter
    assert direction(difference(-0.2, half_width=0.3), 0.005) == 0  # large, but not sure
    assert direction(Estimate(-0.2), 0.005) == 0
    assert direction(Estimate(0.006, 0.0, 0.012), 0.005) == 0  # the interval touches 0


def test_the_effect_follows_from_both_differences() -> None:
    for loss, cosine, effect in (
        (0.0017, -0.001, "nothing measurable"),  # weight 0.1 at 80k tokens on SmolLM2-135M
        (-0.0017, -0.017, "disperses, loss unchanged"),  # weight 1
        (-0.02, -0.02, "disperses, loss better"),
        (-0.02, 0.0, "loss better, not dispersed"),
        (0.0, 0.02, "condenses, loss unchanged"),
        (0.02, -0.02, "hurts"),
    ):
        assert candidate(1, loss, cosine).effect == effect


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
    assert [row.dispersion.weight for row in ranked(candidates)] == [3, 4, 5, 6, 8, 7, 9]


def test_the_best_useful_setting_is_recommended_as_a_line_that_reads_back(recipe: Path) -> None:
    section = Dispersion(weight=3, layers=(0, 2), tokens=16)
    useful = replace(candidate(3, 0.0, -0.03), dispersion=section)
    pilot = Pilot(load(recipe, ["train.tokens=256"]), 2560, [candidate(2, -0.02, 0.02), useful])
    first, second = advice(pilot)
    line = recipe_line(section)
    assert first.endswith(line) and "2,560 tokens, 10 times as many" in second
    read_back = YAML(typ="safe").load(line)["dispersion"]
    assert read_back == {"variant": "angular", "weight": 3, "layers": [0, 2], "tokens": 16}
    assert "exclude_sink: true" in recipe_line(Dispersion(exclude_sink=True))
    assert "try smaller weights" in advice(replace(pilot, candidates=[candidate(9, 0.02, -0.1)]))[0]
    assert "try larger weights" in advice(replace(pilot, candidates=[candidate(0.1, 0.0, 0.0)]))[0]


@pytest.fixture
def recipe(tmp_path: Path, text_file: Path, tiny_folder: dict[str, Path]) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(base=tiny_folder["llama"], text=text_file.name))
    return path


def test_every_weight_is_tried_with_all_layers_and_variants(recipe: Path) -> None:
    pilot = plan(
        load(recipe), weights="0.03,3", tokens="2k", layers="all,last_half", variants="angular,cosine"
    )
    names = [row.name for row in pilot.candidates]
    assert len(set(names)) == 8 and names[0] == "angular-all-0.03" and names[-1] == "cosine-last_half-3"
    assert pilot.recipe.train.tokens == 15 * STEP
    assert all(row.dispersion.tokens == 16 for row in pilot.candidates)
    plain = plan(load(recipe, ["train.dispersion=null", "arms=[baseline]"]), weights="1", tokens="2k")
    assert [row.name for row in plain.candidates] == ["angular-all-1"]


def test_bad_input_ends_with_2_and_writes_nothing(edgedisp, recipe: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for options, words in (
        (["--weights", "0.1,x"], ["--weights 0.1,x: 'x': ", "a number, such as 0.1"]),
        (["--weights", "0.1,,3"], ["--weights 0.1,,3: ''"]),
        (["--weights", "0,1"], ["baseline", "above 0"]),
        (["--weights", "0.1,1e-1"], ["1e-1 is listed twice"]),
        (["--layers", "all,lst"], ["'lst': did you mean 'last'?", "first_half"]),
        (["--variants", "cosine,cosine"], ["cosine is listed twice"]),
        (["--tokens", "100"], ["--tokens 100: too few", "at least 128"]),
        (["--tokens", "many"], ["--tokens many", "a whole number"]),
        (["--set", "data.heldout=0.1%"], ["1 document", "data.heldout"]),
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
        assert row["name"] in ended.out and row["effect"] in ended.out
    assert (run_dir / "pilot.png").read_bytes()[1:4] == b"PNG" and str(run_dir / "pilot.png") in ended.out
    weights = [path.parent.name for path in run_dir.rglob("*.safetensors")]
    assert weights == ["base"]  # trained ones are thrown away
    assert not [*run_dir.rglob("*.partial")]

    again = edgedisp(*words, "--json")
    assert again.code == 0 and "kept 5 finished stages" in again.err
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
    from edgedisp.pipeline import training
    from edgedisp.train.dispersion_trainer import NotFinite

    trained, real_train, real_condensation = [], training.train, training.condensation

    def train(options: Any, *inputs: Any) -> dict[str, Any]:
        trained.append(options.arm.name)
        if options.arm.name == "angular-all-7":
            raise NotFinite("the loss is NaN")
        return real_train(options, *inputs)

    def interrupted(inputs: Any, *rest: Any) -> Any:
        if "reference" in inputs:
            raise KeyboardInterrupt
        return real_condensation(inputs, *rest)

    monkeypatch.setattr(training, "train", train)
    folder = tmp_path / "run"
    pilot = plan(load(recipe), weights="0.1,7", tokens="256")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "condensation", interrupted)
        run(pilot, folder, Watcher())
    assert trained == ["baseline", "angular-all-0.1"]
    rest = Watcher()
    last = run(pilot, folder, rest).candidates[-1]
    assert trained[2:] == ["angular-all-7"]  # a finished training is not repeated for its measurement
    assert rest.executed == ["angular-all-0.1", "angular-all-7"]
    assert last.effect == "diverges" and last.loss is None and last.diverged
    more = Watcher()
    run(plan(load(recipe), weights="0.1,1", tokens="256"), folder, more)
    assert more.executed == ["angular-all-1"]
    with pytest.raises(BadInput, match=r"train\.tokens"):
        run(plan(load(recipe), weights="0.1,1", tokens="512"), folder, Watcher())


def test_a_candidate_is_what_a_build_of_as_many_tokens_trains(recipe: Path, tmp_path: Path) -> None:
    from edgedisp.pipeline import build_plan
    from edgedisp.pipeline.stage import walk

    run(plan(load(recipe), weights="2", tokens="256"), tmp_path / "pilot", Watcher())
    built = load(recipe, ["train.tokens=256", "train.dispersion.weight=2"])
    trainings = [build_plan.training(built, arm) for arm in built.arm_runs]
    (tmp_path / "build").mkdir()
    passed = walk(
        [build_plan.base(built), build_plan.corpus(built), *trainings], tmp_path / "build", Watcher()
    )
    records = {stage.name: stage.record for stage in passed}
    for name, arm in (("baseline", "baseline"), ("angular-all-2", "dispersed")):
        record = read(tmp_path / "pilot" / name)
        assert record is not None
        assert record.results["weights_sha256"] == records[f"{arm}/model"].results["weights_sha256"]


def test_an_adapter_is_measured_as_the_recipe_trains_it(recipe: Path, tmp_path: Path) -> None:
    loaded = load(recipe, ["train.adapter.kind=lora", "train.lr=1e-2"])
    results = run(plan(loaded, weights="30", tokens="512"), tmp_path / "run", Watcher())
    assert (results.candidates[0].cosine or Estimate(0)).high < 0
