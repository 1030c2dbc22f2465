"""Answers against references: what is exact, and which part of a call is right."""

from __future__ import annotations

import pytest

from edgedisp.evaluate.answers import judge, parse

CALL = '{"name": "set_light", "arguments": {"area": "porch", "level": 3}}'
RIGHT, NONE = (1, 1, 1, 1.0), (0, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        (CALL, CALL, RIGHT),
        (CALL, ' {"arguments":{"level":3.0,\n"area":"porch"},"name":"set_light"}\n', RIGHT),
        (CALL, CALL.replace("3", '"3"'), (0, 1, 0, 0.5)),  # another type
        (CALL.replace("3", "1"), CALL.replace("3", "true"), (0, 1, 0, 0.5)),
        (CALL, '{"name": "set_light", "arguments": {"area": "porch"}}', (0, 1, 0, 2 / 3)),
        (CALL, CALL.replace("set_light", "turn_on"), (0, 0, 1, 1.0)),
        (CALL, f"Of course! {CALL}", (0, 1, 1, 1.0)),  # an app would have to find it
        (CALL, f"{CALL} {CALL}", (0, 0, 0, 2 / 3)),
        (CALL, CALL[:-1], NONE),  # cut off
        (CALL, "I turn the light on.", NONE),
        (CALL, '{"area": "porch", "level": 3}', (0, 0, 1, 1.0)),  # the call lacks its name
        (f"[{CALL}, {CALL}]", f"[{CALL},{CALL}]", RIGHT),
        (f"<tool_call>\n{CALL}\n</tool_call>", f"<tool_call>{CALL}</tool_call>", RIGHT),
        (f"<tool_call>\n{CALL}\n</tool_call>", CALL, (0, 1, 1, 1.0)),
        ("It is 21 °C.", "It is 21 °C. ", RIGHT),
        ("It is 21 °C.", "It is 21  °C.", (0, 1, 1, 1.0)),  # nothing was to be called
        ("It is 21 °C.", CALL, NONE),
        ('{"city": "Bonn", "days": [1, 2]}', '{"days": [2, 1], "city": "Bonn"}', (0, 1, 0, 0.5)),
    ],
)
def test_an_answer_is_judged_by_its_json_and_the_words_around_it(
    reference: str, answer: str, expected: tuple[float, ...]
) -> None:
    judged = judge(reference, answer)
    assert [*judged] == ["exact", "name", "arguments", "argument_f1"]
    assert tuple(judged.values()) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["[" * 5000, "{" * 50 + "}" * 50, '{"a": ' + "9" * 5000 + "}"])
def test_what_is_no_json_stays_words(text: str) -> None:
    assert parse(text) == [text]
