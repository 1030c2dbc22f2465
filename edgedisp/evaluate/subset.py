"""A random part of a task's items, scored on a device, held against the same items and the whole set here.

A phone is too slow for thousands of items. It gets a simple random sample, drawn without replacement by a
seed, as token ids: what is asked there is what the scorer here asks, cut to the same context. Back come, for
each request, the sum of its log-probabilities and whether every token was the most likely one. They are put
in the place of this machine's own scores (`Replaced`), and the task then reads its answers as always.

Three differences stand apart:

- device and here, the same items: what the device's arithmetic changes; paired, as two models are;
- the sample and the whole set, both here: what drawing some of the items changes (finite_population.py);
- the sample and all text of the kind: each score's own interval, as everywhere (statistics.py).

Items are asked in the order of the draw: what a device answered before it was lost is a random sample too.
Left out: tasks that need generated text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.evaluate import statistics
from edgedisp.evaluate.answers import Likelihood, Request
from edgedisp.evaluate.finite_population import sampled
from edgedisp.evaluate.kept import Kept, name_of
from edgedisp.evaluate.result import TaskResult, task_result
from edgedisp.evaluate.score import LanguageModel, as_read
from edgedisp.evaluate.statistics import Metric, Record
from edgedisp.evaluate.tasks import Suite

FEWEST, MOST = 20, 2000  # items of a task that a device may be asked

Pair = tuple[list[int], list[int]]
Answer = tuple[float, bool]
"""Sum of the log-probabilities of a continuation, and whether each of its tokens was the most likely one."""


@dataclass(frozen=True)
class Asked:
    """One item: its requests as the scorer asks them, and what of them is read in a model's context.

    sent: token ids of contexts and continuations after the cut; dropped: context tokens cut off, by request.
    """

    task: str
    id: str
    requests: tuple[Request, ...]
    sent: tuple[Pair, ...]
    dropped: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name of the item in a store of scores."""
        return name_of([tuple(map(tuple, request)) for request in self.requests])


@dataclass(frozen=True)
class Sample:
    """Of every task the items drawn, in the order of the draw, and how many there are in all.

    cut: some item of the full set loses tokens to the context.
    """

    items: dict[str, list[Asked]]
    of: dict[str, int]
    cut: bool

    def in_turn(self) -> list[Asked]:
        """All items, the tasks by turns: what is lost at the end is lost of each alike."""
        turns = zip_longest(*self.items.values())
        return [item for turn in turns for item in turn if item is not None]


def drawn(suite: Suite, model: Any, count: int, seed: int) -> Sample:
    """Draw at most `count` items of each task; `model` tells `context` and `vocab_size`.

    Raises BadInput for a task that needs generated text, or that asks one item in several ways.
    """
    items: dict[str, list[Asked]] = {}
    of: dict[str, int] = {}
    cut = False
    for task, asked in _all_asked(suite, model).items():
        key = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big")
        read = [_cut(task, one, requests, model, suite) for one, requests in asked.items()]
        items[task] = [read[at] for at in np.random.default_rng([seed, key]).permutation(len(read))[:count]]
        of[task] = len(read)
        cut |= any(any(item.dropped) for item in read)
    return Sample(items, of, cut)


def _all_asked(suite: Suite, model: Any) -> dict[str, dict[str, tuple[Request, ...]]]:
    """Task -> item -> its requests, of the full set."""
    found = {
        task: {question.id: question.requests for question in questions}
        for task, questions in suite.questions.items()
    }
    if suite.harness_tasks:
        from edgedisp.evaluate import noting

        found |= {task: noting.asked(suite, task, model) for task in suite.harness_tasks}
    return found


def _cut(task: str, one: str, requests: tuple[Request, ...], model: Any, suite: Suite) -> Asked:
    start, lead = suite.text.start, suite.text.lead
    read = [as_read(model, *request, start, lead) for request in requests]
    return Asked(
        task,
        one,
        requests,
        tuple((list(context), list(continuation)) for context, continuation, _ in read),
        tuple(dropped for _, _, dropped in read),
    )


class Replaced(Kept):
    """A store of scores some of which are a device's. Nothing new may be computed over it."""

    def __init__(self, below: Kept, above: Mapping[str, Any]) -> None:
        self.below, self.above = below, above

    def find(self, items: Sequence[str]) -> dict[str, Any]:
        return self.below.find(items) | {item: self.above[item] for item in items if item in self.above}

    def keep(self, found: Mapping[str, Any]) -> None:
        raise BuildFailed(f"{len(found)} items of the full set have no score here to compare with")


