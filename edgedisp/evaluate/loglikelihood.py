"""Log-likelihoods of continuations, given contexts, from a model that gives the logits of one sequence.

Each sequence is computed alone by the model as it ships. Nothing is padded, packed or shared, so a score
depends neither on the other requests nor on their order: in int8 arithmetic a sum in another order can move a
log-probability by a tenth. Sequences run side by side where the model says how many may. Log-softmax is
reduced in float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.evaluate.score_cache import ScoreCache, name_of

LOGITS_BYTES = 2**30  # most memory for the float32 logits of sequences side by side; one may exceed it
_POSITIONS = 64  # rows of logits reduced at a time: 64 x 262k x 4 bytes = 64 MB of working memory
_WRITE_EVERY_S = 2.0  # what an interruption can lose

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]
Row = tuple[int, ...]
Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation."""


class LanguageModel(Protocol):
    """What can be scored: the torch model, a bundle, or a table in a test. context: most tokens of a
    sequence; parallel: how many calls of `logits` may run at once, from as many threads."""

    context: int
    vocab_size: int

    @property
    def parallel(self) -> int: ...

    def logits(self, ids: NDArray[np.int64], last: int) -> NDArray[np.float32]:
        """ids int64 [tokens] -> logits float32 [last, vocab] at its `last` positions."""
        ...

    def greedy(self, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        """The most likely next tokens after `ids`, one by one, until a stop token or the limit."""
        ...


@dataclass(frozen=True)
class Likelihood:
    """The score of one request. logprobs: natural log-probability of each continuation token. greedy: each of
    them was the most likely token. dropped: context tokens cut off on the left to fit the model's context."""

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
    """How requests are scored. end_of_text: the token between documents. bos_token: the one that begins every
    text, for models that know one (Gemma's <bos>); it stays when a context is cut. An empty context is
    replaced by bos_token, or else end_of_text. cache: this very model's earlier scores."""

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
    items. A request longer than the model's context loses tokens on the left of its context, never of its
    continuation. An empty continuation has probability 1.

    Raises ValueError for a continuation that alone is longer than the model's context (cut it with
    `rolling_windows`), for a token outside the vocabulary, and for an empty context without a token to start
    from; BuildFailed when the model gives logits that are not finite.
    """
    results = _Results(requests, range(len(requests)) if items is None else items, options.cache)
    rows: dict[Row, list[int]] = {}
    dropped: dict[int, int] = {}
    for number in (number for number in range(len(requests)) if number not in results):
        if not requests[number][1]:
            results.add(number, Likelihood((), True))
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
    parallel = max(1, min(model.parallel, room))
    pool = ThreadPoolExecutor(parallel)
    try:
        scored: Iterable[list[tuple[int, Likelihood]]]
        scored = map(score, rows) if parallel == 1 else pool.map(score, rows)
        for likelihoods in scored:
            for number, likelihood in likelihoods:
                results.add(number, likelihood)
            options.progress(len(results), len(requests), "requests")
    finally:  # an interrupted scoring continues
        pool.shutdown(cancel_futures=True)
        results.write()
    return [results[number] for number in range(len(requests))]


def rolling_windows(
    ids: Sequence[int], context: int, prefix: int, each: bool = False
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a long text into (context_ids, continuation_ids) pairs that predict each token exactly once.

    No input (context + continuation but its last token) is longer than `context`. The first window starts
    with the token `prefix`, each later one with the token before it; the last one is filled up on the left
    with earlier text. `each`: every window begins with `prefix`.
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

    The whole is split where it stops sharing tokens with the context alone (less its white space at the end),
    so a token across the join belongs to the continuation; lm-eval splits at the context's number of tokens.
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


class _Results(dict[int, Likelihood]):
    """Likelihoods by request number. The cached ones are there from the start; complete items are written."""

    def __init__(
        self, requests: Sequence[Request], items: Sequence[Hashable], cache: ScoreCache | None
    ) -> None:
        super().__init__()
        self.items_by_number, self.cache = items, cache
        self.numbers: dict[Hashable, list[int]] = {}
        for number, item in enumerate(items):
            self.numbers.setdefault(item, []).append(number)
        self.names: dict[Hashable, str] = {}
        self.unwritten: list[Hashable] = []
        self.written_at = time.monotonic()
        if cache is None:
            return
        for item, numbers in self.numbers.items():
            self.names[item] = name_of([tuple(map(tuple, requests[number])) for number in numbers])
        cached = cache.read([*self.names.values()])
        for item, numbers in self.numbers.items():
            for number, values in zip(numbers, cached.get(self.names[item], ())):
                self[number] = Likelihood(tuple(values["logprobs"]), values["greedy"], values["dropped"])

    def add(self, number: int, likelihood: Likelihood) -> None:
        self[number] = likelihood
        item = self.items_by_number[number]
        if self.cache is not None and all(other in self for other in self.numbers[item]):
            self.unwritten.append(item)
            if time.monotonic() - self.written_at > _WRITE_EVERY_S:
                self.write()

    def write(self) -> None:
        if self.cache is not None and self.unwritten:
            self.cache.write(
                {
                    self.names[item]: [asdict(self[number]) for number in self.numbers[item]]
                    for item in self.unwritten
                }
            )
        self.unwritten, self.written_at = [], time.monotonic()


def _score(logits: NDArray[np.float32], targets: tuple[int, ...]) -> tuple[tuple[float, ...], bool]:
    """logits [tokens, vocab] that predict `targets` -> their log-probabilities, all greedy?"""
    logprobs: list[float] = []
    greedy = True
    for start in range(0, len(targets), _POSITIONS):
        ids = np.asarray(targets[start : start + _POSITIONS])
        part = logits[start : start + _POSITIONS]
        right = part[np.arange(len(ids)), ids].astype(np.float64)
        peak = part.max(axis=-1, keepdims=True)
        total = np.exp(part - peak).sum(axis=-1, dtype=np.float64)
        values = right - peak[:, 0].astype(np.float64) - np.log(total)
        if not np.isfinite(values).all():
            raise BuildFailed(
                "scoring: the model gave logits that are not finite (NaN or infinity); its weights are broken"
            )
        logprobs += values.tolist()
        greedy = greedy and bool((part.argmax(axis=-1) == ids).all())
    return tuple(logprobs), greedy
