"""A candidate of `edgedisp pilot`: trained as a build trains, measured on held-out text, and thrown away.

Measured are the loss of each held-out window, the very items that a build scores, and the mean cosine of each
sequence on which a build measures condensation. An adapter is measured over its base, not merged.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedisp import models
from edgedisp.core.errors import BadInput
from edgedisp.core.files import write_json
from edgedisp.core.progress import Progress
from edgedisp.dispersion.condensation import measure_model
from edgedisp.evaluate.loglikelihood import ScoreOptions
from edgedisp.evaluate.task_suite import TaskSuite
from edgedisp.pipeline.condensation import heldout_blocks
from edgedisp.pipeline.options import CandidateOptions, ItemsOptions
from edgedisp.pipeline.prepare import task_suite
from edgedisp.pipeline.training import train
from edgedisp.recipe import Adapter
from edgedisp.train.dispersion_trainer import NotFinite
from edgedisp.train.lora import load_adapter, load_quantized

TASK = "heldout_perplexity"


def judging(
    options: ItemsOptions, *, base: Path, corpus: Path, output_dir: Path, progress: Progress
) -> dict[str, Any]:
    """Counts of what every candidate is scored on. BadInput where it is too little for an interval."""
    questions = task_suite(options, base, corpus).questions[TASK]
    counts = {
        "windows": len(questions),
        "documents": len({question.document for question in questions}),
        "tokens": sum(len(target) for question in questions for _, target in question.requests),
        "sequences": len(heldout_blocks(corpus)),
    }
    for unit in ("documents", "sequences"):
        if counts[unit] < 2:
            raise BadInput(
                f"the held-out text has {counts[unit]} {unit[:-1]}, and a paired interval needs 2: "
                "hold out more (data.heldout), give more text, or a smaller data.context"
            )
    write_json(output_dir / "judging.json", counts)
    return counts


def candidate(
    options: CandidateOptions, *, base: Path, corpus: Path, output_dir: Path, progress: Progress
) -> dict[str, Any]:
    """Train one candidate and leave its figures in judged.json.

    A training that an earlier, interrupted call finished is not repeated. Results are {"diverged": reason}
    where the loss becomes NaN or infinite; a baseline may not diverge (NotFinite).
    """
    weights = output_dir / "weights"
    trained = weights / "trained.json"
    if not trained.is_file():
        weights.mkdir(exist_ok=True)
        try:
            results = train(options.training, base=base, corpus=corpus, output_dir=weights, progress=progress)
        except NotFinite as problem:
            if not options.may_diverge:
                raise
            shutil.rmtree(weights)
            return {"diverged": str(problem)}
        write_json(trained, results)
    results = json.loads(trained.read_text(encoding="utf-8"))
    model = _open(options.training.train.adapter, base, weights)
    measured = _measure(model, task_suite(options.items, base, corpus), corpus, progress)
    write_json(output_dir / "judged.json", measured)
    if (weights / "logs").is_dir():  # for train.report_to
        shutil.move(weights / "logs", output_dir / "logs")
    shutil.rmtree(weights)
    names = ("steps", "tokens", "seconds", "peak_memory_bytes", "weights_sha256")
    return {name: results[name] for name in names}


def _open(adapter: Adapter | None, base_folder: Path, weights: Path) -> Any:
    """The trained model with its adapter, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if adapter is None:
        return models.load(weights).to(device)
    base = load_quantized(base_folder, adapter.base) if adapter.base else models.load(base_folder)
    model: Any = load_adapter(weights, base)
    return model.get_base_model().to(device).eval()  # the adapter's layers stay in it


def _measure(model: Any, suite: TaskSuite, corpus: Path, progress: Progress) -> dict[str, Any]:
    """items: {id, document, nll, tokens} of each window; cosine: {id, document, value} of each sequence."""
    windows = suite.run(models.TorchModel(model), ScoreOptions(progress=progress), bootstrap=2)[TASK].items
    profile = measure_model(model, heldout_blocks(corpus), progress)
    # The mean over the blocks: the embedding's output, which no loss disperses, and the final norm's are out.
    cosines = [float(np.mean(layers[1:-1])) for layers in profile.figures["cosine_raw"]]
    return {
        "items": [{name: item[name] for name in ("id", "document", "nll", "tokens")} for item in windows],
        "cosine": [
            {"id": str(index), "document": index, "value": value} for index, value in enumerate(cosines)
        ],
    }
