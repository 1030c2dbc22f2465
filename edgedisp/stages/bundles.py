"""ONNX bundles: written, quantized, and checked against the torch model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from edgedisp import models
from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import RECORD, write_json
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.evaluate.divergence import Divergence
from edgedisp.graph import check
from edgedisp.graph.export import export as export_graph
from edgedisp.graph.session import OnnxModel, at_accuracy_level
from edgedisp.quantize import nf4
from edgedisp.quantize.awq import rescale
from edgedisp.quantize.calibrated import weighted_model
from edgedisp.quantize.grid import Grid, dequantize
from edgedisp.quantize.grid import quantize as grid_quantize
from edgedisp.quantize.made import Made
from edgedisp.quantize.rewrite import quantize_bundle
from edgedisp.quantize.store import DATA, GRAPH
from edgedisp.recipe import QuantizeBits
from edgedisp.stages.bits import chosen_grids
from edgedisp.stages.calibration import by_gptq, calibration_text
from edgedisp.stages.levels import first_level, measured_levels
from edgedisp.stages.rounding import Trained, has_scales, trained_blocks, trained_roundings
from edgedisp.stages.start import heldout_documents
from edgedisp.train.rounded import round_weights

# Real prompts that verify decodes greedily with the cache, and how many tokens of each.
VERIFY_PROMPTS = 4
VERIFY_NEW_TOKENS = 16
# The largest difference of a logit between the graph in fp32 and the torch model rounded as it was trained.
AS_TRAINED = 1e-3


def export(model_folder: Path, threads: int, own: Path, progress: Progress) -> dict[str, Any]:
    """The fp32 ONNX bundle."""
    return export_graph(model_folder, own, threads=threads, load=models.load, progress=progress)


def quantize(
    section: QuantizeBits,
    bits: int,
    parent: Path,
    model_folder: Path | None,
    corpus_folder: Path | None,
    own: Path,
    progress: Progress,
    threads: int = 1,
    is_trained: bool = False,
    decided: Path | None = None,
) -> dict[str, Any]:
    """A bundle with `bits`-bit weights from the fp32 one; `gptq` and `rescale` calibrate the model on the
    training text, accuracy level auto runs the bundle on it, other methods need neither folder. `is_trained`:
    under this very rounding; where its scales were calibrated or learned they lie in the model's folder.
    `decided`: the bundle of the arm whose accuracy levels hold for this one too."""
    method, made, source, found = section.method, None, parent, {}
    with tempfile.TemporaryDirectory(dir=own) as scratch:
        if is_trained and model_folder is not None and (section.calibrated or has_scales(model_folder)):
            made = trained_blocks(Trained(section, bits), models.load(model_folder), model_folder)
        elif section.calibrated:
            if model_folder is None or corpus_folder is None:
                raise ValueError("a calibrated method needs the model and the corpus")
            opened, text = models.load(model_folder), calibration_text(section, corpus_folder)
            if section.rescale:
                found["rescaled"] = rescale(
                    opened, decoder_layers(opened), text, _rounding(section, bits), progress=progress
                )
                _save(opened, model_folder, Path(scratch) / "model")
            made = _calibrated(section, bits, opened, text, progress)
            del opened
            if section.rescale:
                source = _export_like(parent, Path(scratch), progress)
        if is_trained:
            method = "rtn"  # embedding and head, as training rounded them
        elif method == "gptq":  # what is left to the rewriter: the embedding, and a head of 8 bits
            method = "rtn" if section.head_bits == 8 else "k_quant"
        record = quantize_bundle(
            source,
            own,
            bits=bits,
            group=section.group,
            symmetric=section.symmetric,
            accuracy_level=first_level(section),
            head_bits=section.head_bits,
            head_group=section.head_group,
            method=method,
            made=made,
            progress=progress,
        )
    record = {**record, **found, "method": section.method, "is_trained": is_trained}
    return measured_levels(section, record, own, corpus_folder, threads, progress, decided)


def _rounding(section: QuantizeBits, bits: int) -> Callable[[Tensor], Tensor]:
    """The weight as the bundle's form holds it, rounded to nearest."""
    if section.method == "nf4":
        return lambda weight: nf4.dequantize(nf4.quantize(weight, section.group))
    grid = Grid(bits, section.group, section.symmetric)
    return lambda weight: dequantize(grid_quantize(weight, grid), grid)


def _calibrated(section: QuantizeBits, bits: int, opened: Any, text: Any, progress: Progress) -> Made | None:
    """The weights that the method rounds on calibration text; None for one that looks at weights alone. A
    head of 8 bits loses nothing worth the time."""
    layers, grid = decoder_layers(opened), Grid(bits, section.group, section.symmetric)
    ends = Grid(section.head_bits, section.head_group or section.group, section.symmetric)
    head = ends if section.head_bits < 8 else None
    if section.method == "gptq":
        return by_gptq(section, grid, opened, text, progress, head)
    if section.method in ("rtn", "nf4"):
        return None
    return weighted_model(
        opened,
        layers,
        text,
        grid,
        section.method,
        head=head,
        correction=section.correction,
        progress=progress,
    )


def _save(opened: Any, original: Path, folder: Path) -> None:
    """A changed model, with the tokenizer and the other small files of the folder that it came from."""
    weights = shutil.ignore_patterns("*.safetensors*", "*.bin*", RECORD)
    shutil.copytree(original, folder, ignore=weights)
    opened.save_pretrained(folder)


def _export_like(parent: Path, scratch: Path, progress: Progress) -> Path:
    """The fp32 bundle of scratch/model, its other files those of `parent`: threads, tokenizer, layout."""
    bundle = scratch / "fp32"
    bundle.mkdir()
    export_graph(scratch / "model", bundle, threads=1, progress=progress)
    for file in parent.iterdir():
        if file.is_file() and file.name not in (GRAPH, DATA, RECORD):
            shutil.copyfile(file, bundle / file.name)
    return bundle


def verify(
    limits: dict[str, float | None],
    trained: tuple[QuantizeBits, int, Path | None] | None,
    blocks: int,
    model_folder: Path,
    bundle: Path,
    corpus_folder: Path,
    threads: int,
    own: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Open, run and compare what ships with the torch model; BuildFailed with the reason if it disagrees.

    `trained`: section and bits of the rounding that the model was trained under, and the folder of the search
    that chose its grids. The torch model is then rounded so, and the graph, its arithmetic set to fp32, has
    to give its logits.
    """
    held = np.load(corpus_folder / "heldout.npy", allow_pickle=False)[:blocks].astype(np.int64)
    prompts = _ragged_prompts(held)
    texts = [document.text[:400] for document in heldout_documents(corpus_folder)[:VERIFY_PROMPTS]]
    opened = check.check(bundle, prompts, texts=texts, threads=threads)
    torch_model = models.load(model_folder)
    if trained is not None:
        section, bits, searched = trained
        rounding = Trained(section, bits, chosen_grids(searched))
        round_weights(torch_model, *trained_roundings(rounding, model_folder))
    reference, shipped = models.TorchModel(torch_model), OnnxModel(bundle, threads)
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
