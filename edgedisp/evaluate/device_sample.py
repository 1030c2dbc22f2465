"""A random sample of a task's items, scored on a device and compared with this machine's scores.

A phone is too slow for thousands of items, so it gets a simple random sample (without replacement, by a seed)
as token ids: the very tokens that the scorer here reads. It answers each request with the sum of its
log-probabilities and whether every token was the most likely one. The task then reads these answers as usual,
and device - here over the same items, paired, is what the device's arithmetic changes.

Items are sent in the order of the draw, so what was answered before a device was lost is a random sample too.
Tasks that need generated text are not supported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import to_json
from edgedisp.core.progress import Progress, silent
from edgedisp.evaluate import statistics
from edgedisp.evaluate.comparison import Results, TaskResult, task_result
from edgedisp.evaluate.loglikelihood import LanguageModel, Likelihood, Request, ScoreOptions, model_input
from edgedisp.evaluate.score_cache import ScoreCache, name_of
from edgedisp.evaluate.statistics import Resampling
from edgedisp.evaluate.task_suite import TaskSuite

LEAST, MOST = 20, 2000  # items of a task that a device may be asked

Pair = tuple[list[int], list[int]]
Answer = tuple[float, bool]
"""Sum of the log-probabilities of a continuation, and whether each of its tokens was the most likely one."""


@dataclass(frozen=True)
class SampledItem:
    """One item: its requests as the scorer makes them; `sent`, the token ids of contexts and continuations
    after the cut to the model's context; `dropped`, the context tokens cut off, by request."""

    task: str
    id: str
    requests: tuple[Request, ...]
    sent: tuple[Pair, ...]
    dropped: tuple[int, ...]

    @property
    def cache_name(self) -> str:
        return name_of([tuple(map(tuple, request)) for request in self.requests])


@dataclass(frozen=True)
class Sample:
    """The items drawn of each task, in the order of the draw, and how many the task has in all. cut: some
    item of the full set loses tokens to the context."""

    items: dict[str, list[SampledItem]]
    total: dict[str, int]
    cut: bool

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
        from edgedisp.evaluate.lm_eval_adapter import item_requests

        for task, tasks in suite.harness_tasks.items():
            requests[task] = item_requests(tasks, model, suite.text, suite.limit)
    options = ScoreOptions(suite.text.end_of_text, suite.text.bos_token)
    sample: dict[str, list[SampledItem]] = {}
    cut = False
    for task, by_item in requests.items():
        items = [_item(task, name, pairs, model, options) for name, pairs in by_item.items()]
        key = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big")
        order = np.random.default_rng([seed, key]).permutation(len(items))
        sample[task] = [items[place] for place in order[:count]]
        cut = cut or any(any(item.dropped) for item in items)
    return Sample(sample, {task: len(by_item) for task, by_item in requests.items()}, cut)


def _item(
    task: str, name: str, requests: tuple[Request, ...], model: Any, options: ScoreOptions
) -> SampledItem:
    sent: list[Pair] = []
    dropped = []
    for context, continuation in requests:
        # An empty continuation is certain: no device is asked.
        row, cut = model_input(model, context, continuation, options) if continuation else (context, 0)
        sent.append((list(row[: len(row) - max(0, len(continuation) - 1)]), list(continuation)))
        dropped.append(cut)
    return SampledItem(task, name, requests, tuple(sent), tuple(dropped))


class _DeviceScores(ScoreCache):
    """A cache in which a device's scores replace this machine's. Nothing new may be computed over it."""

    def __init__(self, cache: ScoreCache, scores: Mapping[str, Any]) -> None:
        self.cache, self.scores = cache, scores

    def read(self, items: Sequence[str]) -> dict[str, Any]:
        return self.cache.read(items) | {item: self.scores[item] for item in items if item in self.scores}

    def write(self, values: Mapping[str, Any]) -> None:
        raise BuildFailed(f"{len(values)} items of the full set have no score here to compare with")


@dataclass(frozen=True)
class Here:
    """This machine's side: the model, its cache after `TaskSuite.run`, and what that gave."""

    model: LanguageModel
    cache: ScoreCache
    results: Results


