"""From task names to results: the held-out tasks, and whatever lm-evaluation-harness knows.

Three steps, so that nothing fails late: `check_tasks` reads names only; `prepare` builds the held-out items
and reads the data sets; `TaskSuite.run` scores one model. One suite serves all arms and precisions of a
build. lm-eval is an extra (`edgedisp[bench]`), imported only for tasks that are not held-out.

Names of several tasks: `heldout`, the three made from the recipe's own text; `paper`, the ten of the
dispersion paper (arXiv 2602.00217, table 1), about half of which models below 500M guess; `small`, those that
models of 100M to 600M answer above chance (SmolLM2-135M's model card: HellaSwag 42 %, ARC 44 %, PIQA 68 %,
OpenBookQA 35 %, where guessing gives 25, 25, 50 and 25).
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress
from edgedisp.evaluate import heldout_tasks
from edgedisp.evaluate.comparison import Results
from edgedisp.evaluate.heldout_items import Document, Question, Text
from edgedisp.evaluate.loglikelihood import DEFAULT_OPTIONS, LanguageModel, ScoreOptions
from edgedisp.evaluate.statistics import DEFAULT, Resampling

SETS: dict[str, tuple[str, ...]] = {
    "heldout": tuple(heldout_tasks.TASKS),
    "paper": (
        "anli_r2",
        "lambada_openai",
        "openbookqa",
        "piqa",
        "truthfulqa_mc2",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "medmcqa",
        "mmlu",
    ),
    "small": ("arc_easy", "hellaswag", "lambada_openai", "openbookqa", "piqa", "sciq"),
}


_NAME = re.compile(r"^[\"']?(?:task|group)[\"']?:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)


@dataclass(frozen=True)
class SuiteOptions:
    """Which items a suite holds.

    context: tokens of a held-out window, at most the models' own. limit: most items of each task.
    perplexity_tokens: most tokens of heldout_perplexity. tasks_path: a folder of lm-eval YAML.
    """

    tasks: tuple[str, ...]
    context: int = 512
    limit: int = 100
    seed: int = 0
    perplexity_tokens: int | None = None
    tasks_path: Path | None = None


@dataclass(frozen=True)
class TaskSuite:
    """Tasks with their items, ready for any number of models. missing: task -> why its data cannot be had."""

    questions: dict[str, list[Question]]
    harness_tasks: dict[str, dict[str, Any]]
    text: Text
    limit: int
    missing: dict[str, str]

    def run(
        self,
        model: LanguageModel,
        options: ScoreOptions = DEFAULT_OPTIONS,
        bootstrap: int = DEFAULT.bootstrap,
    ) -> Results:
        """Score a model. Of `options` cache and progress count.

        Raises BuildFailed for logits that are not finite.
        """
        text, resampling, results = self.text, Resampling(bootstrap, self.text.seed), {}
        for name, questions in self.questions.items():
            progress = _named(options.progress, name)
            named = ScoreOptions(text.end_of_text, text.bos_token, options.cache, progress)
            results[name] = heldout_tasks.score(name, questions, model, named, resampling)
        if self.harness_tasks:
            from edgedisp.evaluate import lm_eval_adapter
        for name, tasks in self.harness_tasks.items():
            progress = _named(options.progress, name)
            adapter = lm_eval_adapter.HarnessModel(model, text, options.cache, progress)
            results[name] = lm_eval_adapter.score(adapter, name, tasks, self.limit, resampling)
        return results


def expand(names: Iterable[str]) -> list[str]:
    """The tasks that the names stand for, each once, in order."""
    return [*dict.fromkeys(task for name in names for task in SETS.get(name, (name,)))]


def check_tasks(tasks: Sequence[str], tasks_path: Path | None = None) -> None:
    """Raise BadInput for an unknown name, a missing lm-eval, or a tasks_path that is no folder.

    Reads no data set. Held-out names cost nothing; others are looked up in the text of the task files (a
    second), and only a name that is not there makes lm-eval read its index of 14,000 (some seconds).
    """
    known = [*heldout_tasks.TASKS, *SETS]
    choices = ", ".join(known)
    if not tasks:
        raise BadInput(f"evaluate.tasks is empty; choose from {choices}, or lm-eval task names")
    if tasks_path is not None and not tasks_path.is_dir():
        raise BadInput(
            f"evaluate.tasks_path: {tasks_path} is no folder; name one that holds lm-eval task YAML"
        )
    others = [task for task in expand(tasks) if task not in heldout_tasks.TASKS]
    if not others:
        return
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            f"evaluate.tasks: {', '.join(others)}: not a held-out task{_nearest(others, known)}. "
            f"Held-out tasks are {choices}; those of lm-evaluation-harness need it installed: "
            'pip install "edgedisp[bench]"'
        )
    folders = [Path(place) / "tasks" for place in spec.submodule_search_locations]
    names = _names_in(folders if tasks_path is None else [tasks_path, *folders])
    if set(others) <= names:
        return
    from edgedisp.evaluate import lm_eval_tasks

    with lm_eval_tasks.quiet():  # the index also knows tags and names made by templates
        names = set(lm_eval_tasks.task_index(others, tasks_path).all_tasks)
    if unknown := [name for name in others if name not in names]:
        near = _nearest(unknown, [*known, *sorted(names)])
        raise BadInput(
            f"evaluate.tasks: {', '.join(unknown)}: no such task{near}. "
            f"There are {choices} and {len(names)} names in lm-eval (list: lm_eval ls tasks)"
        )


def _names_in(folders: Sequence[Path]) -> set[str]:
    """Names of the tasks and groups that YAML files give themselves, found without parsing them."""
    paths = (path for folder in folders for path in folder.rglob("*.yaml"))
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return {name for text in texts for name in _NAME.findall(text)}


def _nearest(names: Sequence[str], known: Sequence[str]) -> str:
    """' (did you mean a, b?)' for names that resemble known ones, or nothing."""
    close = [match for name in names for match in difflib.get_close_matches(name, known)]
    return f" (did you mean {', '.join(dict.fromkeys(close))}?)" if close else ""


def prepare(
    tokenizer: Any,
    documents: Sequence[Document],
    options: SuiteOptions,
    end_of_text: int,
    bos_token: int | None = None,
) -> TaskSuite:
    """Build the items of all tasks; call it before training, so that what cannot be scored is known then.

    tokenizer: a transformers tokenizer. end_of_text: the token between documents. bos_token: the one that
    every text begins with, if the models know such. Raises BadInput as `check_tasks` does, for too little
    held-out text, and when no task is left.
    """
    check_tasks(options.tasks, options.tasks_path)
    text = tokenizer_text(tokenizer, end_of_text, bos_token, options.context)
    text = replace(text, documents=documents, seed=options.seed, perplexity_tokens=options.perplexity_tokens)
    names = expand(options.tasks)
    questions = {
        name: heldout_tasks.build(name, text, options.limit) for name in names if name in heldout_tasks.TASKS
    }
    harness_tasks: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    if others := [name for name in names if name not in heldout_tasks.TASKS]:
        from edgedisp.evaluate import lm_eval_tasks

        harness_tasks, missing = lm_eval_tasks.load(others, options.tasks_path, options.seed)
    if not questions and not harness_tasks:
        raise BadInput(f"evaluate.tasks: {next(iter(missing.values()))}")
    return TaskSuite(questions, harness_tasks, text, options.limit, missing)


def tokenizer_text(tokenizer: Any, end_of_text: int, bos_token: int | None, context: int) -> Text:
    """A `Text` without documents: how a tokenizer's models read."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    stop_ids = frozenset({end_of_text} | ({tokenizer.eos_token_id} - {None}))
    return Text((), encode, decode, end_of_text, context, bos_token=bos_token, stop_ids=stop_ids)


def _named(progress: Progress, task: str) -> Progress:
    return lambda done, total, note: progress(done, total, f"{task}: {note}")
