"""The noise floor: how far two scorings of ONE model differ when nothing about it has changed.

Sums taken in another order give other last bits. In fp32 that moves a log-probability by 1e-6; in int8
arithmetic now and then a whole step of an activation, and thirty layers later a token by a tenth of a nat. So
the same model is scored with another number of threads, and through another implementation of attention. What
differs then means nothing, and neither does a difference between two models that is no larger.
"""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any

from edgedisp import models
from edgedisp.core.progress import Progress
from edgedisp.evaluate import heldout
from edgedisp.evaluate.kept import Kept
from edgedisp.evaluate.questions import Question
from edgedisp.evaluate.result import TaskResult, compare_task
from edgedisp.evaluate.tasks import Suite
from edgedisp.graph.session import OnnxModel
from edgedisp.stages.figures import scored_name

MEASURED_BY = "heldout_perplexity"
NOISE_TOKENS = 8192  # read at most; more would cost as much as the scoring itself


class _Plain:
    """A model that reads padded batches alone: causal attention, not a forest's mask."""

    tree_nodes = 0

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, ids: Any, mask: Any) -> Any:
        return self.inner(ids, mask)


def noise(
    suite: Suite,
    model_folder: Path,
    bundle: Path | None,
    threads: int,
    store: Path,
    progress: Progress,
    *,
    batch_tokens: int = 1024,
    bootstrap: int = 2000,
) -> dict[str, Any]:
    """Score one model (the torch model where bundle is None) in three ways on the held-out loss.

    Returns {variants {name: {difference, low, high}}, floor, documents, all_documents}: nats per token, other
    way - usual way, and the floor for a mean over all of the recipe's documents; empty without that task.
    """
    questions = suite.questions.get(MEASURED_BY, [])
    if not questions:
        return {}
    chosen: list[Question] = []
    spent = 0
    for question in questions:
        spent += sum(len(target) for _, target in question.requests)
        if chosen and spent > NOISE_TOKENS:
            break
        chosen.append(question)

    def scored(subject: Any, name: str, note: str) -> TaskResult:
        with closing(Kept(store, name)) as kept:
            return heldout.score(
                MEASURED_BY,
                chosen,
                subject,
                batch_tokens=batch_tokens,
                bootstrap=bootstrap,
                seed=suite.text.seed,
                kept=kept,
                progress=lambda done, total, _: progress(done, total, note),
            )

    other_threads = threads - 1 if threads > 1 else 2
    source = bundle or model_folder
    usual = scored(_opened(model_folder, bundle, threads), scored_name(source, threads), "as scored")
    others = {
        "threads": scored(
            _opened(model_folder, bundle, other_threads),
            scored_name(source, other_threads),
            f"{other_threads} threads",
        ),
        "attention": scored(
            _Plain(_opened(model_folder, bundle, threads, attention="eager")),
            f"{scored_name(source, threads)} plain attention",
            "other attention",
        ),
    }
    variants = {
        name: compare_task(usual, other, bootstrap=bootstrap, seed=suite.text.seed)["nll_difference"]
        for name, other in others.items()
    }
    measured = usual["documents"]
    documents = len({question.document for question in questions})
    return {
        "variants": variants,
        "floor": max(_floor(one, measured, documents) for one in variants.values()),
        "documents": measured,
        "all_documents": documents,
    }


def _floor(difference: dict[str, Any], measured: int, documents: int) -> float:
    """The larger of the shift that was seen, and of what chance alone leaves in a mean over all documents."""
    if difference["low"] is None:
        return abs(float(difference["difference"]))
    half = (difference["high"] - difference["low"]) / 2
    return max(abs(float(difference["difference"])), float(half) * math.sqrt(measured / documents))


def _opened(model_folder: Path, bundle: Path | None, threads: int, attention: str | None = None) -> Any:
    if bundle is not None:
        return OnnxModel(bundle, threads)
    loaded = models.load(model_folder)
    if attention is not None:
        loaded.set_attn_implementation(attention)
    return models.TorchModel(loaded, threads)
