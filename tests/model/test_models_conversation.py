"""Conversations as templates write them: what training predicts, and what templates have no place for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from edgedisp import models
from edgedisp.core.errors import BadInput
from edgedisp.data import Conversation

CALL = {"type": "function", "function": {"name": "turn_on", "arguments": {"area": "hall", "level": 3}}}
TOOL = {"type": "function", "function": {"name": "turn_on", "parameters": {"type": "object"}}}
JSON = '{"name":"turn_on","arguments":{"area":"hall","level":3}}'
# Turns are rewritten once others follow: thoughts stand before the newest answer alone.
THINKING = (
    "{% if tools %}{{ '<|im_start|>tools ' + tools | tojson + '<|im_end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.last and m.role == 'assistant' %}{{ '[no thought]' }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}{{ '[call]' + call.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Two roles that take turns, nothing else, and no token at the end of an answer.
STRICT = (
    "{% for m in messages %}"
    "{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}{{ raise_exception('turns') }}{% endif %}"
    "{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_folder: dict[str, Path]) -> Any:
    return copy.copy(models.load_tokenizer(tiny_folder["llama"]))


def talk(*texts: str, system: str = "", **more: Any) -> Conversation:
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return Conversation.of("a", [{"role": "system", "content": system}] * bool(system) + messages, **more)


def test_training_predicts_every_answer_and_what_ends_it(tokenizer: Any) -> None:
    (example,) = models.example(tokenizer, talk("hello", "yes", "why?", "no"))
    text = tokenizer.apply_chat_template(talk("hello", "yes", "why?", "no").messages, tokenize=False)
    assert tokenizer.decode(example.ids) + "\n" == text
    assert tokenizer.decode(example.ids[example.targets]) == "yes<|im_end|>no<|im_end|>"
    # In use the model is given the very ids that stood before the answer in training.
    for turn in (1, 3):
        ids = models.prompt_ids(tokenizer, talk("hello", "yes", "why?", "no").messages[:turn])
        assert example.ids[: len(ids)].tolist() == ids


def test_a_template_that_rewrites_turns_gives_an_example_for_each_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKING
    pair = models.example(tokenizer, talk("hello", "yes", "why?", "no"))
    targets = [tokenizer.decode(example.ids[example.targets]) for example in pair]
    assert targets == ["[no thought]yes<|im_end|>", "[no thought]no<|im_end|>"]
    assert "user\nhello<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>" in tokenizer.decode(pair[1].ids)


def test_what_a_template_has_no_place_for_is_written_in_messages(tokenizer: Any) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "done"}
    rows = [{"role": "user", "content": "light"}, call, result, {"role": "assistant", "content": "It is on."}]
    conversation = Conversation.of("a", rows, [TOOL])
    notes, texts = {}, {}
    for name, template in {"plain": None, "thinking": THINKING, "strict": STRICT}.items():
        tokenizer.chat_template = template or tokenizer.chat_template
        notes[name] = len(models.chat_format(tokenizer).notes([conversation]))
        texts[name] = tokenizer.decode(models.example(tokenizer, conversation)[-1].ids)
    assert notes == {"plain": 2, "thinking": 0, "strict": 3}
    assert f"<|im_start|>assistant\n{JSON}<|im_end|>" in texts["plain"]
    assert (
        "<|im_start|>system\nYou can call these functions." in texts["plain"]
        and "[call]" in texts["thinking"]
    )
    assert texts["strict"].startswith("user: You can call") and "\nuser: done\n" in texts["strict"]
    # Its answers end with nothing, so that training adds what stops a model: the tokenizer's eos.
    assert texts["strict"].endswith("It is on.\n<|im_end|>")


def test_special_tokens_in_a_message_are_characters_and_counted(tokenizer: Any) -> None:
    ((example,), count) = models.examples(tokenizer, [talk("a<|im_end|>b", "<|im_start|>")])[0]
    assert count == 2
    text = tokenizer.decode(example.ids)
    assert "a< |im_end|>b" in text and example.ids.tolist().count(tokenizer.eos_token_id) == 2


def test_what_the_templates_of_some_rows_refuse_is_said_with_the_row(tokenizer: Any) -> None:
    tokenizer.chat_template = STRICT
    conversation = Conversation(
        "a", "", 1.0, ({"role": "user", "content": "a"},) * 2 + ANSWER, None, "a.jsonl:7"
    )
    with pytest.raises(BadInput, match=r"a.jsonl:7: the chat template fails: TemplateError: turns"):
        models.example(tokenizer, conversation)
    tokenizer.chat_template = None
    with pytest.raises(BadInput, match=r"no chat template .* fit ChatML: .* as chat_template.jinja"):
        models.example(tokenizer, conversation)


ANSWER = ({"role": "assistant", "content": "b"},)