def compare(
    suite: TaskSuite,
    sample: Sample,
    answers: Mapping[str, Mapping[str, Sequence[Answer]]],
    here: Here,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """A record for each task: what a device scored, against this machine.

    answers: task -> item -> an answer for each of its requests. Each record holds {task, metric,
    higher_is_better, drawn, answered, of, truncated, full, device, here, difference, agreement, logprob,
    reason}; full, device and here are an `Estimate`, difference a `Difference`, as JSON. Where nothing was
    answered, or the main metric has no part per item, those from `device` on are None and `reason` says why.
    """
    scores = {
        item.cache_name: [asdict(one) for one in _likelihoods(item, answers[task][item.id])]
        for task, items in sample.items.items()
        for item in items
        if item.id in answers.get(task, {})
    }
    options = ScoreOptions(cache=_DeviceScores(here.cache, scores), progress=progress)
    device = suite.run(here.model, options, 2)
    records = []
    for task, items in sample.items.items():
        full = here.results[task]
        main, scored = full.score.main, {item["id"] for item in full.items}
        answered = [item for item in items if item.id in answers.get(task, {}) and item.id in scored]
        record: dict[str, Any] = {
            "task": task,
            "metric": main.metric,
            "higher_is_better": main.higher_is_better,
            "drawn": len(items),
            "answered": len(answered),
            "of": sample.total[task],
            "truncated": sum(any(item.dropped) for item in answered),
            "full": to_json(main.estimate),
            **dict.fromkeys(("device", "here", "difference", "agreement", "logprob", "reason")),
        }
        if not answered:
            record["reason"] = "nothing was answered"
        elif main.metric not in full.definitions:
            record["reason"] = "the metric exists for a whole task only, not as a mean of items"
        else:
            names = [item.id for item in answered]
            record |= _compared(full, device[task], names, Resampling(seed=suite.text.seed))
            record["logprob"] = _logprob_differences(answered, answers[task], here.cache)
        records.append(record)
    return records


def _likelihoods(item: SampledItem, answers: Sequence[Answer]) -> list[Likelihood]:
    """A device's answers as the scorer's own. Only sums are read of them, so tokens share a sum equally."""
    if len(answers) != len(item.sent):
        raise BuildFailed(f"{item.task} {item.id}: {len(answers)} answers to {len(item.sent)} requests")
    return [
        Likelihood((total / max(1, len(target)),) * len(target), greedy, dropped)
        for (total, greedy), (_, target), dropped in zip(answers, item.sent, item.dropped)
    ]


def _compared(
    full: TaskResult, scored_there: TaskResult, names: Sequence[str], resampling: Resampling
) -> dict[str, Any]:
    metric = full.definitions[full.score.main.metric]
    results = []
    for result in (full, scored_there):
        by_id = {item["id"]: item for item in result.items}
        items = [by_id[name] for name in names]
        results.append(task_result(replace(result.score, metrics={}), items, [metric], resampling))
    here, device = results
    return {
        "device": to_json(device.score.main.estimate),
        "here": to_json(here.score.main.estimate),
        "difference": to_json(statistics.difference([(here.items, device.items)], metric, resampling)),
        "agreement": agreement(here.items, device.items, metric.name),
    }


def agreement(
    here: Sequence[Mapping[str, Any]], device: Sequence[Mapping[str, Any]], metric: str
) -> dict[str, Any] | None:
    """Share of items answered alike, with Wilson's interval: {share, low, high, same, n, of}.

    of: "choice", the answer chosen among several; "right", whether it was right. None for losses.
    """
    choices = [[_choice(item) for item in items] for items in (here, device)]
    of = "right" if None in choices[0] else "choice"
    if of == "right":
        choices = [[item.get(metric) for item in items] for items in (here, device)]
        if not {*choices[0], *choices[1]} <= {0, 1}:
            return None
    same = sum(a == b for a, b in zip(*choices, strict=True))
    low, high = statistics.wilson(same, len(here))
    return {"share": same / len(here), "low": low, "high": high, "same": same, "n": len(here), "of": of}


def _choice(item: Mapping[str, Any]) -> int | None:
    """The likeliest of several answers; None where there is one."""
    if "choice" in item:
        return int(item["choice"])
    logprobs = item.get("logprobs", ())
    return int(np.argmax(logprobs)) if len(logprobs) > 1 else None


def _logprob_differences(
    answered: Sequence[SampledItem], answers: Mapping[str, Sequence[Answer]], cache: ScoreCache
) -> dict[str, Any]:
    """Absolute differences of log-likelihoods in nats, the largest of each item: {mean, max, item,
    mean_per_token}. item: the one with the largest."""
    scores = cache.read([item.cache_name for item in answered])
    largest = [  # (nats, tokens) of each item
        max(
            (abs(total - float(np.sum(score["logprobs"]))), max(1, len(target)))
            for (total, _), score, (_, target) in zip(answers[item.id], scores[item.cache_name], item.sent)
        )
        for item in answered
    ]
    worst = max(range(len(largest)), key=lambda place: largest[place][0])
    return {
        "mean": float(np.mean([nats for nats, _ in largest])),
        "max": largest[worst][0],
        "item": answered[worst].id,
        "mean_per_token": float(np.mean([nats / tokens for nats, tokens in largest])),
    }
