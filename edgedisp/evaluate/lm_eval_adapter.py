"""Any lm-evaluation-harness task over a `LanguageModel`.

lm-eval makes prompts, filters answers and scores each item. This module is the model side (log-likelihoods,
rolling log-likelihoods, greedy text), and turns lm-eval's samples into items, so that two models can be
paired. A group whose tasks are scored alike is one result over all their items.

Not supported: chat templates, and tasks that sample, run generated code or look at pictures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from edgedisp.core.errors import BadInput
from edgedisp.core.results import TaskScore
from edgedisp.evaluate import lm_eval_tasks
from edgedisp.evaluate.comparison import TaskResult, task_result
from edgedisp.evaluate.lm_eval_tasks import quiet, refuse_sampling
from edgedisp.evaluate.loglikelihood import LanguageModel, ScoreOptions, loglikelihoods, name_of
from edgedisp.evaluate.statistics import Resampling
from edgedisp.evaluate.tokenization import Request, TextTokenizer, encode_pair, rolling_windows

MAX_NEW_TOKENS = 256  # lm-eval's own default for tasks that name no limit
_FIRST_BLOCK = 32  # tokens generated before the first look for a stop string


class HarnessModel(LM):  # type: ignore[misc]  # lm-eval ships no types
    """The model side of lm-eval. cut: (task, item) -> how many of its requests lost context on the left."""

    def __init__(
        self, model: LanguageModel, tokenizer: TextTokenizer, options: ScoreOptions | None = None
    ) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.options = options or ScoreOptions(tokenizer.bos_token)
        self.bos = [] if tokenizer.bos_token is None else [tokenizer.bos_token]
        self.cut: Counter[tuple[str | None, int | None]] = Counter()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, all greedy) of each (context, continuation) text pair."""
        return self._score(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of each whole text, every token predicted once, with as much context as fits."""
        return [total for total, _ in self._score(requests)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy text after each prompt, up to the first stop string, stop token or max_gen_toks."""
        texts = []
        for number, request in enumerate(requests, start=1):
            texts.append(self._generate(request, *request.args))
            self.options.progress(number, len(requests), "generations")
        return texts

    def token_requests(self, instance: Instance) -> list[Request]:
        """The pair itself; windows of a rolling likelihood, and of a continuation beyond the context."""
        repeat_prefix, context = bool(self.bos), self.model.context
        encode, prefix = self.tokenizer.encode, self.tokenizer.prefix
        if instance.request_type == "loglikelihood_rolling":
            return [*rolling_windows(encode(instance.args[0]), context, prefix, repeat_prefix)]
        before, after = encode_pair(encode, *instance.args)
        if len(after) <= context:
            return [([*self.bos, *before] or [prefix], after)]
        self._count_cut(instance, int(len(before) > 1))
        first = before[-1] if before and not repeat_prefix else prefix
        return [*rolling_windows(after, context, first, repeat_prefix)]

    def _score(self, instances: Sequence[Instance]) -> list[tuple[float, bool]]:
        groups = [self.token_requests(instance) for instance in instances]
        scored = iter(loglikelihoods(self.model, [pair for group in groups for pair in group], self.options))
        results = []
        for instance, group in zip(instances, groups):
            parts = [next(scored) for _ in group]
            self._count_cut(instance, sum(part.dropped > 0 for part in parts))
            results.append((sum(part.sum_logprob for part in parts), all(part.greedy for part in parts)))
        return results

    def _count_cut(self, instance: Instance, times: int) -> None:
        self.cut[instance.task_name, instance.doc_id] += times

    def _generate(self, instance: Instance, prompt: str, options: dict[str, Any]) -> str:
        refuse_sampling("a task", options)
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        limit = int(options.get("max_gen_toks") or options.get("max_new_tokens") or MAX_NEW_TOKENS)
        ids = self.tokenizer.encode(prompt)
        # Where both do not fit, the prompt keeps at least half of the context.
        available = self.model.context - len(self.bos)
        room = max(available - limit, available // 2, 1)
        limit = min(limit, available - min(len(ids), room))
        self._count_cut(instance, int(len(ids) > room))
        ids = [*self.bos, *ids[-room:]] or [self.tokenizer.prefix]
        if (cache := self.options.cache) is None:
            return self._until(ids, limit, stops)
        name = name_of(("until", ids, limit, stops))
        if not (cached := cache.read([name])):
            cache.write(cached := {name: self._until(ids, limit, stops)})
        return str(cached[name])

    def _until(self, prompt: list[int], limit: int, stops: list[str]) -> str:
        """Generate in blocks that double, looking for the stop strings after each: they are any text, not
        tokens, so the model cannot stop at them by itself. Each block reads the prompt once more."""
        new: list[int] = []
        stop_ids = self.tokenizer.stop_ids
        while True:
            block = min(max(_FIRST_BLOCK, len(new)), limit - len(new))
            fresh = self.model.greedy([*prompt, *new], block, stop_ids)
            ended = len(fresh) < block or bool(stop_ids & set(fresh))
            new += [token for token in fresh if token not in stop_ids]
            text = self.tokenizer.decode(new)
            cuts = [index for stop in stops if (index := text.find(stop)) >= 0]
            if cuts or ended or len(new) >= limit:
                return text[: min(cuts)] if cuts else text


def score(
    model: HarnessModel,
    name: str,
    tasks: Mapping[str, Any],
    limit: int,
    resampling: Resampling,
) -> TaskResult:
    """Score the first items of a loaded task, or of the tasks of a group as one result (`limit` together, at
    least). The seed of `resampling` is also the tasks'."""
    before = model.cut.total()
    items: list[dict[str, Any]] = []
    aggregates: dict[str, Any] = {}
    for task_name, task in tasks.items():
        task.set_fewshot_seed(seed=resampling.seed)
        loaded: Any = {"tasks": {task_name: task}, "groups": {}, "group_map": {}}
        with quiet(resampling.seed):
            result: Any = evaluate(model, loaded, limit=math.ceil(limit / len(tasks)), bootstrap_iters=0)
        items += _items(task_name, task, result["samples"][task_name], model)
        aggregates = result["results"][task_name]
    metrics, whole = lm_eval_tasks.task_metrics(next(iter(tasks.values())), aggregates, items)
    chance = lm_eval_tasks.chance(metrics, items)
    task_score = TaskScore(name, whole if len(tasks) == 1 else {}, chance, model.cut.total() - before)
    return task_result(task_score, items, metrics, resampling)


def item_requests(
    tasks: Mapping[str, Any], model: HarnessModel, limit: int, seed: int
) -> dict[str, tuple[Request, ...]]:
    """Item -> its requests; nothing is computed. Raises BadInput for a task that needs generated text, and
    for one that asks an item in several ways."""
    requests: dict[str, list[Request]] = {}
    for name, task in tasks.items():
        task.set_fewshot_seed(seed=seed)
        with quiet(seed):
            task.build_all_requests(limit=math.ceil(limit / len(tasks)))
        kinds = {instance.request_type for instance in task.instances}
        if "generate_until" in kinds:
            raise BadInput(f"--score {name}: needs generated text; on a device only likelihoods are scored")
        if len(kinds) > 1:
            raise BadInput(f"--score: {name}#0 is asked in two ways, which no device can be")
        for instance in task.instances:
            requests.setdefault(f"{name}#{instance.doc_id}", []).extend(model.token_requests(instance))
    return {item: tuple(pairs) for item, pairs in requests.items()}


def _items(name: str, task: Any, samples: list[dict[str, Any]], model: HarnessModel) -> list[dict[str, Any]]:
    """lm-eval's samples (one per item and filter) -> one item each, with a hash of what was asked: of a cut
    or rolling text that depends on the context."""
    items: dict[int, dict[str, Any]] = {}
    for sample in samples:
        number = sample["doc_id"]
        hashes: tuple[Any, ...] = (sample["doc_hash"], sample["prompt_hash"], sample["target_hash"])
        if task.OUTPUT_TYPE == "loglikelihood_rolling" or model.cut[name, number]:
            hashes += (model.model.context, model.tokenizer.bos_token)
        item = items.setdefault(number, {"id": f"{name}#{number}", "document": f"{name}#{number}"})
        item["asked"] = name_of(hashes)[:16]
        item |= lm_eval_tasks.item_fields(task, sample)
    # A text of no words or bytes says nothing, and cannot be weighed.
    return [item for item in items.values() if all(item[key] for key in item if key.endswith(":weight"))]
