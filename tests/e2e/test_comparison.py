"""`edgedisp compare` over runs and over models: items are paired, unlike ones refused, nothing is lost."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Ended

from edgedisp import data
from edgedisp.commands.compare import ScoredArm, join_runs, pair_with_first, short_names
from edgedisp.core.errors import BadInput
from edgedisp.core.files import from_json
from edgedisp.core.results import TaskScore
from edgedisp.evaluate.comparison import Results, common_items, compare_task, task_result
from edgedisp.evaluate.statistics import ACCURACY, PERPLEXITY, difference
from edgedisp.pipeline.run_results import load


@pytest.fixture(scope="module")
def fewer(built: tuple[Path, Path, Ended], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run scored on other items: the windows are the same, but fewer of them."""
    from typer.testing import CliRunner

    from edgedisp.cli.builds import app

    recipe, run, _ = built
    folder = tmp_path_factory.mktemp("fewer") / "run"
    shutil.copytree(run, folder)
    asked = ["build", str(recipe), "--out", str(folder), "--set", "evaluate.perplexity_tokens=250"]
    assert CliRunner().invoke(app, asked).exit_code == 0
    return folder


def results(run: Path, arm: str, precision: str = "int4") -> Results:
    path = run / arm / f"measure-{precision}" / "items.json"
    return from_json(Results, json.loads(path.read_text()))


def test_a_run_joined_with_itself_differs_by_nothing(built: tuple[Path, Path, Ended]) -> None:
    _, run, _ = built
    joint = join_runs([run, run])
    assert joint.arms[:2] == ["baseline", "dispersed"] and len(joint.arms) == 4
    again = next(arm for arm in joint.arms[2:] if arm.startswith("baseline of"))
    for by_task in joint.comparisons[again].values():
        assert all(entry.main.estimate.value == 0 for entry in by_task.values())
    assert joint.unpaired == []
    alone = load(run).comparisons["dispersed"]["int4"]
    for task, entry in joint.comparisons["dispersed"]["int4"].items():
        assert entry.main.estimate.value == alone[task].main.estimate.value


def test_only_items_in_common_are_paired(built: tuple[Path, Path, Ended], fewer: Path) -> None:
    _, run, _ = built
    joint = join_runs([run, fewer])
    other = next(arm for arm in joint.arms if arm.startswith("dispersed of"))
    entry = joint.comparisons[other]["int4"]["heldout_perplexity"].main.estimate
    first, second = (
        results(run, "baseline")["heldout_perplexity"],
        results(fewer, "dispersed")["heldout_perplexity"],
    )
    asked = {item["asked"] for item in first.items} & {item["asked"] for item in second.items}
    assert 0 < entry.n == len(asked) < len(first.items)
    before, after = ([item for item in one.items if item["asked"] in asked] for one in (first, second))
    assert entry.value == difference([(before, after)], PERPLEXITY).estimate.value
    assert any("heldout_perplexity: " in reason and "items in common" in reason for reason in joint.unpaired)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a/one", "a/two", ["one", "two"]),
        ("r/base/int8", "r/base/int4", ["base/int8", "base/int4"]),  # a precision's name means one
        ("r/x/dispersed", "r/y/model", ["x/dispersed", "y/model"]),
        ("a/one", "a/one", ["one (1)", "one (2)"]),
    ],
)
def test_two_models_are_called_by_what_is_theirs_alone(first: str, second: str, expected: list[str]) -> None:
    assert short_names(Path(first), Path(second)) == expected


def scored(label: str, shares: list[float]) -> ScoredArm:
    """An arm of as many trainings as shares of right answers, each another 40 items' worth."""
    results: list[Any] = []
    for seed, share in enumerate(shares):
        right = np.random.default_rng(seed).permutation(40) < 40 * share
        items = [{"id": k, "document": k, "accuracy": int(one), "asked": k} for k, one in enumerate(right)]
        by_task = {task: task_result(TaskScore(task, {}), items, [ACCURACY]) for task in ("a", "b")}
        results.append(by_task)
    return ScoredArm(label, 0, label, {"int4": results})


