"""Greedy decoding of many prompts at once, whatever computes them.

All sequences of a batch stand at the same position: each reads its next token, of its prompt or the one that
it chose. So nothing is padded or masked, and a short prompt is answered while longer ones are read. A
sequence that ended leaves the batch. What all prompts of a batch start with is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgedisp.core.progress import Progress, labelled, silent

BATCH = 64  # sequences side by side: more are hardly faster
CACHE_BYTES = 2**30  # most memory for the keys and values of a batch

Ids = NDArray[np.int64]


class Reader(Protocol):
    """A language model that reads sequences side by side, and remembers what it has read of each."""

    def read(self, ids: Ids) -> Ids:
        """The next tokens of every sequence, [sequences, tokens] -> the likeliest to follow, [sequences]."""

    def select(self, sequences: Ids) -> None:
        """Go on with these, by index; one that is named several times is copied."""


class GreedyDecoding(Protocol):
    """`greedy` of a model that answers many prompts at once."""

    def greedy_batch(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        stop_ids: frozenset[int],
        progress: Progress = silent,
    ) -> list[list[int]]:
        """`greedy` of every prompt, side by side: the same but for near-ties."""

    def greedy(self, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        """The most likely next tokens after `ids`, at most `max_new_tokens` or what the context leaves.

        A stop token ends them and is the last. Raises BadInput or ValueError for a prompt that is empty or
        longer than the context.
        """
        return self.greedy_batch([ids], max_new_tokens, stop_ids)[0]


def greedy_batch(
    start: Callable[[int], Reader],
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    stop_ids: frozenset[int],
    token_bytes: int,
    progress: Progress,
) -> list[list[int]]:
    """The likeliest next tokens of every prompt, one by one, up to a stop token, which is the last.

    start: gives a reader of one sequence, still empty, that grows to so many tokens. limits: most new tokens
    of each prompt. token_bytes: of the keys and values of one token.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    order = [index for index in order if limits[index] > 0]
    answers: list[list[int]] = [[] for _ in prompts]
    progress = labelled(progress, "answers")
    while order:
        longest, most = len(prompts[order[0]]), max(limits[index] for index in order)
        # A prompt that is much shorter would be answered long before the longest is read.
        near = sum(longest - len(prompts[index]) <= most for index in order)
        size = max(1, min(BATCH, near, CACHE_BYTES // (token_bytes * (longest + most))))
        batch, order = order[:size], order[size:]
        texts = [[*prompts[index]] for index in batch]
        sizes = [len(text) + limits[index] for text, index in zip(texts, batch)]
        for left in _decode(start(max(sizes)), texts, sizes, stop_ids):
            progress(len(prompts) - len(order) - left, len(prompts), "prompts")
        for index, text in zip(batch, texts):
            answers[index] = text[len(prompts[index]) :]
    return answers


def _decode(
    reader: Reader, texts: list[list[int]], sizes: Sequence[int], stop_ids: frozenset[int]
) -> Iterator[int]:
    """Continue the texts of a batch, each up to its end or a stop token; yields how many are going on."""
    lengths = [len(text) for text in texts]
    differing = (place for place, tokens in enumerate(zip(*texts)) if len({*tokens}) > 1)
    # The last token of a prompt has to be read for what follows it.
    shared = 0 if len(texts) == 1 else min([*islice(differing, 1), min(lengths) - 1])
    if shared > 0:
        reader.read(np.array([texts[0][:shared]], np.int64))
    reader.select(np.zeros(len(texts), np.int64))
    active, position, end = [*range(len(texts))], shared, min(lengths)
    while active:
        likeliest = reader.read(np.array([texts[row][position:end] for row in active], np.int64))
        position, end = end, end + 1
        for row, token in zip(active, likeliest.tolist()):
            if len(texts[row]) == position:  # its prompt is read
                texts[row].append(token)
        is_going = [
            len(texts[row]) <= lengths[row]
            or (len(texts[row]) < sizes[row] and texts[row][-1] not in stop_ids)
            for row in active
        ]
        if not all(is_going):
            places = _without_gaps(np.flatnonzero(is_going))
            reader.select(places)
            active = [active[place] for place in places]
            yield len(active)


def _without_gaps(places: Ids) -> Ids:
    """The same places, the last ones in the gaps between the others: the fewest are moved."""
    dense = np.arange(len(places))
    gaps = np.isin(dense, places, invert=True)
    dense[gaps] = places[places >= len(places)]
    return dense
