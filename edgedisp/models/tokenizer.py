"""Text -> token ids, and the tokens that stand before and behind a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from edgedisp.core.errors import BadInput

# Chat models end a TURN with their eos token; what ended a document in pre-training has one of these names.
# SmolLM2: <|endoftext|> is id 0 while eos is <|im_end|>. Llama 3: <|end_of_text|>, eos <|eot_id|>.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")


class Encoder:
    """`encoder(text) -> ids` without special tokens, and `encoder.batch(texts)`, some times faster.

    bos: a token that is put before every text (`bos_id`) which does not begin with it, as text that a chat
    template rendered does.
    """

    def __init__(self, tokenizer: Any, bos: int | None = None) -> None:
        self.tokenizer, self.bos = tokenizer, bos

    def __call__(self, text: str) -> list[int]:
        return self.batch([text])[0]

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: no warning that a document is longer than the context; it will be cut into blocks.
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        ids: list[list[int]] = encoded["input_ids"]
        if self.bos is None:
            return ids
        return [row if row[:1] == [self.bos] else [self.bos, *row] for row in ids]


def document_encoder(tokenizer: Any) -> Encoder:
    """The encoder of documents that an end-of-text token separates: with the tokenizer's BOS before each,
    unless the separator is that very token (OPT)."""
    bos = bos_id(tokenizer)
    return Encoder(tokenizer, None if bos == end_of_text_id(tokenizer) else bos)


@overload
def encode(tokenizer: Any, text: str) -> list[int]: ...
@overload
def encode(tokenizer: Any, text: Sequence[str]) -> list[list[int]]: ...
def encode(tokenizer: Any, text: str | Sequence[str]) -> list[int] | list[list[int]]:
    """Token ids of a text (or of each of several) without special tokens around them."""
    encoder = Encoder(tokenizer)
    return encoder(text) if isinstance(text, str) else encoder.batch(text)


def bos_id(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text, or None where it puts none.

    Gemma, Llama 3, Mistral and OPT were trained on texts that begin with one; without it Gemma writes
    nonsense. SmolLM2, Qwen, GPT-2 and GPT-NeoX have none.
    """
    plain, full = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True))
    first = full[: len(full) - len(plain)] if full[-len(plain) :] == plain else full[:1]
    return int(first[0]) if first and first[0] != plain[0] else None


def end_of_text_id(tokenizer: Any) -> int:
    """The id that separates documents: <|endoftext|> if it is in the vocabulary, else the tokenizer's eos.

    Raises BadInput for a tokenizer that has neither.
    """
    vocabulary = tokenizer.get_vocab()
    for name in END_OF_TEXT:
        if name in vocabulary:
            return int(vocabulary[name])
    if tokenizer.eos_token_id is None:
        raise BadInput(
            f"the tokenizer has no token that ends a document: neither {' nor '.join(END_OF_TEXT)} nor an "
            "eos token. Set `eos_token` in its tokenizer_config.json."
        )
    return int(tokenizer.eos_token_id)
