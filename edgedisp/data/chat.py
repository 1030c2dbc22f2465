"""Rows of chat data -> conversations in one form, whatever form the rows have.

| form | keys of `data.train` |
|---|---|
| OpenAI: a list of {role, content, tool_calls}, perhaps the row's tools | messages (, tools) |
| ShareGPT: a list of {from, value} | messages |
| two fields, texts or lists of messages | prompt, completion |

Lists and arguments may be written as JSON text, as tables have them. Keys that hold null are left out: a
table of nested rows fills every row with the keys of all others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from edgedisp.core.errors import BadInput
from edgedisp.data.readers import Document, Row, check_pairs
from edgedisp.recipe import Source

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "developer": "system", "human": "user", "gpt": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function": "tool", "function_response": "tool",
}  # fmt: skip
"""Role of a row -> role of a message."""


@dataclass(frozen=True)
class Conversation(Document):
    """Messages {role: system | user | assistant | tool, content: text, perhaps tool_calls, tool_call_id and
    name}, and the functions that may be called. `text` is their canonical JSON; place: of the row."""

    messages: tuple[Message, ...] = field(default=(), compare=False)
    tools: Tools = field(default=None, compare=False)
    place: str = field(default="", compare=False)

    @classmethod
    def of(cls, name: str, messages: list[Message], tools: Tools = None) -> Conversation:
        """The conversation of that id; messages and tools in their one form."""
        content = {"messages": messages, "tools": tools}
        text = json.dumps(content, ensure_ascii=False, sort_keys=True, allow_nan=False)
        return cls(name, text, messages=tuple(messages), tools=tools)

    @property
    def answers(self) -> list[int]:
        """Which of the messages are the assistant's, to be learned."""
        roles = [(message["role"], message.get("weight")) for message in self.messages]
        return [index for index, role in enumerate(roles) if role == ("assistant", None)]

    @property
    def question(self) -> str:
        """What names the messages before the last answer: a row that asks the same gives its answer away."""
        before = self.messages[: self.answers[-1]]
        return " ".join(json.dumps(before, ensure_ascii=False, sort_keys=True).split())

    def without_oldest_turn(self) -> Conversation | None:
        """What remains without the first user's message and all up to the next; None: no answer would."""
        users = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
        if len(users) < 2 or self.answers[-1] < users[1]:
            return None
        messages = self.messages[: users[0]] + self.messages[users[1] :]
        return replace(
            Conversation.of(self.id, [*messages], self.tools), weight=self.weight, place=self.place
        )

    def row(self) -> dict[str, Any]:
        return {"id": self.id, "messages": [*self.messages], "tools": self.tools}


def conversation(row: Row, source: Source) -> Conversation:
    """The conversation of a row. Raises BadInput, with the row's place, for one that cannot be trained on."""

    def wrong(words: str) -> NoReturn:
        raise BadInput(f"{row.location}: {words}")

    record = row.value
    if not isinstance(record, dict):
        wrong(f"a conversation is an object with the field {source.fields[0]!r}, found {_kind(record)}.")
    for name in source.fields:
        if record.get(name) in (None, "", []):
            names = ", ".join(str(key) for key, value in record.items() if value is not None)
            what = f"{name!r} is empty" if name in record else f"no {name!r}"
            wrong(f"{what}, so there is no conversation (the row has: {names}; data.train names its fields).")
    if source.messages is not None:
        turns = _listed(record[source.messages], source.messages, wrong)
    else:
        prompt, completion = (record[name] for name in source.fields)
        turns = _turns(prompt, "user", wrong) + _turns(completion, "assistant", wrong)
    messages = [_message(turn, number, wrong) for number, turn in enumerate(turns, start=1)]
    _check_order(messages, wrong)
    name = source.tools or "tools"
    if source.tools is not None and name not in record:
        wrong(f"no field {name!r} with tools (fields: {', '.join(map(str, record))}).")
    tools = _tools(record.get(name), wrong)
    try:
        result = Conversation.of(row.id, messages, tools)
    except ValueError:
        wrong("holds NaN or Infinity, which JSON has not.")
    check_pairs(result.text, row.location)
    return Conversation(row.id, result.text, source.weight, result.messages, tools, row.location)


