"""Log-likelihoods of continuations, given contexts, from a model that is nothing but `ids, mask -> logits`.

A model that can read trees of tokens gets them as forests (forest.py): what requests share at their
beginnings is computed once, there is no padding, and only the logits that predict a continuation token are
made. Any other model gets them sorted by length in right-padded batches. Both stay under two limits, a budget
of tokens and the memory that logits may take (a vocabulary of 262k entries fills 256 MB with 256 positions).

A score must not depend on what it was computed with. Log-softmax is reduced in float64, and in fp32 a logit
moves by 1e-5 at most. But int8 arithmetic rounds activations: a sum taken in another order moves one by 1e-7,
now and then that is a whole step, and 30 layers later a log-probability has moved by a tenth. So a model with
`packs` false gets the requests of one item and no others in a forward pass; several items are then computed
side by side, on a core each: small products gain little from a second thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.evaluate import forest
from edgedisp.evaluate.answers import Answers, Likelihood, Request
from edgedisp.evaluate.forest import Row
from edgedisp.evaluate.kept import Kept

LOGITS_BYTES = 256 * 2**20
"""Most memory that the float32 logits of one batch may take; a single row may exceed it."""

_POSITIONS = 64  # rows of logits reduced at a time: 64 x 262k x 4 bytes = 64 MB of working memory

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]
ItemRow = tuple[Hashable, Row]
Job = TypeVar("Job")
Done = TypeVar("Done")


class LanguageModel(Protocol):
    """What can be scored. The torch model and the ONNX bundle both fit; so does a table in a test."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def context(self) -> int:
        """Most tokens in one sequence."""
        ...

    def __call__(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """ids, mask int64 [batch, tokens] (0 padding, on the right) -> float32 [batch, tokens, vocab]."""
        ...

    @property
    def tree_nodes(self) -> int:
        """Most nodes in one forest; 0 for a model that cannot read trees of tokens."""
        ...

    @property
    def packs(self) -> bool:
        """Whether a forest of several items gives each the scores that it has alone."""
        ...

    @property
    def lanes(self) -> int:
        """How many forests may be read at once, from as many threads; asked where `packs` is false."""
        ...

    def tree(
        self,
        ids: NDArray[np.int64],
        depths: NDArray[np.int64],
        ends: NDArray[np.int64],
        wanted: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Logits float32 [wanted, vocab] of some nodes of a forest; ids, depths, ends int64 [nodes]."""
        ...

    def greedy(self, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        """The most likely next tokens after `ids`, one by one, until a stop token or the limit."""
        ...


def loglikelihoods(
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    items: Sequence[Hashable] | None = None,
    batch_tokens: int = 1024,
    end_of_text: int | None = None,
    lead: int | None = None,
    kept: Kept | None = None,
    progress: Progress = silent,
) -> list[Likelihood]:
    """Score every (context_ids, continuation_ids) pair; results come in request order.

    items: which item each request belongs to, such as the question whose choice it is; None: each its own.
    kept: where this very model's scores are read from, and written to item by item.

    An empty context is replaced by `lead`, which begins every text where a model knows such a token, else by
    `end_of_text`, which stands before every document in training. A request longer than the model's context
    loses tokens on the left of its context, never of its continuation, nor a `lead` that it begins with. An
    empty continuation has probability 1. `batch_tokens` bounds rows x padded length.

    Raises ValueError for a continuation that alone is longer than the model's context (cut it with
    `rolling_windows`), for a token outside the vocabulary, and for an empty context without
    `end_of_text`; BuildFailed when the model gives logits that are not finite.
    """
    answers = Answers(requests, range(len(requests)) if items is None else items, kept)
    rows: dict[ItemRow, list[int]] = {}
    targets: dict[int, Row] = {}
    dropped: dict[int, int] = {}
    for number in answers.missing():
        context_ids, continuation_ids = requests[number]
        inputs, dropped[number] = _inputs(
            model, context_ids, continuation_ids, end_of_text if lead is None else lead, lead
        )
        rows.setdefault((None if model.packs else answers.owners[number], inputs), []).append(number)
        targets[number] = tuple(continuation_ids)
        if not targets[number]:
            answers.add(number, Likelihood((), True))

    wanted = {row: most for row, numbers in rows.items() if (most := max(len(targets[n]) for n in numbers))}
    try:
        for row, logits in _last_logits(model, wanted, batch_tokens):
            for number in rows[row]:
                asked = targets[number]
                if asked:
                    logprobs, greedy = _score(logits[len(logits) - len(asked) :], asked)
                    answers.add(number, Likelihood(logprobs, greedy, dropped[number]))
            progress(len(answers.found), len(requests), "requests")
    finally:  # an interrupted scoring continues
        answers.write()
    return [answers.found[number] for number in range(len(requests))]


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


def as_read(
    model: LanguageModel,
    context_ids: Sequence[int],
    continuation_ids: Sequence[int],
    start: int | None,
    lead: int | None,
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """What a model reads of a request: (context, continuation, context tokens dropped); see `loglikelihoods`.

    `start` stands in for an empty context. An empty continuation is asked of nobody.
    """
    if not continuation_ids:
        return tuple(context_ids), (), 0
    inputs, dropped = _inputs(model, context_ids, continuation_ids, start, lead)
    return inputs[: len(inputs) - len(continuation_ids) + 1], tuple(continuation_ids), dropped


def encode_pair(encode: Encode, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokenize two texts that are read as one: (context_ids, continuation_ids).

    White space at the end of the context is moved to the continuation, since most vocabularies hold the
    space together with the word that follows; then the whole is tokenized and split where the context's
    own tokens end (as lm-evaluation-harness does). Where a token reaches over the join it belongs to the
    continuation, so the two lists together are always the tokens of the joined text.
    """
    stripped = context.rstrip()
    whole = encode(context + continuation)
    alone = encode(stripped) if stripped else []
    shared = 0
    while shared < min(len(alone), len(whole)) and alone[shared] == whole[shared]:
        shared += 1
    return whole[:shared], whole[shared:]


def _inputs(
    model: LanguageModel,
    context_ids: Sequence[int],
    continuation_ids: Sequence[int],
    start: int | None,
    lead: int | None,
) -> tuple[tuple[int, ...], int]:
    """The input tokens of a request (the last continuation token is only predicted) and how many were cut."""
    if len(continuation_ids) > model.context:
        raise ValueError(
            f"a continuation of {len(continuation_ids)} tokens does not fit the model's context of "
            f"{model.context}; cut it with rolling_windows"
        )
    if not context_ids:
        if start is None:
            raise ValueError("an empty context needs end_of_text, the token to start from")
        context_ids = (start,)
    whole = (*context_ids, *continuation_ids)
    outside = next((token for token in whole if not 0 <= token < model.vocab_size), None)
    if outside is not None:
        raise ValueError(f"token {outside} is outside the model's vocabulary of {model.vocab_size}")
    inputs = whole[:-1]
    cut = max(0, len(inputs) - model.context)
    if cut and inputs[0] == lead:
        return (inputs[0], *inputs[cut + 1 :]), cut
    return inputs[cut:], cut


def _last_logits(
    model: LanguageModel, wanted: Mapping[ItemRow, int], batch_tokens: int
) -> Iterator[tuple[ItemRow, NDArray[np.float32]]]:
    """Each row with the logits of its last tokens, as many as are wanted: float32 [wanted, vocab]."""
    room = max(1, LOGITS_BYTES // (4 * model.vocab_size))
    most = min(batch_tokens, room)
    together: dict[Hashable, dict[Row, int]] = {}
    for (item, row), count in wanted.items():
        if len(row) <= model.tree_nodes:
            together.setdefault(item, {})[row] = count
    lanes = 1 if model.packs else model.lanes
    nodes = min(batch_tokens, model.tree_nodes) if model.packs else model.tree_nodes
    asked_at_once = most if model.packs else max(1, room // lanes)
    parts = (
        (item, part)
        for item, counts in together.items()
        for part in forest.parted(counts, nodes, asked_at_once)
    )
    for item, read in _side_by_side(lambda one: (one[0], _from_forest(model, one[1])), parts, lanes):
        for row, logits in read:
            yield (item, row), logits
    rest: dict[Hashable, list[ItemRow]] = {}  # in batches: all rows, or those of one item
    for one in wanted:
        if len(one[1]) > model.tree_nodes:
            rest.setdefault(one[0], []).append(one)
    for rows in rest.values():
        for batch in _batches(sorted(rows, key=lambda one: (-len(one[1]), one[1])), most):
            for one, logits in zip(batch, _run(model, [row for _, row in batch])):
                end = len(one[1])
                yield one, logits[end - wanted[one] : end]


def _side_by_side(work: Callable[[Job], Done], jobs: Iterable[Job], lanes: int) -> Iterator[Done]:
    """The results in the order of the jobs, `lanes` of them in work at a time and few waiting to be taken."""
    if lanes == 1:
        yield from map(work, jobs)
        return
    with ThreadPoolExecutor(lanes) as pool:
        waiting: deque[Future[Done]] = deque()
        for job in jobs:
            waiting.append(pool.submit(work, job))
            if len(waiting) > lanes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _from_forest(model: LanguageModel, wanted: Mapping[Row, int]) -> list[tuple[Row, NDArray[np.float32]]]:
    planted = forest.plant(list(wanted))
    asked = {row: planted.paths[row][-count:] for row, count in wanted.items()}
    nodes = sorted({node for path in asked.values() for node in path})
    place = {node: index for index, node in enumerate(nodes)}
    logits = model.tree(planted.ids, planted.depths, planted.ends, np.array(nodes, np.int64))
    return [(row, logits[[place[node] for node in path]]) for row, path in asked.items()]


def _batches(rows: Sequence[ItemRow], most: int) -> Iterator[list[ItemRow]]:
    """Consecutive rows, longest first, so that rows x longest stays within the limit (or is one row)."""
    batch: list[ItemRow] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(batch[0][1]) > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _run(model: LanguageModel, batch: Sequence[Row]) -> NDArray[np.float32]:
    """Pad on the right and call the model: float32 [rows, longest, vocab]."""
    ids = np.zeros((len(batch), len(batch[0])), dtype=np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(batch):
        ids[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return model(ids, mask)


def _score(logits: NDArray[np.float32], targets: tuple[int, ...]) -> tuple[tuple[float, ...], bool]:
    """logits [tokens, vocab] that predict `targets` -> their log-probabilities, all greedy?"""
    logprobs: list[float] = []
    greedy = True
    for start in range(0, len(targets), _POSITIONS):
        wanted = np.asarray(targets[start : start + _POSITIONS])
        part = logits[start : start + _POSITIONS]
        chosen = part[np.arange(len(wanted)), wanted].astype(np.float64)
        peak = part.max(axis=-1, keepdims=True)
        total = np.exp(part - peak).sum(axis=-1, dtype=np.float64)
        values = chosen - peak[:, 0].astype(np.float64) - np.log(total)
        if not np.isfinite(values).all():
            raise BuildFailed(
                "scoring: the model gave logits that are not finite (NaN or infinity); its weights are broken"
            )
        logprobs += values.tolist()
        greedy = greedy and bool((part.argmax(axis=-1) == wanted).all())
    return tuple(logprobs), greedy
