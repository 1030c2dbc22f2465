"""Three tasks made from the recipe's own held-out documents: no hub, no download, any language.

heldout_perplexity    Every token, in windows, each document after the end-of-text token: perplexity and bits
                      per byte (comparable between vocabularies).
heldout_cloze         The last word of a sentence after 30 words or more, as in LAMBADA (Paperno et al. 2016):
                      right when each of its tokens is the most likely one. Words seen before come first. In
                      scripts without spaces two characters are a word.
heldout_continuation  The next sentence against three of nearest length from three other documents, as in
                      HellaSwag: right when it has the highest log-likelihood per byte.

Items depend on documents, tokenizer and seed alone, and spread over as many documents as there are.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgedisp.core.errors import BadInput
from edgedisp.core.results import TaskScore
from edgedisp.data import Document
from edgedisp.evaluate import statistics
from edgedisp.evaluate.comparison import TaskResult, task_result
from edgedisp.evaluate.loglikelihood import Request, ScoreOptions, TextTokenizer, loglikelihoods, name_of
from edgedisp.evaluate.statistics import ACCURACY, Metric, Resampling

CLOZE_CONTEXT = 96  # tokens
CLOZE_WORDS = 30
CONTINUATION_CONTEXT = 64  # tokens
CONTINUATION_SENTENCE = 40  # tokens
CONTINUATION_WORDS = 4
CHOICES = 4
LEAST = 2  # questions of a task; with one there is no interval
_SENTENCES = 24  # looked back at most: more than fit in any context here


@dataclass(frozen=True)
class SuiteOptions:
    """Which items a suite of tasks holds.

    context: tokens of a held-out window, at most the models' own. limit: most items of each task.
    perplexity_tokens, answer_tokens: most tokens of heldout_perplexity, and of an answer of heldout_answers.
    tasks_path: a folder of lm-eval YAML, whose Python runs if trust_task_code.
    """

    tasks: tuple[str, ...]
    context: int = 512
    limit: int = 100
    seed: int = 0
    perplexity_tokens: int | None = None
    tasks_path: Path | None = None
    trust_task_code: bool = False
    answer_tokens: int = 128


@dataclass(frozen=True)
class Text:
    """Documents and a tokenizer, from which questions are made."""

    tokenizer: TextTokenizer
    documents: Sequence[Document]
    options: SuiteOptions

    @property
    def share(self) -> int:
        """Most questions from one document, so that they spread over as many documents as there are."""
        return max(1, math.ceil(self.options.limit / max(1, len(self.documents))))


@dataclass(frozen=True)
class Question:
    """One item before scoring. sizes: UTF-8 bytes of each request's continuation; gold: the right one."""

    id: str
    document: str
    requests: tuple[Request, ...]
    sizes: tuple[int, ...]
    gold: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Names the exact tokens that are asked for."""
        return name_of(([*self.requests], self.gold))[:16]


def build(task: str, text: Text) -> list[Question]:
    """The questions of a held-out task. Raises BadInput when the documents hold too few."""
    rng = np.random.default_rng([text.options.seed, list(TASKS).index(task)])
    shuffled = [text.documents[index] for index in rng.permutation(len(text.documents))]
    questions = TASKS[task].build(Text(text.tokenizer, shuffled, text.options), rng)
    if len(questions) < (least := min(LEAST, text.options.limit)):
        raise BadInput(
            f"{task}: {len(questions)} questions can be made of {len(shuffled)} held-out documents, need "
            f"{least}; hold out more text (data.heldout), or take {task} out of evaluate.tasks"
        )
    return questions


def score(
    task: str, questions: Sequence[Question], model: Any, options: ScoreOptions, resampling: Resampling
) -> TaskResult:
    """Ask a model the questions that `build` made: of several choices the one with the most likelihood per
    byte is its answer. No question is longer than a model's context."""
    items, metrics = [], TASKS[task].metrics
    requests = [request for question in questions for request in question.requests]
    scores = iter(loglikelihoods(model, requests, options))
    for question in questions:
        likelihoods = [*islice(scores, len(question.requests))]
        gold, size = likelihoods[question.gold], question.sizes[question.gold]
        item: dict[str, Any] = {"id": question.id, "document": question.document}
        item |= {"nll": -gold.sum_logprob, "tokens": len(gold.logprobs), "bytes": size}
        if len(likelihoods) > 1:
            by_byte = [likelihood.sum_logprob / size for likelihood, size in zip(likelihoods, question.sizes)]
            choice = int(np.argmax(by_byte))
            item |= {"accuracy": int(choice == question.gold), "choice": choice}
        elif ACCURACY in metrics:
            item["accuracy"] = int(gold.greedy)
        items.append({**item, **question.notes, "asked": question.fingerprint()})
    return task_result(TaskScore(task, {}, TASKS[task].chance), items, metrics, resampling)


