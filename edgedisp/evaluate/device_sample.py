"""A random part of a task's items, scored on a device, compared with the same items and the whole set here.

A phone is too slow for thousands of items. It gets a simple random sample, drawn without replacement by a
seed, as token ids: the very tokens that the scorer here reads. Back come, for each request, the sum of its
log-probabilities and whether every token was the most likely one. They replace this machine's scores
(`_Replaced`), and the task then reads its answers as always. Device - here over the same items, paired, is
what the device's arithmetic changes.

Items go out in the order of the draw: what a device answered before it was lost is a random sample too.
Left out: tasks that need generated text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any

import numpy as np

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.core.results import Estimate
from edgedisp.core.serialization import to_json
from edgedisp.evaluate import statistics
from edgedisp.evaluate.loglikelihood import LanguageModel, Likelihood, Request, ScoreOptions, model_input
from edgedisp.evaluate.score_cache import ScoreCache, name_of
from edgedisp.evaluate.statistics import Resampling
from edgedisp.evaluate.task_result import Results, TaskResult, task_result
from edgedisp.evaluate.task_suite import TaskSuite

LEAST, MOST = 20, 2000  # items of a task that a device may be asked

Pair = tuple[list[int], list[int]]
Answer = tuple[float, bool]
"""Sum of the log-probabilities of a continuation, and whether each of its tokens was the most likely one."""


@dataclass(frozen=True)
class SampledItem:
    """One item: its requests as the scorer makes them, and what of them is read in a model's context.

    sent: token ids of contexts and continuations after the cut; dropped: context tokens cut off, by request.
    """

    task: str
    id: str
    requests: tuple[Request, ...]
    sent: tuple[Pair, ...]
    dropped: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of the item in a score cache."""
        return name_of([tuple(map(tuple, request)) for request in self.requests])


@dataclass(frozen=True)
class Sample:
    """Of every task the items drawn, in the order of the draw, and how many there are in all.

    cut: some item of the full set loses tokens to the context.
    """

    items: dict[str, list[SampledItem]]
    total: dict[str, int]
    cut: bool

    def in_turn(self) -> list[SampledItem]:
        """All items, the tasks by turns: what is lost at the end is lost of each alike."""
        turns = zip_longest(*self.items.values())
        return [item for turn in turns for item in turn if item is not None]


def draw(suite: TaskSuite, model: Any, count: int, seed: int) -> Sample:
    """Draw at most `count` items of each task; of `model` `context` and `vocab_size` are read.

    Raises BadInput for a task that needs generated text, or that asks one item in several ways.
    """
    sample = Sample({}, {}, False)
    for task, requests in _all_requests(suite, model).items():
        key = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big")
        items = [_read(task, item, pairs, model, suite) for item, pairs in requests.items()]
        order = np.random.default_rng([seed, key]).permutation(len(items))
        sample.items[task] = [items[place] for place in order[:count]]
        sample.total[task] = len(items)
        sample = replace(sample, cut=sample.cut or any(any(item.dropped) for item in items))
    return sample


def _all_requests(suite: TaskSuite, model: Any) -> dict[str, dict[str, tuple[Request, ...]]]:
    """Task -> item -> its requests, of the full set."""
    requests = {
        task: {question.id: question.requests for question in questions}
        for task, questions in suite.questions.items()
    }
    if suite.harness_tasks:
        from edgedisp.evaluate.lm_eval_adapter import item_requests

        for task, tasks in suite.harness_tasks.items():
            requests[task] = item_requests(tasks, model, suite.text, suite.limit)
    return requests


def _read(task: str, item: str, requests: tuple[Request, ...], model: Any, suite: TaskSuite) -> SampledItem:
    options = ScoreOptions(suite.text.end_of_text, suite.text.bos_token)
    sent: list[Pair] = []
    dropped = []
    for context, continuation in requests:
        if not continuation:  # certain, so no device is asked
            sent.append((list(context), []))
            dropped.append(0)
            continue
        row, cut = model_input(model, context, continuation, options)
        sent.append((list(row[: len(row) - len(continuation) + 1]), list(continuation)))
        dropped.append(cut)
    return SampledItem(task, item, requests, tuple(sent), tuple(dropped))