def test_means_are_over_all_seeds_and_trainings_without_a_pair_are_told() -> None:
    first, second = scored("baseline", [0.5, 0.6, 0.7]), scored("other", [0.6, 0.8, 0.9])
    paired = pair_with_first([first, second])
    mean = paired.means["other"]["int4"]
    assert paired.unpaired == []
    assert (mean.first, mean.second) == (pytest.approx(0.6), pytest.approx(2.3 / 3))
    assert mean.estimate.value == pytest.approx(mean.second - mean.first)
    paired = pair_with_first([first, scored("other", [0.6])])
    assert paired.unpaired == ["other, 1 of 3 trainings have one to be paired with"]


def test_a_task_that_one_side_alone_was_asked_is_told() -> None:
    first, second = scored("baseline", [0.5]), scored("other", [0.6])
    del second.by_precision["int4"][0]["b"]
    assert pair_with_first([first, second]).unpaired == ["other, b: scored in one of the two alone"]


def test_items_asked_in_other_words_are_not_the_same(built: tuple[Path, Path, Ended]) -> None:
    _, run, _ = built
    first = results(run, "baseline")["heldout_cloze"]
    second = results(run, "dispersed")["heldout_cloze"]
    second.items[0]["asked"] = "another text"
    second = replace(second, score=replace(second.score, items_sha256="another"))
    cut = common_items([first, second])
    left = len(first.items) - 1
    assert cut[0].score.main.estimate.value == np.mean([item["accuracy"] for item in first.items[1:]])
    assert [len(one.items) for one in cut] == [left] * 2
    assert compare_task([(cut[0], cut[1])]).main.estimate.n == left
    with pytest.raises(ValueError, match="accuracy is made of all items, and these differ"):
        common_items([replace(one, definitions={}) for one in (first, second)])
    for item in second.items:
        item["asked"] += " elsewhere"
    with pytest.raises(ValueError, match="heldout_cloze: no item in common"):
        common_items([first, second])


def test_runs_without_a_common_item_are_refused(
    built: tuple[Path, Path, Ended],
    tmp_path: Path,
    edgedisp: Any,
) -> None:
    _, run, _ = built
    other = tmp_path / "run"
    shutil.copytree(run, other)
    for path in other.rglob("items.json"):
        found = json.loads(path.read_text())
        for one in found.values() if "heldout_items" not in found else ():
            one["score"]["items_sha256"] = "another"
            for item in one["items"]:
                item["asked"] = "another text"
        path.write_text(json.dumps(found))
    ended = edgedisp("compare", run, other)
    assert ended.code == 2 and "no item in common" in ended.err and "same text" in ended.err


def test_a_report_without_its_run_folder_cannot_be_joined(
    built: tuple[Path, Path, Ended],
    tmp_path: Path,
) -> None:
    _, run, _ = built
    alone = tmp_path / "report.json"
    shutil.copyfile(run / "report.json", alone)
    with pytest.raises(BadInput, match="needs the run folder"):
        join_runs([run, alone])


def test_the_joint_page_and_table_name_every_arm(
    built: tuple[Path, Path, Ended],
    fewer: Path,
    tmp_path: Path,
    edgedisp: Any,
) -> None:
    _, run, _ = built
    page = tmp_path / "both.html"
    ended = edgedisp("compare", run, fewer, "--html", page)
    assert ended.code == 0 and "not paired: " in ended.out
    assert "dispersed of tiny" in ended.out and "dispersed of tiny" in page.read_text()
    assert "The runs, joined on the items" in page.read_text()
    found = json.loads(edgedisp("compare", run, fewer, "--json").out)
    assert set(found["joined"]["comparisons"]) == set(found["joined"]["arms"]) - {"baseline"}
    assert edgedisp("compare", run, "--html", tmp_path / "no" / "where.html").code == 2


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held.jsonl"
    rows = [json.dumps({"text": document.text}) for document in data.synthetic_documents(40, seed=9)]
    path.write_text("\n".join(rows))
    return path


