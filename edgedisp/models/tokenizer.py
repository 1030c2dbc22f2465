"""Tokenizers, opened and checked; texts and conversations -> token ids; what stands around a document.

The text of a document is text: `<|endoftext|>` written in it is thirteen characters and ends no document.
Only a text that begins with another special token, or as the chat template begins, holds tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedisp.core.errors import BadInput
from edgedisp.core.hub import one_line, quiet
from edgedisp.core.progress import warn
from edgedisp.models.chat_template import RENDERER

SETTINGS: dict[str, Any] = {
    "dtype": "float32", "torch_dtype": "float32", "attn_implementation": None, "use_cache": True,
    "return_dict": True, "output_attentions": False, "output_hidden_states": False,
}  # fmt: skip
"""In the place of what a machine or a script chose and left in config.json."""
MESSAGE = {"role": "user", "content": "Hello"}
RAISED = ": TemplateError: "  # by `raise_exception` in a template; mistakes of syntax have other types

# Chat models end a TURN with their eos token; what ended a document in pre-training has one of these names.
# SmolLM2: <|endoftext|> is id 0 while eos is <|im_end|>. Llama 3: <|end_of_text|>, eos <|eot_id|>.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")
PIECE = 2**20  # characters encoded at a time: a text of 43 MB as a whole took 6 GB
_OVERLAP = 64  # characters before a piece that are encoded with it
_WORD_END = re.compile(r"\w(?=[ 。，、][^\W\d_])")  # no tokenizer has tokens across
# verbose=False: no warning that a text is longer than the context; it will be cut into blocks.
_PLAIN = {"add_special_tokens": False, "verbose": False}

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}; an assistant's may have tool_calls."""


class TemplateError(BadInput):
    """The template refuses the conversation, or is no valid template."""


def load_tokenizer(path: Path, trust_remote_code: bool = False, vocab_size: int | None = None) -> Any:
    """The tokenizer of a folder or a .gguf file. vocab_size: rows of the embedding; None: of config.json.

    Truncation, padding and dropout, which training scripts leave in tokenizer.json, are switched off with a
    line on stderr. Raises BadInput if there is none or a damaged one, for ids without a row in the embedding,
    and for a chat template that shows nothing of a message.
    """
    from transformers import AutoTokenizer

    folder, options = opened_as(path, trust_remote_code)
    if (path / "config.json").is_file():
        options["config"] = read_config(path, trust_remote_code)
        vocab_size = vocab_size or rows_of(options["config"])
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            if tokenizer.is_fast:
                _switch_off(tokenizer.backend_tokenizer, path)
            marked = tokenizer("a")["input_ids"]  # with what a post-processor adds
        except Exception as problem:  # what transformers raises over a damaged file has no common type
            raise BadInput(f"{path}: no usable tokenizer: {_reason(folder, problem)}") from problem
    if vocab_size is not None:
        ids = tokenizer.get_vocab() | {f"id {index}": index for index in marked}
        outside = [token for token, index in ids.items() if index >= vocab_size]
        if outside:
            raise BadInput(
                f"{path}: {len(outside)} tokens of the tokenizer have no row in the model's embedding of "
                f"{vocab_size} rows: {', '.join(sorted(outside)[:4])}. Call "
                "`model.resize_token_embeddings(len(tokenizer))` and save the model, or remove the tokens."
            )
    _check_template(tokenizer, path)
    return tokenizer


