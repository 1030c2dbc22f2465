"""Tasks of lm-evaluation-harness: reading them with their data, and what their items and metrics are here.

Of lm-eval's aggregates four can be made of a part per item: means, two kinds of perplexity, bits per byte.
All others (F1, BLEU) exist for a whole task only, and are carried over as they are, without an interval. A
multiple choice also gives the log-likelihood of its right answer (`gold_nll`, `gold_bits_per_byte`): where a
small model guesses, as on MMLU, that moves before the accuracy does.

A folder of tasks may name Python functions, which lm-eval runs: name only folders you trust.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
from lm_eval.api.registry import AGGREGATION_REGISTRY
from lm_eval.tasks import TaskManager

from edgedisp.core import hub
from edgedisp.core.errors import BadInput
from edgedisp.core.results import Estimate, Score
from edgedisp.evaluate.comparison import WHOLE_TASK
from edgedisp.evaluate.statistics import GOLD_BITS_PER_BYTE, Metric

GOLD_NLL = Metric("gold_nll", "nll", None, "mean", higher_is_better=False)

Loaded = dict[str, dict[str, Any]]
"""Result -> its tasks by name: one, or those of a group that are scored alike."""


@contextlib.contextmanager
def quiet(seed: int = 0) -> Iterator[None]:
    """No logging below errors and no progress bars of lm-eval and datasets; random and numpy seeded, because
    some tasks shuffle with the global generators. All is put back after."""
    disabled, bars = logging.root.manager.disable, datasets.are_progress_bars_disabled()
    bar, state, numpy_state = lm_eval.api.task.tqdm, random.getstate(), np.random.get_state()
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, **options: items  # it offers no switch for this one
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        lm_eval.api.task.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
        logging.disable(disabled)


def task_index(names: Sequence[str], tasks_path: Path | None) -> TaskManager:
    """lm-eval's index of tasks, groups and tags, with those of a folder. The built-in ones (14,000, seconds)
    are read only when the folder does not hold all names."""
    if tasks_path is None:
        return TaskManager()
    local = TaskManager(include_path=[tasks_path], include_defaults=False)
    return local if set(names) <= set(local.all_tasks) else TaskManager(include_path=[tasks_path])


def _reads_hub(entry: Any) -> bool:
    """Whether a task's data may lie on the hub: false for a YAML with local data files."""
    config = getattr(entry, "cfg", None) or {}
    return config.get("dataset_path") not in ("json", "csv", "parquet", "text", "arrow")


def load(names: Sequence[str], tasks_path: Path | None, seed: int = 0) -> tuple[Loaded, dict[str, str]]:
    """Read tasks and their data. Returns them, and task -> reason for those whose data a hub does not give.

    A group whose tasks are scored alike is one entry; other groups, and tags, become their tasks. Raises
    BadInput for a local task that cannot be read, and for one that samples, runs code or needs pictures.
    """
    loaded: Loaded = {}
    missing: dict[str, str] = {}
    with quiet(seed):
        index = task_index(names, tasks_path)
        if any(_reads_hub(index.task_index.get(name)) for name in names):
            hub.unreachable()  # asked once; left to itself, `datasets` tries 23 s for each data set
        for name in names:
            try:
                entry = index.load([name])
            except Exception as problem:  # of a YAML, Python that it names, or its data: a user's choice
                message = (
                    f"{name} cannot be loaded: {type(problem).__name__}: {problem}. Without a hub use the "
                    "heldout_ tasks, or a local copy: a YAML with `dataset_path: json` and `data_files` in "
                    "the folder that evaluate.tasks_path names"
                )
                # OfflineModeIsEnabled and a hub that does not answer are ConnectionErrors too.
                if not isinstance(problem, ConnectionError | datasets.exceptions.DatasetNotFoundError):
                    raise BadInput(f"evaluate.tasks: {message}") from problem
                missing[name] = message
                continue
            tasks = dict(entry["tasks"])
            for task_name, task in tasks.items():
                _check(task_name, task)
            is_one = name in entry["groups"] and _scored_alike([*tasks.values()])
            loaded |= {name: tasks} if is_one else {each: {each: task} for each, task in tasks.items()}
    return loaded, missing


def _check(name: str, task: Any) -> None:
    """BadInput for a task that cannot be scored here; few-shot examples that are not set are none."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise BadInput(f"evaluate.tasks: {name} runs generated code or needs pictures or sound; take it out")
    refuse_sampling(f"evaluate.tasks: {name}", task.get_config("generation_kwargs") or {})
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)


def refuse_sampling(where: str, options: Mapping[str, Any]) -> None:
    """BadInput if a task's generation options ask for anything but greedy text."""
    if options.get("do_sample") and float(options.get("temperature", 1.0)) > 0:
        raise BadInput(
            f"{where} asks for sampled text (do_sample: true), but models are decoded greedily here; copy "
            "its YAML to your own folder with do_sample: false and name that in evaluate.tasks_path"
        )


