"""Texts and conversations -> token ids, and the tokens before and after a document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.core.hub import one_line
from edgedisp.models.chat_template import RENDERER

# Chat models end a TURN with their eos token; what ended a document in pre-training has one of these names.
# SmolLM2: <|endoftext|> is id 0 while eos is <|im_end|>. Llama 3: <|end_of_text|>, eos <|eot_id|>.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""


class TemplateError(BadInput):
    """The template refuses the conversation, or is no valid template."""


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text without special tokens around them."""
    # verbose=False: no warning that a text is longer than the context; it will be cut into blocks.
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def render_conversation(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The text of a conversation by the tokenizer's template, with its generation prompt.

    Raises TemplateError; other BadInput for a template that is no text or does not end.
    """
    place = f"{tokenizer.name_or_path or 'the tokenizer'}: its chat template cannot be used"
    try:
        template = tokenizer.get_chat_template()
        if not isinstance(template, str):
            raise BadInput(f"{place}: it is no text. Mend it, or remove chat_template")
        return RENDERER.render(
            **tokenizer.special_tokens_map,
            conversations=[list(messages)],
            chat_template=template,
            add_generation_prompt=True,
        )
    except ValueError as error:
        raise TemplateError(f"{place}: {one_line(error)}. Mend it, or remove chat_template") from error
    except TimeoutError as error:
        raise BadInput(f"{place}: {error}. Mend it, or remove chat_template") from error


def check_template(tokenizer: Any) -> None:
    """BadInput for a chat template that is no text or does not end; one may refuse what it does not know."""
    if tokenizer.chat_template:
        with suppress(TemplateError):
            render_conversation(tokenizer, [{"role": "user", "content": "Hello."}])


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """What a model is given to answer a conversation: the ids of transformers' `apply_chat_template`.

    Without a template the contents are one text to continue, with BOS before it as `bos_id` has it. BadInput
    for a template that cannot be rendered.
    """
    if tokenizer.chat_template:
        return encode(tokenizer, render_conversation(tokenizer, messages))
    ids, bos = encode(tokenizer, "\n".join(message["content"] for message in messages)), bos_id(tokenizer)
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def document_encoder(tokenizer: Any) -> Callable[[Sequence[str]], list[list[int]]]:
    """Texts of documents -> token ids of each: BOS (where the tokenizer has one), text, end-of-text.

    No BOS is added to a text that begins with it, as one rendered by a chat template does, nor where it is
    the end-of-text token itself (OPT).
    """
    bos, end_of_text = bos_id(tokenizer), end_of_text_id(tokenizer)
    start = [] if bos is None or bos == end_of_text else [bos]

    def encode_documents(texts: Sequence[str]) -> list[list[int]]:
        rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [[*(start if row[:1] != start else []), *row, end_of_text] for row in rows]

    return encode_documents


def bos_id(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text, or None.

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
    token = next((vocabulary[name] for name in END_OF_TEXT if name in vocabulary), tokenizer.eos_token_id)
    if token is None:
        raise BadInput(
            f"the tokenizer has no token that ends a document: neither {' nor '.join(END_OF_TEXT)} nor an "
            "eos token. Set `eos_token` in its tokenizer_config.json."
        )
    return int(token)
