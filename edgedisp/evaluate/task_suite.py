"""From task names to results: the held-out tasks, and whatever lm-evaluation-harness knows.

Three steps, so that nothing fails late: `check_tasks` reads names only; `prepare` builds the held-out items
and reads the data sets; `TaskSuite.run` scores one model. lm-eval is an extra (`edgedisp[bench]`), imported
only for tasks that are not held-out.
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
from edgedisp.core.results import ANSWERS_TASK
from edgedisp.data import Conversation, Document
from edgedisp.evaluate import answers, heldout_tasks
from edgedisp.evaluate.comparison import Results
from edgedisp.evaluate.heldout_tasks import Question, SuiteOptions, Text
from edgedisp.evaluate.loglikelihood import DEFAULT_OPTIONS, ScoreOptions, TextTokenizer
from edgedisp.evaluate.statistics import DEFAULT, Resampling

PAPER = "anli_r2 lambada_openai openbookqa piqa truthfulqa_mc2 winogrande arc_easy arc_challenge medmcqa mmlu"
SETS: dict[str, tuple[str, ...]] = {
    # made from the recipe's text
    "heldout": tuple(heldout_tasks.TASKS),
    # those of the dispersion paper (arXiv 2602.00217, table 1); models below 500M guess at about half of them
    "paper": tuple(PAPER.split()),
    # what 100M to 600M answer above chance (SmolLM2-135M's card: HellaSwag 42 %, ARC 44 %, PIQA 68 %)
    "small": ("arc_easy", "hellaswag", "lambada_openai", "openbookqa", "piqa", "sciq"),
}
_NAME = re.compile(r"^(?:[\"']?(?:task|group|tag)[\"']?:|[ \t]*-)[ \t]*[\"'\[]?([^\s\"'#,\]]+)", re.MULTILINE)


@dataclass(frozen=True)
class TaskSuite:
    """Tasks with their items, ready for any number of models. missing: task -> why its data cannot be had."""

    questions: dict[str, list[Question]]
    harness_tasks: dict[str, dict[str, Any]]
    tokenizer: TextTokenizer
    options: SuiteOptions
    missing: dict[str, str]

    def run(
        self, model: Any, options: ScoreOptions = DEFAULT_OPTIONS, bootstrap: int = DEFAULT.bootstrap
    ) -> Results:
        """Score a model; bos_token is the suite's own. Raises BuildFailed for logits that are not finite."""
        resampling, results = Resampling(bootstrap, self.options.seed), {}
        options = replace(options, bos_token=self.tokenizer.bos_token)
        for name, questions in self.questions.items():
            of_task = replace(options, progress=labelled(options.progress, name))
            if name == ANSWERS_TASK:
                scored = answers.score(questions, model, self.tokenizer, self.options, of_task, resampling)
                results[name] = scored
            else:
                results[name] = heldout_tasks.score(name, questions, model, of_task, resampling)
        for name, tasks in self.harness_tasks.items():
            from edgedisp.evaluate import lm_eval_adapter

            of_task = replace(options, progress=labelled(options.progress, name))
            adapter = lm_eval_adapter.HarnessModel(model, self.tokenizer, of_task)
            results[name] = lm_eval_adapter.score(adapter, name, tasks, self.options.limit, resampling)
        return results


def expand(names: Iterable[str]) -> list[str]:
    """The tasks that the names stand for, each once, in order."""
    return [*dict.fromkeys(task for name in names for task in SETS.get(name, (name,)))]


