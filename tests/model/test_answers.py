"""A tiny model answers held-out conversations: as it decodes alone, and once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgedisp import models
from edgedisp.core.errors import BadInput
from edgedisp.data import Conversation
from edgedisp.evaluate.answers import short_prompt, wrong_answers
from edgedisp.evaluate.heldout_tasks import SuiteOptions
from edgedisp.evaluate.loglikelihood import ScoreCache, ScoreOptions, loglikelihoods
from edgedisp.evaluate.task_suite import TaskSuite, prepare

TASK, TOKENS = "heldout_answers", 6
WORDS = (
    "lights on",
    "lights off in the cellar",
    "what time is it",
    "a question that is " + "very " * 200 + "long",
)


def conversations() -> list[Conversation]:
    call = {"type": "function", "function": {"name": "turn", "arguments": {"on": True}}}
    answers: list[dict[str, Any]] = [{"content": "", "tool_calls": [call]}, {"content": "It is late."}]
    return [
        Conversation.of(
            f"c{number}",
            [{"role": "user", "content": text}, {"role": "assistant", **answers[number % 2]}],
        )
        for number, text in enumerate(WORDS)
    ]


def suite(tokenizer: Any, **options: Any) -> TaskSuite:
    return prepare(tokenizer, conversations(), SuiteOptions((TASK,), 128, answer_tokens=TOKENS, **options))


def test_a_model_answers_as_it_decodes_alone_and_answers_once(
    tiny_folder: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = tiny_folder["llama"]
    tokenizer, model = models.load_tokenizer(folder), models.TorchModel(models.load(folder))
    tasks = suite(tokenizer)
    with closing(ScoreCache(tmp_path / "scores.sqlite", "model")) as cache:
        first = tasks.run(model, ScoreOptions(cache=cache))[TASK]
        silent: Any = SimpleNamespace(context=model.context, vocab_size=model.vocab_size, parallel=1)
        assert tasks.run(silent, ScoreOptions(cache=cache))[TASK].items == first.items
        few = suite(tokenizer, perplexity_tokens=1).run(silent, ScoreOptions(cache=cache))[TASK]
    assert [item["tokens"] > 0 for item in few.items] == [True, True, False]  # at least two
    assert list(first.score.metrics) == ["exact", "name", "arguments", "argument_f1", "answer_loss"]
    assert sorted(item["id"] for item in first.items) == ["c0", "c1", "c2"]  # the last is too long
    by_id = {item["id"]: item for item in first.items}
    assert by_id["c0"]["reference"] == '{"name":"turn","arguments":{"on":true}}'
    assert by_id["c1"]["reference"] == "It is late." and by_id["c1"]["prompt"] == WORDS[1]
    for question in tasks.questions[TASK]:
        item, (prompt, answer) = by_id[question.id], question.requests[0]
        assert list(prompt) == models.prompt_ids(tokenizer, [{"role": "user", "content": item["prompt"]}])
        alone = model.greedy(list(prompt), TOKENS, frozenset(models.end_of_turn_ids(tokenizer)))
        assert item["answer"] == tokenizer.decode(alone, skip_special_tokens=True).strip()
        assert answer[-1] in models.end_of_turn_ids(tokenizer)
        (likelihood,) = loglikelihoods(model, [(prompt, answer)])
        assert item["nll"] == pytest.approx(-likelihood.sum_logprob) and item["tokens"] == len(answer)
    total, tokens = (sum(item[part] for item in first.items) for part in ("nll", "tokens"))
    assert first.score.metrics["answer_loss"].estimate.value == pytest.approx(total / tokens)
    assert short_prompt({TASK: first}) == first.items[0]["prompt"]
    wrong = wrong_answers({"a/int4": {TASK: first}, "b/int4": {TASK: first}}, "b/int4")
    assert [each.answers for each in wrong] == [
        dict.fromkeys(("a/int4", "b/int4"), item["answer"]) for item in first.items if not item["exact"]
    ]


def test_too_few_conversations_are_refused_and_plain_answers_have_no_calls_to_judge(
    tiny_folder: Mapping[str, Path],
) -> None:
    folder = tiny_folder["llama"]
    tokenizer, model = models.load_tokenizer(folder), models.TorchModel(models.load(folder))
    options = SuiteOptions((TASK,), 128, answer_tokens=2)
    with pytest.raises(BadInput, match="heldout_answers: 0 of 0 held-out conversations fit"):
        prepare(tokenizer, [], options)
    plain = prepare(tokenizer, conversations()[1::2] * 2, options)
    assert [*plain.run(model, bootstrap=2)[TASK].score.metrics] == ["exact", "answer_loss"]
