"""Documents -> the held-out split and packed blocks of token ids, from the seed alone.

The documents' tokens, each with its end-of-text token, are laid end to end and cut into blocks of `context`
tokens; only the last partial block is dropped. A document may cross blocks, and attention sees across the
separator, as in most pre-training.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.data.documents import Documents, unique_id
from edgedisp.data.readers import Document

Encode = Callable[[Sequence[str]], Sequence[ArrayLike]]
"""Texts of documents -> the token ids of each, its end-of-text token included."""

Row = tuple[NDArray[np.uint32], NDArray[np.bool_]]
TARGET, START, PADDING = 1, 2, 4
"""Bits of a token's mark in a block of rows: training predicts it; it is a row's first, from which positions
count and before which nothing is attended to; it fills a block up."""
OPEN_BLOCKS = 512  # the newest, in which room is looked for

BATCH, BATCH_CHARACTERS = 256, 2**21  # documents encoded together: enough for all cores, little memory


def split(documents: Sequence[Document], heldout: float, seed: int) -> tuple[Documents, Documents]:
    """(train, held-out) documents, shuffled, split by document; at least one on each side.

    `heldout` is the share of documents, 0 < heldout < 1. Of documents with the same text (white space and
    Unicode composition aside) the first stays, so no held-out text is trained on; `.dropped["duplicate"]` of
    the first result counts the rest. Ids become unique. Raises BadInput for fewer than two texts.
    """
    distinct: dict[bytes, Document] = {}
    ids: set[str] = set()
    for document in documents:
        text = unicodedata.normalize("NFC", " ".join(document.text.split()))
        name = hashlib.blake2b(text.encode()).digest()
        if name not in distinct:
            distinct[name] = replace(document, id=unique_id(document.id, ids))
    if len(distinct) < 2:
        raise BadInput(
            f"the text holds {len(distinct)} different document(s), but 2 are needed: one to train on and "
            "one held out. Give more documents; in a .txt or .md file a blank line ends a document."
        )
    texts = list(distinct.values())
    shuffled = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    count = min(max(1, round(len(texts) * heldout)), len(texts) - 1)
    return Documents(shuffled[count:], duplicate=len(documents) - len(texts)), Documents(shuffled[:count])


def pack(
    documents: Sequence[Document],
    encode: Encode,
    context: int,
    blocks: int | None = None,
    name: str = "the held-out text",
    progress: Progress = silent,
) -> NDArray[np.uint32]:
    """Token ids uint32 [blocks, context]: the documents in the given order, once, in whole blocks.

    `blocks` None takes all; otherwise at most that many, and documents that are not needed are not encoded.
    `name` is what an error calls the text. Raises BadInput if not even one block is filled.
    """
    pieces, tokens = [np.empty(0, np.uint32)], 0
    for piece in _encoded(documents, encode, progress):
        pieces.append(piece)
        tokens += piece.size
        if blocks is not None and tokens >= blocks * context:
            break
    whole = min(tokens // context, blocks or tokens)
    if whole == 0:
        raise _too_short(name, tokens, context)
    return np.concatenate(pieces)[: whole * context].reshape(whole, context)


def count_tokens(documents: Sequence[Document], encode: Encode, progress: Progress = silent) -> float:
    """Tokens of one epoch, each document as often as its source is read."""
    pieces = _encoded(documents, encode, progress)
    return sum(document.weight * piece.size for document, piece in zip(documents, pieces))


def epoch_order(weights: Sequence[float], seed: int, epoch: int) -> list[int]:
    """Indices of what an epoch reads, shuffled; a fraction of a weight is the chance to be read."""
    rng = np.random.default_rng([seed, epoch])
    if {*weights} == {1.0}:
        return rng.permutation(len(weights)).tolist()
    counts = np.floor(weights) + (rng.random(len(weights)) < np.mod(weights, 1))
    return rng.permutation(np.repeat(np.arange(len(weights)), counts.astype(int))).tolist()


def pack_rows(
    rows: Sequence[Row], order: Sequence[int], context: int, padding: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """(token ids, marks), both [blocks, context]: whole rows, each in the first block with room for it.

    A row is its token ids, at most `context`, and which of them training predicts; the first never is. What
    no row fills is `padding`.
    """
    blocks, free = list[list[int]](), np.zeros(len(order), np.int64)
    for index in order:
        size, oldest = len(rows[index][0]), max(0, len(blocks) - OPEN_BLOCKS)
        room = np.flatnonzero(free[oldest : len(blocks)] >= size)
        block = oldest + int(room[0]) if room.size else len(blocks)
        if not room.size:
            blocks.append([])
            free[block] = context
        blocks[block].append(index)
        free[block] -= size
    tokens = np.full((len(blocks), context), padding, np.uint32)
    marks = np.full(tokens.shape, PADDING, np.uint8)
    for number, block_rows in enumerate(blocks):
        start = 0
        for ids, targets in (rows[index] for index in block_rows):
            end = start + len(ids)
            tokens[number, start:end], marks[number, start:end] = ids, TARGET * targets
            marks[number, start] = START
            start = end
        marks[number, start : start + 1] |= START  # padding attends to no row
    return tokens, marks


def row_positions(is_first: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Where each token stands in its row, from 0. is_first [..., context]: at the first token of a row."""
    every = np.arange(is_first.shape[-1])
    first: NDArray[np.int64] = np.maximum.accumulate(np.where(is_first, every, 0), axis=-1)
    return every - first


def training_blocks(
    documents: Sequence[Document],
    encode: Encode,
    context: int,
    blocks: int,
    seed: int,
    progress: Progress = silent,
) -> tuple[NDArray[np.uint32], float]:
    """(exactly `blocks` blocks, uint32 [blocks, context]; passes over the documents, such as 2.25).

    The text is read as often as it takes. Every epoch is shuffled anew from (seed, epoch); each document is
    encoded at most once, and only if it is reached. Blocks run on across epochs. Raises BadInput if the whole
    text is shorter than one block.
    """
    out = np.empty(blocks * context, dtype=np.uint32)
    filled = read = epoch = 0
    encoded: dict[int, NDArray[np.uint32]] = {}
    while filled < out.size:
        order = epoch_order([document.weight for document in documents], seed, epoch)
        unread = [*dict.fromkeys(index for index in order if index not in encoded)]
        pieces = _encoded([documents[index] for index in unread], encode, progress)
        for index in order:
            if index not in encoded:
                encoded[index] = next(pieces)
            piece = encoded[index]
            size = min(piece.size, out.size - filled)
            out[filled : filled + size] = piece[:size]
            filled += size
            read += 1
            if filled == out.size:
                break
        if epoch == 0 and filled < context:
            raise _too_short("the training text", filled, context)
        epoch += 1
    return out.reshape(blocks, context), round(read / sum(document.weight for document in documents), 4)


def _encoded(
    documents: Sequence[Document], encode: Encode, progress: Progress
) -> Iterator[NDArray[np.uint32]]:
    """The ids of each document, encoded in batches when they are reached."""
    batch, size = list[str](), 0
    for number, document in enumerate(documents, start=1):
        batch.append(document.text)
        size += len(document.text)
        is_full = len(batch) == BATCH or size >= BATCH_CHARACTERS
        if is_full or number == len(documents):
            yield from (np.asarray(ids, dtype=np.uint32) for ids in encode(batch))
            progress(number, len(documents), "encoding text")
            batch, size = [], 0


def _too_short(name: str, tokens: int, context: int) -> BadInput:
    return BadInput(
        f"{name} is too short for one block: {tokens} tokens found, {context} needed (the context). Give "
        "more text or a shorter context."
    )
