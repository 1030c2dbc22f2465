"""A random sample of a task's items, scored on a device and compared with this machine's scores.

A phone is too slow for thousands of items, so it gets a simple random sample (without replacement, by a seed)
as the token ids that the scorer reads, and answers with log-probabilities. The task reads these answers as
usual; device - host over the same items, paired, is what the device's arithmetic changes. Items are sent in
the order of the draw, so what was answered before a device was lost is a random sample too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import to_json
from edgedisp.evaluate import statistics
from edgedisp.evaluate.comparison import Results, TaskResult, task_result
from edgedisp.evaluate.loglikelihood import (
    Fitted,
    ScoreCache,
    ScoreOptions,
    fitted,
    loglikelihoods,
    name_of,
)
from edgedisp.evaluate.statistics import Resampling
from edgedisp.evaluate.task_suite import TaskSuite

LEAST, MOST = 20, 2000  # items of a task that a device may be asked

Answer = tuple[float, bool]
"""Sum of the log-probabilities of a continuation, and whether each of its tokens was the most likely one."""


@dataclass(frozen=True)
class SampledItem:
    """One item: its requests, cut to the model's context (is_cut: some were)."""

    task: str
    id: str
    requests: tuple[Fitted, ...]
    is_cut: bool

    @property
    def sent(self) -> list[Fitted]:
        """What a device is asked: an empty continuation is certain."""
        return [request for request in self.requests if request[1]]


@dataclass(frozen=True)
class Sample:
    """The items drawn of each task, in the order of the draw, and how many the task has in all."""

    items: dict[str, list[SampledItem]]
    total: dict[str, int]

    def in_turn(self) -> list[SampledItem]:
        """All items, the tasks by turns: what is lost at the end is lost of each alike."""
        turns = zip_longest(*self.items.values())
        return [item for turn in turns for item in turn if item is not None]


def check_count(count: int) -> None:
    """Raises BadInput for a sample too small to say anything, or larger than a device should be asked."""
    if not LEAST <= count <= MOST:
        raise BadInput(f"--items {count}: give {LEAST} to {MOST}; 100 to 300 are usual")


