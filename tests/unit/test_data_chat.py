"""Conversations from rows of every form, and the one line that says what is wrong with a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgedisp.core.errors import BadInput
from edgedisp.data import Conversation, read_documents, split
from edgedisp.recipe import Source

CALL = {"type": "function", "function": {"name": "turn_on", "arguments": {"area": "hall"}}}
ASKED = [{"role": "user", "content": "light"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
TOOL = {"type": "function", "function": {"name": "turn_on", "description": "switch"}}


def read(path: Path, rows: list[Any], **fields: Any) -> Any:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return read_documents(path, Source(source=str(path), **fields))


def test_all_forms_of_a_conversation_become_the_same(tmp_path: Path) -> None:
    flat = {"name": "turn_on", "arguments": '{"area": "hall"}'}
    spread = {"function": {"name": "turn_on", "arguments": {"area": "hall", "floor": None}}}
    asks = {"role": "user", "content": [{"type": "text", "text": "light"}]}
    shared = {"from": "human", "value": "light"}
    rows = [
        {"m": ASKED, "tools": [TOOL]},
        {"m": json.dumps(ASKED), "tools": json.dumps([TOOL["function"]])},
        {"m": [asks, {"role": "assistant", "content": None, "tool_calls": [spread]}], "tools": [TOOL]},
        {"m": [shared, {"from": "function_call", "value": json.dumps(flat)}], "tools": [TOOL]},
        {"m": [ASKED[0], {"role": "assistant", "content": None, "function_call": flat}], "tools": [TOOL]},
        {"m": [ASKED[0], {"role": "assistant", "tool_calls": json.dumps([flat])}], "tools": [TOOL]},
    ]
    for number, document in enumerate(read(tmp_path / "a.jsonl", rows, messages="m"), start=1):
        assert [*document.messages] == ASKED and document.tools == [TOOL]
        assert document.place.endswith(f"a.jsonl:{number}")
        stored = document.row()
        assert Conversation.of("x", stored["messages"], stored["tools"]).text == document.text
    pairs = read(tmp_path / "b.jsonl", [{"q": "light", "a": "on"}], prompt="q", completion="a", weight=2.5)
    texts = [{"role": "user", "content": "light"}, {"role": "assistant", "content": "on"}]
    assert [*pairs[0].messages] == texts and pairs[0].tools is None and pairs[0].weight == 2.5
    (tmp_path / "c.csv").write_text('m,tools\n"' + json.dumps(texts).replace('"', '""') + '",\n')
    (table,) = read_documents(tmp_path / "c.csv", Source(source="c.csv", messages="m"))
    assert table.text == pairs[0].text
    import pyarrow
    import pyarrow.parquet

    columns = pyarrow.Table.from_pylist([rows[0], {"m": texts, "tools": None}])
    pyarrow.parquet.write_table(columns, tmp_path / "d.parquet")
    documents: Any = read_documents(tmp_path / "d.parquet", Source(source="d", messages="m"))
    assert [[*document.messages] for document in documents] == [ASKED, texts]
    train, heldout = split(documents, 0.5, seed=0)
    assert {type(document) for document in [*train, *heldout]} == {Conversation}


USER = {"role": "user", "content": "hi"}


def answered(**message: Any) -> dict[str, Any]:
    return {"m": [USER, {"role": "assistant", **message}]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "hi"}, r"no 'm', so there is no conversation \(the row has: text; "),
        ({"m": []}, "'m' is empty"),
        ({"m": "hi"}, "'m' is a text that is no JSON"),
        ({"m": [{"role": "boss", "content": "hi"}]}, "message 1 has the role 'boss'; roles are system, user"),
        ({"m": [USER]}, "no message of the assistant"),
        ({"m": [{"role": "assistant", "content": "hi"}, USER]}, "the assistant's message comes first"),
        (answered(content=None), r"message 2 \(assistant\) has no content: null is for"),
        (answered(content=3), "message 2: content must be text, found int"),
        (answered(content=[{"type": "image"}]), "message 2 holds parts that are no text"),
        (answered(tool_calls=["{turn_on"]), "message 2: a tool call is no JSON .*'{turn_on'"),
        (
            answered(tool_calls=[{"name": "f", "arguments": "{a}"}]),
            "message 2: a tool call is no JSON in its arguments",
        ),
        (answered(tool_calls=[{"arguments": {}}]), "message 2: a tool call needs a name"),
        ({**answered(content="x"), "tools": [{"name": 3}]}, "a tool needs a name"),
        (answered(content="\ud800"), "holds half of a surrogate pair"),
        (answered(tool_calls=[{"name": "f", "arguments": {"x": float("inf")}}]), "holds NaN or Infinity"),
        ([], "a conversation is an object with the field 'm', found list"),
    ],
)
def test_a_faulty_row_is_refused_with_its_place(tmp_path: Path, row: Any, words: str) -> None:
    with pytest.raises(BadInput, match=f"a.jsonl:2: {words}") as refusal:
        read(tmp_path / "a.jsonl", [answered(content="x"), row], messages="m")
    assert "\n" not in str(refusal.value)


def test_a_result_is_json_text_and_rows_with_a_blank_answer_are_dropped(tmp_path: Path) -> None:
    result = {"role": "tool", "content": {"on": [1, {"level": 2}]}}
    rows = [
        {"m": [USER, result, {"role": "assistant", "content": "on"}]},
        answered(content=" "),
        answered(content="x"),
    ]
    documents = read(tmp_path / "a.jsonl", rows, messages="m")
    assert documents[0].messages[1] == {"role": "tool", "content": '{"on": [1, {"level": 2}]}'}
    assert len(documents) == 2 and documents.counts()["dropped"] == {"blank": 1}
    turns = [
        USER,
        {"role": "assistant", "content": "no", "weight": 0},
        USER,
        {**documents[1].messages[1], "weight": 1},
    ]
    (weighted,) = read(tmp_path / "b.jsonl", [{"m": turns}], messages="m")
    assert weighted.answers == [3], "OpenAI's weight 0: read, but not learned"
    with pytest.raises(BadInput, match="no message of the assistant"):
        read(tmp_path / "b.jsonl", [{"m": turns[:2]}], messages="m")
