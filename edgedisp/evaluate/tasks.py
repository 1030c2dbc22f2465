"""From task names to results: the held-out tasks, and whatever lm-evaluation-harness knows.

Three steps, so that nothing fails late: `check_tasks` reads names only; `prepare` builds the held-out items
and reads the data sets; `Suite.run` scores one model. One suite serves all arms and precisions of a build,
which share documents, tokenizer and seed, so all of them answer the same items.

lm-eval is an extra (`edgedisp[bench]`): it is imported only when a task is asked for that is not held-out.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.evaluate import heldout
from edgedisp.evaluate.kept import Kept
from edgedisp.evaluate.questions import Document, Question, Text
from edgedisp.evaluate.result import TaskResult
from edgedisp.evaluate.score import Decode, Encode, LanguageModel
from edgedisp.evaluate.sets import SETS, expand

CONTEXT = 512  # tokens of a held-out window when nothing else is said

_OURS = [*heldout.TASKS, *SETS]

_NAME = re.compile(r"^[\"']?(?:task|group)[\"']?:[ \t]*[\"']?([^\s\"'#]+)", re.MULTILINE)


@dataclass(frozen=True)
class Suite:
    """Tasks with their items, ready to be asked of any number of models. stop_ids end generated text;
    missing: why the data of a task cannot be had."""

    questions: dict[str, list[Question]]
    harness_tasks: dict[str, dict[str, Any]]
    text: Text
    limit: int
    stop_ids: frozenset[int]
    missing: dict[str, str]

    def run(
        self,
        model: LanguageModel,
        *,
        batch_tokens: int = 1024,
        bootstrap: int = 2000,
        kept: Kept | None = None,
        progress: Progress = silent,
    ) -> dict[str, TaskResult]:
        """Score a model: {task: result}. `kept`: this model's scores of earlier.

        Raises BuildFailed for logits that are not finite.
        """
        results: dict[str, TaskResult] = {}
        for name, questions in self.questions.items():
            results[name] = heldout.score(
                name,
                questions,
                model,
                batch_tokens=batch_tokens,
                bootstrap=bootstrap,
                seed=self.text.seed,
                kept=kept,
                progress=_named(progress, name),
            )
        for name in self.harness_tasks:
            results[name] = self._run_harness(name, model, batch_tokens, bootstrap, kept, progress)
        return results

    def _run_harness(
        self,
        name: str,
        model: LanguageModel,
        batch_tokens: int,
        bootstrap: int,
        kept: Kept | None,
        progress: Progress,
    ) -> TaskResult:
        from edgedisp.evaluate import harness

        subject = harness.HarnessModel(
            model,
            self.text.encode,
            self.text.decode,
            self.text.end_of_text,
            lead=self.text.lead,
            stop_ids=self.stop_ids,
            batch_tokens=batch_tokens,
            kept=kept,
            progress=_named(progress, name),
        )
        tasks = self.harness_tasks[name]
        return harness.run(subject, name, tasks, limit=self.limit, seed=self.text.seed, bootstrap=bootstrap)


def check_tasks(tasks: Sequence[str], tasks_path: Path | None = None) -> None:
    """Raise BadInput for any unknown name, a missing lm-eval, or a tasks_path that is no folder.

    Reads no data set. Held-out names cost nothing; other names are looked up in the text of the task files
    (about a second), and only a name that is not there makes lm-eval read all of its index (some seconds).
    """
    choices = ", ".join(_OURS)
    if not tasks:
        raise BadInput(f"evaluate.tasks is empty; choose from {choices}, or lm-eval task names")
    tasks = expand(tasks)
    if tasks_path is not None and not tasks_path.is_dir():
        raise BadInput(
            f"evaluate.tasks_path: {tasks_path} is no folder; name one that holds lm-eval task YAML"
        )
    others = [task for task in tasks if task not in heldout.TASKS]
    if not others:
        return
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        near = _near(others, [*heldout.TASKS]) or _near(others, [*SETS])
        raise BadInput(
            f"evaluate.tasks: {', '.join(others)}: not a held-out task{near}. "
            f"Held-out tasks are {choices}; those of lm-evaluation-harness need it installed: "
            'pip install "edgedisp[bench]"'
        )
    folders = [Path(place) / "tasks" for place in spec.submodule_search_locations]
    missing = sorted(set(others) - _names_in(folders if tasks_path is None else [tasks_path, *folders]))
    for name in missing:
        if near := _near([name], _OURS, cutoff=0.8):
            raise BadInput(f"evaluate.tasks: {name}: no such task{near}. Held-out tasks are {choices}")
    if missing:
        _check_index(missing, tasks_path)


def _check_index(names: Sequence[str], tasks_path: Path | None) -> None:
    """Look names up in lm-eval's own index, which also knows tags and names made by its templates."""
    from edgedisp.evaluate import catalog

    known = set(catalog.known_names(tasks_path))
    unknown = [name for name in names if name not in known]
    if unknown:
        near = _near(unknown, [*_OURS, *sorted(known)])
        raise BadInput(
            f"evaluate.tasks: {', '.join(unknown)}: no such task{near}. There are "
            f"{', '.join(_OURS)} "
            f"and {len(known)} names in lm-eval (list: lm_eval ls tasks)"
        )