def windows(text: Text, rng: np.random.Generator) -> list[Question]:
    """Windows of documents, the first ones of each, within `limit` and (beyond two) the token budget."""
    questions: list[Question] = []
    tokenizer, options = text.tokenizer, text.options
    budget = math.inf if options.perplexity_tokens is None else options.perplexity_tokens
    for document in text.documents:
        is_plain = not text.tokenizer.is_rendered(document.text)
        ids = tokenizer.encode(document.text, is_plain)
        pairs = tokenizer.windows(ids, options.context, tokenizer.start)
        end = size = 0  # tokens and bytes so far
        for index, pair in enumerate(islice(pairs, text.share)):
            tokens, before = len(pair[1]), size
            if len(questions) == options.limit or (tokens > budget and len(questions) >= LEAST):
                return questions
            end, budget = end + tokens, budget - tokens
            # Exact for the whole document; half a character at the end of a window counts 3.
            is_whole = is_plain and end == len(ids)
            size = len((document.text if is_whole else tokenizer.decode(ids[:end])).encode())
            sizes = (max(1, size - before),)
            questions.append(Question(f"{document.id}#{index}", document.id, (pair,), sizes))
    return questions


class _Passage(NamedTuple):
    """A passage from any of `starts` to `stop`, and what follows it. number: of the answer's sentence."""

    document: Document
    number: int
    starts: list[int]
    stop: int
    answer: str


def cloze(text: Text, rng: np.random.Generator) -> list[Question]:
    """Last words: those seen earlier in the passage first, at most a fair share from each document."""
    questions: list[Question] = []
    for document in text.documents:
        passages, candidates = _last_words(document), []
        for index in rng.permutation(len(passages))[: 8 + 4 * text.share]:
            word = passages[index].answer
            question = _question(text, passages[index], [word], 0, CLOZE_CONTEXT)
            passage = text.tokenizer.decode(question.requests[0][0][1:]).lower()
            words = passage if re.match(_UNSPACED, word) else _WORD.findall(passage)
            question.notes["seen"] = word.lower() in words
            candidates.append(question)
        questions += sorted(candidates, key=lambda question: not question.notes["seen"])[: text.share]
        if sum(question.notes["seen"] for question in questions) >= text.options.limit:
            break
    return sorted(questions, key=lambda question: not question.notes["seen"])[: text.options.limit]


def _last_words(document: Document) -> list[_Passage]:
    """The last words of sentences after passages that are long enough."""
    spans = sentences(document.text)
    texts = [document.text[start:end] for start, end in spans]
    words_before = [0, *accumulate(map(word_count, texts))]
    passages = []
    for number, (start, _) in enumerate(spans):
        match = _LAST_WORD.search(texts[number]) or _LAST_CHARACTERS.search(texts[number])
        most = words_before[number + 1] - 1 - CLOZE_WORDS
        first = max(0, number - _SENTENCES)
        starts = [spans[k][0] for k in range(first, number + 1) if words_before[k] <= most]
        if match is not None and starts:
            passages.append(_Passage(document, number, starts, start + match.start(), match.group(1)))
    return passages


