"""Three tasks made from the recipe's own held-out documents: no hub, no download, any language with spaces.

heldout_perplexity    Every token of the documents, in windows of `context` tokens, each document after the
                      end-of-text token: perplexity and bits per byte (comparable between vocabularies).
heldout_cloze         The last word of a sentence after at least 30 words of passage, as in LAMBADA (Paperno
                      et al., 2016): right when each of its tokens is the most likely one. Words that occurred
                      earlier in the passage come first.
heldout_continuation  The sentence that follows, against three of nearest length from three other documents,
                      as in HellaSwag: right when it has the highest log-likelihood per byte.

Items depend on the documents, the tokenizer and the seed alone, never on a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedisp.core.errors import BadInput
from edgedisp.core.results import TaskScore
from edgedisp.evaluate.comparison import TaskResult, task_result
from edgedisp.evaluate.heldout_items import (
    CHOICES,
    LEAST,
    Document,
    Question,
    Text,
    cloze,
    continuation,
    windows,
)
from edgedisp.evaluate.loglikelihood import (
    DEFAULT_OPTIONS,
    LanguageModel,
    Likelihood,
    ScoreOptions,
    loglikelihoods,
)
from edgedisp.evaluate.statistics import (
    ACCURACY,
    BITS_PER_BYTE,
    DEFAULT,
    GOLD_BITS_PER_BYTE,
    PERPLEXITY,
    Metric,
    Resampling,
)

WORD_NLL = Metric("word_nll", "nll", None, "mean", higher_is_better=False)


def build(task: str, text: Text, limit: int) -> list[Question]:
    """The first `limit` questions of a held-out task. Raises BadInput when the documents hold too few."""
    rng = np.random.default_rng([text.seed, list(TASKS).index(task)])
    shuffled = [text.documents[place] for place in rng.permutation(len(text.documents))]
    questions = TASKS[task].build(text, shuffled, limit, rng)
    if len(questions) < min(LEAST, limit):
        raise BadInput(
            f"{task}: found {len(questions)} {TASKS[task].unit} in {len(shuffled)} held-out documents, need "
            f"{min(LEAST, limit)}; hold out more text (data.heldout), or take {task} out of evaluate.tasks"
        )
    return questions


def score(
    task: str,
    questions: Sequence[Question],
    model: LanguageModel,
    options: ScoreOptions = DEFAULT_OPTIONS,
    resampling: Resampling = DEFAULT,
) -> TaskResult:
    """Ask a model the questions that `build` made."""
    requests = [(question.id, request) for question in questions for request in question.requests]
    ids, pairs = zip(*requests)
    likelihoods = loglikelihoods(model, pairs, ids, options)
    remaining = iter(likelihoods)
    items = []
    for question in questions:
        fields = TASKS[task].read([next(remaining) for _ in question.requests], question)
        name = {"id": question.id, "document": question.document}
        items.append({**name, **fields, **question.notes, "asked": question.fingerprint()})
    truncated = sum(likelihood.dropped > 0 for likelihood in likelihoods)
    task_score = TaskScore(task, {}, TASKS[task].chance, truncated)
    return task_result(task_score, items, TASKS[task].metrics, resampling)


def _read_window(likelihoods: Sequence[Likelihood], question: Question) -> dict[str, Any]:
    (likelihood,) = likelihoods
    return {"nll": -likelihood.sum_logprob, "tokens": likelihood.tokens, "bytes": question.sizes[0]}


def _read_cloze(likelihoods: Sequence[Likelihood], question: Question) -> dict[str, Any]:
    return {"accuracy": int(likelihoods[0].greedy)} | _read_window(likelihoods, question)


def _read_continuation(likelihoods: Sequence[Likelihood], question: Question) -> dict[str, Any]:
    by_byte = [likelihood.sum_logprob / size for likelihood, size in zip(likelihoods, question.sizes)]
    choice = int(np.argmax(by_byte))
    best_other = max(value for place, value in enumerate(by_byte) if place != question.gold)
    gold = likelihoods[question.gold]
    return {
        "accuracy": int(choice == question.gold),
        "choice": choice,
        "gold": question.gold,
        "margin": by_byte[question.gold] - best_other,
        "nll": -gold.sum_logprob,
        "tokens": gold.tokens,
        "bytes": question.sizes[question.gold],
    }


@dataclass(frozen=True)
class HeldoutTask:
    """build: its questions. read: the fields of an item. metrics: the main one first. unit: for messages."""

    build: Callable[[Text, Sequence[Document], int, np.random.Generator], list[Question]]
    read: Callable[[Sequence[Likelihood], Question], dict[str, Any]]
    metrics: tuple[Metric, ...]
    unit: str
    chance: float | None = None


TASKS: dict[str, HeldoutTask] = {
    "heldout_perplexity": HeldoutTask(windows, _read_window, (PERPLEXITY, BITS_PER_BYTE), "windows of text"),
    "heldout_cloze": HeldoutTask(cloze, _read_cloze, (ACCURACY, WORD_NLL), "passages that end in a word"),
    "heldout_continuation": HeldoutTask(
        continuation,
        _read_continuation,
        (ACCURACY, GOLD_BITS_PER_BYTE),
        "sentences with three of like length in other documents",
        chance=1 / CHOICES,
    ),
}
