"""Items of tasks scored on devices, and compared with this machine's scores of the same items.

A device gets the first items of each task, as the token ids that the scorer reads, and answers with
log-probabilities, which the task reads as usual; device - host, paired by item, is what the device's
arithmetic changes. Items are sent in an order drawn by the seed, the tasks by turns: what was answered before
a device was lost is a random sample of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from edgedisp import data, models
from edgedisp.bench.devices import DeviceTasks
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import check_files, check_writable, file_digest, to_json
from edgedisp.core.progress import Progress, labelled
from edgedisp.core.results import ANSWERS_TASK, DeviceResult, Json
from edgedisp.core.stage_folder import RUN, SCORES
from edgedisp.evaluate import statistics
from edgedisp.evaluate.comparison import Results, TaskResult, task_result
from edgedisp.evaluate.heldout_tasks import SuiteOptions
from edgedisp.evaluate.loglikelihood import (
    Fitted,
    Likelihood,
    ScoreCache,
    ScoreOptions,
    fitted,
    loglikelihoods,
    name_of,
)
from edgedisp.evaluate.statistics import Resampling
from edgedisp.evaluate.task_suite import TaskSuite, check_tasks, expand, prepare
from edgedisp.graph.session import scored_model, scored_size
from edgedisp.pipeline.measure import score_key
from edgedisp.pipeline.prepare import heldout_documents

CONTEXT = 256  # tokens of a held-out window
HELDOUT = "corpus"  # where a run has the documents that no arm was trained on

Answer = tuple[float, bool]
"""Sum of the log-probabilities of a continuation, and whether each of its tokens was the most likely one."""


@dataclass(frozen=True)
class Item:
    """One item of a task. requests: those that a device is asked, cut to the model's context (is_cut: some
    were); an empty continuation is certain and not asked."""

    task: str
    id: str
    requests: list[Fitted]
    is_cut: bool


class DeviceQuestions:
    """The items that devices are asked, the same for all bundles, and the records made of their answers.

    cache: a folder for scores, where the bundles lie in no run, or in one that cannot be written. Raises
    BadInput for tasks that are not known or need generated text, held-out tasks without text, a task whose
    data a hub does not give, and bundles of several tokenizers.
    """

    def __init__(self, tasks: DeviceTasks, bundles: Mapping[str, Path], cache: Path) -> None:
        check_tasks(tasks.tasks, tasks.tasks_path, tasks.trust_task_code)
        if ANSWERS_TASK in tasks.tasks:
            words = "needs generated text; on a device only likelihoods are scored"
            raise BadInput(f"--score {ANSWERS_TASK}: {words}")
        first = next(iter(bundles.values()))
        folder = first.resolve().parent.parent  # of RUN/ARM/BUNDLE
        is_run = all((folder / name).is_file() for name in (RUN, f"{HELDOUT}/heldout.jsonl"))
        run = folder if is_run else None
        tokenizers = [bundle / "tokenizer.json" for bundle in bundles.values()]
        if len({file_digest(path) if path.is_file() else str(path) for path in tokenizers}) > 1:
            raise BadInput("--score: takes bundles of one tokenizer; score the others by themselves")
        size = min(map(scored_size, bundles.values()), key=lambda size: size.context)
        window = min(size.context, CONTEXT)
        code = tasks.tasks_path, tasks.trust_task_code
        options = SuiteOptions(tasks.tasks, window, tasks.items, tasks.seed, None, *code)
        self.tasks, self.bundles, self.context = tasks, bundles, size.context
        self.suite = prepare(models.load_tokenizer(first), _documents(tasks, run), options)
        if missing := self.suite.missing:
            raise BadInput(f"--score: {'; '.join(missing.values())}")
        self.items = draw(self.suite, size)
        self.store = (run if run and os.access(run, os.W_OK) else cache) / SCORES
        self.store.parent.mkdir(parents=True, exist_ok=True)
        check_writable("the cache ($EDGEDISP_CACHE)", self.store)

    def facts(self) -> Json:
        """What the scores of all devices have in common."""
        return {"tasks": expand(self.tasks.tasks), "items": self.tasks.items, "seed": self.tasks.seed}

    def with_scores(
        self, results: Sequence[DeviceResult], threads: int, progress: Progress
    ) -> list[DeviceResult]:
        """The results of devices with `scores` in the place of their answers: a record for each bundle and
        task (`compare`)."""
        scores: list[list[Json]] = [[] for _ in results]
        for label, bundle in self.bundles.items():
            model = scored_model(bundle, threads)
            model.context = self.context  # what the requests were cut to
            with closing(ScoreCache(self.store, score_key(bundle, 1))) as cache:
                options = ScoreOptions(cache=cache, progress=labelled(progress, f"here, {label}"))
                here = score_here(self.suite, self.items, model, options)
            for records, result in zip(scores, results):
                answers = result.answers.get(label, ())
                for record in compare(self.suite, self.items, answers, model, here):
                    records.append({"label": label, **record})
        return [replace(result, answers={}, scores=records) for result, records in zip(results, scores)]


def draw(suite: TaskSuite, model: Any) -> list[Item]:
    """The items of a suite in the order of asking; of `model`, `context` and `vocab_size` are read.

    Raises BadInput for a task that needs generated text, or that asks one item in several ways.
    """
    requests = {
        task: {question.id: question.requests for question in questions}
        for task, questions in suite.questions.items()
    }
    if suite.harness_tasks:
        from edgedisp.evaluate.lm_eval_adapter import HarnessModel, item_requests

        adapter = HarnessModel(model, suite.tokenizer)
        for task, tasks in suite.harness_tasks.items():
            requests[task] = item_requests(tasks, adapter, suite.options.limit, suite.options.seed)
    rng = np.random.default_rng(suite.options.seed)
    by_task: list[list[Item]] = []
    for task, by_item in requests.items():
        items = []
        for item, pairs in by_item.items():
            cut, dropped = zip(*(fitted(model, pair, suite.tokenizer.bos_token) for pair in pairs))
            items.append(Item(task, item, [pair for pair in cut if pair[1]], any(dropped)))
        by_task.append([items[index] for index in rng.permutation(len(items))])
    return [item for turn in zip_longest(*by_task) for item in turn if item is not None]


Here = tuple[Mapping[Fitted, Likelihood], Results]
"""This machine's scores: of every request of the items, and of the tasks."""