def _turns(value: Any, role: str, wrong: Callable[[str], NoReturn]) -> list[Any]:
    """A field of two: the messages it lists, or one message of its text."""
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _listed(value: Any, name: str, wrong: Callable[[str], NoReturn]) -> list[Any]:
    """A list that may be written as JSON text."""
    if isinstance(value, str):
        value = _parsed(value, f"{name!r} is a text that is no JSON", wrong)
    if not isinstance(value, list):
        wrong(f"{name!r} must be a list, found {_kind(value)}.")
    return value


def _parsed(text: str, words: str, wrong: Callable[[str], NoReturn]) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        wrong(f"{words} ({problem}): {text[:60]!r}.")


def _message(turn: Any, number: int, wrong: Callable[[str], NoReturn]) -> Message:
    if not isinstance(turn, dict):
        wrong(f"message {number} must be an object with role and content, found {_kind(turn)}.")
    turn = _without_nulls(turn)
    label = turn.get("role", turn.get("from"))
    role = ROLES.get(label) if isinstance(label, str) else None
    if role is None:
        wrong(f"message {number} has the role {label!r}; roles are {', '.join(ROLES)}.")
    content, old_call = turn.get("content", turn.get("value")), turn.get("function_call")
    calls = turn.get("tool_calls") or ([] if old_call is None else [old_call])
    if label == "function_call":
        calls, content = [content], None
    parts = content if isinstance(content, list) else []
    if parts and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        content = "".join(part["text"] for part in parts)
    elif role == "tool" and isinstance(content, dict | list):
        content = json.dumps(content, ensure_ascii=False)  # what a function returned
    elif parts:
        wrong(f"message {number} holds parts that are no text, which a language model cannot read.")
    if content is None and not calls:
        wrong(f"message {number} ({role}) has no content: null is for an answer with tool_calls.")
    if not isinstance(content, str | None):
        wrong(f"message {number}: content must be text, found {_kind(content)}.")
    message: Message = {"role": role, "content": content or ""}
    if calls:
        if role != "assistant":
            wrong(f"message {number} ({role}): tool_calls belong to an assistant's message.")
        message["tool_calls"] = [_call(call, number, wrong) for call in _listed(calls, "tool_calls", wrong)]
    not_learned = {"weight": 0} if role == "assistant" and turn.get("weight") == 0 else {}  # as OpenAI has it
    return message | not_learned | {key: str(turn[key]) for key in ("tool_call_id", "name") if key in turn}


def _call(call: Any, number: int, wrong: Callable[[str], NoReturn]) -> dict[str, Any]:
    """A tool call in OpenAI's form, from that form or {name, arguments}, each perhaps as JSON text."""
    words = f"message {number}: a tool call is no JSON"
    if isinstance(call, str):
        call = _parsed(call, words, wrong)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        wrong(f"message {number}: a tool call needs a name and arguments, found {str(call)[:60]!r}.")
    arguments = function.get("arguments", function.get("parameters", {}))
    if isinstance(arguments, str):
        arguments = _parsed(arguments or "{}", f"{words} in its arguments", wrong)
    if not isinstance(arguments, dict):
        wrong(f"message {number}: the arguments of a tool call are an object, found {_kind(arguments)}.")
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(value: Any, wrong: Callable[[str], NoReturn]) -> Tools:
    """The functions that may be called, in OpenAI's form; None where there are none."""
    if value in (None, "", []):
        return None
    tools = []
    for tool in _listed(value, "tools", wrong):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            wrong(f"a tool needs a name, description and parameters, found {str(tool)[:60]!r}.")
        tools.append({"type": "function", "function": _without_nulls(function)})
    return tools


def _check_order(messages: list[Message], wrong: Callable[[str], NoReturn]) -> None:
    roles = ["context" if "weight" in message else message["role"] for message in messages]
    if "assistant" not in roles:
        wrong("no message of the assistant, so there is no answer to learn.")
    if "user" not in roles[: roles.index("assistant")]:
        wrong("the assistant's message comes first, and answers nothing; a user's belongs before it.")


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
