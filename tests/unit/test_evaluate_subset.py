"""Tasks of lm-evaluation-harness whose items another device scores: another model stands in for it."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from test_evaluate_harness import Letters, Table, folder

from edgedisp.core.errors import BadInput
from edgedisp.evaluate import subset, tasks
from edgedisp.evaluate.kept import Kept
from edgedisp.evaluate.score import loglikelihoods
from edgedisp.evaluate.statistics import Metric

__all__ = ["folder"]  # a fixture
NAMES = ["toy_choice", "toy_rolling", "toy_lambada"]


def suite_of(names: list[str], place: Path) -> tasks.Suite:
    return tasks.prepare(Letters(), names, [], end_of_text=0, tasks_path=place)


def test_what_a_device_answers_is_what_the_task_would_give_it(folder: Path, tmp_path: Path) -> None:
    here, device = Table(0), Table(1)
    suite = suite_of(NAMES, folder)
    sample = subset.drawn(suite, here, 3, seed=0)
    assert {task: len(items) for task, items in sample.items.items()} == dict.fromkeys(NAMES, 3)
    answers: dict[str, dict[str, list[subset.Answer]]] = {}
    for item in sample.in_turn():
        found = loglikelihoods(device, item.sent)
        answers.setdefault(item.task, {})[item.id] = [(one.sum_logprob, one.greedy) for one in found]
    with closing(Kept(tmp_path / "scores.sqlite", "here")) as kept:
        full = suite.run(here, kept=kept)
        records = subset.compare(suite, sample, answers, here, kept, full=full)
        missing = subset.compare(suite, sample, {}, here, kept, full=full)
    there = suite.run(device)
    for record, task in zip(records, NAMES, strict=True):
        metric = Metric(**there[task]["definitions"][record["metric"]])
        for result, name in ((there, "device"), (full, "here")):
            drawn = {item.id for item in sample.items[task]}
            items = [item for item in result[task]["items"] if item["id"] in drawn]
            expected = subset.sampled(items, metric, len(items))["value"]
            assert record[name]["value"] == pytest.approx(expected, rel=1e-9)
        assert record["full"]["value"] == full[task]["value"] and record["of"] == 5
        assert (record["answered"], record["drawn"]) == (3, 3)
    assert records[0]["agreement"]["of"] == "choice" and records[1]["agreement"] is None
    assert [one["reason"] for one in missing] == ["nothing was answered"] * 3


def test_a_task_that_needs_generated_text_is_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match="toy_generate: needs generated text"):
        subset.drawn(suite_of(["toy_generate"], folder), Table(), 3, seed=0)


def test_items_longer_than_the_context_are_counted(folder: Path, tmp_path: Path) -> None:
    short = Table(context=24)
    suite = suite_of(["toy_choice"], folder)
    sample = subset.drawn(suite, short, 5, seed=0)
    cut = [item for item in sample.items["toy_choice"] if any(item.dropped)]
    assert cut and all(len(a) + len(b) - 1 <= 24 for item in cut for a, b in item.sent)
    answers = {
        item.id: [(one.sum_logprob, one.greedy) for one in loglikelihoods(short, item.sent)]
        for item in sample.items["toy_choice"]
    }
    with closing(Kept(tmp_path / "scores.sqlite", "here")) as kept:
        full = suite.run(short, kept=kept)
        (record,) = subset.compare(suite, sample, {"toy_choice": answers}, short, kept, full=full)
    assert record["truncated"] == len(cut) and record["logprob"]["max"] < 1e-9
    assert record["difference"]["identical"]
