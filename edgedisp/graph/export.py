"""From a model folder to an fp32 bundle: the door of this room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.graph import builder, decoder, families, layout, weight_map
from edgedisp.graph.writer import DATA, GRAPH


def export(
    model_folder: Path,
    out: Path,
    *,
    threads: int,
    max_context: int | None = None,
    load: Callable[[Path], Any] = families.load,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the bundle of `model_folder` (a Hugging Face folder) into the existing empty folder `out`.

    Returns {family, exporter: edgedisp | onnxruntime-genai, runtime_layout, context, threads, size_bytes,
    nodes: {op: n}}; size_bytes counts the graph and its weights. `max_context` caps the positions (default
    8192, or the model's own if less; the genai builder always takes the model's own). `load` opens the folder
    and may refuse it; the usual one leaves that to transformers. BadInput for a family that nobody here can
    export and for weights that are not finite, BuildFailed where the builder fails.
    """
    family = families.family_of(model_folder)
    if family not in {*families.READERS, *builder.FAMILIES}:
        known = ", ".join(sorted({*families.READERS, *builder.FAMILIES}))
        raise BadInput(f"{model_folder}: models of type {family!r} cannot be exported; known types: {known}")
    model = load(model_folder)
    families.check_finite(model, str(model_folder))
    if family in families.READERS:
        described = families.describe(model, max_context)
        decoder.write(described, out, progress)
        layout.write_layout(described, model_folder, out, threads)
        weight_map.write(out, weight_map.decoder_weights(described, model))
        exporter = "edgedisp"
    else:
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        del model  # the builder reads the folder itself
        builder.build(model_folder, out, family=family, threads=threads, progress=progress)
        exporter = "onnxruntime-genai"
    graph = onnx.load(out / GRAPH, load_external_data=False).graph
    if exporter != "edgedisp":
        weight_map.write(out, weight_map.builder_weights(graph, shapes))
    return {
        "family": family,
        "exporter": exporter,
        "runtime_layout": "onnxruntime-genai",
        "context": layout.context_of(out),
        "threads": threads,
        "size_bytes": sum((out / name).stat().st_size for name in (GRAPH, DATA)),
        "nodes": dict(sorted(Counter(node.op_type for node in graph.node).items())),
    }
