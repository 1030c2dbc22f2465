"""Which lm-evaluation-harness tasks there are, and reading them with their data, quietly.

Before a hub is used one short request shows whether it can be reached, because the client library would try
for half a minute or longer; without it, the client's cache still works. Some tasks shuffle with the global
random generators: these are seeded for the time of a call. A folder of one's own tasks may name Python
functions, which lm-eval runs: name only folders whose code you would run.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval.api.task
import numpy as np
from lm_eval.tasks import TaskManager

from edgedisp.core.errors import BadInput
from edgedisp.evaluate import lm_eval_metrics

HUB_TIMEOUT_S = 5.0
_LOCAL_FORMATS = frozenset({"arrow", "csv", "json", "pandas", "parquet", "sql", "text", "webdataset", "xml"})


Loaded = dict[str, dict[str, Any]]
"""Result -> its tasks by name: one, or those of a group that are scored alike."""


def load(names: Sequence[str], tasks_path: Path | None, seed: int = 0) -> tuple[Loaded, dict[str, str]]:
    """Read the tasks and their data. Returns them, and for each whose data a hub does not give the reason.

    A group whose tasks are scored alike is one entry; other groups, and tags, become their tasks. Raises
    BadInput for a local task that cannot be read, and for one that runs code or needs pictures.
    """
    tasks: Loaded = {}
    missing: dict[str, str] = {}
    with quiet(), seeded(seed):
        manager = _manager(names, tasks_path)
        hub = {name: sorted(_hub_ids(manager, name)) for name in names}
        with _offline_unless_reachable(any(hub.values())) as unreachable:
            for name in names:
                try:
                    tasks |= _load_one(manager, name, hub[name], unreachable)
                except Unreadable as problem:
                    missing[name] = str(problem)
    for name, task in (one for group in tasks.values() for one in group.items()):
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise BadInput(
                f"evaluate.tasks: {name} runs generated code or needs pictures or sound; take it out"
            )
        refuse_sampling(f"evaluate.tasks: {name}", task.get_config("generation_kwargs") or {})
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return tasks, missing


class Unreadable(Exception):
    """A task whose data a hub does not give."""


def known_names(tasks_path: Path | None, *, builtin: bool = True) -> list[str]:
    """Names of all tasks, groups and tags, the built-in ones (14,000, some seconds) and those of a folder."""
    with quiet():
        return list(TaskManager(include_path=_paths(tasks_path), include_defaults=builtin).all_tasks)


def _paths(tasks_path: Path | None) -> list[str | Path] | None:
    return None if tasks_path is None else [tasks_path]


def _manager(names: Sequence[str], tasks_path: Path | None) -> TaskManager:
    """The index of tasks; the built-in ones (seconds) only when the folder does not hold all names."""
    if tasks_path is not None:
        local = TaskManager(include_path=_paths(tasks_path), include_defaults=False)
        if set(names) <= set(local.all_tasks):
            return local
    return TaskManager(include_path=_paths(tasks_path))


def _hub_ids(manager: TaskManager, name: str) -> set[str]:
    """Data sets that a task, or the tasks of a group or tag, would fetch from a hub."""
    entry = manager.task_index.get(name)
    if entry is None:
        return set()
    config = entry.cfg or {}
    members = [*entry.tags] if not config else config.get("task")
    found: set[str] = set()
    for member in members if isinstance(members, list) else []:
        inner = member if isinstance(member, str) else str(member.get("task") or member.get("group"))
        found |= _hub_ids(manager, inner) if inner != name else set()
    path = config.get("dataset_path")
    if path and not config.get("custom_dataset") and path not in _LOCAL_FORMATS and not Path(path).exists():
        found.add(str(path))
    return found


def _load_one(manager: TaskManager, name: str, hub_ids: list[str], unreachable: bool) -> Loaded:
    try:
        loaded = manager.load([name])
    except Exception as problem:  # a YAML, Python that it names, or its data: all of it the user's choice
        data = (
            f"its data set is {', '.join(hub_ids[:3])} on the hub" if hub_ids else "its data cannot be read"
        )
        if hub_ids and unreachable:
            data += f", and {huggingface_hub.constants.ENDPOINT} does not answer"
        message = (
            f"{name} cannot be loaded: {data} ({type(problem).__name__}: {problem}). "
            "Without a hub use the heldout_ tasks, or a local copy: a YAML with `dataset_path: json` and "
            "`data_files` in the folder that evaluate.tasks_path names"
        )
        raise (Unreadable(message) if hub_ids else BadInput(f"evaluate.tasks: {message}")) from problem
    tasks = dict(loaded["tasks"])
    if name in loaded["groups"] and alike([*tasks.values()]):
        return {name: tasks}
    return {each: {each: task} for each, task in tasks.items()}


def refuse_sampling(what: str, options: Mapping[str, Any]) -> None:
    """BadInput if a task's generation options ask for anything but greedy text."""
    if options.get("do_sample") and float(options.get("temperature", 1.0)) > 0:
        raise BadInput(
            f"{what} asks for sampled text (do_sample: true), but models are decoded greedily here; copy its "
            "YAML to your own folder with do_sample: false and name that in evaluate.tasks_path"
        )


def alike(tasks: Sequence[Any]) -> bool:
    """Whether tasks can be one result: one kind of output, the same metrics summed up in the same way, and by
    items (F1 and BLEU are of a whole task)."""
    if not all(any(lm_eval_metrics.is_by_items(task, name) for name in task.aggregation()) for task in tasks):
        return False
    return len({(task.OUTPUT_TYPE, frozenset(task.aggregation().items())) for task in tasks}) == 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No logging below errors and no progress bars from lm-eval and datasets, for the time of a call."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "httpx")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    bar = lm_eval.api.task.tqdm
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, **options: items  # it offers no switch for this one
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators of random and numpy, seeded inside and put back after."""
    state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def _offline_unless_reachable(wanted: bool) -> Iterator[bool]:
    """Whether a hub is wanted and not there; then only the cache is read, instead of trying for minutes."""
    constants, config = huggingface_hub.constants, datasets.config
    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    unreachable = wanted and not before[0] and not _hub_reachable()
    if unreachable:
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield unreachable
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def _hub_reachable() -> bool:
    """One request through the client's own session, so that proxies and mirrors count."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT_S)
    except Exception as problem:  # the client's errors differ between its releases; all mean "not reachable"
        logging.getLogger(__name__).info("the hub cannot be reached: %s", problem)
        return False
    return True
