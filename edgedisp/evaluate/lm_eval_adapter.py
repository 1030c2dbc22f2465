"""Any lm-evaluation-harness task over a `LanguageModel`, as items with an interval.

lm-eval reads tasks, makes prompts, filters answers and scores each item; `HarnessModel` is the model side.
Metrics are its means, perplexities and bits per byte, made of a part per item. Those of a whole task (F1,
BLEU) are left out: lm-eval's own command gives them (commands/lm_eval.py). Not supported: chat templates, and
tasks that sample, run generated code or look at pictures. Templates of tasks are rendered in Jinja's sandbox;
whose Python runs is decided in task_suite.py.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import datasets
import lm_eval.api.task
import lm_eval.utils
import numpy as np
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import AGGREGATION_REGISTRY
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from edgedisp.core import hub
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import digest
from edgedisp.core.results import TaskScore
from edgedisp.evaluate.comparison import TaskResult, task_result
from edgedisp.evaluate.loglikelihood import Request, ScoreOptions, TextTokenizer, loglikelihoods
from edgedisp.evaluate.statistics import GOLD_BITS_PER_BYTE, Metric, Resampling

GOLD_NLL = Metric("gold_nll", "nll", None, "mean", higher_is_better=False)
_FIRST_BLOCK = 32  # tokens generated before the first look for a stop string
_LOCAL_DATA = ("json", "csv", "parquet", "text", "arrow")  # `dataset_path` of a YAML with local data files
# lm-eval's aggregates that can be made of a part per item -> Metric.scale
_SCALES: dict[str, Literal["mean", "exp", "bits"]] = {
    "mean": "mean", "perplexity": "exp", "weighted_perplexity": "exp", "bits_per_byte": "bits",
}  # fmt: skip

_sandbox = SandboxedEnvironment(undefined=lm_eval.utils.env.undefined, keep_trailing_newline=True)
_sandbox.filters |= lm_eval.utils.env.filters
lm_eval.utils.env = _sandbox  # lm-eval's own lets a template reach any Python
datasets.disable_progress_bars()
lm_eval.api.task.tqdm = partial(lm_eval.api.task.tqdm, disable=True)  # it has no switch of its own


class HarnessModel(LM):  # type: ignore[misc]  # lm-eval ships no types
    """The model side of lm-eval. cut: (task, item) -> how many of its requests lost context on the left."""

    def __init__(self, model: Any, tokenizer: TextTokenizer, options: ScoreOptions | None = None) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.options = options or ScoreOptions(tokenizer.bos_token)
        self.bos = [] if tokenizer.bos_token is None else [tokenizer.bos_token]
        self.cut: Counter[tuple[str | None, int | None]] = Counter()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, all greedy) of each (context, continuation) text pair."""
        groups = [self.token_requests(instance) for instance in requests]
        scores = iter(loglikelihoods(self.model, [*chain(*groups)], self.options))
        results = []
        for instance, group in zip(requests, groups):
            parts = [*islice(scores, len(group))]
            self.cut[instance.task_name, instance.doc_id] += sum(part.dropped > 0 for part in parts)
            results.append((sum(part.sum_logprob for part in parts), all(part.greedy for part in parts)))
        return results

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of each whole text, every token predicted once, with as much context as fits."""
        return [total for total, _ in self.loglikelihood(requests)]

    def token_requests(self, instance: Instance) -> list[Request]:
        """The pair itself; of a rolling likelihood the windows of its text."""
        tokenizer = self.tokenizer
        if instance.request_type == "loglikelihood_rolling":
            ids = tokenizer.encode(instance.args[0])
            return [*tokenizer.windows(ids, self.model.context, tokenizer.prefix)]
        context, continuation = tokenizer.encode_pair(*instance.args)
        return [([*self.bos, *context] or [tokenizer.prefix], continuation)]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy text after each prompt, up to the first stop string, stop token or max_gen_toks."""
        texts = []
        for number, instance in enumerate(requests, start=1):
            refuse_sampling("a task", instance.args[1])  # first: the next line may set do_sample
            options = normalize_gen_kwargs(instance.args[1])
            ids = self.tokenizer.encode(instance.args[0])
            # Where both do not fit, the prompt keeps at least half of the context.
            available = self.model.context - len(self.bos)
            room = max(available - options["max_gen_toks"], available // 2, 1)
            limit = min(options["max_gen_toks"], available - min(len(ids), room))
            self.cut[instance.task_name, instance.doc_id] += len(ids) > room
            ids = [*self.bos, *ids[-room:]] or [self.tokenizer.prefix]
            texts.append(self._until(ids, limit, options["until"]))
            self.options.progress(number, len(requests), "generations")
        return texts

    def _until(self, prompt: list[int], limit: int, stops: list[str]) -> str:
        """Generate in blocks that double, looking for the stop strings after each: they are any text, not
        tokens, so the model cannot stop at them by itself. Each block reads the prompt once more."""
        new: list[int] = []
        stop_ids, text = self.tokenizer.stop_ids, ""
        while len(new) < limit and not any(stop in text for stop in stops if stop):
            block = min(max(_FIRST_BLOCK, len(new)), limit - len(new))
            tokens = self.model.greedy([*prompt, *new], block, stop_ids)
            new += [token for token in tokens if token not in stop_ids]
            text = self.tokenizer.decode(new)
            if len(tokens) < block or tokens[-1] in stop_ids:
                break
        return str(postprocess_generated_text(text, stops, None))


@contextlib.contextmanager
def quiet(seed: int = 0) -> Iterator[None]:
    """No logging below errors; random and numpy seeded, as some tasks shuffle with the global generators."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        logging.disable(level)


# Loading


@cache
def task_index(names: tuple[str, ...], tasks_path: Path | None) -> TaskManager:
    """lm-eval's index of tasks, groups and tags, with those of a folder. The built-in ones (14,000, seconds)
    are read only when the folder does not hold all names, and once in a process."""
    if tasks_path is not None:
        index = TaskManager(include_path=[tasks_path], include_defaults=False)
        if set(names) <= set(index.all_tasks):
            return index
    return TaskManager(include_path=tasks_path and [tasks_path])


def load(
    names: Sequence[str], tasks_path: Path | None, seed: int = 0
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Read tasks and their data: result -> its tasks by name, and task -> reason for those whose data a hub
    does not give.

    A group whose tasks are scored alike is one result; other groups, and tags, become their tasks. Raises
    BadInput for a local task that cannot be read, and for one that cannot be scored here.
    """
    loaded: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    with quiet(seed):
        index = task_index((*names,), tasks_path)
        configs = [getattr(index.task_index.get(name), "cfg", None) or {} for name in names]
        if any(config.get("dataset_path") not in _LOCAL_DATA for config in configs):
            hub.unreachable()  # asked once; left to itself, `datasets` tries 23 s for each data set
        for name in names:
            try:
                entry = index.load([name])
            except Exception as problem:  # of a YAML, Python that it names, or its data: a user's choice
                missing[name] = (
                    f"{name} cannot be loaded: {type(problem).__name__}: {problem}. Without a hub use the "
                    "heldout_ tasks, or a local copy: a YAML with `dataset_path: json` and `data_files` in "
                    "the folder that evaluate.tasks_path names"
                )
                # OfflineModeIsEnabled and a hub that does not answer are ConnectionErrors too.
                if isinstance(problem, ConnectionError | datasets.exceptions.DatasetNotFoundError):
                    continue
                raise BadInput(f"evaluate.tasks: {missing[name]}") from problem
            tasks = entry["tasks"]
            for task_name, task in tasks.items():
                _check(f"evaluate.tasks: {task_name}", task)
            kinds = {(task.OUTPUT_TYPE, frozenset(task.aggregation().items())) for task in tasks.values()}
            is_pooled = name in entry["groups"] and len(kinds) == 1
            loaded |= {name: tasks} if is_pooled else {each: {each: task} for each, task in tasks.items()}
    return loaded, missing


def _check(where: str, task: Any) -> None:
    """BadInput for a task that cannot be scored here; few-shot examples that are not set are none."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise BadInput(f"{where} runs generated code or needs pictures or sound; take it out")
    if not any(_metric(task, name, "none") for name in task.aggregation()):
        raise BadInput(
            f"{where} has no metric that is made of its items ({', '.join(task.aggregation())}), so it "
            "has no interval; take it out, or score it with python -m edgedisp.commands.lm_eval"
        )
    refuse_sampling(where, task.get_config("generation_kwargs") or {})
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)


def refuse_sampling(where: str, options: Mapping[str, Any]) -> None:
    """BadInput if a task's generation options ask for anything but greedy text."""
    if options.get("do_sample") and float(options.get("temperature", 1.0)) > 0:
        raise BadInput(
            f"{where} asks for sampled text (do_sample: true), but models are decoded greedily here; copy "
            "its YAML to your own folder with do_sample: false and name that in evaluate.tasks_path"
        )


# Scoring


def score(
    model: HarnessModel, name: str, tasks: Mapping[str, Any], limit: int, resampling: Resampling
) -> TaskResult:
    """Score the first items of a loaded task, or of the tasks of a group as one result (`limit` together, at
    least). The seed of `resampling` is also the tasks'."""
    before, items = model.cut.total(), dict[str, dict[str, Any]]()
    metrics: dict[str, Metric] = {}
    for task in tasks.values():
        task.set_fewshot_seed(seed=resampling.seed)
    with quiet(resampling.seed):
        loaded: Any = {"tasks": dict(tasks)}
        results: Any = evaluate(model, loaded, limit=math.ceil(limit / len(tasks)), bootstrap_iters=0)
    for task_name, task in tasks.items():
        for sample in results["samples"][task_name]:  # of each item one for every filter
            of_task = {metric: _metric(task, metric, sample["filter"]) for metric in sample["metrics"]}
            by_name = {name: metric for name, metric in of_task.items() if metric is not None}
            metrics |= {metric.name: metric for metric in by_name.values()}
            item_id = f"{task_name}#{sample['doc_id']}"
            item = items.setdefault(item_id, {"id": item_id, "document": item_id})
            question = [sample["doc_hash"], sample["prompt_hash"], sample["target_hash"]]
            if task.OUTPUT_TYPE == "loglikelihood_rolling" or model.cut[task_name, sample["doc_id"]]:
                question += [model.model.context, model.tokenizer.bos_token]  # what is read of it
            item |= {"asked": digest(question)[:16], **_fields(task, sample, by_name)}
    # A text of no words or bytes says nothing, and cannot be weighed.
    rows = [item for item in items.values() if all(item[key] for key in item if key.endswith(":weight"))]
    usable = [metric for metric in metrics.values() if all(metric.numerator in row for row in rows)]
    if not usable:
        raise BuildFailed(f"{name}: lm-eval gave no metric with a number for every item")
    chance, main = None, usable[0].name
    if all("nll" in row for row in rows):  # a multiple choice with one right answer each
        usable += [GOLD_NLL, GOLD_BITS_PER_BYTE]
        if main.startswith("acc") and all(row[main] in (0, 1) for row in rows):
            chance = float(np.mean([1 / len(row["logprobs"]) for row in rows]))
    return task_result(TaskScore(name, {}, chance, model.cut.total() - before), rows, usable, resampling)


def _metric(task: Any, name: str, filter_name: str) -> Metric | None:
    """A metric of a task as one over items; None for an aggregate that cannot be made of them."""
    function = task.aggregation().get(name)
    aggregate = next((key for key in _SCALES if AGGREGATION_REGISTRY.get(key) is function), None)
    if aggregate is None:
        return None
    label = name if filter_name in ("none", "") else f"{name}/{filter_name}"
    part = label if aggregate == "mean" else f"{label}:nll"
    weight = f"{label}:weight" if aggregate in ("weighted_perplexity", "bits_per_byte") else None
    return Metric(label, part, weight, _SCALES[aggregate], task.higher_is_better().get(name, True))


def _fields(task: Any, sample: Mapping[str, Any], metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """The fields of an item that its metrics name. Of a multiple choice also the log-probability of every
    answer, and loss and bytes of the right one, where there is just one and the task scores by the usual
    rule: where a small model guesses, as on MMLU, these move before the accuracy does."""
    fields: dict[str, Any] = {}
    if task.OUTPUT_TYPE == "multiple_choice":
        fields["logprobs"] = [float(answer[0]) for answer in sample["filtered_resps"]]
        choices = list(task.doc_to_choice(sample["doc"]))
        gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
        gold = choices.index(gold) if gold in choices else gold
        is_plain = task.config.process_results is None and len(choices) == len(fields["logprobs"])
        if is_plain and isinstance(gold, int) and 0 <= gold < len(choices):
            size = len(str(sample["arguments"][gold][1]).encode())
            fields |= {"nll": -fields["logprobs"][gold], "bytes": max(1, size)}
    for name, metric in metrics.items():
        value = sample[name]
        if metric.denominator is not None:
            value, fields[metric.denominator] = value[0], float(value[1])
        if metric.scale != "mean":
            fields[metric.numerator] = -float(value)
        elif isinstance(value, bool | int | float | np.number) and math.isfinite(value):
            fields[metric.numerator] = float(value)
    return fields


def item_requests(
    tasks: Mapping[str, Any], model: HarnessModel, limit: int, seed: int
) -> dict[str, tuple[Request, ...]]:
    """Item -> its requests; nothing is computed. Raises BadInput for a task that needs generated text, and
    for one that asks an item in several ways."""
    requests: dict[str, list[Request]] = {}
    with quiet(seed):
        for task in tasks.values():
            task.set_fewshot_seed(seed=seed)
            task.build_all_requests(limit=math.ceil(limit / len(tasks)))
    for name, task in tasks.items():
        kinds = {instance.request_type for instance in task.instances}
        if "generate_until" in kinds or len(kinds) > 1:
            raise BadInput(f"--score {name}: needs generated text; on a device only likelihoods are scored")
        for instance in task.instances:
            requests.setdefault(f"{name}#{instance.doc_id}", []).extend(model.token_requests(instance))
    return {item: tuple(pairs) for item, pairs in requests.items()}
