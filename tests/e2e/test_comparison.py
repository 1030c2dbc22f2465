"""`edgedisp compare` over runs and over models: items are paired, unlike ones refused, nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_build import Built, Command, write_documents

from edgedisp.commands.compare import Scored, join, join_runs
from edgedisp.core.errors import BadInput
from edgedisp.core.files import from_json
from edgedisp.core.results import TaskScore
from edgedisp.core.run import Run
from edgedisp.evaluate.comparison import Results, task_result
from edgedisp.evaluate.statistics import ACCURACY, PERPLEXITY, difference
from edgedisp.pipeline.run_results import load


@pytest.fixture(scope="module")
def fewer(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run scored on other items: the windows are the same, but fewer of them."""
    from typer.testing import CliRunner

    from edgedisp.cli import app

    recipe, run, _ = built
    folder = tmp_path_factory.mktemp("fewer") / "run"
    shutil.copytree(run, folder)
    words = ["build", str(recipe), "--out", str(folder), "--set", "evaluate.perplexity_tokens=250"]
    assert CliRunner().invoke(app, words).exit_code == 0
    return folder


def results(run: Path, arm: str, precision: str = "int4") -> Results:
    path = run / arm / f"measure-{precision}" / "items.json"
    return from_json(Results, json.loads(path.read_text()))


def test_a_run_joined_with_itself_differs_by_nothing(built: Built) -> None:
    run = built.run
    joint = join_runs([run, run])
    assert joint.arms[:2] == ["baseline", "dispersed"] and len(joint.arms) == 4
    again = next(arm for arm in joint.arms[2:] if arm.startswith("baseline of"))
    for by_task in joint.comparisons[again].values():
        assert all(entry.main.estimate.value == 0 for entry in by_task.values())
    assert joint.unpaired == []
    alone = load(run).comparisons["dispersed"]["int4"]
    for task, entry in joint.comparisons["dispersed"]["int4"].items():
        assert entry.main.estimate.value == alone[task].main.estimate.value


def test_only_items_in_common_are_paired(built: Built, fewer: Path) -> None:
    run = built.run
    joint = join_runs([run, fewer])
    other = next(arm for arm in joint.arms if arm.startswith("dispersed of"))
    entry = joint.comparisons[other]["int4"]["heldout_perplexity"].main.estimate
    first = results(run, "baseline")["heldout_perplexity"]
    second = results(fewer, "dispersed")["heldout_perplexity"]
    common = {item["asked"] for item in first.items} & {item["asked"] for item in second.items}
    assert 0 < entry.n == len(common) < len(first.items)
    before, after = [[item for item in result.items if item["asked"] in common] for result in (first, second)]
    assert entry.value == difference([(before, after)], PERPLEXITY).estimate.value
    assert any("heldout_perplexity: " in reason and "items in common" in reason for reason in joint.unpaired)


def scored(shares: list[float]) -> Scored:
    """An arm of as many trainings as shares of right answers, each another 40 items' worth."""
    results: list[Any] = []
    for seed, share in enumerate(shares):
        right = np.random.default_rng(seed).permutation(40) < 40 * share
        items = [{"id": k, "document": k, "accuracy": int(hit), "asked": k} for k, hit in enumerate(right)]
        results.append({task: task_result(TaskScore(task, {}), items, [ACCURACY]) for task in ("a", "b")})
    return {"int4": results}


def joined(first: Scored, second: Scored) -> Run:
    run = Run("two", ["baseline", "other"], ["int4"])
    join(run, {"baseline": first, "other": second})
    return run


def test_means_are_over_all_seeds_and_what_cannot_be_paired_is_named() -> None:
    first, second = scored([0.5, 0.6, 0.7]), scored([0.6, 0.8, 0.9])
    run = joined(first, second)
    mean = run.means["other"]["int4"]
    assert run.unpaired == []
    assert (mean.first, mean.second) == (pytest.approx(0.6), pytest.approx(2.3 / 3))
    assert mean.estimate.value == pytest.approx(mean.second - mean.first)
    assert joined(first, scored([0.6])).unpaired == ["other, 1 of 3 trainings have one to be paired with"]
    del second["int4"][0]["b"]
    assert "other, b: scored in one of the two alone" in joined(first, second).unpaired


