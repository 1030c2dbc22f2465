"""ONNX bundles: written, quantized, and checked against the torch model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedisp import models
from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import write_json
from edgedisp.evaluate.divergence import Divergence
from edgedisp.graph.export import export as export_graph
from edgedisp.graph.session import OnnxModel, at_accuracy_level
from edgedisp.graph.verify import check_bundle
from edgedisp.quantize.onnx_rewrite import quantize_bundle
from edgedisp.quantize.weight_map import read_weight_map
from edgedisp.recipe import QuantizeBits
from edgedisp.stages.rounding import Trained, ends_method, gptq_blocks, trained_blocks, trained_roundings
from edgedisp.stages.start import heldout_documents
from edgedisp.train.quantized_weights import round_weights

# Real prompts that verify decodes greedily with the cache, and how many tokens of each.
VERIFY_PROMPTS = 4
VERIFY_NEW_TOKENS = 16
# The largest difference of a logit between the graph in fp32 and the torch model rounded as it was trained.
AS_TRAINED = 1e-3


def export(model_folder: Path, threads: int, own: Path, progress: Progress) -> dict[str, Any]:
    """The fp32 ONNX bundle."""
    return export_graph(model_folder, own, threads=threads, progress=progress)


def quantize(
    section: QuantizeBits,
    bits: int,
    parent: Path,
    model_folder: Path | None,
    corpus_folder: Path | None,
    own: Path,
    progress: Progress,
    is_trained: bool = False,
) -> dict[str, Any]:
    """A bundle with `bits`-bit weights from the fp32 one; gptq calibrates the model on the training text,
    other methods need neither folder. `is_trained`: under this very rounding; with gptq its scales lie in
    the model's folder."""
    blocks = None
    if section.calibrated:
        if model_folder is None or corpus_folder is None:
            raise ValueError("a calibrated method needs the model and the corpus")
        opened, trained = models.load(model_folder), Trained(section, bits)
        if is_trained:
            by_parameter = trained_blocks(trained, opened, model_folder)
        else:
            by_parameter = gptq_blocks(trained, opened, corpus_folder, progress)
        origins = read_weight_map(parent)
        blocks = lambda name: origins[name].blocks(by_parameter)  # noqa: E731
        del opened
    record = quantize_bundle(
        parent,
        own,
        bits=bits,
        group=section.group,
        symmetric=section.symmetric,
        accuracy_level=section.accuracy_level,
        head_bits=section.head_bits,
        method="rtn" if is_trained else ends_method(section),  # as training rounded embedding and head
        blocks=blocks,
        progress=progress,
    )
    return {**record, "method": section.method, "is_trained": is_trained}


def verify(
    limits: dict[str, float | None],
    trained: tuple[QuantizeBits, int] | None,
    blocks: int,
    model_folder: Path,
    bundle: Path,
    corpus_folder: Path,
    threads: int,
    own: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Open, run and compare what ships with the torch model; BuildFailed with the reason if it disagrees.

    `trained`: section and bits of the rounding that the model was trained under. The torch model is
    then rounded so, and the graph, its arithmetic set to fp32, has to give its logits.
    """
    held = np.load(corpus_folder / "heldout.npy", allow_pickle=False)[:blocks].astype(np.int64)
    prompts = _ragged_prompts(held)
    texts = [document.text[:400] for document in heldout_documents(corpus_folder)[:VERIFY_PROMPTS]]
    shipped = OnnxModel(bundle, threads)
    opened = check_bundle(shipped, prompts, texts=texts)
    torch_model = models.load(model_folder)
    if trained is not None:
        round_weights(torch_model, *trained_roundings(Trained(*trained), model_folder))
    reference = models.TorchModel(torch_model)
    difference = Divergence()
    for done, block in enumerate(held):
        ids, mask = block[None], np.ones_like(block[None])
        difference.add(reference(ids, mask)[0], shipped(ids, mask)[0])
        progress(done + 1, len(held), "")
    results = {**opened, **difference.record(), "limits": limits}
    results["greedy_agreement"] = _greedy_agreement(reference, shipped, prompts)
    if trained is not None:
        exact = OnnxModel(bundle, threads, graph=at_accuracy_level(bundle, 0))
        results["as_trained"] = _as_trained(reference, exact, held, prompts)
        limits = {**limits, "max_abs_difference": AS_TRAINED}
        results["max_abs_difference"] = results["as_trained"]["max_abs_difference"]
    _hold(results, limits, bundle)
    results["passed"] = True
    write_json(own / "verify.json", results)
    return results


def _as_trained(
    reference: Any, exact: OnnxModel, held: NDArray[np.int64], prompts: Sequence[list[int]]
) -> dict[str, float]:
    """How far the graph in fp32 arithmetic is from the rounded torch model."""
    largest = 0.0
    for block in held:
        ids, mask = block[None], np.ones_like(block[None])
        largest = max(largest, float(np.abs(reference(ids, mask) - exact(ids, mask)).max()))
    agreement = _greedy_agreement(reference, exact, prompts)
    return {"max_abs_difference": largest, "greedy_agreement": agreement}


def _ragged_prompts(held: np.ndarray) -> list[list[int]]:
    """Prompts of different lengths from real text."""
    width = held.shape[1]
    lengths = [max(2, width * (index + 1) // (2 * VERIFY_PROMPTS)) for index in range(VERIFY_PROMPTS)]
    return [held[index % len(held)][:length].tolist() for index, length in enumerate(lengths)]


def _greedy_agreement(reference: Any, shipped: Any, prompts: Sequence[list[int]]) -> float:
    """Share of greedily decoded tokens that are equal, up to the first difference in each text."""
    same = 0
    for prompt in prompts:
        left = reference.greedy(prompt, VERIFY_NEW_TOKENS, frozenset())
        right = shipped.greedy(prompt, VERIFY_NEW_TOKENS, frozenset())
        same += next((i for i, pair in enumerate(zip(left, right)) if pair[0] != pair[1]), len(left))
    return same / (len(prompts) * VERIFY_NEW_TOKENS)


def _hold(results: dict[str, Any], limits: dict[str, float | None], bundle: Path) -> None:
    """Raise BuildFailed naming every figure beyond its limit."""
    worse = {
        "max_abs_difference": results["max_abs_difference"],
        "mean_kl": results["mean_kl"],
        "top1_agreement": results["top1_agreement"],
    }
    broken = []
    for name, limit in limits.items():
        if limit is None:
            continue
        beyond = worse[name] < limit if name == "top1_agreement" else worse[name] > limit
        if beyond:
            broken.append(f"{name} is {worse[name]:.4g}, the limit is {limit:.4g}")
    if broken:
        raise BuildFailed(
            f"{bundle.parent.name}/{bundle.name} does not agree with the torch model: {'; '.join(broken)}. "
            "If that is good enough for you, set the limit under `verify` in the recipe"
        )
