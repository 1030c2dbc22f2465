"""Items of lm-eval tasks for a device, and its answers compared with this machine's."""

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
from edgedisp.evaluate.heldout_tasks import SuiteOptions
from edgedisp.evaluate.loglikelihood import ScoreCache, ScoreOptions, loglikelihoods
from edgedisp.evaluate.task_suite import TaskSuite, prepare
from edgedisp.pipeline.device_scores import Answer, compare, draw, score_here

__all__ = ["folder"]  # a fixture

NAMES = ("toy_choice", "toy_rolling", "toy_lambada")
COUNT = 5


def suite(folder: Path, *names: str) -> TaskSuite:
    return prepare(Letters(), [], SuiteOptions(names, limit=COUNT, tasks_path=folder))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ScoreOptions]:
    with closing(ScoreCache(tmp_path / "scores.sqlite", "this machine")) as cache:
        yield ScoreOptions(cache=cache)


def records(
    folder: Path, cache: ScoreOptions, device: Speller, count: int | None = None
) -> dict[str, dict[str, Any]]:
    """The records of the tasks, when `device` has answered the first `count` items."""
    tasks, host = suite(folder, *NAMES), Speller(context=16)
    items = draw(tasks, host)
    assert [item.task for item in items[:4]] == [*NAMES, NAMES[0]]  # by turns
    answers: list[list[Answer]] = [
        [(score.sum_logprob, score.greedy) for score in loglikelihoods(device, item.requests)]
        for item in items[:count]
    ]
    here = score_here(tasks, items, host, cache)
    return {record["task"]: record for record in compare(tasks, items, answers, host, here)}


def test_the_same_model_gives_the_same_scores(folder: Path, cache: ScoreOptions) -> None:
    by_task = records(folder, cache, Speller(context=16))
    metrics = {task: record["metric"] for task, record in by_task.items()}
    assert metrics == {"toy_choice": "acc", "toy_rolling": "word_perplexity", "toy_lambada": "acc"}
    for record in by_task.values():
        assert record["drawn"] == record["answered"] == COUNT
        assert record["device"]["value"] == pytest.approx(record["here"]["value"])
        assert from_json(Difference, record["difference"]).estimate.value == pytest.approx(0)
        assert record["logprob"]["max"] < 1e-4
    shares = [record["agreement"] and record["agreement"]["share"] for record in by_task.values()]
    assert shares == [1, None, 1]
    assert by_task["toy_choice"]["truncated"] == COUNT  # of 16 tokens of context


def test_another_model_differs_in_scores_choices_and_log_probs(folder: Path, cache: ScoreOptions) -> None:
    by_task = records(folder, cache, Speller(seed=2, context=16), 3 * 4)
    record = by_task["toy_choice"]
    assert record["answered"] == 4 < record["drawn"] and record["logprob"]["max"] > 1
    assert record["agreement"]["same"] < record["agreement"]["n"] == 4
    change = from_json(Difference, by_task["toy_rolling"]["difference"])
    assert change.second == by_task["toy_rolling"]["device"]["value"] != change.first


def test_no_answers_too_few_and_tasks_that_generate_text(folder: Path, cache: ScoreOptions) -> None:
    tasks, model = suite(folder, "toy_choice"), Speller()
    items = draw(tasks, model)
    here = score_here(tasks, items, model, cache)
    (record,) = compare(tasks, items, [], model, here)
    assert (record["answered"], record["device"]) == (0, None)
    with pytest.raises(BuildFailed, match="1 answers to 3 requests"):
        list(compare(tasks, items, [[(0.0, True)]], model, here))
    with pytest.raises(BadInput, match="toy_generate: needs generated text"):
        draw(suite(folder, "toy_generate"), model)
