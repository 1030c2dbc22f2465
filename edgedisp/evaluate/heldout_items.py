"""Test items from documents: windows of text, last words, next sentences (for heldout_tasks.py).

Each builder takes shuffled documents and a random generator of its own, and returns at most `limit`
questions, spread over as many documents as there are. Contexts are whole sentences and short.

Sentences end by rule: at . ! or ? before white space and something that can begin a sentence, but not after
an initial ("J. R. R. Tolkien"), a known abbreviation or one with inner full stops ("e.g.").
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from edgedisp.evaluate.loglikelihood import Decode, Encode, Request, encode_pair, rolling_windows

CLOZE_CONTEXT = 96  # tokens
CLOZE_WORDS = 30
CONTINUATION_CONTEXT = 64  # tokens
CONTINUATION_SENTENCE = 40  # tokens
CONTINUATION_WORDS = 4
CHOICES = 4
LEAST = 2  # questions of a task; with one there is no interval
_SENTENCES = 24  # looked back at most: more than fit in any context here
_LAST_WORD = re.compile(r"\s+([^\W\d_]{3,})[.!?]+[\"'”’)\]]*$")
_END = re.compile(r"([.!?]+[\"'”’)\]]*)\s+(?=[\"'“‘(\[¿¡]*[^\W_a-z])")
_WORD_AT_END = re.compile(r"\S+$")
_ABBREVIATION = re.compile(
    "mr|mrs|ms|dr|prof|rev|hon|st|mt|ft|jr|sr|gen|col|capt|lt|maj|sgt|adm|gov|sen|rep|pres|"
    "vs|etc|approx|ca|cf|al|ed|eds|vol|(?-i:No|Nos)|pp|fig|inc|ltd|co|corp|bros|dept|univ|est|"
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec",
    re.IGNORECASE,
)


class Document(Protocol):
    """A text with a name, such as data.Document."""

    @property
    def id(self) -> str: ...

    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class Question:
    """One item before scoring. requests: what is scored; sizes: UTF-8 bytes of each continuation."""

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
class Text:
    """Documents and a tokenizer, from which questions are made.

    context: most tokens in a question, the same for every model. bos_token: the one that every text begins
    with, for models that know such (Gemma's <bos>); others begin after `end_of_text`, as in training.
    stop_ids: tokens that end generated text.
    """

    documents: Sequence[Document]
    encode: Encode
    decode: Decode
    end_of_text: int
    context: int
    seed: int = 0
    perplexity_tokens: int | None = None
    bos_token: int | None = None
    stop_ids: frozenset[int] = frozenset()

    @property
    def start(self) -> int:
        """The token that stands before a text."""
        return self.end_of_text if self.bos_token is None else self.bos_token


def windows(
    text: Text, documents: Sequence[Document], limit: int, rng: np.random.Generator
) -> list[Question]:
    """Windows of documents, the first ones of each, within `limit` and (beyond two) the token budget."""
    questions: list[Question] = []
    budget = math.inf if text.perplexity_tokens is None else text.perplexity_tokens
    share = _per_document(limit, documents)
    for document in documents:
        ids = text.encode(document.text)
        end = 0
        windows = rolling_windows(ids, text.context, text.start, text.bos_token is not None)
        for index, window in enumerate(windows):
            start, end = end, end + len(window[1])
            if len(questions) == limit or (end - start > budget and len(questions) >= LEAST):
                return questions
            if index == share:
                break
            budget -= end - start
            size = _bytes(text, document, ids, end) - _bytes(text, document, ids, start)
            questions.append(Question(f"{document.id}#{index}", document.id, (window,), (max(1, size),)))
    return questions


def cloze(text: Text, documents: Sequence[Document], limit: int, rng: np.random.Generator) -> list[Question]:
    """Last words: those seen earlier in the passage first, at most a fair share from each document."""
    share = _per_document(limit, documents)
    seen: list[Question] = []
    unseen: list[Question] = []
    for document in documents:
        places = [*_last_words(document.text)]
        drawn = [places[number] for number in rng.permutation(len(places))[: 8 + 4 * share]]
        questions = [_last_word(text, document, *place) for place in drawn]
        questions.sort(key=lambda question: not question.notes["seen"])
        for question in questions[:share]:
            (seen if question.notes["seen"] else unseen).append(question)
        if len(seen) >= limit:
            break
    return [*seen, *unseen][:limit]


def _last_words(document: str) -> Iterator[tuple[int, list[int], int, str]]:
    """(sentence number, places where the passage may start, where it ends, the word that follows)."""
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
    words = re.findall(r"[^\W\d_]+", text.decode(list(request[0][1:])).lower())
    notes = {"seen": word.lower() in words}
    return Question(f"{document.id}#{index}", document.id, (request,), (len(word.encode()) + 1,), notes=notes)


class _Sentence(NamedTuple):
    """A sentence of a document, by its number, and the spans of all of the document's sentences."""

    document: Document
    number: int
    sentence: str
    spans: list[tuple[int, int]]


def continuation(
    text: Text, documents: Sequence[Document], limit: int, rng: np.random.Generator
) -> list[Question]:
    """The next sentence against sentences of nearest length in bytes from three other documents."""
    share = _per_document(limit, documents)
    pool: list[_Sentence] = []
    for document in documents:
        pool += _next_sentences(text, document, 8 + 2 * share, rng)
        if len(pool) >= max(2000, 4 * limit):
            break
    by_document: dict[str, list[int]] = {}
    for place, entry in enumerate(pool):
        by_document.setdefault(entry.document.id, []).append(place)
    sizes = np.array([len(entry.sentence.encode()) for entry in pool])
    questions: list[Question] = []
    for places in by_document.values():
        for place in places[: _per_document(limit, [*by_document])]:
            if len(questions) == limit:
                return questions
            others = _nearest(pool, sizes, place, rng)
            if len(others) == CHOICES - 1:
                questions.append(_choices(text, pool, place, others, int(rng.integers(CHOICES))))
    return questions


def _next_sentences(text: Text, document: Document, most: int, rng: np.random.Generator) -> list[_Sentence]:
    """At most `most` sentences, never the first, short enough for a choice, long enough to say something."""
    spans = sentences(document.text)
    tokens = min(CONTINUATION_SENTENCE, text.context // 2)
    result: list[_Sentence] = []
    for index in (rng.permutation(len(spans) - 1) + 1).tolist() if len(spans) > 1 else []:
        sentence = document.text[slice(*spans[index])]
        if len(sentence.split()) >= CONTINUATION_WORDS and len(text.encode(" " + sentence)) <= tokens:
            result.append(_Sentence(document, index, sentence, spans))
        if len(result) == most:
            break
    return result


def _nearest(pool: Sequence[_Sentence], sizes: Any, place: int, rng: np.random.Generator) -> list[int]:
    """Places in the pool of the sentences nearest in length, each from another document; ties by chance."""
    taken = {pool[place].document.id}
    texts = {pool[place].sentence}
    others: list[int] = []
    for other in np.lexsort((rng.permutation(len(pool)), np.abs(sizes - sizes[place]))):
        entry = pool[other]
        if entry.document.id not in taken and entry.sentence not in texts:
            taken.add(entry.document.id)
            texts.add(entry.sentence)
            others.append(int(other))
        if len(others) == CHOICES - 1:
            break
    return others


def _choices(text: Text, pool: Sequence[_Sentence], place: int, others: list[int], gold: int) -> Question:
    """One question; the true sentence stands at `gold`, drawn at random, so that a tie favours no one."""
    document, number, _, spans = pool[place]
    order = [*others[:gold], place, *others[gold:]]
    continuations = [" " + pool[choice].sentence for choice in order]
    starts = [start for start, _ in spans[max(0, number - _SENTENCES) : number]]
    requests = _fit(text, document.text[: spans[number - 1][1]], starts, continuations, CONTINUATION_CONTEXT)
    sizes = tuple(len(choice.encode()) for choice in continuations)
    return Question(f"{document.id}#{number}", document.id, requests, sizes, gold)


def _fit(
    text: Text, passage: str, starts: Sequence[int], continuations: Sequence[str], most: int
) -> tuple[Request, ...]:
    """Tokenize the longest passage of whole sentences that fits, with each of its continuations.

    It fits when no context has more than `most` tokens (`Text.start` included) and no request more than the
    model can take. When even the latest start is too long, all contexts are cut on the left alike.
    """
    best: list[tuple[list[int], list[int]]] = []
    room = 0
    for start in reversed(starts):
        pairs = [encode_pair(text.encode, passage[start:], continuation) for continuation in continuations]
        room = min(most, text.context - max(len(target) for _, target in pairs) + 1) - 1
        if best and any(len(context) > room for context, _ in pairs):
            break
        best = pairs
    return tuple(((text.start, *context[max(0, len(context) - room) :]), target) for context, target in best)


def _per_document(limit: int, documents: Sequence[object]) -> int:
    """Most questions from one document, so that they spread over as many documents as there are."""
    return max(1, math.ceil(limit / max(1, len(documents))))


def _bytes(text: Text, document: Document, ids: Sequence[int], end: int) -> int:
    """UTF-8 bytes of the document's first `end` tokens (exact for the whole; half a character counts 3)."""
    if end in (0, len(ids)):
        return len(document.text.encode()) if end else 0
    return len(text.decode(list(ids[:end])).encode())


def sentences(text: str) -> list[tuple[int, int]]:
    """Spans (start, end) of the sentences of a text, in order, without the white space around them."""
    spans: list[tuple[int, int]] = []
    start = len(text) - len(text.lstrip())
    for match in _END.finditer(text):
        if not _abbreviated(text[start : match.start()], match.group(1)):
            spans.append((start, match.end(1)))
            start = match.end()
    end = len(text.rstrip())
    if end > start:
        spans.append((start, end))
    return spans


def _abbreviated(before: str, mark: str) -> bool:
    """Whether the full stop after `before` belongs to its last word and ends no sentence."""
    word = _WORD_AT_END.search(before)
    if word is None or mark != ".":
        return False
    bare = word.group().lstrip("\"'“‘([")
    inner_stops = "." in bare and all(len(part) <= 2 for part in bare.split("."))
    initial = len(bare) == 1 and bare.isupper()
    return initial or inner_stops or _ABBREVIATION.fullmatch(bare) is not None
