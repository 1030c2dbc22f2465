"""Language models whose every score is known: bigram tables; and a tokenizer of letters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

LETTERS = "\x00\n abcdefghijklmnopqrstuvwxyz?:."


class Bigram:
    """P(next | previous) from a table of logits. rows: the sequences that it was asked for."""

    def __init__(self, vocab_size: int = 11, context: int = 64, seed: int = 0, parallel: int = 1) -> None:
        rng = np.random.default_rng(seed)
        self.table = rng.normal(0, 2, (vocab_size, vocab_size)).astype(np.float32)
        self.vocab_size, self.context, self.parallel = vocab_size, context, parallel
        self.rows: list[tuple[int, ...]] = []
        self.prompts: list[list[int]] = []

    def logits(self, ids: NDArray[np.int64], last: int) -> NDArray[np.float32]:
        self.rows.append(tuple(ids.tolist()))
        return self.table[ids[-last:]]

    def greedy(self, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        self.prompts.append(ids)
        new: list[int] = []
        while len(new) < max_new_tokens and not (new and new[-1] in stop_ids):
            new.append(int(self.table[(ids + new)[-1]].argmax()))
        return new

    def logprobs(self, context: Sequence[int], continuation: Sequence[int]) -> list[float]:
        """The closed form."""
        whole = [*context, *continuation]
        rows = self.table[whole[len(context) - 1 : -1]].astype(np.float64)
        return [float(row[k] - math.log(np.exp(row).sum())) for row, k in zip(rows, continuation)]


def some_requests(vocab_size: int, n: int = 40, seed: int = 1) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(seed)

    def tokens(most: int) -> list[int]:
        ids: list[int] = rng.integers(0, vocab_size, rng.integers(1, most)).tolist()
        return ids

    return [(tokens(20), tokens(9)) for _ in range(n)]


class Letters:
    """One token a letter; id 0 ends a document."""

    eos_token_id = 0
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def get_vocab(self) -> dict[str, int]:
        return {letter: number for number, letter in enumerate(LETTERS)}

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [LETTERS.index(letter) for letter in text.lower()]}

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(LETTERS[number] for number in ids)


class Speller(Bigram):
    """A bigram model over letters."""

    def __init__(self, seed: int = 0, context: int = 64) -> None:
        super().__init__(len(LETTERS), context, seed)

    def say(self, text: str) -> None:
        """Make `text` what follows its first letter (each letter in it may occur once)."""
        ids = Letters()(text)["input_ids"]
        for before, after in itertools.pairwise(ids):
            self.table[before, after] = 50.0

    def logprob(self, context: str, continuation: str) -> float:
        """Of `continuation` after end of text and `context`."""
        before, after = (Letters()(text)["input_ids"] for text in (context, continuation))
        return sum(self.logprobs([0, *before], after))
