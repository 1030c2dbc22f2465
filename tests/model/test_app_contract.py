"""app.json holds what an app needs, in the form that the model's template takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from graph_twins import TwinStore

from edgedisp.core.errors import BadInput
from edgedisp.graph.app_contract import write_app
from edgedisp.graph.session import OnnxModel
from edgedisp.graph.verify import check_bundle
from edgedisp.models import load_tokenizer
from edgedisp.models.tiny_model import CHAT_TEMPLATE

TOOL = {"type": "function", "function": {"name": "turn_on", "parameters": {"type": "object"}}}
CHAT = {"system": "Be brief.", "tools": [TOOL]}
TOOLS_SHOWN = "{% if tools %}{{ tools | tojson }}{% endif %}"
CALLS_SHOWN = CHAT_TEMPLATE.replace(
    "message['content']",
    "message['content'] + (message.tool_calls[0].function.name + (message.tool_calls[0].function.arguments"
    " | tojson) if message.tool_calls else '')",
)


@pytest.mark.parametrize(("template", "tools", "tool_calls"), [
    (CHAT_TEMPLATE, None, "json"),
    (TOOLS_SHOWN + CALLS_SHOWN, [TOOL], "template"),
])  # fmt: skip
def test_tools_stand_where_the_template_has_a_place_and_the_build_checks_it(
    template: str, tools: Any, tool_calls: str, twins: TwinStore, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(twins.fp32("llama"), bundle)
    (bundle / "chat_template.jinja").write_text(template)

    def written(chat: Any) -> Any:
        write_app(bundle, chat, 100)
        return json.loads((bundle / "app.json").read_text())

    app = written(CHAT)
    assert app["tools"] == tools and app["tool_calls"] == tool_calls and app["max_new_tokens"] == 50
    assert app["system"].startswith("Be brief.") and ('"turn_on"' in app["system"]) == (tools is None)
    assert app["stop"] == {"ids": [0, 2], "tokens": ["<|endoftext|>", "<|im_end|>"]}
    assert written(app) == app  # as when a bundle is packed for a device
    prompt = [{"role": "system", "content": app["system"]}, {"role": "user", "content": "Hello"}]
    tokenizer = load_tokenizer(bundle)
    ids = tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True)["input_ids"]
    assert app["example"]["messages"] == prompt and app["example"]["prompt_ids"] == ids
    agrees = check_bundle(OnnxModel(bundle, 1), [[5, 6, 7]])["genai"]
    assert agrees["example"] == f"{len(ids)}/{len(ids)}"


def test_an_example_without_ids_is_one_line(twins: TwinStore, tmp_path: Path) -> None:
    shutil.copytree(twins.fp32("llama"), tmp_path / "bundle")
    (tmp_path / "bundle" / "app.json").write_text('{"example": {"messages": []}}')
    with pytest.raises(BadInput, match=r"app.json: example"):
        check_bundle(OnnxModel(tmp_path / "bundle", 1), [[5, 6, 7]])
