"""`app.json`: what an app must know to talk to a bundle as the model was trained. docs/phone_app.md says
what each key means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedisp import models
from edgedisp.core.files import APP, read_json, write_json
from edgedisp.graph.genai_config import LENGTHS, end_ids

FORMAT = 1
ESCAPE = (
    "put a space after the first character of each special token that is written in a message's content; "
    "special tokens are the added_tokens of tokenizer.json with special: true, longer ones first"
)
GREETING: list[models.Message] = [{"role": "user", "content": "Hello"}]


def max_new_tokens(context: int) -> int:
    """Most tokens of an answer where nobody says how many: 256, or half of a small context."""
    return max(1, min(256, context // 2))


def write_app(folder: Path, chat: Mapping[str, Any], context: int | None = None) -> None:
    """Write app.json beside a model or a bundle.

    chat: {system, tools, example} of the conversations that the model was trained on, or an earlier app.json;
    empty where there is neither: then the example is what the template makes of a greeting. Tools that the
    template has no place for become part of the system message. context None: the model's own.
    """
    tokenizer, stop = models.load_tokenizer(folder), end_ids(folder)
    config = read_json(folder / "config.json")
    context = context or next((config[name] for name in LENGTHS if isinstance(config.get(name), int)), 0)
    app: dict[str, Any] = {"format": FORMAT, "context": context}
    app |= {"max_new_tokens": max_new_tokens(context), "template": None, "escape": ESCAPE}
    app["stop"] = {"ids": stop, "tokens": tokenizer.convert_ids_to_tokens(stop)}
    app |= {"system": chat.get("system"), "system_role": "system", "tools": None, "tool_calls": "json"}
    app["example"] = None
    if tokenizer.chat_template:
        app |= {"template": "chat_template.jinja", **_conversations(tokenizer, chat)}
    write_json(folder / APP, app)


def _conversations(tokenizer: Any, chat: Mapping[str, Any]) -> dict[str, Any]:
    """What depends on the template."""
    format, system, tools = models.chat_format(tokenizer), chat.get("system"), chat.get("tools")
    messages = [{"role": "system", "content": system}, *GREETING] if system else GREETING
    greeting = format.messages(messages, tools)
    if tools and format.tools == "system":
        system, tools = replace(format, system="template").messages(messages, tools)[0]["content"], None
    example = chat.get("example") or _greeting(tokenizer, greeting, tools)
    return {
        "system": system,
        "system_role": "system" if format.system == "template" else "user",
        "tools": tools,
        "tool_calls": format.tool_calls,
        "example": example and {"tools": tools, **example},
    }


def _greeting(tokenizer: Any, messages: list[models.Message], tools: Any) -> dict[str, Any] | None:
    """None where the template refuses a lone greeting."""
    try:
        prompt = models.render_conversation(tokenizer, messages, tools)
    except models.TemplateError:
        return None
    ids = models.encode(tokenizer, prompt)
    return {"messages": messages, "prompt": prompt, "prompt_ids": ids, "answer": None, "answer_ids": None}
