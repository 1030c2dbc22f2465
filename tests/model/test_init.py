"""`edgedisp init`: a recipe from a user's chat rows, and what it says of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_build import Command

from edgedisp import models
from edgedisp.core.errors import BadInput
from edgedisp.data import read_documents
from edgedisp.recipe import load

CALL = {"type": "function", "function": {"name": "turn_on", "arguments": {"name": "lamp"}}}
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_the_recipe_fits_the_rows_and_what_is_said_names_each_fault(
    tmp_path: Path, tiny_folder: Mapping[str, Path], edgedisp: Command
) -> None:
    answer, rows = {"role": "assistant", "content": None, "tool_calls": [CALL]}, []
    for number in range(240):
        question = {"role": "user", "content": f"lamp {'very ' * (number % 7)}on {number}"}
        rows.append({"messages": [question, answer], "metadata": "train"})
    rows[6], rows[8] = {"messages": [{**USER, "role": "wizard"}, answer]}, rows[7]
    path, out = write(tmp_path / "rows.jsonl", rows), tmp_path / "my lamp.yaml"
    ended = edgedisp("init", "--chat", path, "--base", tiny_folder["llama"], "--out", out)
    lines = dict(line.split(maxsplit=1) for line in ended.out.splitlines() if "template" not in line)
    assert lines["rows"] == "239, different 238; with faults 1"
    assert lines["fields"] == "messages: messages; not read: metadata"
    assert lines["roles"] == "user 239, assistant 239" and lines["tools"] == "0 offered; called: turn_on 239"
    assert lines["fault"].startswith(f"{path}:7: message 1 has the role 'wizard'")
    recipe = load(out)
    tokenizer, (source,) = models.load_tokenizer(tiny_folder["llama"]), recipe.data.train
    assert (recipe.name, recipe.model.architecture, source.source) == ("my_lamp", "llama", str(path))
    with pytest.raises(BadInput, match=re.escape(lines["fault"])):
        read_documents(path, source)
    write(path, rows[:6] + rows[7:])
    planned = edgedisp("plan", out, "--no-probe")
    assert planned.code == 0 and "238 documents" in planned.out
    longest = max(len(parts[0].ids) for parts, _ in models.examples(tokenizer, read_documents(path, source)))
    assert f"{longest} at most" in lines["tokens"]
    assert longest <= recipe.data.context < max(257, longest + 64)


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "conversations",
        ),
        ({"chat": json.dumps([USER, ANSWER]), "tools": "[]"}, "chat"),
        ({"instruction": "a", "input": "1", "output": "b"}, ("instruction", "output")),
        ({"prompt": [USER], "completion": [ANSWER]}, ("prompt", "completion")),
        ({"prompt": "topic", "completion": "all", "messages": [USER, ANSWER]}, "messages"),
        ({"text": "plain", "label": 1}, None),
    ],
)
def test_the_form_is_found_and_nothing_is_overwritten(
    row: Any, keys: Any, tmp_path: Path, edgedisp: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgedisp.core.hub.unreachable", lambda: "offline")
    path, out = write(tmp_path / "a.jsonl", [row] * 3), tmp_path / "recipe.yaml"
    words = ("init", "--chat", path, "--base", "some/base", "--out", out)
    ended = edgedisp(*words)
    if keys is None:
        assert ended.code == 2 and f"{path}: holds no chat rows (fields: text, label)" in ended.err
        return
    assert ended.code == 0 and "tokens are guessed from characters (some/base: the hub cannot" in ended.out
    (source,) = load(out).data.train
    assert keys in (source.messages, (source.prompt, source.completion))
    out.write_text("mine", encoding="utf-8")
    assert edgedisp(*words).code == 2 and out.read_text() == "mine"
    assert edgedisp(*words, "--force").code == 0 and out.read_text() != "mine"
