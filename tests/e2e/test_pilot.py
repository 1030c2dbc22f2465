"""`edgedisp pilot`: the rule against numbers made by hand, and the real command on a tiny recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import silent
from edgedisp.core.stage_folder import Record, read
from edgedisp.pilot import estimate, plan, run, show
from edgedisp.pilot.halving import COSINE_FLOOR, LOSS_FLOOR, Difference, Judged, ranked, survivors
from edgedisp.recipe import load

RECIPE = """\
name: tiny
seed: 1
model: {{base: {base}, architecture: llama}}
data: {{train: [{{source: {text}}}], heldout: 20%, context: 32}}
train: {{tokens: 2k, lr: 1e-3, batch: 4, watch_every: 0, dispersion: {{weight: 0.1, tokens: 16}}}}
"""
STEP = 128  # tokens of an optimizer step: batch 4 x context 32


# The rule.


def difference(value: float, half_width: float = 0.001) -> Difference:
    return Difference(value, value - half_width, value + half_width)


def candidate(name: str, loss: float, cosine: float) -> Judged:
    return Judged(name, difference(loss), difference(cosine))


def test_a_difference_counts_if_its_interval_excludes_0_and_it_is_as_large_as_the_floor() -> None:
    assert difference(0.006).moved(0.005) == "up"
    assert difference(-0.005).moved(0.005) == "down"
    assert difference(-0.0049).moved(0.005) == "still"  # sure, but too small to matter
    assert difference(-0.2, half_width=0.3).moved(0.005) == "still"  # large, but not sure
    assert Difference(-0.2, None, None).moved(0.005) == "still"
    assert Difference(0.006, 0.0, 0.012).moved(0.005) == "still"  # the interval touches 0


@pytest.mark.parametrize(
    ("loss", "cosine", "effect"),
    [
        (0.0, 0.0, "nothing measurable"),
        (0.004, -0.004, "nothing measurable"),
        (0.0, -0.02, "disperses, loss unchanged"),
        (-0.02, -0.02, "disperses, loss better"),
        (-0.02, 0.0, "loss better, not dispersed"),
        (0.0, 0.02, "condenses, loss unchanged"),
        (-0.02, 0.02, "condenses, loss better"),
        (0.02, 0.0, "hurts"),
        (0.02, -0.02, "hurts"),
        (0.02, 0.02, "hurts"),
    ],
)
def test_what_a_setting_does_is_said_by_rule(loss: float, cosine: float, effect: str) -> None:
    assert candidate("x", loss, cosine).effect == effect


def test_weight_0_1_at_80k_tokens_on_smollm2_135m_does_nothing_and_weight_1_disperses() -> None:
    """Mean cosine .536 of the baseline, .535 and .519; perplexities 11.9 within 0.02."""
    assert Judged("0.1", difference(0.0017), difference(-0.001, 0.0005)).effect == "nothing measurable"
    assert candidate("1", -0.0017, -0.017).effect == "disperses, loss unchanged"


def test_a_better_loss_goes_first_then_what_disperses_most_then_what_hurts_then_what_diverged() -> None:
    rung = [
        Judged("diverged", None, None),
        candidate("hurts", 0.02, -0.3),
        candidate("hurts more", 0.03, -0.4),
        candidate("idle", 0.001, -0.001),
        candidate("disperses", 0.002, -0.02),
        candidate("better", -0.01, 0.0),
        candidate("much better", -0.02, 0.0),
    ]
    order = [judged.name for judged in ranked(rung)]
    assert order == ["much better", "better", "disperses", "idle", "hurts", "hurts more", "diverged"]
    assert survivors(rung) == order[:4]
    assert survivors(rung[:2]) == ["hurts"]
    assert survivors(rung[:1]) == []


def test_a_loss_that_is_lower_by_too_little_is_a_tie() -> None:
    rung = [
        candidate("lower", -LOSS_FLOOR + 0.0001, 0.0),
        candidate("disperses", 0.004, -COSINE_FLOOR),
        candidate("equal", 0.0, 0.0),
    ]
    assert survivors(rung) == ["disperses", "lower"]


# What is tried.


@pytest.fixture
def recipe(tmp_path: Path, text_file: Path, tiny_folder: dict[str, Path]) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(base=tiny_folder["llama"], text=text_file.name))
    return path


def test_every_weight_is_tried_with_all_layers_and_variants_in_rungs_of_doubling_tokens(recipe: Path) -> None:
    planned = plan(
        load(recipe), weights="0.03,3", tokens="2k", layers="all,last_half", variants="angular,cosine"
    )
    names = [one.name for one in planned.candidates]
    assert len(set(names)) == 8 and names[0] == "angular-all-0.03" and names[-1] == "cosine-last_half-3"
    assert planned.steps == (3, 7, 15)  # 15 steps of 128 tokens are what 2,000 tokens pay for
    assert planned.trainings == [(9, 3 * STEP), (5, 7 * STEP), (3, 15 * STEP)]
    assert planned.candidates[-1].laid_over(planned.dispersion).model_dump() == {
        **planned.dispersion.model_dump(), "variant": "cosine", "layers": "last_half", "weight": 3.0,
    }  # fmt: skip
    assert planned.dispersion.tokens == 16


def test_halvings_are_two_or_as_many_as_candidates_and_steps_allow(recipe: Path) -> None:
    loaded = load(recipe)
    for weights, tokens, steps in (("1", "2k", (15,)), ("1,2", "2k", (7, 15)), ("1,2,3", "300", (1, 2))):
        assert plan(loaded, weights=weights, tokens=tokens).steps == steps
    assert plan(loaded, weights="1,2,3,4,5", tokens="2k", halvings=3).steps == (1, 3, 7, 15)


def test_a_recipe_without_dispersion_is_piloted_with_the_defaults(recipe: Path) -> None:
    loaded = load(recipe, ["train.dispersion=null", "arms=[baseline]"])
    planned = plan(loaded, weights="1", tokens="2k")
    assert (planned.candidates[0].variant, planned.candidates[0].layers) == ("angular", "all")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weights", "0.1,x"], ["'x' is no number", "0.03,0.1,0.3"]),
        (["--weights", "0.1,,3"], ["a value is missing"]),
        (["--weights", "0.1,-1"], ["-1", "negative", "above 0"]),
        (["--weights", "0,1"], ["baseline", "above 0"]),
        (["--weights", "0.1,1e-1"], ["0.1 stands there twice"]),
        (["--layers", "all,lst"], ["'lst' is not known", "did you mean 'last'?", "first_half"]),
        (["--variants", "angualr"], ["did you mean 'angular'?", "spectral_entropy"]),
        (["--variants", "cosine,cosine"], ["cosine stands there twice"]),
        (["--tokens", "100"], ["--tokens 100: too few", "at least 128"]),
        (["--tokens", "many"], ["no whole number", "20k"]),
        (["--tokens", "300", "--halvings", "2"], ["too few with --halvings 2", "at least 512"]),
        (["--halvings", "4"], ["5 candidates are down to one after 3"]),
        (["--set", "data.heldout=0.1%"], ["1 document", "data.heldout"]),
        (["--set", "data.train.0.source=gone.jsonl"], ["gone.jsonl"]),
    ],
)
def test_bad_input_ends_with_2_and_writes_nothing(  # type: ignore[no-untyped-def]
    edgedisp, recipe: Path, tmp_path: Path, options: list[str], words: list[str]
) -> None:
    ended = edgedisp("pilot", recipe, "--out", tmp_path / "run", *options)
    assert ended.code == 2, ended
    assert all(word in ended.err for word in words), ended.err
    assert "Traceback" not in ended.err and not ended.out
    assert not (tmp_path / "run").exists()


# The real command.


def test_the_command_trains_judges_and_tells_and_a_second_one_runs_nothing(  # type: ignore[no-untyped-def]
    edgedisp, recipe: Path, tmp_path: Path
) -> None:
    words = ("pilot", recipe, "--smoke", "--weights", "0.1,30", "--out", tmp_path / "run")
    ended = edgedisp(*words)
    assert ended.code == 0, ended
    # 8 steps in a smoke run: two candidates and the baseline for 4, one and the baseline for 8.
    assert f"at most 5 trainings, {28 * STEP:,} tokens together" in ended.err
    found = json.loads((tmp_path / "run" / "pilot.json").read_text())
    first, last = found["rungs"]
    assert [rung["tokens"] for rung in found["rungs"]] == [4 * STEP, 8 * STEP]
    assert len(first["candidates"]) == 2 and len(last["candidates"]) == 1
    assert [row["name"] for row in first["candidates"] if row["goes_on"]] == [last["candidates"][0]["name"]]
    strong = next(row for row in first["candidates"] if row["weight"] == 30)
    assert strong["cosine_raw"]["high"] < 0
    for row in [*first["candidates"], *last["candidates"]]:
        for figure in ("loss", "cosine_raw", "cosine_mean_removed"):
            part = row[figure]
            assert part["low"] <= part["difference"] <= part["high"]
            assert part["difference"] == pytest.approx(part["candidate"] - part["baseline"])
        assert f"{row['loss']['difference']:+.4f}" in ended.out and row["effect"] in ended.out
    for name in ("pilot.svg", "pilot.png"):
        assert (tmp_path / "run" / name).stat().st_size > 2000
    weights = [path.parent.name for path in (tmp_path / "run").rglob("*.safetensors")]
    assert weights == ["base"]  # trained ones are thrown away
    assert not [*(tmp_path / "run").rglob("*.partial")]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.*")}
    again = edgedisp(*words, "--json")
    assert again.code == 0 and "every training is there already" in again.err and "kept" in again.err
    assert len(again.out.splitlines()) == 1 and json.loads(again.out) == found
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.*")} == before


class Watcher:
    """An observer that stops the pilot when a stage is finished, as Ctrl-C would."""

    def __init__(self, stop_after: str | None = None) -> None:
        self.stop_after = stop_after
        self.made: list[str] = []
        self.was_kept: list[str] = []

    def started(self, name: str, number: int, total: int) -> None: ...

    def progress(self, done: int, total: int, note: str) -> None: ...

    def finished(self, name: str, record: Record) -> None:
        self.made.append(name)
        if name == self.stop_after:
            raise KeyboardInterrupt

    def kept(self, name: str, record: Record) -> None:
        self.was_kept.append(name)


def test_a_stopped_pilot_continues_and_another_weight_trains_what_is_new(
    recipe: Path, tmp_path: Path
) -> None:
    planned = plan(load(recipe), weights="0.1,1e39", tokens="256")
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(planned, folder, Watcher(stop_after="tokens-128/angular-all-0.1"))
    left = estimate(planned, folder, silent)
    assert (left["trainings"], left["tokens"]) == (3, 128 + 2 * 256) and left["seconds"] > 0
    rest = Watcher()
    found = run(planned, folder, rest)
    assert rest.made == ["tokens-128/angular-all-1e+39", "tokens-256/baseline", "tokens-256/angular-all-0.1"]
    assert found["rungs"][0]["candidates"][1]["effect"] == "diverges"
    assert "loss" not in found["rungs"][0]["candidates"][1]

    more = Watcher()
    wider = plan(load(recipe), weights="0.1,1", tokens="256")
    run(wider, folder, more)
    assert more.made[0] == "tokens-128/angular-all-1" and "tokens-128/baseline" in more.was_kept
    with pytest.raises(BadInput, match=r"train\.tokens"):
        run(plan(load(recipe), weights="0.1,1", tokens="512"), folder, Watcher())


def test_the_last_rung_is_what_a_build_of_as_many_tokens_trains(recipe: Path, tmp_path: Path) -> None:
    from edgedisp.pipeline.build_plan import base, corpus, training
    from edgedisp.pipeline.stage import walk

    planned = plan(load(recipe), weights="2", tokens="256")
    run(planned, tmp_path / "pilot", Watcher())
    built = load(recipe, ["train.tokens=256", "train.dispersion.weight=2"])
    todo = [base(built), corpus(built), *(training(built, one) for one in built.arm_runs)]
    (tmp_path / "build").mkdir()
    walked = {step.name: step.record for step in walk(todo, tmp_path / "build", Watcher())}
    for piloted, arm in (("baseline", "baseline"), ("angular-all-2", "dispersed")):
        record = read(tmp_path / "pilot" / "tokens-256" / piloted)
        assert record is not None
        assert record.results["weights_sha256"] == walked[f"{arm}/model"].results["weights_sha256"]


def test_figures_are_those_of_the_loss_and_the_cosines_by_loops(recipe: Path, tmp_path: Path) -> None:
    """The base's own figures: a training whose learning rate is next to nothing leaves it as it is."""
    import numpy as np
    import torch

    from edgedisp import models
    from edgedisp.pipeline.prepare import heldout_documents

    planned = plan(load(recipe, ["train.lr=1e-30", "train.precision=fp32"]), weights="1", tokens="128")
    found = run(planned, tmp_path / "run", Watcher())
    row = found["rungs"][0]["candidates"][0]
    base = models.load(tmp_path / "run" / "base")
    judged = json.loads((tmp_path / "run" / "tokens-128" / "baseline" / "judged.json").read_text())
    first_windows = {item["id"]: item for item in judged["items"] if item["id"].endswith("#0")}
    assert len(first_windows) > 5
    tokenizer = models.load_tokenizer(tmp_path / "run" / "base")
    for document in heldout_documents(tmp_path / "run" / "corpus"):
        if (item := first_windows.get(f"{document.id}#0")) is None:
            continue  # the held-out tokens that are scored end before it
        ids = [models.end_of_text_id(tokenizer), *models.encode(tokenizer, document.text)][:33]
        with torch.no_grad():
            logits = base(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
        nats = -sum(float(logits[place, token]) for place, token in enumerate(ids[1:]))
        assert item["tokens"] == len(ids) - 1
        assert item["nll"] == pytest.approx(nats, rel=1e-4)
    blocks = torch.from_numpy(np.load(tmp_path / "run" / "corpus" / "heldout.npy").astype(np.int64))[:16]
    cosines: list[float] = []

    def look(module: Any, inputs: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        directions = torch.nn.functional.normalize(state[0].double(), dim=-1)
        pairs = [float(directions[i] @ directions[j]) for i in range(32) for j in range(i)]
        cosines.append(sum(pairs) / len(pairs))

    for layer in base.model.layers:
        layer.register_forward_hook(look)
    with torch.no_grad():
        for block in blocks:
            base(block[None])
    by_sequence = np.reshape(cosines, (len(blocks), 2)).mean(axis=1)
    np.testing.assert_allclose(judged["cosine_raw"], by_sequence, atol=1e-4)
    assert row["cosine_raw"]["baseline"] == pytest.approx(float(by_sequence.mean()), abs=1e-4)


def test_an_adapter_is_piloted_as_the_recipe_trains_it(recipe: Path, tmp_path: Path) -> None:
    loaded = load(recipe, ["train.adapter.kind=lora", "train.lr=1e-2"])
    found = run(plan(loaded, weights="30", tokens="512"), tmp_path / "run", Watcher())
    row = found["rungs"][0]["candidates"][0]
    assert row["cosine_raw"]["high"] < 0 and row["cosine_raw"]["candidate"] != row["cosine_raw"]["baseline"]


# What is said.


def shown(weight: float, loss: float, cosine: float, width: float = 0.001, **more: Any) -> dict[str, Any]:
    parts = {
        name: {
            "baseline": 1.0,
            "candidate": 1.0,
            "difference": value,
            "low": value - width,
            "high": value + width,
        }
        for name, value in (("loss", loss), ("cosine_raw", cosine))
    }
    judged = Judged("x", *(difference(value, width) for value in (loss, cosine)))
    return {
        "name": f"angular-all-{weight:g}", "variant": "angular", "layers": "all", "weight": weight,
        **parts, "effect": judged.effect, "goes_on": False, **more,
    }  # fmt: skip


def told(recipe: Path, *rungs: list[dict[str, Any]]) -> dict[str, Any]:
    planned = plan(load(recipe, ["train.tokens=200k"]), weights="1", tokens="20k")
    sizes = [planned.tokens(planned.steps[-1]) // 2**left for left in range(len(rungs) - 1, -1, -1)]
    made = [{"steps": 1, "tokens": size, "candidates": rows} for size, rows in zip(sizes, rungs)]
    by = {"windows": 9, "documents": 8, "tokens": 700, "sequences": 4}
    return show.result(planned, Path("runs/x"), made, by)


def test_the_line_for_the_recipe_is_read_back_as_the_chosen_setting(recipe: Path) -> None:
    found = told(recipe, [shown(3, 0.0, -0.02, goes_on=True), shown(0.1, 0.0, 0.0)], [shown(3, 0.0, -0.03)])
    assert found["chosen"] == "angular-all-3"
    read_back = YAML(typ="safe").load(found["line"])["dispersion"]
    assert read_back == {"variant": "angular", "weight": 3, "layers": "all", "tokens": 16}
    said = " ".join(found["sentences"])
    assert "weight 3: disperses, loss unchanged within 19,968 tokens (cosine -0.0300, loss 0.0000)" in (
        said.replace("+0.0000", "0.0000")
    )
    assert "Nothing measurable, as far as each went: weight 0.1." in said
    assert "The recipe trains on 200,000 tokens, 10 times as many" in said
    assert found["line"] in show.render(found)


def test_what_does_nothing_is_extrapolated_only_from_an_effect_and_called_an_extrapolation(
    recipe: Path,
) -> None:
    found = told(recipe, [shown(3, 0.0, -0.002, width=0.0005), shown(1, 0.0, 0.0)])
    said = " ".join(found["sentences"])
    assert found["chosen"] is None and found["line"] is None
    assert "No setting does anything measurable within 19,968 tokens." in said
    assert "an extrapolation, not a measurement" in said and "about 50,000" in said
    unsure = " ".join(told(recipe, [shown(3, 0.0, -0.002, width=0.01)])["sentences"])
    assert "no number of tokens can be named" in unsure and "extrapolation" not in unsure


def test_a_setting_that_hurts_is_never_recommended(recipe: Path) -> None:
    found = told(recipe, [shown(3, 0.02, -0.2), shown(9, 0.04, -0.3)])
    assert found["chosen"] is None
    assert "Hurts, as far as each went: weight 3 and weight 9." in found["sentences"]
    assert "No setting can be recommended: try smaller weights." in found["sentences"]


def test_a_setting_behind_one_that_condenses_is_still_recommended(recipe: Path) -> None:
    found = told(recipe, [shown(3, -0.02, 0.05), shown(9, -0.015, -0.05)])
    assert found["chosen"] is not None and "-9" in found["chosen"]
