"""Everything that a build measures of one model, an arm at a precision, in one stage.

For a bundle first the parity verdict, which stops a build: the bundle is opened, run and decoded by its
runtimes (graph/verify.py), then its logits over held-out blocks and its greedy text are compared with those
of the torch model that it was made from. Then how far its next-token distributions lie from its fp32
parent's and from the baseline's bundle; the geometry of its hidden states, on blocks that all models of a run
share; its scores on the recipe's tasks, item by item; and, for one model of a precision, the noise floor
(scoring.py). Latency is a stage of its own, over all bundles in turns.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgedisp import models
from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.interleaved_timing import Local
from edgedisp.bench.results import twin_pairs
from edgedisp.core.errors import BuildFailed
from edgedisp.core.files import from_json, to_json, write_json
from edgedisp.core.progress import Progress
from edgedisp.core.results import Condensation, Divergence, Measurement, Parity
from edgedisp.core.stage_folder import SCORES
from edgedisp.dispersion.condensation import Profile, measure_model, profile, summary
from edgedisp.evaluate.divergence import DivergenceMeter
from edgedisp.graph.runtime_layouts import for_device
from edgedisp.graph.session import HiddenStates, OnnxModel, at_accuracy_level
from edgedisp.graph.verify import check_bundle
from edgedisp.pipeline.options import ITEMS, LatencyOptions, MeasureOptions, ParityOptions
from edgedisp.pipeline.prepare import (
    CONDENSATION_BLOCKS,
    heldout_blocks,
    heldout_documents,
    task_suite,
)
from edgedisp.pipeline.rounding import trained_roundings
from edgedisp.pipeline.scoring import Scorer
from edgedisp.pipeline.stage import Inputs
from edgedisp.train.quantized_weights import round_weights

PROFILE = "condensation.json"  # with the figures of every sequence
PROMPTS, NEW_TOKENS = 4, 16  # real prompts decoded greedily with the cache, and how many tokens of each
AS_TRAINED = 1e-3  # largest difference of a logit between the graph in fp32 and the torch model rounded alike


def measure(options: MeasureOptions, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Measure a model: a `Measurement` as JSON; every item in items.json.

    Inputs: model, base, corpus, items; bundle, without which the torch model is measured; parent, baseline:
    bundles that this one is compared with; reference: the measurement whose condensation the `change` is
    from, the baseline's of the torch model, or for a bundle the torch model's of the same arm.
    Raises BuildFailed where a bundle does not agree with the torch model, and where the data of a task that
    was there for the items cannot be read now: every arm answers the same tasks.
    """
    suite, bundle = task_suite(options.items, inputs), inputs.get("bundle")
    missing = json.loads((inputs["items"] / ITEMS).read_text(encoding="utf-8"))["missing"]
    if lost := [reason for task, reason in suite.missing.items() if task not in missing]:
        raise BuildFailed(f"{'; '.join(lost)}. It could be read before; the same command continues")
    # One cache serves the run, whatever is measured: its entries are named by all that a score depends on.
    scorer = Scorer(bundle or inputs["model"], options.threads, inputs["base"].parent / SCORES)
    model = scorer.model
    verdict = geometry = None
    divergences: dict[str, Divergence] = {}
    if bundle is not None and options.parity is not None:
        verdict = parity(options.parity, inputs["model"], model, inputs["corpus"], progress)
    if options.hidden_states:
        divergences = _divergences(options, inputs, model, progress)
        geometry = condensation(inputs, model, output_dir, progress)
    results = scorer.score(suite, options.bootstrap, progress)
    write_json(output_dir / ITEMS, to_json(results))
    floor = scorer.noise_floor(suite, options.bootstrap, progress) if options.noise else None
    scores = {task: result.score for task, result in results.items()}
    return dict(to_json(Measurement(scores, geometry, divergences, verdict, floor)))


def _divergences(
    options: MeasureOptions, inputs: Inputs, model: Any, progress: Progress
) -> dict[str, Divergence]:
    """Of a bundle from the bundles among its inputs; all read the same held-out blocks."""
    references = {
        name: OnnxModel(inputs[name], options.threads) for name in ("parent", "baseline") if name in inputs
    }
    if not references:
        return {}
    blocks = heldout_blocks(inputs["corpus"], tokens=options.divergence_tokens)
    meters = compare_logits(references, model, blocks, progress)
    return {name: meter.result() for name, meter in meters.items()}


def compare_logits(
    references: Mapping[str, Any], model: Any, blocks: NDArray[np.int64], progress: Progress
) -> dict[str, DivergenceMeter]:
    """Read the blocks, int64 [blocks, tokens], with the model and each reference."""
    meters = {name: DivergenceMeter() for name in references}
    for number, block in enumerate(blocks, start=1):
        ids, mask = block[None], np.ones_like(block[None])
        logits = model(ids, mask)
        for name, reference in references.items():
            meters[name].add(reference(ids, mask), logits)
        progress(number, len(blocks), f"blocks against {', '.join(references)}")
    return meters


