"""Texts as what is scored: pairs of context and continuation, windows of a long text, sentences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of its continuation."""

_END = re.compile(r"([.!?]+[\"'”’)\]]*)\s+(?=[\"'“‘(\[¿¡]*[^\W_a-z])")
_WORD_AT_END = re.compile(r"\S+$")
_ABBREVIATION = re.compile(
    "mr|mrs|ms|dr|prof|rev|hon|st|mt|ft|jr|sr|gen|col|capt|lt|maj|sgt|adm|gov|sen|rep|pres|"
    "vs|etc|approx|ca|cf|al|ed|eds|vol|(?-i:No|Nos)|pp|fig|inc|ltd|co|corp|bros|dept|univ|est|"
    "jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec",
    re.IGNORECASE,
)


class TextTokenizer:
    """A transformers tokenizer that adds no special tokens by itself.

    end_of_text: the token between documents. bos_token: the one that begins every text, for models trained
    with it (Gemma's <bos>). start: before a held-out text, as in training. prefix: before an lm-eval text
    without a context, as lm-eval chooses it, so that figures compare with published ones. stop_ids: tokens
    that end generated text.
    """

    def __init__(self, tokenizer: Any, end_of_text: int, bos_token: int | None = None) -> None:
        self.tokenizer, self.bos_token = tokenizer, bos_token
        self.start = end_of_text if bos_token is None else bos_token
        special = bos_token, getattr(tokenizer, "bos_token_id", None), tokenizer.eos_token_id, end_of_text
        self.prefix: int = next(token for token in special if token is not None)
        self.stop_ids = frozenset({end_of_text} | ({tokenizer.eos_token_id} - {None}))

    def encode(self, text: str) -> list[int]:
        # verbose=False: no warning about a text longer than the context; it is cut into windows.
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def encode_pair(
    encode: Callable[[str], list[int]], context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Tokenize two texts that are read as one: (context_ids, continuation_ids).

    The whole is split where it stops sharing tokens with the context alone (less its white space at the end),
    so a token across the join belongs to the continuation; lm-eval splits at the context's number of tokens.
    """
    whole, alone = encode(context + continuation), encode(context.rstrip())
    pairs = enumerate(zip(alone, whole))
    shared = next((k for k, (first, second) in pairs if first != second), min(len(alone), len(whole)))
    return whole[:shared], whole[shared:]


def rolling_windows(
    ids: Sequence[int], context: int, prefix: int, repeat_prefix: bool = False
) -> Iterator[Request]:
    """Cut a long text into requests that predict each token exactly once.

    No input (context + continuation but its last token) is longer than `context`. The first window starts
    with the token `prefix`, each later one with the token before it; the last one is filled up on the left
    with earlier text. repeat_prefix: every window begins with `prefix`.
    """
    if context <= repeat_prefix:
        raise ValueError(
            f"a window of {context} tokens cannot predict anything; use {1 + repeat_prefix} or more"
        )
    start, room = 0, context
    while start < len(ids):
        end = min(start + room, len(ids))
        room = context - repeat_prefix
        earlier = tuple(ids[max(0, end - 1 - room) : start])
        yield (prefix, *earlier) if repeat_prefix or start == 0 else earlier, tuple(ids[start:end])
        start = end


def sentences(text: str) -> list[tuple[int, int]]:
    """Spans (start, end) of the sentences of a text, in order, without the white space around them.

    A sentence ends at . ! or ? before white space and something that can begin one, but not after an initial
    ("J. R. R. Tolkien"), a known abbreviation or a word with inner full stops ("e.g.").
    """
    spans: list[tuple[int, int]] = []
    start = len(text) - len(text.lstrip())
    for match in _END.finditer(text):
        if not _abbreviated(text[start : match.start()], match.group(1)):
            spans.append((start, match.end(1)))
            start = match.end()
    end = len(text.rstrip())
    return [*spans, (start, end)] if end > start else spans


def _abbreviated(before: str, mark: str) -> bool:
    """Whether the full stop after `before` belongs to its last word and ends no sentence."""
    word = _WORD_AT_END.search(before)
    if word is None or mark != ".":
        return False
    bare = word.group().lstrip("\"'“‘([")
    inner_stops = "." in bare and all(len(part) <= 2 for part in bare.split("."))
    initial = len(bare) == 1 and bare.isupper()
    return initial or inner_stops or _ABBREVIATION.fullmatch(bare) is not None
