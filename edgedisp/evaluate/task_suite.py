"""From task names to results: the held-out tasks, and whatever lm-evaluation-harness knows.

Three steps, so that nothing fails late: `check_tasks` reads names only; `prepare` builds the held-out items
and reads the data sets; `TaskSuite.run` scores one model. One suite serves all arms and precisions of a
build. lm-eval is an extra (`edgedisp[bench]`), imported only for tasks that are not held-out.
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
from edgedisp.core.progress import labelled
from edgedisp.data import Document
from edgedisp.evaluate import heldout_tasks
from edgedisp.evaluate.comparison import Results
from edgedisp.evaluate.heldout_tasks import Question, Text
from edgedisp.evaluate.loglikelihood import DEFAULT_OPTIONS, LanguageModel, ScoreOptions
from edgedisp.evaluate.statistics import DEFAULT, Resampling
from edgedisp.evaluate.tokenization import TextTokenizer

PAPER = "anli_r2 lambada_openai openbookqa piqa truthfulqa_mc2 winogrande arc_easy arc_challenge medmcqa mmlu"
SETS: dict[str, tuple[str, ...]] = {
    # made from the recipe's text
    "heldout": tuple(heldout_tasks.TASKS),
    # those of the dispersion paper (arXiv 2602.00217, table 1); models below 500M guess at about half of them
    "paper": tuple(PAPER.split()),
    # those that models of 100M to 600M answer above chance (SmolLM2-135M's model card: HellaSwag 42 %, ARC
    # 44 %, PIQA 68 %, OpenBookQA 35 %, where guessing gives 25, 25, 50 and 25)
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
    tokenizer: TextTokenizer
    options: SuiteOptions
    missing: dict[str, str]

    def run(
        self,
        model: LanguageModel,
        options: ScoreOptions = DEFAULT_OPTIONS,
        bootstrap: int = DEFAULT.bootstrap,
    ) -> Results:
        """Score a model; bos_token is the suite's own. Raises BuildFailed for logits that are not finite."""
        resampling, results = Resampling(bootstrap, self.options.seed), {}

        def options_of(task: str) -> ScoreOptions:
            progress = labelled(options.progress, task)
            return replace(options, bos_token=self.tokenizer.bos_token, progress=progress)

        for name, questions in self.questions.items():
            results[name] = heldout_tasks.score(name, questions, model, options_of(name), resampling)
        if self.harness_tasks:
            from edgedisp.evaluate import lm_eval_adapter
        for name, tasks in self.harness_tasks.items():
            adapter = lm_eval_adapter.HarnessModel(model, self.tokenizer, options_of(name))
            results[name] = lm_eval_adapter.score(adapter, name, tasks, self.options.limit, resampling)
        return results


def expand(names: Iterable[str]) -> list[str]:
    """The tasks that the names stand for, each once, in order."""
    return [*dict.fromkeys(task for name in names for task in SETS.get(name, (name,)))]


def check_tasks(tasks: Sequence[str], tasks_path: Path | None = None) -> None:
    """Raise BadInput for an unknown name, a missing lm-eval, or a tasks_path that is no folder.

    Reads no data set. Held-out names cost nothing; others are looked up in the text of the task files (a
    second), and only a name that is not there makes lm-eval read its index of 14,000 (some seconds).
    """
    local = [*heldout_tasks.TASKS, *SETS]
    choices = ", ".join(local)
    if not tasks:
        raise BadInput(f"evaluate.tasks is empty; choose from {choices}, or lm-eval task names")
    if tasks_path is not None and not tasks_path.is_dir():
        raise BadInput(f"evaluate.tasks_path: {tasks_path} is no folder of lm-evaluation-harness tasks")
    harness_names = [task for task in expand(tasks) if task not in heldout_tasks.TASKS]
    if not harness_names:
        return
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        near = _nearest(harness_names, local)
        raise BadInput(
            f"evaluate.tasks: {', '.join(harness_names)}: not a held-out task{near}. "
            f"Held-out tasks are {choices}; those of lm-evaluation-harness need it installed: "
            'pip install "edgedisp[bench]"'
        )
    folders = [Path(location) / "tasks" for location in spec.submodule_search_locations]
    folders += [] if tasks_path is None else [tasks_path]
    paths = [path for folder in folders for path in folder.rglob("*.yaml")]
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths)
    if set(harness_names) <= {name for text in texts for name in _NAME.findall(text)}:
        return
    from edgedisp.evaluate import lm_eval_tasks

    with lm_eval_tasks.quiet():  # the index also holds tags and names made by templates
        names = set(lm_eval_tasks.task_index(harness_names, tasks_path).all_tasks)
    if unknown := [name for name in harness_names if name not in names]:
        near = _nearest(unknown, [*local, *sorted(names)])
        raise BadInput(
            f"evaluate.tasks: {', '.join(unknown)}: no such task{near}. "
            f"There are {choices} and {len(names)} names in lm-eval (list: lm_eval ls tasks)"
        )


def _nearest(names: Sequence[str], choices: Sequence[str]) -> str:
    """' (did you mean a, b?)' for names that resemble a choice, or nothing."""
    close = [match for name in names for match in difflib.get_close_matches(name, choices)]
    return f" (did you mean {', '.join(dict.fromkeys(close))}?)" if close else ""


def prepare(
    tokenizer: Any,
    documents: Sequence[Document],
    options: SuiteOptions,
    end_of_text: int,
    bos_token: int | None = None,
) -> TaskSuite:
    """Build the items of all tasks; call it before training, so that what cannot be scored is known then.

    tokenizer: a transformers tokenizer; end_of_text and bos_token as in TextTokenizer. Raises BadInput as
    `check_tasks` does, for too little held-out text, and when no task is left.
    """
    check_tasks(options.tasks, options.tasks_path)
    encoder = TextTokenizer(tokenizer, end_of_text, bos_token)
    limits = options.context, options.limit, options.seed, options.perplexity_tokens
    text = Text(encoder, documents, *limits)
    names = expand(options.tasks)
    questions = {name: heldout_tasks.build(name, text) for name in names if name in heldout_tasks.TASKS}
    harness_tasks: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    if harness_names := [name for name in names if name not in questions]:
        from edgedisp.evaluate import lm_eval_tasks

        harness_tasks, missing = lm_eval_tasks.load(harness_names, options.tasks_path, options.seed)
    if not questions and not harness_tasks:
        raise BadInput(f"evaluate.tasks: {next(iter(missing.values()))}")
    return TaskSuite(questions, harness_tasks, encoder, options, missing)
