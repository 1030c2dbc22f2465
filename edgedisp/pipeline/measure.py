"""Everything that a build finds out about one model, an arm at a precision, in one stage.

For a bundle first the parity verdict (parity.py), then how far its next-token distributions lie from its fp32
parent's and from the baseline's bundle; the geometry of its hidden states; its scores on the recipe's tasks,
item by item; and, for one model of a precision, the noise floor (scoring.py).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.interleaved_timing import measure as measure_speed
from edgedisp.bench.local import Local
from edgedisp.bench.results import twin_pairs
from edgedisp.core.errors import BuildFailed
from edgedisp.core.files import from_json, to_json, write_json
from edgedisp.core.progress import Progress
from edgedisp.core.results import Condensation, Divergence, Measurement
from edgedisp.core.stage_folder import SCORES
from edgedisp.dispersion.condensation import Profile, measure_model, summary
from edgedisp.evaluate.divergence import DivergenceMeter
from edgedisp.graph.device_graph import for_device
from edgedisp.graph.session import OnnxModel
from edgedisp.pipeline.condensation import heldout_blocks, measure_bundle
from edgedisp.pipeline.options import LatencyOptions, MeasureOptions
from edgedisp.pipeline.parity import parity
from edgedisp.pipeline.prepare import ITEMS, task_suite
from edgedisp.pipeline.scoring import ModelSource, noise_floor, score_tasks

PROFILE = "condensation.json"  # with the figures of every sequence


@dataclass(frozen=True)
class MeasureInputs:
    """Folders that are read. bundle: None measures the torch model. parent, baseline: bundles that this one
    is compared with. reference: the measurement whose condensation the `change` is from: the baseline's of
    the torch model, or for a bundle the torch model's of the same arm."""

    model: Path
    base: Path
    corpus: Path
    items: Path
    bundle: Path | None = None
    parent: Path | None = None
    baseline: Path | None = None
    reference: Path | None = None


def measure(
    options: MeasureOptions,
    *,
    output_dir: Path,
    progress: Progress,
    files: Mapping[str, Path] | None = None,
    **folders: Path,
) -> dict[str, Any]:
    """Measure a model, `folders` as in MeasureInputs: a `Measurement` as JSON, and every item in items.json.

    Raises BuildFailed where a bundle does not agree with the torch model, and where the data of a task that
    was there for the items cannot be read now: every arm answers the same tasks.
    """
    inputs = MeasureInputs(**folders)
    suite = task_suite(options.items, inputs.base, inputs.corpus, files)
    before = json.loads((inputs.items / ITEMS).read_text(encoding="utf-8"))["missing"]
    if lost := [why for task, why in suite.missing.items() if task not in before]:
        raise BuildFailed(f"{'; '.join(lost)}. It could be read before; the same command continues")
    # One cache serves the run, whatever is measured: its entries are named by all that a score depends on.
    source = ModelSource(inputs.bundle or inputs.model, options.threads, inputs.base.parent / SCORES)
    model = source.open()
    verdict = profile = None
    divergences: dict[str, Divergence] = {}
    if inputs.bundle is not None and options.parity is not None:
        verdict = parity(options.parity, inputs.model, model, inputs.corpus, progress)
    if options.hidden_states:
        divergences = _divergences(options, inputs, model, progress)
        profile = _condensation(inputs, model, output_dir, progress)
    results = score_tasks(source, model, suite, options.bootstrap, progress)
    write_json(output_dir / ITEMS, to_json(results))
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


def _condensation(inputs: MeasureInputs, model: Any, output_dir: Path, progress: Progress) -> Condensation:
    blocks = heldout_blocks(inputs.corpus)
    if inputs.bundle is None:
        measured = measure_model(model.model, blocks, progress)
    else:
        measured = measure_bundle(inputs.bundle, blocks, model.threads, progress)
    write_json(output_dir / PROFILE, to_json(measured))
    reference = None
    if inputs.reference is not None:
        reference = from_json(Profile, json.loads((inputs.reference / PROFILE).read_text(encoding="utf-8")))
    return summary(measured, reference)


def latency(
    options: LatencyOptions, *, output_dir: Path, progress: Progress, **bundles: Path
) -> dict[str, Any]:
    """Time every bundle (label -> folder) on this machine in turns; twins must have one graph.

    What is timed is what a device gets: the same weights under a graph for the last token's logits.
    """
    section, threads = options.latency, options.threads
    scratch = output_dir / "timed"
    shipped = {}
    for label, bundle in bundles.items():
        shipped[label] = scratch / label.replace("/", "-")
        shipped[label].mkdir(parents=True)
        for_device(bundle, shipped[label], threads=threads)
    bench = BenchOptions(
        prompt=section.prompt,
        generate=section.generate,
        repetitions=section.repetitions,
        threads=threads,
        seed=options.seed,
        pause_s=section.pause_s,
        pairs=twin_pairs(list(bundles)),
    )
    results = measure_speed(shipped, Local(), bench, progress)
    shutil.rmtree(scratch)
    write_json(output_dir / "latency.json", to_json(results))
    record: dict[str, Any] = to_json(replace(results, repetitions=[]))
    return record
