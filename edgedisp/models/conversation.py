"""Conversations as a tokenizer's chat template writes them: for training, for questions, in an app.

What a template has no place for is written in messages that it can show (`ChatFormat`), the same way
everywhere. A prompt is always encoded as a whole and an answer on its own, so that a model meets the very ids
in training that it meets in use.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgedisp.core.errors import BadInput
from edgedisp.core.hub import one_line
from edgedisp.models.tokenizer import Message, bos_id, encode, render_all, render_conversation, special_tokens

USER, ANSWER = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Welcome"}
PROBE, RESULT = "probe_7", "result_7"  # no template writes them by itself
CALL = {"type": "function", "function": {"name": PROBE, "arguments": {PROBE: PROBE}}}
PARAMETERS = {"type": "object", "properties": {"key": {"type": "string", "description": "a key"}}}
TOOL = {"type": "function", "function": {"name": PROBE, "description": "a tool", "parameters": PARAMETERS}}
TOOLS_INTRODUCED = "You can call these functions. To call one, write its name and arguments as JSON."
FAMILIES = {"<|im_start|>": "ChatML", "<start_of_turn>": "Gemma's", "<|start_header_id|>": "Llama 3's"}
"""Special token -> the template that it is made for."""


@dataclass(frozen=True)
class ChatFormat:
    """Where a template shows tool calls, tools, a tool's message and a system message; `template`: in its own
    way, else in the text of another message."""

    tool_calls: Literal["template", "json"]
    tools: Literal["template", "system"]
    tool_role: Literal["template", "user"]
    system: Literal["template", "user"]

    def notes(self, conversations: Sequence[Any]) -> list[str]:
        """What the template has no place for, of what these have, and where it is written."""
        present = {"tools"} if any(conversation.tools for conversation in conversations) else set[str]()
        for message in (message for conversation in conversations for message in conversation.messages):
            roles = {"tool": "tool_role", "system": "system"}
            present |= {roles.get(message["role"], ""), "tool_calls" if "tool_calls" in message else ""}
        words = {
            "tool_calls": "tool calls are written as compact JSON in the answer",
            "tools": "tools are written as JSON in the system message",
            "tool_role": "a tool's message is written as a user's",
            "system": "a system message is written before the user's",
        }
        return [words[name] for name in words if name in present and getattr(self, name) != "template"]

    def messages(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[Message]:
        """Messages that the template can show."""
        visible: list[Message] = []
        if tools and self.tools == "system":
            lines = [TOOLS_INTRODUCED, *map(compact, tools)]
            if messages[0]["role"] == "system":
                lines, messages = [messages[0]["content"], *lines], messages[1:]
            visible.append({"role": "system", "content": "\n".join(lines)})
        for message in messages:
            if message.get("tool_calls") and self.tool_calls == "json":
                message = {"role": "assistant", "content": answer_text(self, message)}
            elif message["role"] == "tool" and self.tool_role == "user":
                message = {"role": "user", "content": message["content"]}
            visible.append(message)
        if self.system == "user" and visible[0]["role"] == "system" and len(visible) > 1:
            content = f"{visible[0]['content']}\n\n{visible[1]['content']}"
            visible = [{**visible[1], "content": content}, *visible[2:]]
        return visible


class Example(NamedTuple):
    """Token ids, and which of them training predicts: those of answers, with what ends them."""

    ids: NDArray[np.uint32]
    targets: NDArray[np.bool_]


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def answer_text(format: ChatFormat, message: Message) -> str:
    """What a model writes for an assistant's message: its content, and tool calls as compact JSON (an object,
    a list of several), which also stands for calls that the template writes its own way."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [{"name": call["name"], "arguments": call["arguments"]} for call in functions]
    texts = [message["content"]] if message["content"] else []
    return "\n".join(texts + [compact(calls[0] if len(calls) == 1 else calls)] * bool(calls))


