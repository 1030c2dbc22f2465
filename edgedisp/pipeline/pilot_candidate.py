"""A pilot's candidate: trained as a build trains, measured on held-out text, and thrown away.

Measured are the loss of each held-out window, the very items that a build scores, and the mean cosine of each
of the sequences on which a build measures condensation. An adapter is measured as it was trained, over its
base and not merged.
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
from edgedisp.pipeline.condensation import CONDENSATION_SEQUENCES
from edgedisp.pipeline.options import CandidateOptions, ItemsOptions
from edgedisp.pipeline.prepare import task_suite
from edgedisp.pipeline.training import train
from edgedisp.recipe import Adapter
from edgedisp.train.dispersion_trainer import NotFinite
from edgedisp.train.lora import load_adapter, load_quantized

TASK = "heldout_perplexity"
JUDGED = "judged.json"
FIGURES = ("cosine_raw", "cosine_mean_removed")


def judging(
    options: ItemsOptions, *, base: Path, corpus: Path, output_dir: Path, progress: Progress
) -> dict[str, Any]:
    """Count what candidates will be judged by, before any is trained.

    Raises BadInput where the held-out text is too little for an interval.
    """
    suite = task_suite(options, base, corpus)
    counts = {
        "windows": len(suite.questions[TASK]),
        "documents": len({question.document for question in suite.questions[TASK]}),
        "tokens": sum(len(wanted) for one in suite.questions[TASK] for _, wanted in one.requests),
        "sequences": len(_sequences(corpus)),
    }
    for unit, needed in (("documents", 2), ("sequences", 2)):
        if counts[unit] < needed:
            raise BadInput(
                f"the held-out text has {counts[unit]} {unit[:-1]}, and a paired interval needs {needed}: "
                "hold out more (data.heldout), give more text, or a smaller data.context"
            )
    write_json(output_dir / "judging.json", counts)
    return counts


def pilot_candidate(
    options: CandidateOptions, *, base: Path, corpus: Path, output_dir: Path, progress: Progress
) -> dict[str, Any]:
    """Train one candidate by a build's own stage, and leave its figures in judged.json.

    A training that was finished in an earlier, interrupted call is not repeated. Where the loss becomes NaN
    or infinite, the results are `{"diverged": why}`, since that is what a pilot wants to know of a setting;
    a baseline may not diverge (NotFinite).
    """
    weights = output_dir / "weights"
    done = weights / "trained.json"
    if not done.is_file():
        weights.mkdir(exist_ok=True)
        try:
            trained = train(options.training, base=base, corpus=corpus, output_dir=weights, progress=progress)
        except NotFinite as problem:
            if not options.may_diverge:
                raise
            shutil.rmtree(weights)
            return {"diverged": str(problem)}
        write_json(done, trained)
    trained = json.loads(done.read_text(encoding="utf-8"))
    model = _as_trained(options.training.train.adapter, base, weights)
    measured = _measure(model, task_suite(options.items, base, corpus), corpus, progress)
    write_json(output_dir / JUDGED, measured)
    if (weights / "logs").is_dir():  # for others to read (train.report_to)
        shutil.move(weights / "logs", output_dir / "logs")
    shutil.rmtree(weights)
    kept = ("steps", "tokens", "seconds", "tokens_per_s", "peak_memory_bytes", "weights_sha256")
    return {name: trained[name] for name in kept}


def _as_trained(adapter: Adapter | None, base_folder: Path, weights: Path) -> Any:
    """The trained model, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if adapter is None:
        return models.load(weights).to(device)
    base = load_quantized(base_folder, adapter.base) if adapter.base else models.load(base_folder)
    opened: Any = load_adapter(weights, base)
    return opened.get_base_model().to(device).eval()  # the adapter's layers stay in it


def _measure(trained: Any, suite: TaskSuite, corpus: Path, progress: Progress) -> dict[str, Any]:
    """`items`: {id, document, nll, tokens} of each window; FIGURES: of each sequence, over the blocks."""
    scored = suite.run(models.TorchModel(trained), ScoreOptions(progress=progress), bootstrap=2)[TASK]
    profile = measure_model(trained, _sequences(corpus), progress)
    wanted = ("id", "document", "nll", "tokens")
    return {
        "items": [{name: item[name] for name in wanted} for item in scored.items],
        # Without the embedding's output, which no candidate disperses, and the final norm's.
        **{
            figure: [float(np.mean(layers[1:-1])) for layers in profile["by_sequence"][figure]]
            for figure in FIGURES
        },
    }


def _sequences(corpus: Path) -> torch.Tensor:
    held = np.load(corpus / "heldout.npy", allow_pickle=False)[:CONDENSATION_SEQUENCES]
    return torch.from_numpy(held.astype(np.int64))
