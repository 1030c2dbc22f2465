"""Any lm-evaluation-harness task over a model that is nothing but `ids, mask -> logits`.

lm-eval keeps its part: prompts, filters, and the score of each item. Ours is the model side (log-likelihoods,
rolling log-likelihoods, greedy generation) and what happens with the items: each becomes one line of a
result, so that two models can be paired on it, which lm-eval does not offer. Its aggregates are computed
again from the items, with intervals; a metric that exists only for a whole task (F1, BLEU) is carried over
as it is, without an interval.

A multiple choice also tells the log-likelihood of its right answer (`gold_nll`, `gold_bits_per_byte`): where
a small model guesses, as on MMLU, that moves before the accuracy does. A group whose tasks are scored alike
is one result over all their items, as lm-eval's own mean of it weighted by size; others give their tasks.

Left out: chat templates, and tasks that sample, run generated code or look at pictures.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from edgedisp.core.progress import Progress, silent
from edgedisp.evaluate import shapes
from edgedisp.evaluate.answers import Likelihood
from edgedisp.evaluate.catalog import quiet, refuse_sampling, seeded
from edgedisp.evaluate.kept import Kept, name_of
from edgedisp.evaluate.result import TaskResult, task_result
from edgedisp.evaluate.score import (
    Decode,
    Encode,
    LanguageModel,
    encode_pair,
    loglikelihoods,
    rolling_windows,
)

MAX_NEW_TOKENS = 256  # lm-eval's own default for tasks that name no limit
_FIRST_BLOCK = 32  # tokens generated before the first look for a stop string


class HarnessModel(LM):  # type: ignore[misc]  # lm-eval ships no types
    """The model side of lm-eval over `LanguageModel`.

    lead: the token that every text begins with, for models that know such (Gemma's <bos>).
    truncated: requests whose context was cut on the left so far (generation prompts included); cut: the items
    of these, (task, number).
    """

    def __init__(
        self,
        model: LanguageModel,
        encode: Encode,
        decode: Decode,
        end_of_text: int,
        *,
        lead: int | None = None,
        stop_ids: frozenset[int] = frozenset(),
        batch_tokens: int = 1024,
        kept: Kept | None = None,
        progress: Progress = silent,
    ) -> None:
        super().__init__()
        self.model = model
        self.encode = encode
        self.decode = decode
        self.lead = lead
        self.begin = [] if lead is None else [lead]
        self.start = end_of_text if lead is None else lead
        self.stop_ids = stop_ids | {end_of_text}
        self.batch_tokens = batch_tokens
        self.kept = kept
        self.progress = progress
        self.truncated = 0
        self.cut: set[Hashable] = set()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, all greedy) of each (context, continuation) text pair."""
        pairs = [encode_pair(self.encode, *request.args) for request in requests]
        pieces = [self._pieces(request, *pair) for request, pair in zip(requests, pairs)]
        return self._score(requests, pieces)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of each whole text, every token predicted once, with as much context as fits."""
        texts = [self.encode(request.args[0]) for request in requests]
        pieces = [
            [*rolling_windows(ids, self.model.context, self.start, self.lead is not None)] for ids in texts
        ]
        return [total for total, _ in self._score(requests, pieces)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy text after each prompt, up to the first stop string, stop token or max_gen_toks."""
        texts = []
        for done, request in enumerate(requests):
            texts.append(self._generate(request, *request.args))
            self.progress(done + 1, len(requests), "generations")
        return texts

    def _note_cut(self, request: Instance, times: int) -> None:
        if times:
            self.truncated += times
            self.cut.add(_item_of(request))

    def _pieces(
        self, request: Instance, context: list[int], continuation: list[int]
    ) -> list[tuple[Any, Any]]:
        """The pair itself, or windows when the continuation alone is longer than the model's context."""
        if len(continuation) <= self.model.context:
            return [([*self.begin, *context], continuation)]
        prefix = context[-1] if context and self.lead is None else self.start
        self._note_cut(request, int(len(context) > 1))
        return [*rolling_windows(continuation, self.model.context, prefix, self.lead is not None)]

    def _score(
        self, requests: Sequence[Instance], pieces: Sequence[Sequence[tuple[Any, Any]]]
    ) -> list[tuple[float, bool]]:
        found = iter(
            loglikelihoods(
                self.model,
                [pair for group in pieces for pair in group],
                items=[_item_of(request) for request, group in zip(requests, pieces) for _ in group],
                batch_tokens=self.batch_tokens,
                end_of_text=self.start,
                lead=self.lead,
                kept=self.kept,
                progress=self.progress,
            )
        )
        results = []
        for request, group in zip(requests, pieces):
            parts: list[Likelihood] = [next(found) for _ in group]
            self._note_cut(request, sum(part.dropped > 0 for part in parts))
            results.append((sum(part.sum_logprob for part in parts), all(part.greedy for part in parts)))
        return results

    def _generate(self, request: Instance, prompt: str, options: dict[str, Any]) -> str:
        refuse_sampling("a task", options)
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        limit = int(options.get("max_gen_toks") or options.get("max_new_tokens") or MAX_NEW_TOKENS)
        ids = self.encode(prompt)
        # Where both do not fit, the prompt keeps at least half of the context.
        left = self.model.context - len(self.begin)
        room = max(left - limit, left // 2, 1)
        limit = min(limit, left - min(len(ids), room))
        self._note_cut(request, int(len(ids) > room))
        ids = [*self.begin, *ids[-room:]] or [self.start]
        if self.kept is None:
            return self._until(ids, limit, stops)
        name = name_of(("until", ids, limit, stops))
        if not (known := self.kept.find([name])):
            self.kept.keep(known := {name: self._until(ids, limit, stops)})
        return str(known[name])

    def _until(self, prompt: list[int], limit: int, stops: list[str]) -> str:
        """Generate in blocks that double, looking for the stop strings after each.

        A stop string can be any text, not a token, so the model cannot stop at it by itself. Each block reads
        the prompt once more, which costs less than 256 tokens when 5 were wanted.
        """
        new: list[int] = []
        while True:
            block = min(max(_FIRST_BLOCK, len(new)), limit - len(new))
            fresh = self.model.greedy([*prompt, *new], block, self.stop_ids)
            ended = len(fresh) < block or bool(self.stop_ids & set(fresh))
            new += [token for token in fresh if token not in self.stop_ids]
            text = self.decode(new)
            cuts = [place for stop in stops if (place := text.find(stop)) >= 0]
            if cuts or ended or len(new) >= limit:
                return text[: min(cuts)] if cuts else text


def run(
    model: HarnessModel,
    name: str,
    tasks: Mapping[str, Any],
    *,
    limit: int | None = None,
    seed: int = 0,
    bootstrap: int = 2000,
) -> TaskResult:
    """Score a loaded task, or the tasks of a group as one. `limit`: only its first items, of each task of a
    group as many as makes so many together."""
    before = model.truncated
    share = None if limit is None else math.ceil(limit / len(tasks))
    items: list[dict[str, Any]] = []
    marks: list[str] = []
    aggregates: dict[str, Any] = {}
    for each, task in tasks.items():
        task.set_fewshot_seed(seed=seed)
        with quiet(), seeded(seed):
            loaded: Any = {"tasks": {each: task}, "groups": {}, "group_map": {}}
            found: Any = evaluate(
                lm=model, task_dict=loaded, limit=share, bootstrap_iters=0, log_samples=True
            )
        answered, asked = _items(each, task, found["samples"][each], model)
        items, marks, aggregates = [*items, *answered], [*marks, *asked], found["results"][each]
    first = next(iter(tasks.values()))
    metrics, unpaired = shapes.metrics(first, aggregates, items)
    return task_result(
        name,
        items,
        metrics,
        fingerprints=marks,
        chance=shapes.chance(metrics, items),
        truncated=model.truncated - before,
        bootstrap=bootstrap,
        seed=seed,
        unpaired=unpaired if len(tasks) == 1 else None,
    )


def _item_of(request: Instance) -> Hashable:
    return request.task_name, request.doc_id


def _items(
    name: str, task: Any, samples: list[dict[str, Any]], model: HarnessModel
) -> tuple[list[dict[str, Any]], list[str]]:
    """lm-eval's samples (one per item and filter) -> one item each, and what was asked.

    What is read of a long text depends on the context, so that is part of what was asked there.
    """
    context = model.model.context, model.lead
    items: dict[int, dict[str, Any]] = {}
    marks: dict[int, str] = {}
    for sample in samples:
        number = sample["doc_id"]
        hashes: tuple[Any, ...] = (sample["doc_hash"], sample["prompt_hash"], sample["target_hash"])
        if task.OUTPUT_TYPE == "loglikelihood_rolling" or (name, number) in model.cut:
            hashes += context
        marks[number] = name_of(hashes)[:16]
        item = items.setdefault(number, {"id": f"{name}#{number}", "document": f"{name}#{number}"})
        if task.OUTPUT_TYPE == "multiple_choice":
            item |= shapes.choice(task, sample)
        for metric in sample["metrics"]:
            item |= shapes.parts(
                shapes.label(metric, sample["filter"]), sample[metric], shapes.aggregation(task, metric)
            )
    # A text of no words or bytes says nothing, and cannot be weighed.
    empty = {n for n, item in items.items() if any(k.endswith(":weight") and not item[k] for k in item)}
    told = [number for number in items if number not in empty]
    return [items[number] for number in told], [marks[number] for number in told]