def draw(suite: TaskSuite, model: Any, count: int, seed: int) -> Sample:
    """Draw at most `count` items of each task; of `model`, `context` and `vocab_size` are read.

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
    sample: dict[str, list[SampledItem]] = {}
    for task, by_item in requests.items():
        key = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big")
        order = np.random.default_rng([seed, key]).permutation(len(by_item))
        sample[task] = []
        for item in (list(by_item)[index] for index in order[:count]):
            cut, dropped = zip(*(fitted(model, pair, suite.tokenizer.bos_token) for pair in by_item[item]))
            sample[task].append(SampledItem(task, item, cut, any(dropped)))
    return Sample(sample, {task: len(by_item) for task, by_item in requests.items()})


class _DeviceScores(ScoreCache):
    """A cache in which a device's scores replace this machine's. Nothing new may be computed over it."""

    def __init__(self, cache: ScoreCache, scores: Mapping[str, Any]) -> None:
        self.cache, self.scores = cache, scores

    def read(self, names: Sequence[str]) -> dict[str, Any]:
        return self.cache.read(names) | {name: self.scores[name] for name in names if name in self.scores}

    def write(self, values: Mapping[str, Any]) -> None:
        raise BuildFailed(f"{len(values)} requests of the full set have no score here to compare with")


def compare(
    suite: TaskSuite,
    sample: Sample,
    answers: Sequence[Sequence[Answer]],
    model: Any,
    cache: ScoreCache,
    results: Results,
) -> list[dict[str, Any]]:
    """A record for each task: what a device scored, against this machine.

    answers: for each of `sample.in_turn()`, or the first of them, the answers to what was sent. model, cache,
    results: this machine's, after `TaskSuite.run`. Each record holds {task, metric, higher_is_better, drawn,
    answered, of, truncated, full, device, here, difference, agreement, logprob, reason}; full, device and
    here are an `Estimate`, difference a `Difference`, as JSON. Where nothing was answered, or the main metric
    has no part per item, those from `device` on are None and `reason` says why.
    """
    scores: dict[str, Any] = {}
    answered: dict[str, list[SampledItem]] = {task: [] for task in sample.items}
    for item, item_answers in zip(sample.in_turn(), answers):
        if len(item_answers) != len(item.sent):
            raise BuildFailed(
                f"{item.task} {item.id}: {len(item_answers)} answers to {len(item.sent)} requests"
            )
        for request, (total, greedy) in zip(item.sent, item_answers):
            logprobs = [float(total), *[0.0] * (len(request[1]) - 1)]  # only sums are read of them
            scores[name_of(request)] = [logprobs, bool(greedy)]
        answered[item.task].append(item)
    device = ScoreOptions(suite.tokenizer.bos_token, _DeviceScores(cache, scores))
    device_results = suite.run(model, device, 2)
    records = []
    for task, full in results.items():
        main, scored = full.score.main, {item["id"] for item in full.items}
        items = [item for item in answered[task] if item.id in scored]
        record: dict[str, Any] = {
            "task": task,
            "metric": main.metric,
            "higher_is_better": main.higher_is_better,
            "drawn": len(sample.items[task]),
            "answered": len(items),
            "of": sample.total[task],
            "truncated": sum(item.is_cut for item in items),
            "full": to_json(main.estimate),
            **dict.fromkeys(("device", "here", "difference", "agreement", "logprob", "reason")),
        }
        if not items:
            record["reason"] = "nothing was answered"
        elif main.metric not in full.definitions:
            record["reason"] = "the metric exists for a whole task only, not as a mean of items"
        else:
            ids = [item.id for item in items]
            record |= _compared(full, device_results[task], ids, Resampling(seed=suite.options.seed))
            record["logprob"] = _logprob_differences(items, model, ScoreOptions(cache=cache), device)
        records.append(record)
    return records


def _compared(
    host: TaskResult, device: TaskResult, ids: Sequence[str], resampling: Resampling
) -> dict[str, Any]:
    metric = host.definitions[host.score.main.metric]
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


def agreement(
    host: Sequence[Mapping[str, Any]], device: Sequence[Mapping[str, Any]], metric: str
) -> dict[str, Any] | None:
    """Share of items answered alike, with Wilson's interval: {share, low, high, same, n, of}.

    of: "choice", the answer chosen among several; "right", whether it was right. None for losses.
    """
    of = "choice"
    answers = [[_choice(item) for item in items] for items in (host, device)]
    if None in answers[0]:
        of = "right"
        answers = [[item.get(metric) for item in items] for items in (host, device)]
        if not {*answers[0], *answers[1]} <= {0, 1}:
            return None
    same = sum(a == b for a, b in zip(*answers, strict=True))
    low, high = statistics.wilson(same, len(host))
    return {"share": same / len(host), "low": low, "high": high, "same": same, "n": len(host), "of": of}


def _choice(item: Mapping[str, Any]) -> int | None:
    """The likeliest of several answers; None where there is one."""
    logprobs = item.get("logprobs", ())
    return item.get("choice", int(np.argmax(logprobs)) if len(logprobs) > 1 else None)


def _logprob_differences(
    items: Sequence[SampledItem], model: Any, host: ScoreOptions, device: ScoreOptions
) -> dict[str, Any]:
    """Absolute differences of log-likelihoods in nats, the largest of each item: {mean, max, item (that with
    the largest), mean_per_token}."""
    largest = []  # (nats, tokens, id) of each item
    for item in items:
        pairs = zip(*(loglikelihoods(model, item.requests, side) for side in (host, device)))
        differences = [(abs(b.sum_logprob - a.sum_logprob), max(1, len(a.logprobs))) for a, b in pairs]
        largest.append((*max(differences), item.id))
    nats, _, worst = max(largest, key=lambda entry: entry[0])
    return {
        "mean": float(np.mean([nats for nats, _, _ in largest])),
        "max": nats,
        "item": worst,
        "mean_per_token": float(np.mean([nats / tokens for nats, tokens, _ in largest])),
    }