def opened_as(path: Path, trust_remote_code: bool) -> tuple[Path, dict[str, Any]]:
    """Folder and options with which transformers opens a model folder or a .gguf file."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    return (path.parent, options | {"gguf_file": path.name}) if path.is_file() else (path, options)


def read_config(path: Path, trust_remote_code: bool = False) -> Any:
    """The configuration of a folder or a .gguf file under SETTINGS. BadInput for a damaged one."""
    from transformers import AutoConfig

    folder, options = opened_as(path, trust_remote_code)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, **options, **SETTINGS)
        except Exception as problem:
            what = "config.json cannot be used" if path == folder else "the .gguf file cannot be opened"
            raise BadInput(f"{path}: {what}: {one_line(problem)}") from problem
    config._attn_implementation = None  # an older name in the file
    return config


def rows_of(config: Any) -> int | None:
    """Rows of the embedding; None where the configuration does not say."""
    return getattr(config.get_text_config(), "vocab_size", None)


def _switch_off(backend: Any, path: Path) -> None:
    active = [kind for kind in ("truncation", "padding") if getattr(backend, kind) is not None]
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):  # of merges, at random
        active.append("dropout")
        backend.model.dropout = None
    if active:
        warn(f"{path}: {' and '.join(active)} in tokenizer.json switched off: texts stay as they are")


def _check_template(tokenizer: Any, path: Path) -> None:
    """Refuse a template that is not whole. One that refuses a lone message by words of its own may stay."""
    templates = tokenizer.chat_template
    if templates is None or (isinstance(templates, dict) and "default" not in templates):
        return
    try:
        text = render_conversation(tokenizer, [MESSAGE])
    except TemplateError as error:
        if RAISED in str(error):
            return
        raise
    if MESSAGE["content"] not in text:
        raise BadInput(f"{path}: its chat template shows nothing of a message. Mend it, or remove it.")


def _reason(folder: Path, problem: Exception) -> str:
    """Why a folder has no usable tokenizer, and what would work."""
    if (folder / "tokenizer.json").is_file():
        return f"{one_line(problem)}. Copy its files from the original model again."
    pieces = [file.name for file in folder.glob("*.model") if file.read_bytes()[:1] == b"\n"]
    if pieces and find_spec("sentencepiece") is None:
        return f"{pieces[0]} is a SentencePiece file, which takes `pip install sentencepiece protobuf`."
    return f"{one_line(problem)}. Put tokenizer.json beside the weights: `tokenizer.save_pretrained(folder)`."


def encode(tokenizer: Any, text: str, split_special_tokens: bool = False) -> list[int]:
    """Token ids of a text, no special tokens around it; with `split_special_tokens` none within it either."""
    return [token for piece in _pieces(tokenizer, text, split_special_tokens) for token in piece]


def _pieces(tokenizer: Any, text: str, split_special_tokens: bool) -> Iterator[list[int]]:
    """The ids of a text, of about PIECE characters at a time."""

    def ids(part: str) -> list[int]:
        return list(tokenizer(part, split_special_tokens=split_special_tokens, **_PLAIN)["input_ids"])

    start, before = 0, ""
    while len(text) - start > PIECE:
        end = start + PIECE
        word_ends = [match.end() for match in _WORD_END.finditer(text, end - PIECE // 16, end)]
        end = word_ends[-1] if word_ends else end
        yield ids(before + text[start:end])[len(ids(before)) :]
        # Encoded with the next piece: a tokenizer may treat the start of a text in a way of its own.
        start, before = end, text[max(0, end - _OVERLAP) : end]
    last = ids(before + text[start:])
    yield last[len(ids(before)) :] if before else last


def render_conversation(
    tokenizer: Any,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The text of a conversation by the tokenizer's template.

    Raises TemplateError; other BadInput for a template that is no text or does not end.
    """
    request = {"conversations": [list(messages)], "add_generation_prompt": add_generation_prompt}
    (text,) = render_all(tokenizer, [request | {"tools": tools}])
    if isinstance(text, ValueError):
        place = f"{tokenizer.name_or_path or 'the tokenizer'}: its chat template cannot be used"
        raise TemplateError(f"{place}: {one_line(text)}. Mend it, or remove chat_template") from text
    return text


def render_all(tokenizer: Any, requests: Sequence[dict[str, Any]]) -> list[str | ValueError]:
    """The texts of many conversations, or why the template gives none; requests: `conversations` of one, and
    what else transformers' `render_jinja_template` takes. BadInput for a template that does not end."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        return [error] * len(requests)
    if not isinstance(template, str):
        return [ValueError("it is no text")] * len(requests)
    try:
        return RENDERER.render_all(requests, chat_template=template, **tokenizer.special_tokens_map)
    except TimeoutError as error:
        place = f"{tokenizer.name_or_path or 'the tokenizer'}: its chat template cannot be used"
        raise BadInput(f"{place}: {error}. Mend it, or remove chat_template") from error


def document_encoder(tokenizer: Any) -> Callable[[Sequence[str]], list[NDArray[np.uint32]]]:
    """Texts of documents -> token ids of each: BOS (where the tokenizer has one), text, end-of-text.

    No BOS is added to a text that begins with it, as one rendered by a chat template does, nor where it is
    the end-of-text token itself (OPT).
    """
    bos, end_of_text = bos_id(tokenizer), end_of_text_id(tokenizer)
    start = [] if bos is None or bos == end_of_text else [bos]
    is_rendered = rendered_by(tokenizer)

    def document(pieces: Iterable[list[int]]) -> NDArray[np.uint32]:
        ids = np.concatenate([np.array(piece, np.uint32) for piece in pieces])
        first = [] if ids[:1].tolist() == start else start
        return np.concatenate([np.array(first, np.uint32), ids, np.array([end_of_text], np.uint32)])

    def encode_documents(texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        rows: list[NDArray[np.uint32]] = []
        for (rendered, is_long), group in groupby(texts, lambda text: (is_rendered(text), len(text) > PIECE)):
            if is_long:
                rows += [document(_pieces(tokenizer, text, not rendered)) for text in group]
            else:  # together, on all cores
                ids = tokenizer([*group], split_special_tokens=not rendered, **_PLAIN)["input_ids"]
                rows += [document([row]) for row in ids]
        return rows

    return encode_documents


def rendered_by(tokenizer: Any) -> Callable[[str], bool]:
    """Whether a chat template rendered a text: it begins with a special token, but not with end-of-text, or
    as the tokenizer's own template begins (TinyLlama's <|user|> is no special token)."""
    special = {
        index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    first = {*special.values()}
    for role in ("user", "system") if getattr(tokenizer, "chat_template", None) else ():
        with suppress(TemplateError):
            text = render_conversation(tokenizer, [{**MESSAGE, "role": role}])
            first.add(text.partition(MESSAGE["content"])[0].strip())
    begins = tuple(first - {"", special.get(end_of_text_id(tokenizer))})
    return lambda text: text.startswith(begins)


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """What finds the special tokens that are written in a text."""
    contents = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))) or "(?!)")


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