def test_two_models_are_scored_on_the_same_items_once(
    built: tuple[Path, Path, Ended],
    text: Path,
    tmp_path: Path,
    edgedisp: Any,
) -> None:
    _, run, _ = built
    out = tmp_path / "both"
    words = ["compare", run / "baseline" / "int4", run / "dispersed" / "model", "--text", text]
    words += ["--tasks", "heldout_perplexity", "--limit", "25", "--context", "64", "--out", out]
    first = edgedisp(*words, "--json")
    assert first.code == 0, first
    items = json.loads((out / "items.json").read_text())
    assert [*items] == ["baseline/int4", "dispersed/model"]
    results = load(out)
    before, after = (
        results.measured(arm, "as given").scores["heldout_perplexity"].main for arm in results.arms
    )
    entry = results.comparisons["dispersed/model"]["as given"]["heldout_perplexity"].main
    assert before.estimate.n == after.estimate.n == entry.estimate.n == 25
    assert 0 < results.measured("baseline", "as given").noise.floor < 0.05  # type: ignore[union-attr]
    assert entry.estimate.value == pytest.approx(after.estimate.value - before.estimate.value)  # type: ignore[operator]
    assert "--tasks heldout_perplexity --limit 25" in results.command and str(text) in results.command
    assert "baseline" in json.loads(first.out)["verdict"]["sentence"]
    assert edgedisp(*words, "--json").out == first.out
    assert json.loads((out / "items.json").read_text()) == items
    table = edgedisp(*words, "--markdown")
    assert table.code == 0 and "The baseline here is baseline/int4" in table.out


def test_models_whose_tokenizers_differ_are_refused_before_anything_is_scored(
    built: tuple[Path, Path, Ended], text: Path, tmp_path: Path, edgedisp: Any
) -> None:
    _, run, _ = built
    other = tmp_path / "other"
    shutil.copytree(run / "dispersed" / "model", other)
    (other / "record.json").unlink()  # a folder of somebody else's
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    words = ["compare", run / "baseline" / "model", other, "--text", text, "--tasks", "heldout_perplexity"]
    ended = edgedisp(*words, "--out", tmp_path / "out")
    assert ended.code == 2 and "other tokens, so no item is in common" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{run}/baseline/int4", "{run}/nowhere"], "nowhere: no such folder"),
        (["{run}/baseline/int4", "{run}/dispersed/int4"], "--tasks: say what"),
        (["{run}/baseline/int4", "{run}/dispersed/int4", "--tasks", "heldout"], "name a file of documents"),
        (["{run}/baseline/int4", "{run}/dispersed/int4", "--tasks", "arc_eassy"], "did you mean arc_easy"),
        (["{run}/corpus", "{run}/corpus", "--text", "{text}"], "is no run"),
        (["{run}", "{run}/dispersed/int4"], "holds no report.json"),
        (["{run}", "{run}", "--tasks", "small"], "--tasks: is for two models"),
        (["{run}/baseline/int4"], "holds no report.json"),
        (["{run}/items/items.json"], "is no report of format 3"),
        (["{run}/run.json", "{run}"], "is no report of format 3"),
    ],
)
def test_what_cannot_be_compared_is_told_and_leaves_nothing(
    built: tuple[Path, Path, Ended],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    edgedisp: Any,
    words: list[str],
    told: str,
) -> None:
    _, run, _ = built
    monkeypatch.chdir(tmp_path)
    ended = edgedisp("compare", *(word.format(run=run, text=text) for word in words))
    assert ended.code == 2 and told in ended.err and "Traceback" not in ended.err
    assert not [*tmp_path.iterdir()]