def check_tasks(tasks: Sequence[str], tasks_path: Path | None = None, trust_task_code: bool = False) -> None:
    """Raise BadInput for an unknown name, a missing lm-eval, a tasks_path that is no folder, or whose code is
    not trusted. Names are looked for in the text of lm-eval's task files, which takes a second; its own index
    takes ten."""
    heldout = [*heldout_tasks.TASKS, ANSWERS_TASK]
    known = [*heldout, *SETS]
    choices = ", ".join(known)
    if tasks_path is not None and not tasks_path.is_dir():
        raise BadInput(f"evaluate.tasks_path: {tasks_path} is no folder of lm-evaluation-harness tasks")
    names = unknown = [task for task in expand(tasks) if task not in heldout]
    if not names:
        return
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        hint = 'those of lm-evaluation-harness need it installed: pip install "edgedisp[bench]"'
    else:
        folders = [Path(location) / "tasks" for location in spec.submodule_search_locations]
        folders += [] if tasks_path is None else [tasks_path]
        paths = [path for folder in folders for path in folder.rglob("*") if path.suffix in ("", ".yaml")]
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file())
        known += {name for text in texts for name in _NAME.findall(text)}
        unknown = sorted({*names} - {*known})
        hint = "those of lm-evaluation-harness are listed by lm_eval ls tasks"
    if unknown:
        close = [match for name in unknown for match in difflib.get_close_matches(name, known)]
        near = f" (did you mean {', '.join(dict.fromkeys(close))}?)" if close else ""
        raise BadInput(
            f"evaluate.tasks: {', '.join(unknown)}: no such task{near}. Held-out tasks are {choices}; {hint}"
        )
    if tasks_path is not None and not trust_task_code:
        check_task_code([*tasks_path.rglob("*.yaml"), *map(Path, names)])  # a name may also be a file


def check_task_code(files: Iterable[Path]) -> None:
    """Raise BadInput for task files of lm-eval that run code of strangers, also by what they include.

    That is Python behind `!function`, and a metric unknown to lm-eval, as `evaluate` runs the script of that
    name. Files are parsed as lm-eval does, but nothing that they name is imported.
    """
    import yaml
    from lm_eval.api import metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import METRIC_REGISTRY

    programs: list[str] = []

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            metric = mapping.get("metric")
            if isinstance(metric, str) and (mapping.get("hf_evaluate") or metric not in METRIC_REGISTRY):
                programs.append(f"metric: {metric}")
            return mapping

    Loader.add_constructor("!function", lambda loader, node: programs.append(f"!function {node.value}"))
    queue, seen = [*files], set[Path]()
    while queue:
        file = queue.pop().expanduser().resolve()
        if file in seen or not file.is_file():
            continue
        seen.add(file)
        try:
            content = yaml.load(file.read_bytes(), Loader)
        except (yaml.YAMLError, ValueError) as error:  # such as the date 2024-02-30
            raise BadInput(f"{file}: is no task of lm-eval: {' '.join(str(error).split())}") from error
        if programs:
            raise BadInput(
                f"{file}: has `{programs[0]}`, which runs a program with all your rights; if you trust those "
                "who wrote it, say trust_task_code: true (--trust-task-code on the command line)"
            )
        includes = content.get("include") if isinstance(content, dict) else None
        names = includes if isinstance(includes, list) else [includes]
        queue += [file.parent / name for name in names if isinstance(name, str)]


def prepare(tokenizer: Any, documents: Sequence[Document], options: SuiteOptions) -> TaskSuite:
    """Build the items of all tasks, before training, so that what cannot be scored is known then. Raises
    BadInput as `check_tasks` does, for too little held-out text, and when no task is left."""
    check_tasks(options.tasks, options.tasks_path, options.trust_task_code)
    conversations = [document for document in documents if isinstance(document, Conversation)]
    texts = [document for document in documents if not isinstance(document, Conversation)]
    text = Text(TextTokenizer(tokenizer), texts, options)
    names = expand(options.tasks)
    questions = {name: heldout_tasks.build(name, text) for name in names if name in heldout_tasks.TASKS}
    if ANSWERS_TASK in names:
        questions[ANSWERS_TASK] = answers.build(conversations, text.tokenizer, options)
    harness_tasks: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    if harness_names := [name for name in names if name not in questions]:
        from edgedisp.evaluate import lm_eval_adapter

        harness_tasks, missing = lm_eval_adapter.load(harness_names, options.tasks_path, options.seed)
    if not questions and not harness_tasks:
        raise BadInput(f"evaluate.tasks: {next(iter(missing.values()))}")
    return TaskSuite(questions, harness_tasks, text.tokenizer, options, missing)
