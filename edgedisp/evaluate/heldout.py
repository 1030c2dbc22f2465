"""Three tasks made from the recipe's own held-out documents: no hub, no download, any language with spaces.

heldout_perplexity    How well the documents are predicted, token by token: perplexity (nats per token,
                      exponentiated) and bits per byte (comparable between vocabularies). Each document starts
                      after the end-of-text token, in windows of `context` tokens.
heldout_cloze         The last word of a sentence after at least 30 words of passage, in the manner of
                      LAMBADA (Paperno et al., 2016): right when each of its tokens is the most likely one.
                      The word has three letters or more. Words that occurred earlier in the passage come
                      first, because those can be known from the passage alone; others fill up when there
                      are too few.
heldout_continuation  The sentence that follows, against three of nearest length from three other
                      documents, in the manner of HellaSwag: right when it has the highest
                      log-likelihood per byte. Guessing gives 25 %.

Items depend on the documents, the tokenizer and the seed alone, never on a model, so every arm and precision
answers the same ones. They are spread over as many documents as there are, since documents are what the
intervals count. Contexts are whole sentences and short (96 and 64 tokens): with long ones most of the
time goes into reading what every choice shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.evaluate import questions
from edgedisp.evaluate.answers import Likelihood
from edgedisp.evaluate.kept import Kept
from edgedisp.evaluate.questions import CHOICES, FEWEST, Document, Question, Text
from edgedisp.evaluate.result import TaskResult, task_result
from edgedisp.evaluate.score import LanguageModel, loglikelihoods
from edgedisp.evaluate.statistics import (
    ACCURACY,
    BITS_PER_BYTE,
    GOLD_BITS_PER_BYTE,
    PERPLEXITY,
    Metric,
)

WORD_NLL = Metric("word_nll", "nll", None, "mean", higher_is_better=False)


def build(task: str, text: Text, limit: int) -> list[Question]:
    """The first `limit` questions of a held-out task. Raises BadInput when the documents hold too few."""
    rng = np.random.default_rng([text.seed, list(TASKS).index(task)])
    shuffled = [text.documents[place] for place in rng.permutation(len(text.documents))]
    found = TASKS[task].build(text, shuffled, limit, rng)
    if len(found) < min(FEWEST, limit):
        raise BadInput(
            f"{task}: found {len(found)} {TASKS[task].unit} in {len(shuffled)} held-out documents, need "
            f"{min(FEWEST, limit)}; hold out more text (data.heldout), or take {task} out of evaluate.tasks"
        )
    return found


def score(
    task: str,
    asked: Sequence[Question],
    model: LanguageModel,
    *,
    batch_tokens: int = 1024,
    bootstrap: int = 2000,
    seed: int = 0,
    kept: Kept | None = None,
    progress: Progress = silent,
) -> TaskResult:
    """Ask a model the questions that `build` made."""
    asked_of = [(question.id, request) for question in asked for request in question.requests]
    found = loglikelihoods(
        model,
        [request for _, request in asked_of],
        items=[name for name, _ in asked_of],
        batch_tokens=batch_tokens,
        kept=kept,
        progress=progress,
    )
    answers = iter(found)
    items = []
    for question in asked:
        likelihoods = [next(answers) for _ in question.requests]
        parts = TASKS[task].answer(question, likelihoods)
        items.append({"id": question.id, "document": question.document, **parts, **question.notes})
    return task_result(
        task,
        items,
        TASKS[task].metrics,
        fingerprints=[question.fingerprint() for question in asked],
        chance=TASKS[task].chance,
        truncated=sum(likelihood.dropped > 0 for likelihood in found),
        bootstrap=bootstrap,
        seed=seed,
    )


def _answer_window(question: Question, found: list[Likelihood]) -> dict[str, Any]:
    return {"nll": -found[0].sum_logprob, "tokens": found[0].tokens, "bytes": question.sizes[0]}


def _answer_cloze(question: Question, found: list[Likelihood]) -> dict[str, Any]:
    return {"accuracy": int(found[0].greedy)} | _answer_window(question, found)


def _answer_continuation(question: Question, found: list[Likelihood]) -> dict[str, Any]:
    by_byte = [likelihood.sum_logprob / size for likelihood, size in zip(found, question.sizes)]
    choice = int(np.argmax(by_byte))
    best_other = max(value for place, value in enumerate(by_byte) if place != question.gold)
    gold = found[question.gold]
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
    """How a task is made, how an answer is read, and what is reported (the main metric first)."""

    build: Callable[[Text, Sequence[Document], int, np.random.Generator], list[Question]]
    answer: Callable[[Question, list[Likelihood]], dict[str, Any]]
    metrics: tuple[Metric, ...]
    unit: str
    chance: float | None = None


TASKS: dict[str, HeldoutTask] = {
    "heldout_perplexity": HeldoutTask(
        questions.windows, _answer_window, (PERPLEXITY, BITS_PER_BYTE), "windows of text"
    ),
    "heldout_cloze": HeldoutTask(
        questions.cloze, _answer_cloze, (ACCURACY, WORD_NLL), "passages that end in a word"
    ),
    "heldout_continuation": HeldoutTask(
        questions.continuation,
        _answer_continuation,
        (ACCURACY, GOLD_BITS_PER_BYTE),
        "sentences with three of like length in other documents",
        chance=1 / CHOICES,
    ),
}
