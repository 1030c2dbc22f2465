"""Whether a bundle computes what the torch model computes: the verdict that stops a build.

The bundle is opened, run and decoded by its runtimes (graph/verify.py), then its logits over held-out blocks
and its greedy text are compared with those of the torch model that it was made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgedisp import models
from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress
from edgedisp.core.results import Parity
from edgedisp.evaluate.divergence import DivergenceMeter
from edgedisp.graph.session import OnnxModel, at_accuracy_level
from edgedisp.graph.verify import check_bundle
from edgedisp.pipeline.options import ParityOptions
from edgedisp.pipeline.prepare import heldout_documents
from edgedisp.pipeline.rounding import Trained, trained_roundings
from edgedisp.train.quantized_weights import round_weights

PROMPTS, NEW_TOKENS = 4, 16  # real prompts decoded greedily with the cache, and how many tokens of each
AS_TRAINED = 1e-3  # largest difference of a logit between the graph in fp32 and the torch model rounded alike


def parity(
    options: ParityOptions, model_folder: Path, shipped: OnnxModel, corpus_folder: Path, progress: Progress
) -> Parity:
    """Open, run and compare what ships with the torch model; BuildFailed with the reason if it disagrees."""
    held = np.load(corpus_folder / "heldout.npy", allow_pickle=False)
    held = held[: max(1, -(-options.tokens // held.shape[1]))].astype(np.int64)
    prompts = _ragged_prompts(held)
    texts = [document.text[:400] for document in heldout_documents(corpus_folder)[:PROMPTS]]
    graph = check_bundle(shipped, prompts, texts=texts)
    torch_model = models.load(model_folder)
    if options.trained is not None:
        round_weights(torch_model, *trained_roundings(Trained(*options.trained), model_folder))
    reference, limits = models.TorchModel(torch_model), dict(options.limits or {})
    difference = _compare(reference, shipped, held, progress)
    figures = difference.result()
    result = Parity(
        tokens=figures.tokens,
        max_abs_difference=difference.max_abs_difference,
        mean_kl=figures.mean_kl,
        top1_agreement=figures.top1_agreement,
        greedy_agreement=_greedy_agreement(reference, shipped, prompts),
        limits=dict(limits),
        genai=graph.pop("genai"),
        graph=graph,
        passed=True,
    )
    if options.trained is not None:
        exact = OnnxModel(shipped.bundle, shipped.threads, graph=at_accuracy_level(shipped.bundle, 0))
        largest = _compare(reference, exact, held, progress).max_abs_difference
        agreement = _greedy_agreement(reference, exact, prompts)
        as_trained = {"max_abs_difference": largest, "greedy_agreement": agreement}
        result = replace(result, as_trained=as_trained, max_abs_difference=largest)
        limits["max_abs_difference"] = AS_TRAINED
    _check_limits(result, limits, shipped.bundle)
    return result


def _compare(reference: Any, model: OnnxModel, blocks: Any, progress: Progress) -> DivergenceMeter:
    meter = DivergenceMeter()
    for done, block in enumerate(blocks, start=1):
        ids, mask = block[None], np.ones_like(block[None])
        meter.add(reference(ids, mask)[0], model(ids, mask)[0])
        progress(done, len(blocks), "blocks against torch")
    return meter


def _ragged_prompts(held: Any) -> list[list[int]]:
    """Prompts of different lengths from real text."""
    width = held.shape[1]
    lengths = [max(2, width * (index + 1) // (2 * PROMPTS)) for index in range(PROMPTS)]
    return [held[index % len(held)][:length].tolist() for index, length in enumerate(lengths)]


def _greedy_agreement(reference: Any, shipped: Any, prompts: Sequence[list[int]]) -> float:
    """Share of greedily decoded tokens that are equal, up to the first difference in each text."""
    same = 0
    for prompt in prompts:
        left = reference.greedy(prompt, NEW_TOKENS, frozenset())
        right = shipped.greedy(prompt, NEW_TOKENS, frozenset())
        same += next((i for i, pair in enumerate(zip(left, right)) if pair[0] != pair[1]), len(left))
    return same / (len(prompts) * NEW_TOKENS)


def _check_limits(result: Parity, limits: dict[str, float | None], bundle: Path) -> None:
    """Raise BuildFailed naming every figure beyond its limit."""
    broken = []
    for name, limit in limits.items():
        figure = float(getattr(result, name))
        if limit is not None and (figure < limit if name == "top1_agreement" else figure > limit):
            broken.append(f"{name} is {figure:.4g}, the limit is {limit:.4g}")
    if broken:
        raise BuildFailed(
            f"{bundle.parent.name}/{bundle.name} does not agree with the torch model: {'; '.join(broken)}. "
            "If that is good enough for you, set the limit under `verify` in the recipe"
        )
