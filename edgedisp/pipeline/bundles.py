"""ONNX bundles: exported, quantized, and what quantization leaves of training's change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedisp import models
from edgedisp.core.files import write_json
from edgedisp.core.progress import Progress
from edgedisp.graph.export import export as export_graph
from edgedisp.models import load_weights
from edgedisp.pipeline.options import ExportOptions, QuantizeOptions
from edgedisp.pipeline.rounding import Trained, ends_method, gptq_blocks, trained_blocks
from edgedisp.quantize.delta_survival import survival
from edgedisp.quantize.onnx_rewrite import quantize_bundle
from edgedisp.quantize.weight_map import read_weight_map


def export(options: ExportOptions, *, model: Path, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """The fp32 ONNX bundle."""
    return export_graph(model, output_dir, threads=options.threads, progress=progress)


def quantize(
    options: QuantizeOptions,
    *,
    bundle: Path,
    output_dir: Path,
    progress: Progress,
    model: Path | None = None,
    corpus: Path | None = None,
) -> dict[str, Any]:
    """A quantized bundle from the fp32 one; gptq calibrates the model on the training text, others read
    neither. Where the model was trained under gptq's rounding, its scales lie in the model's folder."""
    section, is_trained, blocks = options.quantize, options.is_trained, None
    if model is not None and corpus is not None:
        torch_model, trained = models.load(model), Trained(section, options.bits)
        if is_trained:
            by_parameter = trained_blocks(trained, torch_model, model)
        else:
            by_parameter = gptq_blocks(trained, torch_model, corpus, progress)
        origins = read_weight_map(bundle)
        blocks = lambda name: origins[name].blocks(by_parameter)  # noqa: E731
        del torch_model
    record = quantize_bundle(
        bundle,
        output_dir,
        bits=options.bits,
        group=section.group,
        symmetric=section.symmetric,
        accuracy_level=section.accuracy_level,
        head_bits=section.head_bits,
        method="rtn" if is_trained else ends_method(section),  # as training rounded embedding and head
        blocks=blocks,
        progress=progress,
    )
    return {**record, "method": section.method, "is_trained": is_trained}


@dataclass(frozen=True)
class SurvivalInputs:
    """parent: the arm's fp32 bundle. baseline: the baseline's model, for other arms."""

    base: Path
    model: Path
    parent: Path
    bundle: Path
    baseline: Path | None = None


def delta_survival(options: None, *, output_dir: Path, progress: Progress, **folders: Path) -> dict[str, Any]:
    """What is left of every packed weight's change since the base, and from the baseline's model where there
    is one, on the steps of the bundle (quantize/delta_survival.py); `folders` as in SurvivalInputs."""
    inputs = SurvivalInputs(**folders)
    references = {"base": load_weights(inputs.base)}
    if inputs.baseline is not None:
        references["baseline"] = load_weights(inputs.baseline)
    results = survival(inputs.bundle, inputs.parent, load_weights(inputs.model), references, progress)
    write_json(output_dir / "survival.json", results)
    return results