def condensation(inputs: Inputs, model: Any, output_dir: Path, progress: Progress) -> Condensation:
    """Of a bundle or torch model, with its `change` if `reference` is among the inputs; the figures of every
    sequence in condensation.json."""
    blocks = torch.from_numpy(heldout_blocks(inputs["corpus"], blocks=CONDENSATION_BLOCKS))
    if "bundle" in inputs:
        measured = measure_bundle(inputs["bundle"], blocks, model.threads, progress)
    else:
        measured = measure_model(model.model, blocks, progress)
    write_json(output_dir / PROFILE, to_json(measured))
    if "reference" not in inputs:
        return summary(measured)
    text = (inputs["reference"] / PROFILE).read_text(encoding="utf-8")
    return summary(measured, from_json(Profile, json.loads(text)))


def measure_bundle(bundle: Path, blocks: Tensor, threads: int, progress: Progress) -> Profile:
    """The profile of a bundle over token blocks, int64 [sequences, tokens]."""
    graph = HiddenStates(bundle, threads)

    def states(block: Tensor) -> list[Tensor]:
        return [torch.from_numpy(state) for state in graph(block.numpy())]

    return profile(states, blocks, progress)


# Parity


def parity(
    options: ParityOptions, model_folder: Path, bundle: OnnxModel, corpus: Path, progress: Progress
) -> Parity:
    """Open, run and compare what ships with the torch model; BuildFailed with the reason if it disagrees."""
    blocks = heldout_blocks(corpus, tokens=options.tokens)
    prompts = _ragged_prompts(blocks)
    texts = [document.text[:400] for document in heldout_documents(corpus)[:PROMPTS]]
    graph = check_bundle(bundle, prompts, texts=texts)
    torch_model, limits = models.load(model_folder), dict(options.limits)
    if options.trained_under is not None:
        round_weights(torch_model, *trained_roundings(options.trained_under, model_folder))
    reference = models.TorchModel(torch_model)
    meter = compare_logits({"torch": reference}, bundle, blocks, progress)["torch"]
    figures = meter.result()
    result = Parity(
        tokens=figures.tokens,
        max_abs_difference=meter.max_abs_difference,
        mean_kl=figures.mean_kl,
        top1_agreement=figures.top1_agreement,
        greedy_agreement=_greedy_agreement(reference, bundle, prompts),
        limits=dict(limits),
        genai=graph.pop("genai"),
        graph=graph,
        passed=True,
    )
    if options.trained_under is not None:
        exact = OnnxModel(bundle.bundle, bundle.threads, graph=at_accuracy_level(bundle.bundle, 0))
        largest = compare_logits({"torch": reference}, exact, blocks, progress)["torch"].max_abs_difference
        agreement = _greedy_agreement(reference, exact, prompts)
        as_trained = {"max_abs_difference": largest, "greedy_agreement": agreement}
        result = replace(result, as_trained=as_trained, max_abs_difference=largest)
        limits["max_abs_difference"] = AS_TRAINED
    _check_limits(result, limits, bundle.bundle)
    return result


def _ragged_prompts(blocks: NDArray[np.int64]) -> list[list[int]]:
    """Prompts of different lengths from real text."""
    width = blocks.shape[1]
    lengths = [max(2, width * (index + 1) // (2 * PROMPTS)) for index in range(PROMPTS)]
    return [blocks[index % len(blocks)][:length].tolist() for index, length in enumerate(lengths)]


def _greedy_agreement(reference: Any, bundle: Any, prompts: Sequence[list[int]]) -> float:
    """Share of greedily decoded tokens that are equal, up to the first difference in each text."""
    same = 0
    for prompt in prompts:
        left, right = (model.greedy(prompt, NEW_TOKENS, frozenset()) for model in (reference, bundle))
        same += next((i for i, pair in enumerate(zip(left, right)) if pair[0] != pair[1]), len(left))
    return same / (len(prompts) * NEW_TOKENS)


def _check_limits(result: Parity, limits: Mapping[str, float | None], bundle: Path) -> None:
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


# Latency


def latency(options: LatencyOptions, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """Time every bundle (label -> folder) on this machine in turns; twins must have one graph.

    What is timed is what a device gets: the same weights under a graph for the last token's logits.
    """
    section, threads, scratch = options.latency, options.threads, output_dir / "timed"
    bundles = {label: scratch / label.replace("/", "-") for label in inputs}
    for label, bundle in bundles.items():
        bundle.mkdir(parents=True)
        for_device(inputs[label], bundle, threads=threads)
    bench = BenchOptions(
        prompt=section.prompt,
        generate=section.generate,
        repetitions=section.repetitions,
        threads=threads,
        seed=options.seed,
        pause_s=section.pause_s,
        pairs=twin_pairs(list(bundles)),
    )
    results = Local(bundles, bench).measure(progress)
    if results.lost:
        raise BuildFailed(f"latency: {results.lost}")
    shutil.rmtree(scratch)
    write_json(output_dir / "latency.json", to_json(results))
    return dict(to_json(replace(results, repetitions=[])))
