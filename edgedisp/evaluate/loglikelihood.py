"""Log-likelihoods of continuations, given contexts, from a model that gives the logits of one sequence.

Each sequence is computed alone by the model as it ships. Nothing is padded, packed or shared, so a score
depends neither on the other requests nor on their order: in int8 arithmetic a sum in another order can move a
log-probability by a tenth. Scores are cached in one SQLite file by model and tokens, so an interrupted
scoring continues, and an added task costs only itself.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.evaluate.tokenization import Request

FORMAT = 3  # of cached scores; raised when they are computed in another way
LOGITS_BYTES = 2**30  # most memory for the float32 logits of sequences side by side; one may exceed it
_POSITIONS = 64  # rows of logits reduced at a time: 64 x 262k x 4 bytes = 64 MB of working memory
_WRITE_EVERY_S = 2.0  # what an interruption can lose
_NAMES_PER_QUERY = 500  # SQLite allows 999


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


class ScoreCache:
    """The scores of one model, named by a hash of all that they depend on (files, versions, processor).
    Raises BadInput for a file that is no cache, BuildFailed for a full disk or a locked file."""

    def __init__(self, path: Path, model: str) -> None:
        self.path, self.model = path, f"{FORMAT} {model}"
        with self._errors():
            self._connection = sqlite3.connect(path, timeout=60)
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS scores (model TEXT, item TEXT, found TEXT, "
                "PRIMARY KEY (model, item)) WITHOUT ROWID"
            )

    def read(self, names: Sequence[str]) -> dict[str, Any]:
        """Name -> its value, to the bit, for those that are cached."""
        values: dict[str, Any] = {}
        for start in range(0, len(names), _NAMES_PER_QUERY):
            part = names[start : start + _NAMES_PER_QUERY]
            marks = ",".join("?" * len(part))
            query = f"SELECT item, found FROM scores WHERE model = ? AND item IN ({marks})"
            with self._errors():
                rows = self._connection.execute(query, (self.model, *part))
                values |= {name: json.loads(text) for name, text in rows}
        return values

    def write(self, values: Mapping[str, Any]) -> None:
        """Store JSON-able values by name, all or none."""
        rows = [(self.model, name, json.dumps(value)) for name, value in values.items()]
        with self._errors(), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as problem:
            raise BuildFailed(
                f"{self.path}: scores cannot be stored ({problem}); the same command continues"
            ) from problem
        except sqlite3.Error as problem:
            raise BadInput(
                f"{self.path}: cannot be used as the cache of scores ({problem}); delete it, and its scores "
                "are computed again"
            ) from problem


def name_of(content: Any) -> str:
    """The name in a cache of anything with a faithful repr, such as a request of token ids: its hash."""
    return hashlib.sha256(repr(content).encode()).hexdigest()


Fitted = tuple[tuple[int, ...], tuple[int, ...]]
"""A request cut to the context of a model."""
Score = tuple[tuple[float, ...], bool]


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


@dataclass(frozen=True)
class ScoreOptions:
    """bos_token: a first token that stays when a context is cut. cache: this very model's earlier scores."""

    bos_token: int | None = None
    cache: ScoreCache | None = None
    progress: Progress = silent


DEFAULT_OPTIONS = ScoreOptions()


def loglikelihoods(
    model: LanguageModel, requests: Sequence[Request], options: ScoreOptions = DEFAULT_OPTIONS
) -> list[Likelihood]:
    """Score every (context, continuation) pair; results come in request order.

    A request longer than the model's context is cut (`fitted`). An empty continuation has probability 1.
    Raises BuildFailed when the model gives logits that are not finite, ValueError as `fitted` does.
    """
    cache = options.cache
    fits = [fitted(model, request, options.bos_token) for request in requests]
    scores: dict[Fitted, Score] = {request: ((), True) for request, _ in fits if not request[1]}
    names = {request: name_of(request) for request, _ in fits if request not in scores}
    total = len(scores) + len(names)
    cached = {} if cache is None else cache.read([*names.values()])
    rows: dict[tuple[int, ...], list[Fitted]] = {}
    for request, name in names.items():
        if name in cached:
            logprobs, greedy = cached[name]
            scores[request] = tuple(logprobs), greedy
        else:  # choices of one token share their row
            rows.setdefault((*request[0], *request[1][:-1]), []).append(request)

    def score(row: tuple[int, ...]) -> dict[Fitted, Score]:
        logits = model.logits(np.array(row, np.int64), max(len(target) for _, target in rows[row]))
        return {request: _score(logits[len(logits) - len(request[1]) :], request[1]) for request in rows[row]}

    room = LOGITS_BYTES // (4 * model.vocab_size * max(map(len, rows), default=1))
    parallel = max(1, min(model.parallel, room))
    pool = ThreadPoolExecutor(parallel)
    unwritten: dict[str, Score] = {}
    written_at = time.monotonic()
    try:
        for scored in map(score, rows) if parallel == 1 else pool.map(score, rows):
            scores |= scored
            unwritten |= {names[request]: result for request, result in scored.items()}
            if cache is not None and time.monotonic() - written_at > _WRITE_EVERY_S:
                cache.write(unwritten)
                unwritten, written_at = {}, time.monotonic()
            options.progress(len(scores), total, "requests")
    finally:  # an interrupted scoring continues
        pool.shutdown(cancel_futures=True)
        if cache is not None and unwritten:
            cache.write(unwritten)
    return [Likelihood(*scores[request], dropped) for request, dropped in fits]


def fitted(model: LanguageModel, request: Request, bos_token: int | None = None) -> tuple[Fitted, int]:
    """The request as the model reads it, and how many tokens were cut off on the left of its context.

    The continuation is never cut, and its last token is only predicted. A context that begins with
    `bos_token` keeps it. Raises ValueError for a continuation that alone is longer than the model's context
    (cut it with `rolling_windows`), an empty context, and a token outside the vocabulary.
    """
    context, continuation = tuple(request[0]), tuple(request[1])
    if len(continuation) > model.context:
        raise ValueError(
            f"a continuation of {len(continuation)} tokens exceeds the model's context of {model.context}"
        )
    if continuation and not context:
        raise ValueError("an empty context: put a token before the text, such as end-of-text")
    for token in (*context, *continuation):
        if not 0 <= token < model.vocab_size:
            raise ValueError(f"token {token} is outside the model's vocabulary of {model.vocab_size}")
    cut = max(0, len(context) + len(continuation) - 1 - model.context)
    if cut and context[0] == bos_token:
        return ((context[0], *context[cut + 1 :]), continuation), cut
    return (context[cut:], continuation), cut


def _score(logits: NDArray[np.float32], targets: Sequence[int]) -> Score:
    """logits [tokens, vocab] that predict `targets` -> their log-probabilities in float64; all greedy?"""
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
            raise BuildFailed("scoring: the model gave logits that are not finite; its weights are broken")
        logprobs += values.tolist()
        greedy = greedy and bool((part.argmax(axis=-1) == ids).all())
    return tuple(logprobs), greedy
