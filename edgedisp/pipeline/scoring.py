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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedisp import models
from edgedisp.bench.system import installed_version, runner
from edgedisp.core.files import digest, list_files
from edgedisp.core.progress import Progress, labelled
from edgedisp.core.results import LOSS_TASK, Estimate, NoiseFloor
from edgedisp.core.stage_folder import read
from edgedisp.evaluate.comparison import Results, compare_task
from edgedisp.evaluate.heldout_tasks import Question
from edgedisp.evaluate.loglikelihood import ScoreCache, ScoreOptions
from edgedisp.evaluate.statistics import Resampling
from edgedisp.evaluate.task_suite import TaskSuite
from edgedisp.graph.session import OnnxModel

NOISE_TOKENS, DECODED_TOKENS = 8192, 2048  # read at most, and by a bundle, which decodes half of them


class Scorer:
    """A Hugging Face folder or a bundle, opened as `model`, whose scores are cached in the file `cache`."""

    def __init__(self, folder: Path, threads: int, cache: Path) -> None:
        self.folder, self.threads, self.cache = folder, threads, cache
        self.is_bundle = (folder / "model.onnx").is_file()
        self.model: Any
        if self.is_bundle:
            self.model = OnnxModel(folder, threads)
        else:
            self.model = models.TorchModel(models.load(folder), threads)

    def score(self, suite: TaskSuite, bootstrap: int, progress: Progress) -> Results:
        """The scores on all tasks, through the cache."""
        with closing(self._scores()) as cache:
            return suite.run(self.model, ScoreOptions(cache=cache, progress=progress), bootstrap)

    def _scores(self) -> ScoreCache:
        return ScoreCache(self.cache, score_key(self.folder, 1 if self.is_bundle else self.threads))

    def noise_floor(self, suite: TaskSuite, bootstrap: int, progress: Progress) -> NoiseFloor | None:
        """Score the held-out loss in another way; None without that task.

        Variants: a bundle reads half of each text token by token; a torch model takes another number of
        threads, and another implementation of attention. The floor is that of a mean over all documents.
        """
        questions = suite.questions.get(LOSS_TASK, [])
        if not questions:
            return None
        part = _first_tokens(questions, DECODED_TOKENS if self.is_bundle else NOISE_TOKENS)
        sample = replace(suite, questions={LOSS_TASK: part}, harness_tasks={})
        usual = self.score(sample, bootstrap, labelled(progress, "noise floor, as scored"))[LOSS_TASK]
        changes: dict[str, Estimate] = {}
        for name, variant in self._variants().items():
            options = ScoreOptions(progress=labelled(progress, f"noise floor, other {name}"))
            pair = usual, sample.run(variant, options, bootstrap)[LOSS_TASK]
            change = compare_task([pair], Resampling(bootstrap, suite.options.seed)).main
            changes[name] = change.nats or change.estimate
        documents = len({question.document for question in questions})
        share = (usual.score.main.estimate.documents or 1) / documents
        return NoiseFloor(max(_floor(change, share) for change in changes.values()), changes)

    def _variants(self) -> dict[str, Any]:
        if self.is_bundle:
            return {"decoding": _TokenByToken(self.model)}
        eager = models.load(self.folder)
        eager.set_attn_implementation("eager")
        threads = self.threads - 1 if self.threads > 1 else 2
        return {
            "threads": models.TorchModel(self.model.model, threads),
            "attention": models.TorchModel(eager, self.threads),
        }


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
        logits, cache = self.model.decode(row[:, :half], np.ones((1, half), np.int64))
        rows = [logits[0]]
        for position in range(half, len(ids)):
            mask = np.ones((1, position + 1), np.int64)
            logits, cache = self.model.decode(row[:, position : position + 1], mask, cache)
            rows.append(logits[0])
        joined: NDArray[np.float32] = np.concatenate(rows)[-last:]
        return joined


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
