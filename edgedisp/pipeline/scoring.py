"""Scores of one model on a suite of tasks, and the noise floor of such scores.

Scores are cached, so an interrupted scoring continues, and a task that is added costs no more than itself.

The noise floor says how far two scorings of one model differ when nothing about it has changed. Sums taken in
another order give other last bits: 1e-6 of a log-probability in fp32; in int8 arithmetic now and then a whole
step of an activation, and thirty layers later a token by a tenth of a nat. A difference between two models
that is no larger means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedisp import models
from edgedisp.bench.system import installed_version, runner
from edgedisp.core.files import digest, list_files
from edgedisp.core.progress import Progress, labelled
from edgedisp.core.results import Estimate, NoiseFloor
from edgedisp.core.stage_folder import read
from edgedisp.evaluate.comparison import Results, TaskResult, compare_task
from edgedisp.evaluate.heldout_tasks import Question
from edgedisp.evaluate.loglikelihood import ScoreCache, ScoreOptions
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
    files = list_files(folder) if record is None else record.files
    return digest(
        {
            "content": digest({name: entry["sha256"] for name, entry in files.items()}),
            "threads": threads,
            "processor": runner().cpu(),
            **{name: installed_version(name) for name in ("torch", "transformers", "onnxruntime")},
        }
    )


def score_tasks(
    source: ModelSource, model: Any, suite: TaskSuite, bootstrap: int, progress: Progress
) -> Results:
    """Score an open model on all tasks, through the score cache."""
    with closing(source.scores()) as cache:
        return suite.run(model, ScoreOptions(cache=cache, progress=progress), bootstrap)


# The noise floor


class _TokenByToken:
    """A bundle that reads the second half of a sequence one token at a time through its cache, as it decodes.

    Products with one row have kernels of their own, which sum in another order.
    """

    parallel = 1

    def __init__(self, model: OnnxModel) -> None:
        self.model, self.context, self.vocab_size = model, model.context, model.vocab_size
        self.greedy = model.greedy

    def logits(self, ids: NDArray[np.int64], last: int) -> NDArray[np.float32]:
        row, half = ids[None], max(1, len(ids) // 2)
        logits, cache = self.model.prefill(row[:, :half], np.ones((1, half), np.int64))
        rows = [logits[0]]
        for position in range(half, len(ids)):
            mask = np.ones((1, position + 1), np.int64)
            logits, cache = self.model.decode(row[:, position : position + 1], mask, cache)
            rows.append(logits[0])
        joined: NDArray[np.float32] = np.concatenate(rows)[-last:]
        return joined


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
    if source.is_bundle:
        variants: dict[str, Any] = {"decoding": _TokenByToken(model)}
    else:
        eager = models.load(source.folder)
        eager.set_attn_implementation("eager")
        threads = source.threads - 1 if source.threads > 1 else 2
        variants = {
            "threads": models.TorchModel(model.model, threads),
            "attention": models.TorchModel(eager, source.threads),
        }
    part = _first_tokens(questions, NOISE_TOKENS["bundle" if source.is_bundle else "torch"])
    sample = replace(suite, questions={NOISE_TASK: part}, harness_tasks={})

    def score(model: Any, cache: ScoreCache | None, note: str) -> TaskResult:
        options = ScoreOptions(cache=cache, progress=labelled(progress, f"noise floor, {note}"))
        return sample.run(model, options, bootstrap)[NOISE_TASK]

    with closing(source.scores()) as cache:
        usual = score(model, cache, "as scored")
    changes: dict[str, Estimate] = {}
    for name, variant in variants.items():
        resampling = Resampling(bootstrap, suite.options.seed)
        change = compare_task([(usual, score(variant, None, f"other {name}"))], resampling).main
        changes[name] = change.nats or change.estimate
    documents = len({question.document for question in questions})
    share = (usual.score.main.estimate.documents or 1) / documents
    return NoiseFloor(max(_floor(change, share) for change in changes.values()), changes)


def _first_tokens(questions: Sequence[Question], tokens: int) -> list[Question]:
    """The first questions, so many tokens of text, one at least."""
    part: list[Question] = []
    for question in questions:
        tokens -= sum(len(target) for _, target in question.requests)
        if part and tokens < 0:
            break
        part.append(question)
    return part


def _floor(difference: Estimate, share: float) -> float:
    """The larger of the shift that was seen, and of what chance alone leaves in a mean over all documents, of
    which a `share` was measured."""
    shift = abs(difference.value or 0.0)
    half = difference.half_width
    return shift if half is None else max(shift, half * math.sqrt(share))