def score_here(suite: TaskSuite, items: Sequence[Item], model: Any, options: ScoreOptions) -> Here:
    """Once for a bundle, however many devices answer."""
    requests = [request for item in items for request in item.requests]
    scores = dict(zip(requests, loglikelihoods(model, requests, options)))
    return scores, suite.run(model, options, 2)  # intervals come later, of the items that were answered


def compare(
    suite: TaskSuite, items: Sequence[Item], answers: Sequence[Sequence[Answer]], model: Any, here: Here
) -> Iterator[Json]:
    """A record for each task: what a device scored, against this machine's `model`, whose scores are `here`.

    answers: for each of `items`, or the first of them, the answers to its requests. Each record holds {task,
    metric, higher_is_better, is_share, drawn, answered, truncated, device, here, difference, agreement,
    logprob}; device and here are an `Estimate`, difference a `Difference`, as JSON; logprob: mean and max
    over items of how far log-likelihoods lie apart, nats. Without answers those from `device` on are None.
    """
    by_request, host = here
    scores = {request: (score.logprobs, score.greedy) for request, score in by_request.items()}
    apart: dict[str, dict[str, float]] = {}  # task -> item -> largest difference in nats
    for item, item_answers in zip(items, answers):
        if len(item_answers) != len(item.requests):
            raise BuildFailed(
                f"{item.task} {item.id}: {len(item_answers)} answers to {len(item.requests)} requests"
            )
        differences = [0.0]
        for request, (total, greedy) in zip(item.requests, item_answers):
            scores[request] = (float(total), *[0.0] * (len(request[1]) - 1)), greedy  # only sums are read
            differences.append(abs(total - by_request[request].sum_logprob))
        apart.setdefault(item.task, {})[item.id] = max(differences)
    with closing(ScoreCache(Path(":memory:"), "device")) as cache:
        cache.write({name_of(request): score for request, score in scores.items()})
        device = suite.run(model, ScoreOptions(cache=cache), 2)
    for task, result in host.items():
        main, nats = result.score.main, apart.get(task, {})
        ids = [item["id"] for item in result.items if item["id"] in nats]
        record: Json = {
            "task": task,
            "metric": main.metric,
            "higher_is_better": main.higher_is_better,
            "is_share": main.is_share,
            "drawn": sum(item.task == task for item in items),
            "answered": len(ids),
            "truncated": sum(item.is_cut for item in items if item.task == task and item.id in nats),
            **dict.fromkeys(("device", "here", "difference", "agreement", "logprob")),
        }
        if ids:
            record |= _compared(result, device[task], ids, Resampling(seed=suite.options.seed))
            values = [nats[item] for item in ids]
            record["logprob"] = {"mean": float(np.mean(values)), "max": max(values)}
        yield record


def _compared(host: TaskResult, device: TaskResult, ids: Sequence[str], resampling: Resampling) -> Json:
    metric = host.main
    tables = [{item["id"]: item for item in result.items} for result in (host, device)]
    first, second = (
        task_result(replace(host.score, metrics={}), [table[name] for name in ids], [metric], resampling)
        for table in tables
    )
    return {
        "device": to_json(second.score.main.estimate),
        "here": to_json(first.score.main.estimate),
        "difference": to_json(statistics.difference([(first.items, second.items)], metric, resampling)),
        "agreement": agreement(first.items, second.items, metric.name),
    }


def agreement(host: Sequence[Json], device: Sequence[Json], metric: str) -> Json | None:
    """Share of items answered alike, with Wilson's interval: {share, low, high, same, n}; None for losses.

    Alike: the same choice among several; of one answer, both right or both wrong.
    """
    answers = [[_choice(item) for item in items] for items in (host, device)]
    if None in answers[0]:
        answers = [[item.get(metric) for item in items] for items in (host, device)]
        if not {*answers[0], *answers[1]} <= {0, 1}:
            return None
    same = sum(a == b for a, b in zip(*answers, strict=True))
    low, high = statistics.wilson(same, len(host))
    return {"share": same / len(host), "low": low, "high": high, "same": same, "n": len(host)}


def _choice(item: Json) -> int | None:
    """The likeliest of several answers; None where there is one."""
    logprobs = item.get("logprobs", ())
    return item.get("choice", int(np.argmax(logprobs)) if len(logprobs) > 1 else None)


def _documents(tasks: DeviceTasks, run: Path | None) -> list[data.Document]:
    """The documents of the held-out tasks; none where there is no such task."""
    if tasks.text is not None:
        return list(data.read_documents(tasks.text))
    heldout = [name for name in expand(tasks.tasks) if name.startswith("heldout")]
    if heldout and run is None:
        raise BadInput(
            f"--score {heldout[0]}: is made from text, and the bundle lies in no run; name documents with "
            "--text"
        )
    if not heldout or run is None:
        return []
    check_files(run / HELDOUT, "heldout.jsonl")
    return heldout_documents(run / HELDOUT)
