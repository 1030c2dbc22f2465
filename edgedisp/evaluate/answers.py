"""heldout_answers: what a model answers in held-out conversations.

One question a conversation: all before its last answer, as the chat template renders it. The model answers
greedily until it ends its turn. An answer is exact where it holds the same JSON values as the reference (keys
in any order, any white space between them) and the same words around them; calls are judged in parts, too.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import labelled
from edgedisp.core.results import ANSWERS_TASK, TaskScore, WrongAnswer
from edgedisp.data import Conversation
from edgedisp.evaluate.comparison import Results, TaskResult, task_result
from edgedisp.evaluate.heldout_tasks import LEAST, Question, SuiteOptions
from edgedisp.evaluate.loglikelihood import ScoreOptions, TextTokenizer, loglikelihoods, name_of
from edgedisp.evaluate.statistics import Metric, Resampling

EXACT = Metric("exact", "exact")
CALLS = tuple(Metric(part, part) for part in ("name", "arguments", "argument_f1"))
LOSS = Metric("answer_loss", "nll", "tokens", higher_is_better=False)  # nats per token of the reference
WRONG_ANSWERS = 10  # shown of a run
LINE = 100  # characters of a prompt that is shown in a command
_CHUNK = 64  # prompts between two writes of the cache; the same ones always share it, and so a batch


# Questions


def build(
    conversations: Sequence[Conversation], tokenizer: TextTokenizer, options: SuiteOptions
) -> list[Question]:
    """The questions in an order drawn by the seed, without those longer than the context. Raises BadInput for
    too few conversations."""
    from edgedisp import models  # brings torch

    order = np.random.default_rng([options.seed, 3]).permutation(len(conversations))
    conversations, questions = [conversations[index] for index in order], list[Question]()
    answers = models.last_answers(tokenizer.tokenizer, conversations) if conversations else []
    stop_ids = models.end_of_turn_ids(tokenizer.tokenizer)
    for conversation, answer in zip(conversations, answers):
        if len(answer.prompt_ids) + len(answer.answer_ids) - 1 > options.context:
            continue
        notes = {"prompt": conversation.messages[conversation.answers[-1] - 1]["content"]}
        notes["reference"] = reference = _decoded(tokenizer, answer.answer_ids, stop_ids)
        request, size = (tuple(answer.prompt_ids), tuple(answer.answer_ids)), len(reference.encode())
        questions.append(Question(conversation.id, conversation.id, (request,), (size,), notes=notes))
    if len(questions) < (least := min(LEAST, options.limit)):
        raise BadInput(
            f"{ANSWERS_TASK}: {len(questions)} of {len(conversations)} held-out conversations fit into the "
            f"context of {options.context} tokens, need {least}; give evaluate.answers a file of them, hold "
            "out more (data.heldout), or raise data.context"
        )
    return questions[: options.limit]


def _decoded(tokenizer: TextTokenizer, ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """The text of an answer, without the token that ends it."""
    return tokenizer.decode(ids[:-1] if ids and ids[-1] in stop_ids else ids).strip()


# Scores


def score(
    questions: Sequence[Question],
    model: Any,
    tokenizer: TextTokenizer,
    suite: SuiteOptions,
    options: ScoreOptions,
    resampling: Resampling,
) -> TaskResult:
    """Let a model answer the questions that `build` made. An answer that is cut is as right as what is there.
    Parts of calls are metrics where the references hold any. The loss is that of the first references, up to
    `perplexity_tokens`; the others add nothing to its sums."""
    from edgedisp import models

    stop_ids = models.end_of_turn_ids(tokenizer.tokenizer)
    requests = [question.requests[0] for question in questions]
    answers = generate(
        model, [tuple(prompt) for prompt, _ in requests], suite.answer_tokens, stop_ids, options
    )
    budget = suite.perplexity_tokens or math.inf
    totals = accumulate(len(reference) for _, reference in requests)
    count = max(LEAST, sum(total <= budget for total in totals))
    losses = [
        {"nll": -likelihood.sum_logprob, "tokens": len(likelihood.logprobs)}
        for likelihood in loglikelihoods(model, requests[:count], options)
    ]
    losses += [{"nll": 0.0, "tokens": 0}] * (len(requests) - len(losses))
    items = []
    for question, answer, loss in zip(questions, answers, losses):
        text = _decoded(tokenizer, answer, stop_ids)
        item = {"id": question.id, "document": question.document, **loss}
        item |= judge(question.notes["reference"], text)
        request = (
            f"{question.fingerprint()} {suite.answer_tokens} {loss['tokens']}"  # pairs what was cut alike
        )
        items.append({**item, **question.notes, "answer": text, "asked": request})
    has_calls = any(calls(parse(question.notes["reference"]))[0] for question in questions)
    metrics = [EXACT, *(CALLS if has_calls else ()), LOSS]
    return task_result(TaskScore(ANSWERS_TASK, {}), items, metrics, resampling)


def generate(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    answer_tokens: int,
    stop_ids: Sequence[int],
    options: ScoreOptions,
) -> list[list[int]]:
    """Greedy answers in the order of the prompts, through the cache. A chunk of prompts is answered whole or
    not at all: another batch could decide a near-tie otherwise."""
    names = {prompt: name_of(("answer", prompt, answer_tokens, *sorted(stop_ids))) for prompt in prompts}
    answers = {} if options.cache is None else options.cache.read([*names.values()])
    ordered = sorted(names, key=lambda prompt: (len(prompt), prompt))
    for start in range(0, len(ordered), _CHUNK):
        chunk = ordered[start : start + _CHUNK]
        if all(names[prompt] in answers for prompt in chunk):
            continue
        progress = labelled(options.progress, f"answers from {start + 1} of {len(ordered)}")
        new = model.greedy_batch([*map(list, chunk)], answer_tokens, frozenset(stop_ids), progress)
        results = {names[prompt]: ids for prompt, ids in zip(chunk, new)}
        answers |= results
        if options.cache is not None:
            options.cache.write(results)
    return [answers[names[prompt]] for prompt in prompts]


def short_prompt(results: Results) -> str | None:
    """The first prompt that fits a line; None without the task."""
    items = results[ANSWERS_TASK].items if ANSWERS_TASK in results else []
    prompts = (str(item["prompt"]) for item in items)
    return next((text for text in prompts if text.isprintable() and len(text) <= LINE), None)


def wrong_answers(models: Mapping[str, Results], name: str) -> list[WrongAnswer]:
    """Items that the model `name` got wrong, with what every model said; none without the task."""
    items = {
        label: {item["id"]: item for item in results[ANSWERS_TASK].items}
        for label, results in models.items()
        if ANSWERS_TASK in results
    }
    wrong = [item for item in items.get(name, {}).values() if not item["exact"]][:WRONG_ANSWERS]
    return [
        WrongAnswer(
            item["prompt"],
            item["reference"],
            {label: answers[item["id"]]["answer"] for label, answers in items.items()},
        )
        for item in wrong
    ]


# One answer


def judge(reference: str, answer: str) -> dict[str, float]:
    """How right an answer is: exact; of its calls all names, all arguments, and F1 over the arguments. Where
    nothing is to be called, a call is wrong."""
    expected, actual = parse(reference), parse(answer)
    exact = int(_canonical(expected) == _canonical(actual))
    (names, arguments), (other_names, other_arguments) = calls(expected), calls(actual)
    if bool(names) != bool(other_names):
        return {"exact": exact, "name": 0, "arguments": 0, "argument_f1": 0.0}
    pairs, other_pairs = _pairs(arguments), _pairs(other_arguments)
    total = pairs.total() + other_pairs.total()
    return {
        "exact": exact,
        "name": int(names == other_names),
        "arguments": int(_canonical(arguments) == _canonical(other_arguments)),
        "argument_f1": 2 * (pairs & other_pairs).total() / total if total else 1.0,
    }


def _pairs(arguments: Sequence[dict[str, Any]]) -> Counter[tuple[str, str]]:
    """Name and value of each argument of all calls."""
    return Counter((name, _canonical(value)) for each in arguments for name, value in each.items())


def parse(text: str) -> list[Any]:
    """A text as its JSON objects and lists, and the words between them, in order. From one that is broken on,
    all is words: the parts of a call that was cut off are no call."""
    pieces: list[Any] = []
    end = 0
    for match in re.finditer(r"[{\[]", text):
        start = match.start()
        if start < end:
            continue
        try:
            value, stop = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            break
        pieces += [text[end:start].strip(), value]
        end = stop
    return [piece for piece in (*pieces, text[end:].strip()) if piece != ""]


def calls(pieces: Sequence[Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """The functions that a text calls, one by one or in lists, and the arguments of each; of an object that
    calls none an empty name, and the object itself."""
    names, arguments = list[str](), list[dict[str, Any]]()
    for value in (value for piece in pieces for value in (piece if isinstance(piece, list) else [piece])):
        if isinstance(value, dict):
            name = value.get("name")
            content = value.get("arguments", value.get("parameters"))  # Llama 3's word
            if not (isinstance(name, str) and isinstance(content, dict)):
                name, content = "", value
            names.append(name)
            arguments.append(content)
    return names, arguments


def _canonical(value: Any) -> str:
    """Equal for equal JSON: 3 and 3.0 are one number, 3 and "3" are not."""
    return json.dumps(value, sort_keys=True)


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


_DECODER = json.JSONDecoder(parse_float=_number)
