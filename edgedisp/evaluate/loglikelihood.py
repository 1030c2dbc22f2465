"""Log-likelihoods of continuations, given contexts, and how far two models' next-token distributions differ.

Each sequence is computed alone by the model as it ships. Nothing is padded, packed or shared, so a score
depends neither on the other requests nor on their order: in int8 arithmetic a sum in another order can move a
log-probability by a tenth. Scores are cached in one SQLite file by model and tokens, so an interrupted
scoring continues, and an added task costs only itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.core.results import Divergence

FORMAT = 3  # of cached scores; raised when they are computed in another way
LOGITS_BYTES = 2**30  # most memory for the float32 logits of sequences side by side; one may exceed it
_POSITIONS = 8  # rows of logits reduced at a time: 8 x 262k x 4 bytes = 8 MB of working memory
_CELLS = 500_000  # positions x vocabulary reduced at a time: 4 MB as float64, as much as caches hold
_WORKERS = 4  # threads that reduce: numpy uses one core
_BATCH = 16  # sequences of a thread between two writes of the cache: what an interruption can lose

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation."""
Fitted = tuple[tuple[int, ...], tuple[int, ...]]
"""A request cut to the context of a model."""
Score = tuple[tuple[float, ...], bool]


class TextTokenizer:
    """A transformers tokenizer that adds no special tokens by itself. BadInput for one without end-of-text.

    bos_token: begins every text, for models trained with one (Gemma's <bos>). start: before a held-out text,
    as in training. prefix: before an lm-eval text without a context, as lm-eval chooses it, so that figures
    compare with published ones. stop_ids: end generated text. is_rendered: whether a text of training holds
    special tokens; in others they are characters (`split_special_tokens`).
    """

    def __init__(self, tokenizer: Any) -> None:
        from edgedisp import models  # brings torch, which a plan does without

        self.tokenizer = tokenizer
        end_of_text, self.bos_token = models.end_of_text_id(tokenizer), models.bos_id(tokenizer)
        self.start = end_of_text if self.bos_token is None else self.bos_token
        eos = tokenizer.eos_token_id
        special = self.bos_token, getattr(tokenizer, "bos_token_id", None), eos, end_of_text
        self.prefix: int = next(token for token in special if token is not None)
        self.stop_ids = frozenset({end_of_text} | ({eos} - {None}))
        self.is_rendered = models.rendered_by(tokenizer)
        self._encode = partial(models.encode, tokenizer)

    def encode(self, text: str, split_special_tokens: bool = False) -> list[int]:
        """The ids of a text, without a bos_token that it begins with: who asks puts one there."""
        ids = self._encode(text, split_special_tokens)
        return ids[1:] if ids and ids[0] == self.bos_token else ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def encode_pair(
        self, context: str, continuation: str, split_special_tokens: bool = False
    ) -> tuple[list[int], list[int]]:
        """Tokenize two texts that are read as one. The whole is split where it stops sharing tokens with the
        context alone (less its white space at the end): a token across the join belongs to the continuation;
        lm-eval splits at the context's number of tokens."""
        texts = context + continuation, context.rstrip()
        whole, alone = (self.encode(text, split_special_tokens) for text in texts)
        shared = len([*takewhile(lambda pair: pair[0] == pair[1], zip(alone, whole))])
        return whole[:shared], whole[shared:]

    def windows(self, ids: Sequence[int], context: int, first: int) -> Iterator[Request]:
        """Cut a long text into requests of at most `context` input tokens that predict each token once. The
        first begins with the token `first`, later ones with bos_token (if any) and the token before them; the
        last one is filled up on the left with earlier text."""
        bos = [] if self.bos_token is None else [self.bos_token]
        start, room = 0, context
        while start < len(ids):
            end = min(start + room, len(ids))
            room = max(1, context - len(bos))
            earlier = ids[max(0, end - 1 - room) : start]
            yield (*(bos if start else [first]), *earlier), tuple(ids[start:end])
            start = end


class ScoreCache:
    """The scores of one model, named by a hash of all that they depend on (files, versions, processor).
    Raises BadInput for a file that is no such cache, or damaged, BuildFailed where nothing can be stored."""

    def __init__(self, path: Path, model: str) -> None:
        self.path, self.model = path, f"{FORMAT} {model}"
        with self._errors():
            self._connection = sqlite3.connect(path, timeout=60)
            self._connection.text_factory = lambda raw: raw.decode(errors="replace")  # damage: the seal tells
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS scores (model TEXT, item TEXT, found TEXT, "
                "PRIMARY KEY (model, item)) WITHOUT ROWID"
            )

    def read(self, names: Sequence[str]) -> dict[str, Any]:
        """Name -> its value, to the bit, for those that are cached whole."""
        query = "SELECT item, found FROM scores WHERE model = ? AND item = ?"
        with self._errors():
            rows = [self._connection.execute(query, (self.model, name)).fetchone() for name in names]
        values = [(row[0], *str(row[1]).partition(" ")[::2]) for row in rows if row is not None]
        return {name: json.loads(text) for name, seal, text in values if seal == name_of((name, text))}

    def write(self, values: Mapping[str, Any]) -> None:
        """Store JSON-able values by name, all or none."""
        texts = {name: json.dumps(value) for name, value in values.items()}
        rows = [(self.model, name, f"{name_of((name, text))} {text}") for name, text in texts.items()]
        with self._errors(), self._connection:
            self._connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", rows)

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as problem:  # a full disk, a locked or read-only file
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


