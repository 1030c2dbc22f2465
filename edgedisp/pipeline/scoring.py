"""Scores of one model on a suite of tasks, and the noise floor of such scores.

Scores are kept in a cache, so an interrupted scoring continues, and a task that is added costs no more than
itself.

The noise floor says how far two scorings of one model differ when nothing about it has changed. Sums taken in
another order give other last bits: 1e-6 of a log-probability in fp32; in int8 arithmetic now and then a whole
step of an activation, and thirty layers later a token by a tenth of a nat. A difference between two models
that is no larger means nothing.
"""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedisp import models
from edgedisp.bench.system import installed_version, runner
from edgedisp.core.files import digest, file_digest
from edgedisp.core.progress import Progress
from edgedisp.core.results import Estimate, NoiseFloor
from edgedisp.core.stage_folder import read
from edgedisp.evaluate import heldout_tasks
from edgedisp.evaluate.comparison import Results, TaskResult, compare_task
from edgedisp.evaluate.heldout_items import Question
from edgedisp.evaluate.loglikelihood import ScoreOptions
from edgedisp.evaluate.score_cache import ScoreCache
from edgedisp.evaluate.statistics import Resampling
from edgedisp.evaluate.task_suite import TaskSuite
from edgedisp.graph.session import OnnxModel

NOISE_TASK = "heldout_perplexity"
# Read at most; more would cost as much as the scoring itself. A bundle decodes half of them.
NOISE_TOKENS = {"torch": 8192, "bundle": 2048}


@dataclass(frozen=True)
class ModelSource:
    """A Hugging Face folder or a bundle, how many threads it gets, and the file of its scores."""

    folder: Path
    threads: int
    cache: Path

    @property
    def is_bundle(self) -> bool:
        return (self.folder / "model.onnx").is_file()

    def open(self) -> Any:
        """A model that can be scored (`loglikelihood.LanguageModel`)."""
        if self.is_bundle:
            return OnnxModel(self.folder, self.threads)
        return models.TorchModel(models.load(self.folder), self.threads)

    def scores(self) -> ScoreCache:
        """The scores of this model, as this machine computes them."""
        return ScoreCache(self.cache, score_key(self.folder, 1 if self.is_bundle else self.threads))


def score_key(folder: Path, threads: int) -> str:
    """Hash of all that a score depends on beside the question: the files, the runtimes, the processor, and
    the threads of one sequence (a bundle's take one each, however many run side by side)."""
    record = read(folder)
    if record is None:  # a folder from elsewhere
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        content = digest({path.relative_to(folder).as_posix(): file_digest(path) for path in files})
    else:
        content = record.content
    versions = {name: installed_version(name) for name in ("torch", "transformers", "onnxruntime")}
    return digest({"content": content, "threads": threads, "processor": runner().cpu(), **versions})


def score_tasks(
    source: ModelSource, model: Any, suite: TaskSuite, bootstrap: int, progress: Progress
) -> Results:
    """Score an open model on all tasks, through the score cache."""
    with closing(source.scores()) as cache:
        return suite.run(model, ScoreOptions(cache=cache, progress=progress), bootstrap)


class _TokenByToken:
    """A bundle that reads the second half of a sequence one token at a time through its cache, as it decodes.

    Products with one row have kernels of their own, which sum in another order.
    """

    parallel = 1

    def __init__(self, model: OnnxModel) -> None:
        self.model, self.context, self.vocab_size = model, model.context, model.vocab_size

    def logits(self, ids: NDArray[np.int64], last: int) -> NDArray[np.float32]:
        row, half = ids[None], max(1, len(ids) // 2)
        logits, cache = self.model.prefill(row[:, :half], np.ones((1, half), np.int64))
        rows = [logits[0]]
        for place in range(half, len(ids)):
            mask = np.ones((1, place + 1), np.int64)
            logits, cache = self.model.decode(row[:, place : place + 1], mask, cache)
            rows.append(logits[0])
        joined: NDArray[np.float32] = np.concatenate(rows)[-last:]
        return joined

    def greedy(self, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        return self.model.greedy(ids, max_new_tokens, stop_ids)


def noise_floor(
    source: ModelSource, model: Any, suite: TaskSuite, bootstrap: int, progress: Progress
) -> NoiseFloor | None:
    """Score an open model in another way on the held-out loss; None without that task.

    Variants: a bundle reads half of each text token by token; a torch model takes another number of threads,
    and another implementation of attention. The floor is that of a mean over all of the task's documents.
    """
    questions = suite.questions.get(NOISE_TASK, [])
    if not questions:
        return None
    part, resampling = (
        _part(questions, NOISE_TOKENS["bundle" if source.is_bundle else "torch"]),
        Resampling(bootstrap, suite.text.seed),
    )
    if source.is_bundle:
        others: dict[str, Any] = {"decoding": _TokenByToken(model)}
    else:
        eager = models.load(source.folder)
        eager.set_attn_implementation("eager")
        other_threads = source.threads - 1 if source.threads > 1 else 2
        others = {
            "threads": models.TorchModel(model.model, other_threads),
            "attention": models.TorchModel(eager, source.threads),
        }

    def scored(model: Any, cache: ScoreCache | None, note: str) -> TaskResult:
        named = ScoreOptions(
            suite.text.end_of_text,
            suite.text.bos_token,
            cache,
            lambda done, total, _: progress(done, total, f"noise floor, {note}"),
        )
        return heldout_tasks.score(NOISE_TASK, part, model, named, resampling)

    with closing(source.scores()) as cache:
        usual = scored(model, cache, "as scored")
    variants: dict[str, Estimate] = {}
    for name, other in others.items():
        change = compare_task([(usual, scored(other, None, f"other {name}"))], resampling).main
        variants[name] = change.nats or change.estimate
    measured = usual.score.main.estimate.documents or 1
    documents = len({question.document for question in questions})
    return NoiseFloor(max(_floor(one, measured / documents) for one in variants.values()), variants)


def _part(questions: list[Question], tokens: int) -> list[Question]:
    """The first questions, so many tokens of text."""
    part: list[Question] = []
    spent = 0
    for question in questions:
        spent += sum(len(target) for _, target in question.requests)
        if part and spent > tokens:
            break
        part.append(question)
    return part


def _floor(difference: Estimate, share: float) -> float:
    """The larger of the shift that was seen, and of what chance alone leaves in a mean over all documents, of
    which a `share` was measured."""
    shift = abs(difference.value or 0.0)
    half = difference.half_width
    return shift if half is None else max(shift, half * math.sqrt(share))
