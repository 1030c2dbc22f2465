"""Log-likelihoods of continuations, given contexts, from a model that gives the logits of one sequence.

Each sequence is computed alone, by the model as it ships: nothing is padded, packed or shared, so a score
cannot depend on what it was computed with, nor on the order. Int8 arithmetic would show it: a sum taken in
another order moves an activation by 1e-7, now and then that is a whole rounding step, and 30 layers later a
log-probability has moved by a tenth. Several sequences run side by side where the model says how many may.
Log-softmax is reduced in float64.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.evaluate.score_cache import ScoreCache, name_of

LOGITS_BYTES = 2**30
"""Most memory that the float32 logits of sequences computed side by side may take; one may exceed it."""

_POSITIONS = 64  # rows of logits reduced at a time: 64 x 262k x 4 bytes = 64 MB of working memory
_WRITE_EVERY_S = 2.0  # what an interruption can lose

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]
Row = tuple[int, ...]
Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation."""


class LanguageModel(Protocol):
    """What can be scored: the torch model, a bundle, or a table in a test.

    context: most tokens in a sequence.
    """

    context: int
    vocab_size: int

    @property
    def parallel(self) -> int:
        """How many calls of `logits` may run at once, from as many threads."""
        ...

    def logits(self, ids: NDArray[np.int64], last: int) -> NDArray[np.float32]:
        """ids int64 [tokens] -> logits float32 [last, vocab] at its `last` positions."""
        ...

    def greedy(self, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        """The most likely next tokens after `ids`, one by one, until a stop token or the limit."""
        ...


@dataclass(frozen=True)
class Likelihood:
    """The score of one request.

    logprobs: natural log-probability of each continuation token. greedy: every one of them was the most
    likely token at its place. dropped: context tokens cut off on the left to fit the model's context.
    """

    logprobs: tuple[float, ...]
    greedy: bool
    dropped: int = 0

    @property
    def sum_logprob(self) -> float:
        return float(np.sum(self.logprobs))

    @property
    def tokens(self) -> int:
        return len(self.logprobs)


@dataclass(frozen=True)
class ScoreOptions:
    """How requests are scored.

    end_of_text stands before every document in training, and in for an empty context. bos_token begins every
    text, for models that know one (Gemma's <bos>); it is then the one that stands in, and stays when a
    context is cut. cache: this very model's earlier scores.
    """

    end_of_text: int | None = None
    bos_token: int | None = None
    cache: ScoreCache | None = None
    progress: Progress = silent

    @property
    def start(self) -> int | None:
        return self.end_of_text if self.bos_token is None else self.bos_token


DEFAULT_OPTIONS = ScoreOptions()


def loglikelihoods(
    model: LanguageModel,
    requests: Sequence[Request],
    items: Sequence[Hashable] | None = None,
    options: ScoreOptions = DEFAULT_OPTIONS,
) -> list[Likelihood]:
    """Score every (context, continuation) pair; results come in request order.

    items: which item each request belongs to, such as the question whose choice it is; the cache holds whole
    items. None: each its own. A request longer than the model's context loses tokens on the left of its
    context, never of its continuation. An empty continuation has probability 1.

    Raises ValueError for a continuation that alone is longer than the model's context (cut it with
    `rolling_windows`), for a token outside the vocabulary, and for an empty context without a token to start
    from; BuildFailed when the model gives logits that are not finite.
    """
    scores = _Scores(requests, range(len(requests)) if items is None else items, options.cache)
    rows: dict[Row, list[int]] = {}
    dropped: dict[int, int] = {}
    for number in scores.missing():
        if not requests[number][1]:
            scores.add(number, Likelihood((), True))
            continue
        row, dropped[number] = model_input(model, *requests[number], options)
        rows.setdefault(row, []).append(number)  # choices of one token share theirs

    def score(row: Row) -> list[tuple[int, Likelihood]]:
        targets = {number: tuple(requests[number][1]) for number in rows[row]}
        logits = model.logits(np.array(row, np.int64), max(map(len, targets.values())))
        return [
            (number, Likelihood(*_score(logits[len(logits) - len(ids) :], ids), dropped[number]))
            for number, ids in targets.items()
        ]

    room = LOGITS_BYTES // (4 * model.vocab_size * max(map(len, rows), default=1))
    try:
        for results in _side_by_side(score, rows, max(1, min(model.parallel, room))):
            for number, likelihood in results:
                scores.add(number, likelihood)
            options.progress(len(scores.results), len(requests), "requests")
    finally:  # an interrupted scoring continues
        scores.write()
    return [scores.results[number] for number in range(len(requests))]


def rolling_windows(
    ids: Sequence[int], context: int, prefix: int, each: bool = False
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a long text into (context_ids, continuation_ids) pairs that predict each token exactly once.

    No input (context + continuation but its last token) is longer than `context`. The first window starts
    with the token `prefix`; each later one with the token before it; the last one, when it predicts fewer
    tokens than fit, is filled up on the left with earlier text. `each`: every window begins with `prefix`.
    """
    if context < 1 + each:
        raise ValueError(f"a window of {context} tokens cannot predict anything; use {1 + each} or more")
    start, room = 0, context
    while start < len(ids):
        end = min(start + room, len(ids))
        room = context - each
        reach = max(0, end - 1 - room)
        earlier = tuple(ids[reach:start])
        yield (prefix, *earlier) if each or start == 0 else earlier, tuple(ids[start:end])
        start = end


def encode_pair(encode: Encode, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokenize two texts that are read as one: (context_ids, continuation_ids).

    The whole is tokenized, and split where it stops sharing tokens with the context alone, less its white
    space at the end. So a token that reaches over the join belongs to the continuation, where
    lm-evaluation-harness splits at the context's number of tokens.
    """
    stripped = context.rstrip()
    whole = encode(context + continuation)
    alone = encode(stripped) if stripped else []
    shared = 0
    while shared < min(len(alone), len(whole)) and alone[shared] == whole[shared]:
        shared += 1
    return whole[:shared], whole[shared:]


def model_input(
    model: LanguageModel, context_ids: Sequence[int], continuation_ids: Sequence[int], options: ScoreOptions
) -> tuple[Row, int]:
    """The input tokens of a request (the last continuation token is only predicted) and how many were cut."""
    if len(continuation_ids) > model.context:
        raise ValueError(
            f"a continuation of {len(continuation_ids)} tokens does not fit the model's context of "
            f"{model.context}; cut it with rolling_windows"
        )
    if not context_ids:
        if options.start is None:
            raise ValueError("an empty context needs end_of_text, the token to start from")
        context_ids = (options.start,)
    whole = (*context_ids, *continuation_ids)
    outside = next((token for token in whole if not 0 <= token < model.vocab_size), None)
    if outside is not None:
        raise ValueError(f"token {outside} is outside the model's vocabulary of {model.vocab_size}")
    row = whole[:-1]
    cut = max(0, len(row) - model.context)
    if cut and row[0] == options.bos_token:
        return (row[0], *row[cut + 1 :]), cut
    return row[cut:], cut


class _Scores:
    """Likelihoods by the request's number: those of the cache, and new ones, which it gets item by item."""

    def __init__(
        self, requests: Sequence[Request], items: Sequence[Hashable], cache: ScoreCache | None
    ) -> None:
        self.results: dict[int, Likelihood] = {}
        self._items, self._cache = items, cache
        self._numbers: dict[Hashable, list[int]] = {}
        for number, item in enumerate(items):
            self._numbers.setdefault(item, []).append(number)
        self._names: dict[Hashable, str] = {}
        self._unwritten: set[Hashable] = set()
        self._written = time.monotonic()
        if cache is None:
            return
        for item, numbers in self._numbers.items():
            self._names[item] = name_of([tuple(map(tuple, requests[number])) for number in numbers])
        known = cache.read([*self._names.values()])
        for item, numbers in self._numbers.items():
            for number, values in zip(numbers, known.get(self._names[item], ())):
                self.results[number] = Likelihood(
                    tuple(values["logprobs"]), values["greedy"], values["dropped"]
                )

    def missing(self) -> list[int]:
        return [number for number in range(len(self._items)) if number not in self.results]

    def add(self, number: int, likelihood: Likelihood) -> None:
        self.results[number] = likelihood
        item = self._items[number]
        if self._cache is not None and all(other in self.results for other in self._numbers[item]):
            self._unwritten.add(item)
            if time.monotonic() - self._written > _WRITE_EVERY_S:
                self.write()

    def write(self) -> None:
        if self._cache is not None and self._unwritten:
            values = {
                self._names[item]: [asdict(self.results[number]) for number in self._numbers[item]]
                for item in self._unwritten
            }
            self._cache.write(values)
        self._unwritten, self._written = set(), time.monotonic()


def _side_by_side(
    work: Callable[[Row], list[tuple[int, Likelihood]]], rows: Iterable[Row], parallel: int
) -> Iterator[list[tuple[int, Likelihood]]]:
    """The results in the order of the rows, `parallel` of them in work at a time and few waiting."""
    if parallel == 1:
        yield from map(work, rows)
        return
    with ThreadPoolExecutor(parallel) as pool:
        waiting: deque[Future[list[tuple[int, Likelihood]]]] = deque()
        for row in rows:
            waiting.append(pool.submit(work, row))
            if len(waiting) > parallel:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _score(logits: NDArray[np.float32], targets: tuple[int, ...]) -> tuple[tuple[float, ...], bool]:
    """logits [tokens, vocab] that predict `targets` -> their log-probabilities, all greedy?"""
    logprobs: list[float] = []
    greedy = True
    for start in range(0, len(targets), _POSITIONS):
        wanted = np.asarray(targets[start : start + _POSITIONS])
        part = logits[start : start + _POSITIONS]
        right = part[np.arange(len(wanted)), wanted].astype(np.float64)
        peak = part.max(axis=-1, keepdims=True)
        total = np.exp(part - peak).sum(axis=-1, dtype=np.float64)
        values = right - peak[:, 0].astype(np.float64) - np.log(total)
        if not np.isfinite(values).all():
            raise BuildFailed(
                "scoring: the model gave logits that are not finite (NaN or infinity); its weights are broken"
            )
        logprobs += values.tolist()
        greedy = greedy and bool((part.argmax(axis=-1) == wanted).all())
    return tuple(logprobs), greedy
