"""Items of lm-eval tasks drawn for a device, and its answers compared with this machine's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from harness_tasks import folder
from score_models import Letters, Speller

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import from_json
from edgedisp.core.results import Difference
from edgedisp.evaluate import device_sample
from edgedisp.evaluate.device_sample import Answer
from edgedisp.evaluate.heldout_tasks import SuiteOptions
from edgedisp.evaluate.loglikelihood import ScoreCache, ScoreOptions, loglikelihoods
from edgedisp.evaluate.task_suite import TaskSuite, prepare

__all__ = ["folder"]  # a fixture

NAMES = ("toy_choice", "toy_rolling", "toy_lambada")


def suite(folder: Path, *names: str) -> TaskSuite:
    return prepare(Letters(), [], SuiteOptions(names, tasks_path=folder))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ScoreCache]:
    with closing(ScoreCache(tmp_path / "scores.sqlite", "this machine")) as cache:
        yield cache


def compare(folder: Path, cache: ScoreCache, device: Speller, count: int = 5) -> dict[str, dict[str, Any]]:
    """The records of the tasks, when `device` has answered `count` items of each."""
    tasks, host = suite(folder, *NAMES), Speller(context=16)
    sample = device_sample.draw(tasks, host, count, seed=0)
    results = tasks.run(host, ScoreOptions(cache=cache))
    answers: list[list[Answer]] = [
        [(score.sum_logprob, score.greedy) for score in loglikelihoods(device, item.sent)]
        for item in sample.in_turn()
    ]
    records = device_sample.compare(tasks, sample, answers, host, cache, results)
    return {record["task"]: record for record in records}


def test_the_same_model_gives_the_same_scores(folder: Path, cache: ScoreCache) -> None:
    records = compare(folder, cache, Speller(context=16))
    metrics = {task: record["metric"] for task, record in records.items()}
    assert metrics == {"toy_choice": "acc", "toy_rolling": "word_perplexity", "toy_lambada": "acc"}
    for record in records.values():
        assert (record["drawn"], record["answered"], record["of"]) == (5, 5, 5)
        assert record["device"]["value"] == pytest.approx(record["here"]["value"])
        assert record["here"]["value"] == pytest.approx(record["full"]["value"])
        assert from_json(Difference, record["difference"]).estimate.value == pytest.approx(0)
        assert record["logprob"]["max"] < 1e-4
    agreements = [record["agreement"] and record["agreement"]["of"] for record in records.values()]
    assert agreements == ["choice", None, "right"]
    assert records["toy_choice"]["truncated"] == 5  # of 16 tokens of context


def test_another_model_differs_in_scores_choices_and_log_probs(folder: Path, cache: ScoreCache) -> None:
    records = compare(folder, cache, Speller(seed=2, context=16), count=4)
    record = records["toy_choice"]
    assert record["answered"] == 4 < record["of"] and record["logprob"]["max"] > 1
    assert record["agreement"]["same"] < record["agreement"]["n"] == 4
    change = from_json(Difference, records["toy_rolling"]["difference"])
    assert change.second == records["toy_rolling"]["device"]["value"] != change.first


def test_no_answers_too_few_and_tasks_that_generate_text(folder: Path, cache: ScoreCache) -> None:
    tasks, model = suite(folder, "toy_choice"), Speller()
    sample = device_sample.draw(tasks, model, 2, seed=0)
    results = tasks.run(model, ScoreOptions(cache=cache))
    (record,) = device_sample.compare(tasks, sample, [], model, cache, results)
    assert (record["answered"], record["reason"], record["device"]) == (0, "nothing was answered", None)
    with pytest.raises(BuildFailed, match="1 answers to 3 requests"):
        device_sample.compare(tasks, sample, [[(0.0, True)]], model, cache, results)
    with pytest.raises(BadInput, match="toy_generate: needs generated text"):
        device_sample.draw(suite(folder, "toy_generate"), model, 5, seed=0)
