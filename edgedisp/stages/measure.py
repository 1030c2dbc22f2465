"""Everything that a build finds out about one model, an arm at a precision, in one stage.

For a bundle first the parity verdict (parity.py), then how far its next-token distributions lie from its fp32
parent's and from the baseline's bundle; the geometry of its hidden states; its scores on the recipe's tasks,
item by item; and, for one model of a precision, the noise floor (scoring.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgedisp import models
from edgedisp.core.errors import BuildFailed
from edgedisp.core.files import write_json
from edgedisp.core.progress import Progress
from edgedisp.core.results import Condensation, Divergence, Measurement
from edgedisp.core.serialization import to_json
from edgedisp.dispersion.condensation import measure_model
from edgedisp.evaluate.divergence import DivergenceMeter
from edgedisp.evaluate.task_suite import SuiteOptions, TaskSuite, prepare
from edgedisp.graph.session import OnnxModel
from edgedisp.stages.condensation import condensation, heldout_blocks, measure_bundle
from edgedisp.stages.parity import ParityOptions, parity
from edgedisp.stages.scoring import ModelSource, noise_floor, score_tasks
from edgedisp.stages.start import heldout_documents

ITEMS = "items.json"
PROFILE = "condensation.json"  # with the figures of every sequence


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured. hidden_states: also their condensation, and the divergence from other bundles, which
    are looked at for the first seed alone. noise: also the noise floor."""

    suite: SuiteOptions
    threads: int
    bootstrap: int = 2000
    divergence_tokens: int = 2048
    hidden_states: bool = True
    noise: bool = False
    parity: ParityOptions = field(default_factory=ParityOptions)


@dataclass(frozen=True)
class MeasureInputs:
    """Folders that are read. bundle: None measures the torch model. parent, baseline: bundles that this one
    is compared with. reference: the measurement whose condensation the `change` is from: the baseline's of
    the torch model, or for a bundle the torch model's of the same arm."""

    model: Path
    base: Path
    corpus: Path
    items: Path
    cache: Path
    bundle: Path | None = None
    parent: Path | None = None
    baseline: Path | None = None
    reference: Path | None = None


def items(options: SuiteOptions, base: Path, corpus: Path) -> TaskSuite:
    """The questions of the recipe's tasks: the same for every arm and precision."""
    tokenizer = models.load_tokenizer(base)
    end_of_text, bos_token = models.end_of_text_id(tokenizer), models.bos_id(tokenizer)
    return prepare(tokenizer, heldout_documents(corpus), options, end_of_text, bos_token)


def count_items(options: SuiteOptions, base: Path, corpus: Path, own: Path) -> dict[str, Any]:
    """Make the questions before anything is trained, so that too little text or missing data is found now."""
    suite = items(options, base, corpus)
    results = {
        "heldout_items": {name: len(questions) for name, questions in suite.questions.items()},
        "harness_tasks": sorted(suite.harness_tasks),
        "missing": suite.missing,
    }
    write_json(own / ITEMS, results)
    return results


def measure(options: MeasureOptions, inputs: MeasureInputs, own: Path, progress: Progress) -> dict[str, Any]:
    """Measure a model: a `Measurement` as JSON, and the results with their items in items.json.

    Raises BuildFailed where a bundle does not agree with the torch model, and where the data of a task that
    was there for `inputs.items` cannot be read now: every arm answers the same tasks.
    """
    suite = items(options.suite, inputs.base, inputs.corpus)
    before = json.loads((inputs.items / ITEMS).read_text(encoding="utf-8"))["missing"]
    if lost := [why for task, why in suite.missing.items() if task not in before]:
        raise BuildFailed(f"{'; '.join(lost)}. It could be read before; the same command continues")
    source = ModelSource(inputs.bundle or inputs.model, options.threads, inputs.cache)
    model = source.open()
    verdict = profile = None
    divergences: dict[str, Divergence] = {}
    if inputs.bundle is not None:
        verdict = parity(options.parity, inputs.model, model, inputs.corpus, progress)
    if options.hidden_states:
        divergences = _divergences(options, inputs, model, progress)
        profile = _condensation(inputs, model, own, progress)
    results = score_tasks(source, model, suite, options.bootstrap, progress)
    write_json(own / ITEMS, to_json(results))
    floor = noise_floor(source, model, suite, options.bootstrap, progress) if options.noise else None
    scores = {task: result.score for task, result in results.items()}
    return dict(to_json(Measurement(scores, profile, divergences, verdict, floor)))


def _divergences(
    options: MeasureOptions, inputs: MeasureInputs, model: Any, progress: Progress
) -> dict[str, Divergence]:
    """Read held-out blocks with the bundle and its references at once; one number a token is kept."""
    folders = {"parent": inputs.parent, "baseline": inputs.baseline}
    references = {
        name: OnnxModel(folder, options.threads) for name, folder in folders.items() if folder is not None
    }
    if not references:
        return {}
    blocks = np.load(inputs.corpus / "heldout.npy", allow_pickle=False)
    blocks = blocks[: max(1, -(-options.divergence_tokens // blocks.shape[1]))].astype(np.int64)
    meters = {name: DivergenceMeter() for name in references}
    for done, block in enumerate(blocks, start=1):
        ids, mask = block[None], np.ones_like(block[None])
        logits = model(ids, mask)
        for name, reference in references.items():
            meters[name].add(reference(ids, mask), logits)
        progress(done, len(blocks), "blocks against other bundles")
    return {name: meter.result() for name, meter in meters.items()}


def _condensation(inputs: MeasureInputs, model: Any, own: Path, progress: Progress) -> Condensation:
    blocks = heldout_blocks(inputs.corpus)
    if inputs.bundle is None:
        measured = measure_model(model.model, blocks, progress)
    else:
        measured = measure_bundle(inputs.bundle, blocks, model.threads, progress)
    write_json(own / PROFILE, measured)
    reference = None
    if inputs.reference is not None:
        reference = json.loads((inputs.reference / PROFILE).read_text(encoding="utf-8"))
    return condensation(measured, reference)