def _scored_alike(tasks: Sequence[Any]) -> bool:
    """Whether tasks can be one result: the same kind of output and metrics, one of them at least by items."""
    kinds = {(task.OUTPUT_TYPE, frozenset(task.aggregation().items())) for task in tasks}
    return len(kinds) == 1 and any(_metric(tasks[0], name) for name in tasks[0].aggregation())


def _metric(task: Any, name: str, filter_name: str = "none") -> Metric | None:
    """A metric of a task as one over items; None for an aggregate that cannot be made of them."""
    function = task.aggregation().get(name)
    label, better = _label(name, filter_name), bool(task.higher_is_better().get(name, True))
    match next((key for key, registered in AGGREGATION_REGISTRY.items() if registered is function), None):
        case "mean":
            return Metric(label, label, None, "mean", better)
        case "perplexity":
            return Metric(label, f"{label}:nll", None, "exp", better)
        case "weighted_perplexity":
            return Metric(label, f"{label}:nll", f"{label}:weight", "exp", better)
        case "bits_per_byte":
            return Metric(label, f"{label}:nll", f"{label}:weight", "bits", better)
    return None


def _label(name: str, filter_name: str) -> str:
    return name if filter_name in ("none", "") else f"{name}/{filter_name}"


def item_fields(task: Any, sample: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an item that its metrics name, from one of lm-eval's samples: a number, or two for pairs
    of (log-likelihood, weight). Of a multiple choice also those of `_choice_fields`."""
    fields = _choice_fields(task, sample) if task.OUTPUT_TYPE == "multiple_choice" else {}
    for name in sample["metrics"]:
        value, metric = sample[name], _metric(task, name, sample["filter"])
        if metric is None:
            continue
        if metric.denominator is not None:
            fields |= {metric.numerator: -float(value[0]), metric.denominator: float(value[1])}
        elif metric.scale == "exp":
            fields[metric.numerator] = -float(value)
        elif isinstance(value, bool | int | float | np.number) and math.isfinite(value):
            fields[metric.numerator] = float(value)
    return fields


def _choice_fields(task: Any, sample: Mapping[str, Any]) -> dict[str, Any]:
    """The log-probability of every answer; loss and bytes of the right one, where there is just one and the
    task scores choices by the usual rule."""
    logprobs = [float(answer[0]) for answer in sample["filtered_resps"]]
    choices = list(task.doc_to_choice(sample["doc"]))
    gold = task.doc_to_text(sample["doc"]) if task.multiple_input else task.doc_to_target(sample["doc"])
    if isinstance(gold, str) and gold in choices:
        gold = choices.index(gold)
    is_plain = task.config.process_results is None and isinstance(gold, int)
    if not is_plain or len(choices) != len(logprobs) or not 0 <= gold < len(choices):
        return {"logprobs": logprobs}
    size = len(str(sample["arguments"][gold][1]).encode())
    return {"logprobs": logprobs, "choices": len(choices), "nll": -logprobs[gold], "bytes": max(1, size)}


def task_metrics(
    task: Any, aggregates: dict[str, Any], items: list[dict[str, Any]]
) -> tuple[list[Metric], dict[str, Score]]:
    """Metrics that can be made from the items, the main one first, and scores that lm-eval alone can make."""
    by_items: list[Metric] = []
    whole: dict[str, Score] = {}
    for key, value in aggregates.items():
        name, _, filter_name = key.partition(",")
        if name not in task.aggregation() or not isinstance(value, int | float):
            continue
        metric, label = _metric(task, name, filter_name), _label(name, filter_name)
        if metric is not None and all(metric.numerator in item for item in items):
            by_items.append(metric)
        else:
            finite = float(value) if math.isfinite(value) else None
            estimate = Estimate(finite, n=len(items), documents=len(items), reason=WHOLE_TASK)
            whole[label] = Score(label, estimate, bool(task.higher_is_better().get(name, True)))

    def is_loss(metric: Metric) -> bool:
        is_share = metric.is_mean and metric.higher_is_better
        return not is_share or not all(0 <= item[metric.numerator] <= 1 for item in items)

    by_items.sort(key=is_loss)  # LAMBADA has a loss first
    if by_items and all("nll" in item for item in items):
        by_items += [GOLD_NLL, GOLD_BITS_PER_BYTE]
    return by_items, whole


def chance(metrics: Sequence[Metric], items: Sequence[Mapping[str, Any]]) -> float | None:
    """What guessing scores where the main metric is the accuracy of a multiple choice, else None."""
    main = metrics[0].name if metrics else ""
    if not main.startswith("acc") or not all("choices" in item and item[main] in (0, 1) for item in items):
        return None
    return float(np.mean([1 / item["choices"] for item in items]))
