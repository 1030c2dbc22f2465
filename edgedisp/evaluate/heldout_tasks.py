"""Three tasks made from the recipe's own held-out documents: no hub, no download, any language with spaces.

heldout_perplexity    Every token of the documents, in windows of `context` tokens, each document after the
                      end-of-text token: perplexity and bits per byte (comparable between vocabularies).
heldout_cloze         The last word of a sentence after at least 30 words of passage, as in LAMBADA (Paperno
                      et al., 2016): right when each of its tokens is the most likely one. Words that occurred
                      earlier in the passage come first.
heldout_continuation  The sentence that follows, against three of nearest length from three other documents,
                      as in HellaSwag: right when it has the highest log-likelihood per byte.

Items depend on documents, tokenizer and seed alone, and spread over as many documents as there are.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from edgedisp.core.errors import BadInput
from edgedisp.core.results import TaskScore
from edgedisp.data import Document
from edgedisp.evaluate import statistics
from edgedisp.evaluate.comparison import TaskResult, task_result
from edgedisp.evaluate.loglikelihood import LanguageModel, Likelihood, ScoreOptions, loglikelihoods
from edgedisp.evaluate.statistics import ACCURACY, Metric, Resampling
from edgedisp.evaluate.tokenization import Request, TextTokenizer, encode_pair, rolling_windows, sentences

CLOZE_CONTEXT = 96  # tokens
CLOZE_WORDS = 30
CONTINUATION_CONTEXT = 64  # tokens
CONTINUATION_SENTENCE = 40  # tokens
CONTINUATION_WORDS = 4
CHOICES = 4
LEAST = 2  # questions of a task; with one there is no interval
_SENTENCES = 24  # looked back at most: more than fit in any context here
_LAST_WORD = re.compile(r"\s+([^\W\d_]{3,})[.!?]+[\"'”’)\]]*$")


@dataclass(frozen=True)
class Text:
    """Documents and a tokenizer, from which questions are made. context: most tokens of a question; limit:
    most questions of a task; perplexity_tokens: most tokens of all windows."""

    tokenizer: TextTokenizer
    documents: Sequence[Document]
    context: int
    limit: int
    seed: int = 0
    perplexity_tokens: int | None = None

    @property
    def share(self) -> int:
        """Most questions from one document, so that they spread over as many documents as there are."""
        return max(1, math.ceil(self.limit / max(1, len(self.documents))))


@dataclass(frozen=True)
class Question:
    """One item before scoring. requests: what is scored; sizes: UTF-8 bytes of each continuation; gold: the
    right one."""

    id: str
    document: str
    requests: tuple[Request, ...]
    sizes: tuple[int, ...]
    gold: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Names the exact tokens that are asked for."""
        return hashlib.sha256(repr(([*self.requests], self.gold)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class HeldoutTask:
    """metrics: the main one first. unit: of a question, for messages."""

    build: Callable[[Text, np.random.Generator], list[Question]]
    metrics: tuple[Metric, ...]
    unit: str
    chance: float | None = None


def build(task: str, text: Text) -> list[Question]:
    """The questions of a held-out task. Raises BadInput when the documents hold too few."""
    rng = np.random.default_rng([text.seed, list(TASKS).index(task)])
    shuffled = [text.documents[index] for index in rng.permutation(len(text.documents))]
    questions = TASKS[task].build(replace(text, documents=shuffled), rng)
    if len(questions) < (least := min(LEAST, text.limit)):
        raise BadInput(
            f"{task}: found {len(questions)} {TASKS[task].unit} in {len(shuffled)} held-out documents, need "
            f"{least}; hold out more text (data.heldout), or take {task} out of evaluate.tasks"
        )
    return questions


def score(
    task: str,
    questions: Sequence[Question],
    model: LanguageModel,
    options: ScoreOptions,
    resampling: Resampling,
) -> TaskResult:
    """Ask a model the questions that `build` made."""
    likelihoods = loglikelihoods(
        model, [pair for question in questions for pair in question.requests], options
    )
    remaining = iter(likelihoods)
    items = [
        {
            "id": question.id,
            "document": question.document,
            **_answer(task, question, [next(remaining) for _ in question.requests]),
            **question.notes,
            "asked": question.fingerprint(),
        }
        for question in questions
    ]
    truncated = sum(likelihood.dropped > 0 for likelihood in likelihoods)
    task_score = TaskScore(task, {}, TASKS[task].chance, truncated)
    return task_result(task_score, items, TASKS[task].metrics, resampling)


def _answer(task: str, question: Question, likelihoods: Sequence[Likelihood]) -> dict[str, Any]:
    """The fields of an item: its loss, and of several choices the one with the most likelihood per byte."""
    gold, size = likelihoods[question.gold], question.sizes[question.gold]
    fields = {"nll": -gold.sum_logprob, "tokens": len(gold.logprobs), "bytes": size}
    if len(likelihoods) == 1:
        return fields | ({"accuracy": int(gold.greedy)} if ACCURACY in TASKS[task].metrics else {})
    by_byte = [likelihood.sum_logprob / size for likelihood, size in zip(likelihoods, question.sizes)]
    best_other = max(value for index, value in enumerate(by_byte) if index != question.gold)
    choice, margin = int(np.argmax(by_byte)), by_byte[question.gold] - best_other
    right = int(choice == question.gold)
    return fields | {"accuracy": right, "choice": choice, "gold": question.gold, "margin": margin}


# Windows


def windows(text: Text, rng: np.random.Generator) -> list[Question]:
    """Windows of documents, the first ones of each, within `limit` and (beyond two) the token budget."""
    questions: list[Question] = []
    budget = math.inf if text.perplexity_tokens is None else text.perplexity_tokens
    tokenizer = text.tokenizer
    for document in text.documents:
        ids = tokenizer.encode(document.text)
        end = 0
        pairs = rolling_windows(ids, text.context, tokenizer.start, tokenizer.bos_token is not None)
        for index, pair in enumerate(pairs):
            start, end = end, end + len(pair[1])
            if len(questions) == text.limit or (end - start > budget and len(questions) >= LEAST):
                return questions
            if index == text.share:
                break
            budget -= end - start
            size = _bytes(text, document, ids, end) - _bytes(text, document, ids, start)
            questions.append(Question(f"{document.id}#{index}", document.id, (pair,), (max(1, size),)))
    return questions


def _bytes(text: Text, document: Document, ids: Sequence[int], end: int) -> int:
    """UTF-8 bytes of the document's first `end` tokens (exact for the whole; half a character counts 3)."""
    beginning = document.text if end == len(ids) else text.tokenizer.decode(ids[:end])
    return len(beginning.encode())


# Last words


def cloze(text: Text, rng: np.random.Generator) -> list[Question]:
    """Last words: those seen earlier in the passage first, at most a fair share from each document."""
    seen: list[Question] = []
    unseen: list[Question] = []
    for document in text.documents:
        places = [*_last_words(document.text)]
        sample = rng.permutation(len(places))[: 8 + 4 * text.share]
        questions = [_last_word(text, document, *places[index]) for index in sample]
        for question in sorted(questions, key=lambda question: not question.notes["seen"])[: text.share]:
            (seen if question.notes["seen"] else unseen).append(question)
        if len(seen) >= text.limit:
            break
    return [*seen, *unseen][: text.limit]


def _last_words(document: str) -> Iterator[tuple[int, list[int], int, str]]:
    """(sentence number, where the passage may start, where it ends, the word that follows)."""
    spans = sentences(document)
    words_before = [0]  # words in all sentences before this one
    for index, (start, end) in enumerate(spans):
        words_before.append(words_before[-1] + len(document[start:end].split()))
        match = _LAST_WORD.search(document[start:end])
        most = words_before[-1] - 1 - CLOZE_WORDS
        first = max(0, index - _SENTENCES)
        starts = [spans[k][0] for k in range(first, index + 1) if words_before[k] <= most]
        if match is not None and starts:
            yield index, starts, start + match.start(), match.group(1)


def _last_word(
    text: Text, document: Document, index: int, starts: list[int], stop: int, word: str
) -> Question:
    (request,) = _fit(text, document.text[:stop], starts, [" " + word], CLOZE_CONTEXT)
    words = re.findall(r"[^\W\d_]+", text.tokenizer.decode(request[0][1:]).lower())
    notes = {"seen": word.lower() in words}
    return Question(f"{document.id}#{index}", document.id, (request,), (len(word.encode()) + 1,), notes=notes)


# Next sentences


class _Sentence(NamedTuple):
    """A sentence of a document, by its number, and the spans of all of its sentences."""

    document: Document
    number: int
    sentence: str
    spans: list[tuple[int, int]]


def continuation(text: Text, rng: np.random.Generator) -> list[Question]:
    """The next sentence against sentences of nearest length in bytes from three other documents."""
    pool: list[_Sentence] = []
    for document in text.documents:
        pool += _next_sentences(text, document, 8 + 2 * text.share, rng)
        if len(pool) >= max(2000, 4 * text.limit):
            break
    by_document: dict[str, list[int]] = {}
    for index, entry in enumerate(pool):
        by_document.setdefault(entry.document.id, []).append(index)
    sizes = np.array([len(entry.sentence.encode()) for entry in pool])
    questions: list[Question] = []
    for indices in by_document.values():
        for index in indices[: math.ceil(text.limit / len(by_document))]:
            if len(questions) == text.limit:
                return questions
            distractors = _nearest(pool, sizes, index, rng)
            if len(distractors) == CHOICES - 1:
                questions.append(_choices(text, pool[index], distractors, int(rng.integers(CHOICES))))
    return questions


def _next_sentences(text: Text, document: Document, most: int, rng: np.random.Generator) -> list[_Sentence]:
    """At most `most` sentences, never the first, short enough for a choice, long enough to say something."""
    spans = sentences(document.text)
    tokens = min(CONTINUATION_SENTENCE, text.context // 2)
    result: list[_Sentence] = []
    for index in (rng.permutation(len(spans) - 1) + 1).tolist() if len(spans) > 1 else []:
        sentence = document.text[slice(*spans[index])]
        is_long = len(sentence.split()) >= CONTINUATION_WORDS
        if is_long and len(text.tokenizer.encode(" " + sentence)) <= tokens:
            result.append(_Sentence(document, index, sentence, spans))
        if len(result) == most:
            break
    return result


def _nearest(pool: Sequence[_Sentence], sizes: Any, index: int, rng: np.random.Generator) -> list[_Sentence]:
    """Sentences of the pool nearest in length, each from another document; ties by chance."""
    nearest = {pool[index].document.id: pool[index]}
    for other in np.lexsort((rng.permutation(len(pool)), np.abs(sizes - sizes[index]))):
        entry = pool[other]
        if entry.sentence not in {near.sentence for near in nearest.values()}:
            nearest.setdefault(entry.document.id, entry)
        if len(nearest) == CHOICES:
            break
    return [*nearest.values()][1:]


def _choices(text: Text, right: _Sentence, distractors: list[_Sentence], gold: int) -> Question:
    """One question; the true sentence stands at `gold`, drawn at random, so that a tie favours none."""
    document, number, _, spans = right
    continuations = [" " + entry.sentence for entry in (*distractors[:gold], right, *distractors[gold:])]
    starts = [start for start, _ in spans[max(0, number - _SENTENCES) : number]]
    requests = _fit(text, document.text[: spans[number - 1][1]], starts, continuations, CONTINUATION_CONTEXT)
    sizes = tuple(len(choice.encode()) for choice in continuations)
    return Question(f"{document.id}#{number}", document.id, requests, sizes, gold)


def _fit(
    text: Text, passage: str, starts: Sequence[int], continuations: Sequence[str], most: int
) -> tuple[Request, ...]:
    """Tokenize the longest passage of whole sentences that fits, with each of its continuations.

    It fits when no context has more than `most` tokens (the start token included) and no request more than
    the model can take. When even the latest start is too long, all contexts are cut on the left alike.
    """
    best: list[tuple[list[int], list[int]]] = []
    room = 0
    for start in reversed(starts):
        pairs = [encode_pair(text.tokenizer.encode, passage[start:], choice) for choice in continuations]
        room = min(most, text.context - max(len(target) for _, target in pairs) + 1) - 1
        if best and any(len(context) > room for context, _ in pairs):
            break
        best = pairs
    start_token = text.tokenizer.start
    return tuple(((start_token, *context[max(0, len(context) - room) :]), target) for context, target in best)


TASKS: dict[str, HeldoutTask] = {
    "heldout_perplexity": HeldoutTask(
        windows, (statistics.PERPLEXITY, statistics.BITS_PER_BYTE), "windows of text"
    ),
    "heldout_cloze": HeldoutTask(
        cloze,
        (ACCURACY, Metric("word_nll", "nll", None, "mean", higher_is_better=False)),
        "passages that end in a word",
    ),
    "heldout_continuation": HeldoutTask(
        continuation,
        (ACCURACY, statistics.GOLD_BITS_PER_BYTE),
        "sentences with three of like length in other documents",
        chance=1 / CHOICES,
    ),
}