def test_runs_without_a_common_item_or_without_items_are_refused(
    built: Built, tmp_path: Path, edgedisp: Command
) -> None:
    run = built.run
    other = tmp_path / "run"
    shutil.copytree(run, other)
    for path in other.rglob("items.json"):
        by_task = json.loads(path.read_text())
        for result in by_task.values() if "heldout_items" not in by_task else ():
            result["score"]["items_sha256"] = "another"
            for item in result["items"]:
                item["asked"] = "another text"
        path.write_text(json.dumps(by_task))
        (path.parent / "record.json").unlink()  # which has the hash of what it was
    (other / "run.json").unlink()
    ended = edgedisp("compare", run, other)
    assert ended.code == 2 and "no item in common" in ended.err and "same text" in ended.err
    alone = tmp_path / "report.json"
    shutil.copyfile(run / "report.json", alone)
    with pytest.raises(BadInput, match="needs the run folder"):
        join_runs([run, alone])


def test_the_joint_page_and_table_name_every_arm(
    built: Built, fewer: Path, tmp_path: Path, edgedisp: Command
) -> None:
    run = built.run
    page = tmp_path / "both.html"
    ended = edgedisp("compare", run, fewer, "--html", page)
    assert ended.code == 0 and "Not paired: " in ended.out, ended
    assert "dispersed of tiny" in ended.out and "dispersed of tiny" in page.read_text()
    assert "The runs, joined on the items" in page.read_text()
    joined = json.loads(edgedisp("compare", run, fewer, "--json").out)["joined"]
    assert set(joined["comparisons"]) == set(joined["arms"]) - {"baseline"}
    assert edgedisp("compare", run, "--html", tmp_path / "no" / "where.html").code == 2


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held.jsonl"
    return write_documents(path, 40, seed=9)


def test_two_models_are_scored_on_the_same_items_once(
    built: Built, text: Path, tmp_path: Path, edgedisp: Command
) -> None:
    run = built.run
    out = tmp_path / "both"
    words = ["compare", run / "baseline" / "int4", run / "dispersed" / "model", "--text", text]
    words += ["--tasks", "heldout_perplexity", "--limit", "25", "--context", "64", "--out", out]
    first = edgedisp(*words, "--json")
    assert first.code == 0, first
    items = json.loads((out / "items.json").read_text())
    assert [*items] == ["baseline/int4", "dispersed/model"]
    results = load(out)
    scores = [results.measured(arm, "as given").scores["heldout_perplexity"].main for arm in results.arms]
    before, after = scores
    entry = results.comparisons["dispersed/model"]["as given"]["heldout_perplexity"].main
    assert before.estimate.n == after.estimate.n == entry.estimate.n == 25
    assert 0 < results.measured("baseline", "as given").noise.floor < 0.05  # type: ignore[union-attr]
    assert entry.estimate.value == pytest.approx(after.estimate.value - before.estimate.value)  # type: ignore[operator]
    assert "--tasks heldout_perplexity --limit 25" in results.command and str(text) in results.command
    assert "baseline" in json.loads(first.out)["verdict"]["sentence"]
    again = json.loads(edgedisp(*words, "--json").out)
    assert again["table"] == json.loads(first.out)["table"]
    assert json.loads((out / "items.json").read_text()) == items
    table = edgedisp(*words, "--markdown")
    assert table.code == 0 and "The baseline here is baseline/int4" in table.out


def test_models_whose_tokenizers_differ_are_refused_before_anything_is_scored(
    built: Built, text: Path, tmp_path: Path, edgedisp: Command
) -> None:
    run = built.run
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


def test_what_cannot_be_compared_is_named(built: Built, text: Path, edgedisp: Command) -> None:
    run = built.run
    for words, message in (
        ("{run}/baseline/int4 {run}/nowhere", "nowhere: is no run"),
        ("{run}/baseline/int4 {run}/dispersed/int4", "--tasks: say what"),
        ("{run}/baseline/int4 {run}/dispersed/int4 --tasks heldout", "name a file of documents"),
        ("{run}/baseline/int4 {run}/dispersed/int4 --tasks arc_eassy", "did you mean arc_easy"),
        ("{run}/corpus {run}/corpus --text {text}", "is no run"),
        ("{run} {run}/dispersed/int4", "holds no report.json"),
        ("{run} {run} --tasks small", "are for two models; runs are scored already"),
        ("{run}/baseline/int4", "holds no report.json"),
        ("{run}/items/items.json", "is no report of format 3"),
    ):
        ended = edgedisp("compare", *words.format(run=run, text=text).split())
        assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err
