"""Text to token ids: what stands before and behind a document, and what a tokenizer may not do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers.normalizers import Prepend
from tokenizers.processors import TemplateProcessing

from edgedisp.core.errors import BadInput
from edgedisp.data import synthetic_documents
from edgedisp.evaluate.loglikelihood import TextTokenizer
from edgedisp.models import bos_id, document_encoder, encode, end_of_text_id, load_tokenizer

TEXTS = [document.text for document in synthetic_documents(120, seed=0)]


def tokenizer_with(vocabulary: dict[str, int], eos: int | None) -> Any:
    return SimpleNamespace(get_vocab=lambda: vocabulary, eos_token_id=eos)


def test_a_document_ends_with_endoftext_where_there_is_one_else_with_eos() -> None:
    # SmolLM2: <|endoftext|> is 0, while eos ends a turn. Llama 3 calls it otherwise. Gemma has only eos.
    assert end_of_text_id(tokenizer_with({"<|endoftext|>": 0, "<|im_end|>": 2}, eos=2)) == 0
    assert end_of_text_id(tokenizer_with({"<|end_of_text|>": 5, "<|eot_id|>": 9}, eos=9)) == 5
    assert end_of_text_id(tokenizer_with({"<eos>": 1}, eos=1)) == 1
    with pytest.raises(BadInput, match="no token that ends a document"):
        end_of_text_id(tokenizer_with({"a": 0}, eos=None))


def documents(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in document_encoder(tokenizer)(texts)]


def test_a_document_begins_with_the_token_that_its_tokenizer_puts_before_a_text(
    tiny_folder: dict[str, Path],
) -> None:
    # Gemma, Llama 3 and Mistral; OPT's is the token that also ends a document, so none is put twice.
    tokenizer = load_tokenizer(tiny_folder["llama"])
    plain, end = encode(tokenizer, TEXTS[0]), end_of_text_id(tokenizer)
    assert bos_id(tokenizer) is None
    assert documents(tokenizer, TEXTS[:1]) == [[*plain, end]]
    for name in ("<|im_start|>", "<|endoftext|>"):
        token = tokenizer.convert_tokens_to_ids(name)
        start = [] if token == end else [token]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{name} $A", None, [(name, token)])
        assert bos_id(tokenizer) == token
        first, second = documents(tokenizer, [TEXTS[0], f"{name}user"])
        assert first == [*start, *plain, end]
        assert second[:2] != [token, token]  # a chat template writes the token itself: no second one
        assert encode(tokenizer, TEXTS[0]) == plain


def test_special_tokens_in_a_text_are_characters_unless_a_chat_template_rendered_it(
    tiny_folder: dict[str, Path],
) -> None:
    tokenizer = load_tokenizer(tiny_folder["llama"])
    end, turn = end_of_text_id(tokenizer), tokenizer.convert_tokens_to_ids("<|im_start|>")
    plain = ["a<|endoftext|>b", "<|endoftext|>b", "b<|im_start|>"]
    for text, ids in zip(plain, documents(tokenizer, plain), strict=True):
        assert ids.index(end) == len(ids) - 1 and turn not in ids
        assert tokenizer.decode(ids[:-1]) == text
    rendered = "<|im_start|>user\nHello"
    assert documents(tokenizer, [*plain, rendered])[3] == [*encode(tokenizer, rendered), end]
    assert encode(tokenizer, rendered)[0] == turn
    reader = TextTokenizer(tokenizer)
    assert [reader.is_rendered(text) for text in [*plain, rendered]] == [False] * 3 + [True]
    assert reader.encode(plain[0], split_special_tokens=True) == documents(tokenizer, plain)[0][:-1]


@pytest.mark.parametrize("prefix", ["", "▁"])
def test_a_long_text_is_encoded_in_pieces_to_the_same_tokens(
    tiny_folder: dict[str, Path], monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    tokenizer = load_tokenizer(tiny_folder["llama"])
    if prefix:  # as the tokenizers of Llama 2 and Mistral
        tokenizer.backend_tokenizer.normalizer = Prepend(prefix)
    texts = [" ".join(TEXTS[:20]), "字" * 2500, TEXTS[0]]
    whole = documents(tokenizer, texts)
    monkeypatch.setattr("edgedisp.models.tokenizer.PIECE", 1000)
    assert documents(tokenizer, texts) == whole
    assert encode(tokenizer, texts[0]) == whole[0][:-1]


def test_encoding_adds_and_cuts_nothing(tiny_folder: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tiny_folder["llama"])
    for text in ("", " ".join(TEXTS)):  # far longer than the model's context
        assert tokenizer.decode(encode(tokenizer, text)) == text