def continuation(text: Text, rng: np.random.Generator) -> list[Question]:
    """The next sentence against sentences of nearest length in bytes from three other documents."""
    pool: list[_Passage] = []
    limit = text.options.limit
    for document in text.documents:
        pool += _next_sentences(text, document, rng)
        if len(pool) >= max(2000, 4 * limit):
            break
    sizes = np.array([len(passage.answer.encode()) for passage in pool])
    share = math.ceil(limit / max(1, len({passage.document.id for passage in pool})))
    seen: Counter[str] = Counter()
    questions: list[Question] = []
    for index, passage in enumerate(pool):
        seen[passage.document.id] += 1
        if seen[passage.document.id] > share or len(questions) == limit:
            continue
        choices = _nearest(pool, sizes, index, rng)
        if len(choices) == CHOICES - 1:
            gold = int(rng.integers(CHOICES))  # at random, so that a tie favours none
            choices.insert(gold, passage.answer)
            questions.append(_question(text, passage, choices, gold, CONTINUATION_CONTEXT))
    return questions


def _next_sentences(text: Text, document: Document, rng: np.random.Generator) -> list[_Passage]:
    """Some sentences, never the first, short enough for a choice, long enough to say something."""
    spans = sentences(document.text)
    most, tokens = 8 + 2 * text.share, min(CONTINUATION_SENTENCE, text.options.context // 2)
    passages: list[_Passage] = []
    is_plain = not text.tokenizer.is_rendered(document.text)
    for number in (rng.permutation(max(0, len(spans) - 1)) + 1).tolist():
        sentence = document.text[slice(*spans[number])]
        if len(passages) == most:
            break
        is_long, stop = word_count(sentence) >= CONTINUATION_WORDS, spans[number - 1][1]
        answer = _separator(document, stop) + sentence
        if is_long and len(text.tokenizer.encode(answer, is_plain)) <= tokens:
            starts = [start for start, _ in spans[max(0, number - _SENTENCES) : number]]
            passages.append(_Passage(document, number, starts, stop, sentence))
    return passages


def _nearest(pool: Sequence[_Passage], sizes: Any, index: int, rng: np.random.Generator) -> list[str]:
    """Answers of the pool nearest in length, each from another document; ties by chance."""
    nearest = {pool[index].document.id: pool[index].answer}
    for other in np.lexsort((rng.permutation(len(pool)), np.abs(sizes - sizes[index]))):
        if pool[other].answer not in nearest.values():
            nearest.setdefault(pool[other].document.id, pool[other].answer)
        if len(nearest) == CHOICES:
            break
    return [*nearest.values()][1:]


def _question(text: Text, passage: _Passage, choices: Sequence[str], gold: int, most: int) -> Question:
    """Ask for each of the choices after the longest passage of whole sentences that fits: no context has more
    than `most` tokens (the start token included), no request more than `options.context`. When even the
    latest start is too long, all contexts are cut on the left alike."""
    tokenizer, document = text.tokenizer, passage.document
    separator, is_plain = _separator(document, passage.stop), not tokenizer.is_rendered(document.text)
    best: list[tuple[list[int], list[int]]] = []
    room = 0
    for start in reversed(passage.starts):
        context = document.text[start : passage.stop]
        pairs = [tokenizer.encode_pair(context, separator + choice, is_plain) for choice in choices]
        room = min(most, text.options.context - max(len(target) for _, target in pairs) + 1) - 1
        if best and any(len(ids) > room for ids, _ in pairs):
            break
        best = pairs
    requests = tuple(((tokenizer.start, *ids[max(0, len(ids) - room) :]), target) for ids, target in best)
    sizes = tuple(len((separator + choice).encode()) for choice in choices)
    return Question(f"{document.id}#{passage.number}", document.id, requests, sizes, gold)


def _separator(document: Document, stop: int) -> str:
    """What stands between a passage that stops there and the answer."""
    return " " if document.text[stop].isspace() else ""


class HeldoutTask(NamedTuple):
    """metrics: the main one first."""

    build: Callable[[Text, np.random.Generator], list[Question]]
    metrics: tuple[Metric, ...]
    chance: float | None = None


TASKS = {
    "heldout_perplexity": HeldoutTask(windows, (statistics.PERPLEXITY, statistics.BITS_PER_BYTE)),
    "heldout_cloze": HeldoutTask(cloze, (ACCURACY, Metric("word_nll", "nll", higher_is_better=False))),
    "heldout_continuation": HeldoutTask(continuation, (ACCURACY, statistics.GOLD_BITS_PER_BYTE), 1 / CHOICES),
}


# Sentences

_STOPS = "。！？｡।॥؟۔።፧။។៕։།"  # of other scripts: white space may follow them
_CLOSING, _OPENING = r"\"'”’)\]", r"\"'“‘(\[¿¡"
_WIDE_CLOSING, _WIDE_OPENING = _CLOSING + "」』）】》〉", _OPENING + "「『（【《〈"
_END = re.compile(
    rf"([.!?]+[{_CLOSING}]*)\s+(?=[{_OPENING}]*[^\W_a-z])"
    rf"|([{_STOPS}]+[{_WIDE_CLOSING}]*)\s*(?=[{_WIDE_OPENING}]*[^\W_a-z])"
)
# Thai, Lao, Tibetan, Burmese, Khmer, Japanese, Chinese: letters, and marks on them, which are no \w.
_UNSPACED = (
    r"[\u0e00-\u0eff\u0f0b\u0f40-\u0fbc\u1000-\u1049\u1780-\u17d3"
    r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_THAI = re.compile(r"[\u0e00-\u0eff]")  # and Lao: neither marks the end of a sentence
_PHRASE = re.compile(r"(?s)(.{40,80}?(?=\s+[\u0e00-\u0eff])|.{0,79}\S(?:(?=\W)[\u0e00-\u0eff])*)\s*")
# Vowel signs of Hebrew, Arabic and the scripts of India are no \w either.
_LETTER = r"(?:[^\W\d_]|[\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670\u0900-\u0963\u0980-\u0dff])"
_WORD = re.compile(f"{_LETTER}+")
_LAST_WORD = re.compile(rf"\s+({_LETTER}{{3,}})(?:[.!?]+[{_CLOSING}]*|\s?[{_STOPS}]+[{_WIDE_CLOSING}]*)$")
_LAST_CHARACTERS = re.compile(
    rf"((?:(?=[^\W\d_]){_UNSPACED}(?:(?=\W){_UNSPACED})*){{2}})[.!?{_STOPS}]*[{_WIDE_CLOSING}]*$"
)
_ABBREVIATION = re.compile(  # an initial, a word with inner full stops, a known abbreviation
    r"(?:^|\s)[\"'“‘(\[]*(?:(?P<initial>[^\W\d_])|[^\s.]{0,2}(?:\.[^\s.]{0,2})+|No|Nos|"
    r"(?i:mr|mrs|ms|dr|prof|rev|hon|st|mt|ft|jr|sr|gen|col|capt|lt|maj|sgt|adm|gov|sen|rep|pres|"
    r"vs|etc|approx|ca|cf|al|ed|eds|vol|pp|fig|inc|ltd|co|corp|bros|dept|univ|est|"
    r"jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec))$"
)


def sentences(text: str) -> list[tuple[int, int]]:
    """Spans (start, end) of the sentences of a text, in order, without the white space around them.

    A sentence ends at . ! or ? before white space and something that can begin one, but not after an initial
    ("J. R. R. Tolkien"), a known abbreviation or a word with inner full stops ("e.g."); at the stops of other
    scripts also without white space. Thai is cut by length.
    """
    spans: list[tuple[int, int]] = []
    start = len(text) - len(text.lstrip())
    for match in _END.finditer(text):
        known = _ABBREVIATION.search(text[start : match.start()])
        is_abbreviation = known is not None and (known["initial"] or "A").isupper()
        if match.group(1) != "." or not is_abbreviation:
            spans += _by_length(text, start, match.end(match.lastindex or 0))
            start = match.end()
    end = len(text.rstrip())
    return [*spans, *_by_length(text, start, end)] if end > start else spans


def _by_length(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The span; if it is Thai, pieces of 40 to 80 characters, up to white space where there is some."""
    if 2 * len(_THAI.findall(text, start, end)) <= end - start:
        return [(start, end)]
    return [match.span(1) for match in _PHRASE.finditer(text, start, end)]


def word_count(text: str) -> int:
    """Words between white space; of text without spaces two characters count as one."""
    unspaced = len(re.findall(_UNSPACED, text))
    return unspaced // 2 if 2 * unspaced > len(text) else len(text.split())
