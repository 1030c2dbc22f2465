"""From a model folder to an fp32 bundle, and `weight_map.json`: what its matrices are made of.

    {initializer: {"torch": [parameter, ...], "transposed": bool, "rows": [int, ...], "tied_head": true}}

The torch parameters are concatenated along dimension 0, then `rows` (only where the order differs) picks
rows, then `transposed` says that the initializer is the transpose. `tied_head` marks the one matrix that is
both embedding and output head. Linear maps, embedding and head are listed: what a quantizer may pack.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgedisp import models
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.graph import architectures, builder_fallback, decoder_graph, genai_config
from edgedisp.graph.decoder_graph import EMBEDDING
from edgedisp.graph.decoder_spec import Decoder, Linear
from edgedisp.graph.onnx_graph import DATA, GRAPH

WEIGHT_MAP = "weight_map.json"


def export(
    model_folder: Path,
    output_dir: Path,
    *,
    threads: int,
    max_context: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the bundle of `model_folder` (a Hugging Face folder) into the existing empty `output_dir`.

    Returns {family, exporter: edgedisp | onnxruntime-genai, runtime_layout, context, threads, size_bytes,
    nodes: {op: n}}; size_bytes counts the graph and its weights. `max_context` caps the positions (default
    8192, or the model's own if less; the genai builder always takes the model's own). BadInput for an
    architecture that cannot be exported and for weights that are not finite, BuildFailed where the builder
    fails.
    """
    architecture = _architecture(model_folder)
    known = {*architectures.READERS, *builder_fallback.ARCHITECTURES}
    if architecture not in known:
        raise BadInput(
            f"{model_folder}: models of type {architecture!r} cannot be exported; "
            f"known types: {', '.join(sorted(known))}"
        )
    model = models.load(model_folder)
    _check_finite(model, model_folder)
    is_written_here = architecture in architectures.READERS
    if is_written_here:
        decoder = architectures.read_decoder(model, max_context)
        decoder_graph.write(decoder, output_dir, progress)
        genai_config.write_configs(decoder, model_folder, output_dir, threads)
        graph = ir.load(output_dir / GRAPH).graph
        weight_map = _weight_map(decoder, model)
    else:
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        del model  # the builder reads the folder itself
        builder_fallback.build(
            model_folder, output_dir, architecture=architecture, threads=threads, progress=progress
        )
        graph = ir.load(output_dir / GRAPH).graph
        weight_map = builder_fallback.weight_map(graph.initializers, shapes)
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in weight_map.items()]
    (output_dir / WEIGHT_MAP).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return {
        "family": architecture,
        "exporter": "edgedisp" if is_written_here else "onnxruntime-genai",
        "runtime_layout": "onnxruntime-genai",
        "context": genai_config.context_length(output_dir),
        "threads": threads,
        "size_bytes": sum((output_dir / name).stat().st_size for name in (GRAPH, DATA)),
        "nodes": dict(sorted(Counter(node.op_type for node in graph).items())),
    }


def _architecture(folder: Path) -> str:
    """The `model_type` of a model folder. BadInput if it is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"{folder}: not a model folder (config.json is missing)")
    try:
        return str(json.loads(path.read_text(encoding="utf-8")).get("model_type", "unknown"))
    except (ValueError, AttributeError) as error:
        raise BadInput(f"{path}: no readable configuration: {error}") from error


def _check_finite(model: Any, folder: Path) -> None:
    """BadInput names the first weight with NaN or infinity: no graph is worth writing from it."""
    for key, weight in model.named_parameters():
        # A sum is not finite if a value is not, and needs no array of flags; but it may also overflow.
        if not weight.sum().isfinite() and not weight.isfinite().all():
            bad = int((~weight.isfinite()).sum())
            raise BadInput(
                f"{folder}: {key} holds {bad} values that are not finite (NaN or infinity) of "
                f"{weight.numel()}; the model is damaged, or its training diverged"
            )


def _weight_map(decoder: Decoder, model: Any) -> dict[str, dict[str, Any]]:
    """The map of the graph that decoder_graph.py writes for `model`."""
    parameters = {parameter.data_ptr(): (name, parameter) for name, parameter in model.named_parameters()}

    def entry(linear: Linear) -> dict[str, Any]:
        pairs = [parameters[weight.data_ptr()] for weight in linear.weights]
        # Conv1D keeps [in, out], as the graph does; the description holds a transposed view of it.
        is_view = any(w.stride() != parameter.stride() for w, (_, parameter) in zip(linear.weights, pairs))
        rows = {} if linear.rows is None else {"rows": linear.rows.tolist()}
        return {"torch": [name for name, _ in pairs], "transposed": not is_view, **rows}

    entries = {EMBEDDING: {"torch": [parameters[decoder.embedding.data_ptr()][0]], "transposed": False}}
    for layer in decoder.layers:
        entries |= {f"{linear.name}.weight": entry(linear) for linear in layer.linears()}
    if decoder.head is None:
        entries[EMBEDDING]["tied_head"] = True
    else:
        entries["lm_head.weight"] = entry(Linear("lm_head", (decoder.head,)))
    return entries