def compare(
    suite: Suite,
    sample: Sample,
    answers: Mapping[str, Mapping[str, Sequence[Answer]]],
    model: LanguageModel,
    kept: Kept,
    *,
    full: Mapping[str, TaskResult],
    bootstrap: int = 2000,
    progress: Progress = silent,
) -> list[Record]:
    """A record for each task: what a device scored, against this machine.

    answers: task -> item -> an answer for each of its requests. model, kept: this machine's, after
    `Suite.run`, which gave `full`. Each record holds {task, metric, higher_is_better, drawn, answered, of,
    truncated, device, here, full, sampling, difference, agreement, logprob, reason}; where nothing was
    answered, or the main metric has no part per item, the last ones are None and `reason` says why.
    """
    above = {}
    for task, items in sample.items.items():
        for item in items:
            if (given := answers.get(task, {}).get(item.id)) is not None:
                above[item.name] = [asdict(one) for one in likelihoods(item, given)]
    there = suite.run(model, kept=Replaced(kept, above), bootstrap=2, progress=progress)
    records = []
    for task, items in sample.items.items():
        scored = {item["id"] for item in full[task]["items"]}
        told = [item for item in items if item.id in answers.get(task, {}) and item.id in scored]
        record: Record = {
            "task": task,
            "metric": full[task]["metric"],
            "higher_is_better": full[task]["higher_is_better"],
            "drawn": len(items),
            "answered": len(told),
            "of": sample.of[task],
            "truncated": sum(any(item.dropped) for item in told),
            "full": _ends(full[task]),
            **dict.fromkeys(("device", "here", "sampling", "difference", "agreement", "logprob", "reason")),
        }
        if not told:
            record["reason"] = "nothing was answered"
        elif full[task]["metric"] not in full[task]["definitions"]:
            record["reason"] = "the metric exists for a whole task only, not as a mean of items"
        else:
            whole = full[task], there[task]
            record |= _compared(*whole, told, answers[task], kept, bootstrap, suite.text.seed)
        records.append(record)
    return records


def likelihoods(item: Asked, found: Sequence[Answer]) -> list[Likelihood]:
    """A device's answers as the scorer's own. Of these only sums are read, so tokens share them equally."""
    if len(found) != len(item.sent):
        raise BuildFailed(f"{item.task} {item.id}: {len(found)} answers to {len(item.sent)} requests")
    return [
        Likelihood((total / max(1, len(target)),) * len(target), greedy, dropped)
        for (total, greedy), (_, target), dropped in zip(found, item.sent, item.dropped)
    ]


def _compared(
    full: TaskResult,
    there: TaskResult,
    told: Sequence[Asked],
    answers: Mapping[str, Sequence[Answer]],
    kept: Kept,
    bootstrap: int,
    seed: int,
) -> Record:
    ids = [item.id for item in told]
    metric = Metric(**full["definitions"][full["metric"]])
    here, device = (_restricted(one, ids, metric, bootstrap, seed) for one in (full, there))
    return {
        "device": _ends(device),
        "here": _ends(here),
        "sampling": sampled(here["items"], metric, full["n"]),
        "difference": statistics.paired(
            here["items"], device["items"], metric, bootstrap=bootstrap, seed=seed
        ),
        "agreement": agreement(here["items"], device["items"], full["metric"]),
        "logprob": _apart(told, answers, kept),
    }


def _restricted(
    result: TaskResult, ids: Iterable[str], metric: Metric, bootstrap: int, seed: int
) -> TaskResult:
    """The result over some of its items, its main metric alone."""
    by_id = {item["id"]: item for item in result["items"]}
    items = [by_id[one] for one in ids]
    return task_result(
        result["task"],
        items,
        [metric],
        fingerprints=[item["asked"] for item in items],
        chance=result["chance"],
        bootstrap=bootstrap,
        seed=seed,
    )


def _ends(result: Mapping[str, Any]) -> Record:
    return {key: result[key] for key in ("value", "low", "high", "n", "documents")}


def agreement(
    here: Sequence[Mapping[str, Any]], device: Sequence[Mapping[str, Any]], metric: str
) -> Record | None:
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


def _apart(told: Sequence[Asked], answers: Mapping[str, Sequence[Answer]], kept: Kept) -> Record:
    """How far log-likelihoods lie apart, in nats, by item (its largest): {mean, max, item, mean_per_token}.

    item: where the largest is. mean_per_token: by the tokens of the request that it was found in.
    """
    found = kept.find([item.name for item in told])
    sizes, by_token = [], []
    for item in told:
        apart = [
            (abs(total - float(np.sum(one["logprobs"]))), max(1, len(target)))
            for (total, _), one, (_, target) in zip(answers[item.id], found[item.name], item.sent)
        ]
        most, tokens = max(apart)
        sizes.append(most)
        by_token.append(most / tokens)
    largest = int(np.argmax(sizes))
    return {
        "mean": float(np.mean(sizes)),
        "max": sizes[largest],
        "item": told[largest].id,
        "mean_per_token": float(np.mean(by_token)),
    }


def refuse_count(count: int) -> None:
    """BadInput for a sample that is too small to say anything, or larger than a device should be asked."""
    if not FEWEST <= count <= MOST:
        raise BadInput(f"--items {count}: give {FEWEST} to {MOST}; 100 to 300 are usual")