def chat_format(tokenizer: Any) -> ChatFormat:
    """How the tokenizer's template treats what not every template has a place for. Raises BadInput where
    there is no template, saying which one would fit."""
    if not tokenizer.chat_template:
        known = [name for token, name in FAMILIES.items() if token in tokenizer.get_vocab()]
        fits = f"its tokens fit {known[0]}" if known else "the one of a tuned sibling fits"
        raise BadInput(
            f"{tokenizer.name_or_path or 'the tokenizer'}: the base has no chat template to write chats"
            f" with; {fits}: put it beside the base's tokenizer.json as chat_template.jinja, or take a tuned"
            " base."
        )
    return _probed(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _probed(tokenizer: Any, template: str) -> ChatFormat:
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    written = {"role": "assistant", "content": "{}"}
    result = {"role": "tool", "content": RESULT, "name": "key", "tool_call_id": "0"}
    system = {"role": "system", "content": RESULT}

    def count(probe: str, *messages: Message, tools: list[Any] | None = None) -> int:
        (text,) = render_all(tokenizer, [{"conversations": [[*messages]], "tools": tools}])
        return text.count(probe) if isinstance(text, str) else 0

    has_calls = count(PROBE, USER, calling) >= 3  # the name, a key, a value
    return ChatFormat(
        tool_calls="template" if has_calls else "json",
        tools="template" if count(PROBE, USER, tools=[TOOL]) else "system",
        tool_role="template" if count(RESULT, USER, calling if has_calls else written, result) else "user",
        system="template" if count(RESULT, system, USER) else "user",
    )


def _escaped(tokenizer: Any, value: Any) -> tuple[Any, int]:
    """A value of JSON with a space after the first character of each special token written in its texts, so
    that they are read as characters; and how many there were."""
    if isinstance(value, str):
        return special_tokens(tokenizer).subn(lambda match: f"{match[0][0]} {match[0][1:]}", value)
    if isinstance(value, dict):
        parts = {key: _escaped(tokenizer, part) for key, part in value.items()}
        return {key: part for key, (part, _) in parts.items()}, sum(count for _, count in parts.values())
    if isinstance(value, list | tuple):
        items = [_escaped(tokenizer, part) for part in value]
        return [part for part, _ in items], sum(count for _, count in items)
    return value, 0


def _request(
    format: ChatFormat, messages: Sequence[Message], tools: Sequence[Any] | None, is_prompt: bool
) -> dict[str, Any]:
    visible, tools = format.messages(messages, tools), tools if format.tools == "template" else None
    return {"conversations": [visible], "tools": tools, "add_generation_prompt": is_prompt}


def prompt_ids(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
    """What a model is given to answer a conversation.

    Without a template the contents are one text to continue, with BOS before it as `bos_id` has it. BadInput
    for a template that cannot be rendered.
    """
    if tokenizer.chat_template:
        request = _request(chat_format(tokenizer), _escaped(tokenizer, messages)[0], tools, True)
        text = render_conversation(tokenizer, request["conversations"][0], request["tools"])
        return encode(tokenizer, text)
    ids, bos = encode(tokenizer, "\n".join(message["content"] for message in messages)), bos_id(tokenizer)
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def end_of_turn_ids(tokenizer: Any) -> list[int]:
    """The tokens that end an answer: what the template writes after one, and the tokenizer's eos."""
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    if tokenizer.chat_template:
        text = render_conversation(tokenizer, [USER, ANSWER], add_generation_prompt=False)
        after = encode(tokenizer, text.rpartition(ANSWER["content"])[2])
        added = tokenizer.added_tokens_decoder
        ids = [token for token in after if token in added][:1] + ids
    return [*dict.fromkeys(ids)]


@dataclass(frozen=True)
class Answer:
    """The last answer of a conversation. messages: what the template is given to ask for it; answer_ids: with
    the token that ends it."""

    messages: list[Message]
    prompt: str
    prompt_ids: list[int]
    answer: str
    answer_ids: list[int]


def last_answers(tokenizer: Any, conversations: Sequence[Any]) -> list[Answer]:
    """The last answer of each conversation. Raises BadInput as `examples` does."""
    stops, answers = end_of_turn_ids(tokenizer), []
    for texts, _ in _rendered(tokenizer, conversations):
        messages, before, after = texts[-1]
        ids = _ended(encode(tokenizer, after), stops)
        text = tokenizer.decode([token for token in ids if token not in stops])
        answers.append(Answer(messages, before, encode(tokenizer, before), text, ids))
    return answers


def example(tokenizer: Any, conversation: Any) -> list[Example]:
    """The examples of one conversation; see `examples`."""
    return examples(tokenizer, [conversation])[0][0]


def examples(tokenizer: Any, conversations: Sequence[Any]) -> list[tuple[list[Example], int]]:
    """Of each conversation (data/chat.py) what training reads, and how many special tokens were escaped.

    One example has all answers, unless the template writes an answer differently once others follow (Qwen3
    drops its thoughts): then each answer has its own, after what the model is given to write it. BadInput,
    with the row's place, where the template fails.
    """
    stops = end_of_turn_ids(tokenizer)
    rendered = _rendered(tokenizer, conversations)
    return [(_examples_of(tokenizer, texts, stops), count) for texts, count in rendered]


Rendered = tuple[list[Message], str, str]
"""What the template is given to ask for an answer, the text of that, and the answer's text."""


def _rendered(tokenizer: Any, conversations: Sequence[Any]) -> list[tuple[list[Rendered], int]]:
    """Of each conversation its answers, and how many special tokens were escaped."""
    format, requests, escaped = chat_format(tokenizer), [], []
    for conversation in conversations:
        messages, count = _escaped(tokenizer, conversation.messages)
        escaped.append(count)
        for turn in conversation.answers:
            requests.append(_request(format, messages[:turn], conversation.tools, True))
            requests.append(_request(format, messages[: turn + 1], conversation.tools, False))
    texts = iter(zip(requests, render_all(tokenizer, requests)))
    results = []
    for conversation, count in zip(conversations, escaped):
        place, answers = conversation.place or f"conversation {conversation.id}", []
        for _ in conversation.answers:
            (request, before), (_, whole) = next(texts), next(texts)
            for text in (before, whole):
                if isinstance(text, ValueError):
                    raise BadInput(f"{place}: the chat template fails: {one_line(text)}")
            before, whole = str(before), str(whole)
            if not whole.startswith(before):
                raise BadInput(
                    f"{place}: the chat template writes the answer after something else than its generation "
                    f"prompt ({before[-40:]!r}), so training would not show what use asks for; mend it."
                )
            answers.append((request["conversations"][0], before, whole[len(before) :]))
        results.append((answers, count))
    return results


def _ended(answer: list[int], stops: Sequence[int]) -> list[int]:
    """An answer's ids up to and with the token that ends it, which a template may leave out."""
    end = next((index for index, token in enumerate(answer) if token in stops), None)
    return [*answer, *stops[:1]] if end is None else answer[: end + 1]


def _examples_of(tokenizer: Any, texts: Sequence[Rendered], stops: Sequence[int]) -> list[Example]:
    finished: list[tuple[list[int], list[bool]]] = []
    for _, before, after in texts:
        prompt, answer = encode(tokenizer, before), _ended(encode(tokenizer, after), stops)
        ids, targets = finished.pop() if finished else ([], [])
        if prompt[: len(ids)] != ids:
            finished.append((ids, targets))
            ids, targets = [], []
        targets = targets + [False] * (len(prompt) - len(ids)) + [True] * len(answer)
        finished.append((prompt + answer, targets))
    return [Example(np.array(ids, np.uint32), np.array(targets, bool)) for ids, targets in finished]
