"""ONNX bundles: written and quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedisp import models
from edgedisp.core.progress import Progress
from edgedisp.graph.export import export as export_graph
from edgedisp.quantize.onnx_rewrite import quantize_bundle
from edgedisp.quantize.weight_map import read_weight_map
from edgedisp.recipe import QuantizeBits
from edgedisp.stages.rounding import Trained, ends_method, gptq_blocks, trained_blocks


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