def prepare(
    tokenizer: Any,
    tasks: Sequence[str],
    documents: Sequence[Document],
    *,
    end_of_text: int,
    lead: int | None = None,
    context: int = CONTEXT,
    limit: int = 100,
    seed: int = 0,
    perplexity_tokens: int | None = None,
    tasks_path: Path | None = None,
) -> Suite:
    """Build the items of all tasks; call it before training, so that what cannot be scored is known then.

    tokenizer: a transformers tokenizer. end_of_text: the token between documents. lead: the one that every
    text begins with, if the models know such. context: tokens of a held-out window, at most the models' own.
    limit: most items of each task. perplexity_tokens: most tokens of heldout_perplexity. A task whose data a
    hub does not give is told in `missing`. Raises BadInput as `check_tasks` does, for too little held-out
    text, and when no task is left.
    """
    check_tasks(tasks, tasks_path)
    text = Text(
        documents, encoder(tokenizer), decoder(tokenizer), end_of_text, context, seed, perplexity_tokens, lead
    )
    names = expand(tasks)
    questions = {name: heldout.build(name, text, limit) for name in names if name in heldout.TASKS}
    harness_tasks: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    others = [name for name in names if name not in heldout.TASKS]
    if others:
        from edgedisp.evaluate import catalog

        harness_tasks, missing = catalog.load(others, tasks_path, seed)
    if not questions and not harness_tasks:
        raise BadInput(f"evaluate.tasks: {next(iter(missing.values()))}")
    stop_ids = {end_of_text} | ({tokenizer.eos_token_id} - {None})
    return Suite(questions, harness_tasks, text, limit, frozenset(stop_ids), missing)


def run(
    model: LanguageModel,
    tokenizer: Any,
    tasks: Sequence[str],
    documents: Sequence[Document],
    *,
    end_of_text: int,
    lead: int | None = None,
    context: int | None = None,
    limit: int = 100,
    seed: int = 0,
    batch_tokens: int = 1024,
    perplexity_tokens: int | None = None,
    tasks_path: Path | None = None,
    bootstrap: int = 2000,
    progress: Progress = silent,
) -> dict[str, TaskResult]:
    """`prepare` and `Suite.run` in one call, for a single model: {task: result}.

    context: None takes what the model allows, at most 512; give the recipe's, so that all models agree.
    """
    suite = prepare(
        tokenizer,
        tasks,
        documents,
        end_of_text=end_of_text,
        lead=lead,
        context=min(model.context, CONTEXT if context is None else context),
        limit=limit,
        seed=seed,
        perplexity_tokens=perplexity_tokens,
        tasks_path=tasks_path,
    )
    return suite.run(model, batch_tokens=batch_tokens, bootstrap=bootstrap, progress=progress)


def encoder(tokenizer: Any) -> Encode:
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return encode


def decoder(tokenizer: Any) -> Decode:
    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    return decode


def _names_in(folders: Sequence[Path]) -> set[str]:
    """Names of the tasks and groups that YAML files give themselves, found without parsing them."""
    names: set[str] = set()
    for path in (path for folder in folders for path in folder.rglob("*.yaml")):
        names.update(_NAME.findall(path.read_text(encoding="utf-8", errors="replace")))
    return names


def _near(names: Sequence[str], known: Sequence[str], cutoff: float = 0.6) -> str:
    """' (did you mean a, b?)' for names that resemble known ones, or nothing."""
    close = [match for name in names for match in difflib.get_close_matches(name, known, n=3, cutoff=cutoff)]
    return f" (did you mean {', '.join(dict.fromkeys(close))}?)" if close else ""


def _named(progress: Progress, task: str) -> Progress:
    return lambda done, total, note: progress(done, total, f"{task}: {note}")