class _Replaced(ScoreCache):
    """A cache some of whose scores are a device's. Nothing new may be computed over it."""

    def __init__(self, below: ScoreCache, above: Mapping[str, Any]) -> None:
        self.below, self.above = below, above

    def read(self, items: Sequence[str]) -> dict[str, Any]:
        return self.below.read(items) | {item: self.above[item] for item in items if item in self.above}

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
    bootstrap: int = 2000,
    progress: Progress = silent,
) -> list[dict[str, Any]]:
    """A record for each task: what a device scored, against this machine.

    answers: task -> item -> an answer for each of its requests. Each record holds {task, metric,
    higher_is_better, drawn, answered, of, truncated, device, here, full, difference, agreement, logprob,
    reason}; where nothing was answered, or the main metric has no part per item, the last ones are None and
    `reason` says why.
    """
    above = {}
    for task, items in sample.items.items():
        for item in items:
            if (given := answers.get(task, {}).get(item.id)) is not None:
                above[item.name] = [asdict(likelihood) for likelihood in likelihoods(item, given)]
    there = suite.run(here.model, ScoreOptions(cache=_Replaced(here.cache, above), progress=progress), 2)
    resampling = Resampling(bootstrap, suite.text.seed)
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
            "full": _ends(main.estimate),
            **dict.fromkeys(("device", "here", "difference", "agreement", "logprob", "reason")),
        }
        if not answered:
            record["reason"] = "nothing was answered"
        elif main.metric not in full.definitions:
            record["reason"] = "the metric exists for a whole task only, not as a mean of items"
        else:
            record |= _compared(full, there[task], answered, resampling)
            record["logprob"] = _largest_differences(answered, answers[task], here.cache)
        records.append(record)
    return records


def likelihoods(item: SampledItem, answers: Sequence[Answer]) -> list[Likelihood]:
    """A device's answers as the scorer's own. Of these only sums are read, so tokens share them equally."""
    if len(answers) != len(item.sent):
        raise BuildFailed(f"{item.task} {item.id}: {len(answers)} answers to {len(item.sent)} requests")
    return [
        Likelihood((total / max(1, len(target)),) * len(target), greedy, dropped)
        for (total, greedy), (_, target), dropped in zip(answers, item.sent, item.dropped)
    ]


def _compared(
    full: TaskResult, there: TaskResult, answered: Sequence[SampledItem], resampling: Resampling
) -> dict[str, Any]:
    metric = full.definitions[full.score.main.metric]
    results = []
    for result in (full, there):
        by_id = {item["id"]: item for item in result.items}
        items = [by_id[item.id] for item in answered]
        results.append(task_result(replace(result.score, metrics={}), items, [metric], resampling))
    here, device = results
    change = statistics.difference(here.items, device.items, metric, resampling)
    both = list(zip(here.items, device.items, strict=True))
    return {
        "device": _ends(device.score.main.estimate),
        "here": _ends(here.score.main.estimate),
        "difference": {
            "difference": change.estimate.value,
            "low": change.estimate.low,
            "high": change.estimate.high,
            "p_value": change.estimate.p,
            "identical": all(a[metric.numerator] == b[metric.numerator] for a, b in both),
            "nats": None if change.nats is None else to_json(change.nats),
        },
        "agreement": agreement(here.items, device.items, metric.name),
    }


def _ends(estimate: Estimate) -> dict[str, Any]:
    return {key: getattr(estimate, key) for key in ("value", "low", "high", "n", "documents")}


def agreement(
    here: Sequence[Mapping[str, Any]], device: Sequence[Mapping[str, Any]], metric: str
) -> dict[str, Any] | None:
    """Share of items answered alike, with Wilson's interval: {share, low, high, same, n, of}.

    of: "choice", the answer chosen among several; "right", whether it was right. None for losses.
    """
    of = "choice" if all(_choice(item) is not None for item in here) else "right"
    if of == "right" and not all(item.get(metric) in (0, 1) for item in (*here, *device)):
        return None
    read = _choice if of == "choice" else (lambda item: item[metric])
    same = sum(read(a) == read(b) for a, b in zip(here, device, strict=True))
    low, high = statistics.wilson(same, len(here))
    return {"share": same / len(here), "low": low, "high": high, "same": same, "n": len(here), "of": of}


def _choice(item: Mapping[str, Any]) -> int | None:
    """Which of several answers was the likeliest, where there are several."""
    if "choice" in item:
        return int(item["choice"])
    logprobs = item.get("logprobs", ())
    return int(np.argmax(logprobs)) if len(logprobs) > 1 else None


def _largest_differences(
    answered: Sequence[SampledItem], answers: Mapping[str, Sequence[Answer]], cache: ScoreCache
) -> dict[str, Any]:
    """How far log-likelihoods lie apart, in nats, by item (its largest): {mean, max, item, mean_per_token}.

    item: where the largest is. mean_per_token: by the tokens of the request with the largest difference.
    """
    known = cache.read([item.name for item in answered])
    sizes, by_token = [], []
    for item in answered:
        apart = [
            (abs(total - float(np.sum(one["logprobs"]))), max(1, len(target)))
            for (total, _), one, (_, target) in zip(answers[item.id], known[item.name], item.sent)
        ]
        most, tokens = max(apart)
        sizes.append(most)
        by_token.append(most / tokens)
    largest = int(np.argmax(sizes))
    return {
        "mean": float(np.mean(sizes)),
        "max": sizes[largest],
        "item": answered[largest].id,
        "mean_per_token": float(np.mean(by_token)),
    }


def check_count(count: int) -> None:
    """BadInput for a sample that is too small to say anything, or larger than a device should be asked."""
    if not LEAST <= count <= MOST:
        raise BadInput(f"--items {count}: give {LEAST} to {MOST}; 100 to 300 are usual")