@dataclass(frozen=True)
class Likelihood:
    """logprobs: natural log-probability of each continuation token. greedy: each of them was the most likely
    one. dropped: context tokens cut off on the left to fit the model's context."""

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
    model: Any, requests: Sequence[Request], options: ScoreOptions = DEFAULT_OPTIONS
) -> list[Likelihood]:
    """Score every (context, continuation) pair, cut to the model's context (`fitted`), in request order.

    model: a `TorchModel` or an `OnnxModel`; `logits` (ids int64 [tokens], last) gives float32 [last, vocab]
    at the last positions, in at most `parallel` threads at once. An empty continuation has probability 1.
    Raises BuildFailed for logits that are not finite.
    """
    cache = options.cache
    fits = [fitted(model, request, options.bos_token) for request in requests]
    names = {request: name_of(request) for request, _ in fits if request[1]}
    cached = {} if cache is None else cache.read([*names.values()])
    scores: dict[Fitted, Score] = {request: ((), True) for request, _ in fits if not request[1]}
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
    pending, total = [*rows], len(scores) + sum(map(len, rows.values()))
    with ThreadPoolExecutor(parallel) as pool:
        for start in range(0, len(pending), _BATCH * parallel):
            part = pending[start : start + _BATCH * parallel]
            batch: dict[Fitted, Score] = {}
            for results in map(score, part) if parallel == 1 else pool.map(score, part):
                batch |= results
                options.progress(len(scores) + len(batch), total, "requests")
            scores |= batch
            if cache is not None:  # an interrupted scoring continues
                cache.write({names[request]: result for request, result in batch.items()})
    return [Likelihood(*scores[request], dropped) for request, dropped in fits]


def fitted(model: Any, request: Request, bos_token: int | None = None) -> tuple[Fitted, int]:
    """The request as the model reads it, and how many tokens were cut off on the left of its context, which
    keeps a `bos_token`. BadInput for a continuation that alone is longer than the model's context."""
    context, continuation = tuple(request[0]), tuple(request[1])
    if len(continuation) > model.context:
        raise BadInput(
            f"evaluate.tasks: an answer of {len(continuation)} tokens exceeds the model's context of "
            f"{model.context}; take its task out"
        )
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


def compare_logits(
    references: Mapping[str, Any], model: Any, blocks: NDArray[np.int64], progress: Progress
) -> dict[str, Divergence]:
    """How far a model's next-token distributions lie from each reference's, over int64 [blocks, tokens].

    KL in the other direction is not measured: it blows up where the model is sure and wrong. Raises
    BuildFailed for logits that are not finite.
    """
    rows: dict[str, list[NDArray[np.float64]]] = {name: [] for name in references}
    for number, block in enumerate(blocks, start=1):
        ids, mask = block[None], np.ones_like(block[None])
        logits = model(ids, mask)[0]
        for name, reference in references.items():
            rows[name].append(_divergence(reference(ids, mask)[0], logits))
        progress(number, len(blocks), f"blocks against {', '.join(references)}")
    results = {}
    for name, parts in rows.items():
        kl, top1, top5, largest = np.concatenate(parts).T
        quantiles = np.quantile(kl, [0.5, 0.9, 0.99, 1.0])
        figures = [kl.mean(), *quantiles, top1.mean(), top5.mean(), largest.max()]
        results[name] = Divergence(len(kl), *map(float, figures))
    return results


def _divergence(reference: NDArray[Any], logits: NDArray[Any]) -> NDArray[np.float64]:
    """Logits [tokens, vocab] of both -> [tokens, 4]: KL, same top token?, share of the top five in common,
    largest difference of a logit."""
    step = max(1, _CELLS // logits.shape[-1])
    parts = [slice(start, start + step) for start in range(0, len(logits), step)]
    with ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as pool:
        return np.concatenate([*pool.map(lambda part: _part(reference[part], logits[part]), parts)])


def _part(reference: NDArray[Any], logits: NDArray[Any]) -> NDArray[np.float64]:
    first, second = (part.astype(np.float64) for part in (reference, logits))
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise BuildFailed("divergence: a model gave logits that are not finite; its weights are broken")
    log_p, log_q = log_softmax(first, axis=-1), log_softmax(second, axis=-1)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    k = min(5, logits.shape[-1])
    tops = [np.argpartition(part, -k, axis=-1)[:, -k:] for part in (first, second)]
    in_common = (tops[0][:, :, None] == tops[1][:, None, :]).any(axis=-1).mean(axis=-1)
    same_top = first.argmax(axis=-1) == second.argmax(axis=-1)
    kl = np.maximum(kl, 0.0)  # of equal rows it can be at -1e-17
    return np.stack([kl, same_top, in_common, np.abs(first - second).max(axis=-1)], axis=-1)
