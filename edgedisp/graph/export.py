"""From a model folder to an fp32 bundle, and `weight_map.json`: what its matrices are made of.

    {initializer: {"torch": [parameter, ...], "transposed": bool, "rows": [int, ...], "tied_head": true}}

The torch parameters are concatenated along dimension 0, then `rows` (only where the order differs) picks
rows, then `transposed` says that the initializer is the transpose. `tied_head` marks the one matrix that is
both embedding and output head. Linear maps, embedding and head are listed: what a quantizer may pack.

Architectures that decoder_graph.py does not write go through onnxruntime-genai's model builder; the bundle
has the same interface.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgedisp import models
from edgedisp.core.errors import BuildFailed
from edgedisp.core.files import APP, read_json, write_json
from edgedisp.core.progress import Progress, silent
from edgedisp.graph import decoder_graph, genai_config
from edgedisp.graph.app_contract import write_app
from edgedisp.graph.architectures import check_export
from edgedisp.graph.decoder_graph import Decoder, Linear
from edgedisp.graph.onnx_graph import DATA, EMBEDDING, GRAPH, WEIGHT_MAP, read_graph, to_bytes

# The builder's name of a linear map -> the torch modules that it may stand for.
BUILDER_NAMES = {
    "attn.qkv_proj": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.qkv_proj"]],
    "attn.o_proj": [["self_attn.o_proj"], ["self_attn.dense"]],
}

WeightMap = dict[str, dict[str, Any]]


def export(
    model_folder: Path,
    output_dir: Path,
    *,
    threads: int,
    max_context: int | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the bundle of `model_folder` (a Hugging Face folder) into the existing empty `output_dir`.

    Returns {exporter: edgedisp | onnxruntime-genai, context, size_bytes, nodes: {op: n}}. `max_context` caps
    the positions (default 8192, or the model's own if less; the genai builder always takes the model's own).
    BadInput for an architecture that cannot be exported, BuildFailed where the builder fails.
    """
    model, exporter = models.load(model_folder), "edgedisp"
    decoder = check_export(model, max_context)
    if decoder is not None:
        decoder_graph.write(decoder, output_dir, progress)
        genai_config.copy_files(model_folder, output_dir)
        config, weight_map = genai_config.genai_config(decoder, output_dir), _weight_map(decoder)
    else:
        architecture = model.config.model_type
        rows, exporter = {name: len(values) for name, values in model.named_parameters()}, "onnxruntime-genai"
        del model  # the builder reads the folder itself
        progress(0, 1, f"onnxruntime-genai's builder writes {architecture}")
        _build(model_folder, output_dir, architecture)
        genai_config.copy_files(model_folder, output_dir)
        config = read_json(output_dir / genai_config.GENAI_CONFIG)
        config["model"]["eos_token_id"] = genai_config.end_ids(output_dir)  # the builder: the configured ones
        names = _fix_shapes(output_dir, config["model"]["decoder"]["head_size"])
        weight_map = _builder_weight_map(names, rows)
        progress(1, 1, "graph written")
    write_json(output_dir / genai_config.GENAI_CONFIG, config)
    genai_config.set_threads(output_dir, threads)
    (output_dir / WEIGHT_MAP).write_text(json.dumps(weight_map), encoding="utf-8")
    context = config["model"]["context_length"]
    write_app(output_dir, read_json(model_folder / APP), context)
    return {"exporter": exporter, "context": context, **size_and_nodes(output_dir)}


def size_and_nodes(bundle: Path) -> dict[str, Any]:
    """{size_bytes, nodes: {op: n}} of a bundle; size_bytes counts the graph and its weights."""
    operators = Counter(node.op_type for node in read_graph(bundle / GRAPH).graph)
    size = sum((bundle / name).stat().st_size for name in (GRAPH, DATA))
    return {"size_bytes": size, "nodes": dict(sorted(operators.items()))}


def _weight_map(decoder: Decoder) -> WeightMap:
    """The map of the graph that decoder_graph.py writes."""

    def entry(linear: Linear) -> dict[str, Any]:
        rows = {} if linear.rows is None else {"rows": linear.rows.tolist()}
        # Conv1D keeps [in, out], as the graph does.
        return {"torch": linear.parameters, "transposed": not linear.is_conv1d, **rows}

    entries = {EMBEDDING: {"torch": decoder.embedding.parameters, "transposed": False}}
    for layer in decoder.layers:
        for linear in (layer.qkv, layer.attention_output, layer.up, layer.down):
            entries[f"{linear.name}.weight"] = entry(linear)
    if decoder.lm_head is None:
        entries[EMBEDDING]["tied_head"] = True
    else:
        entries["lm_head.weight"] = entry(decoder.lm_head)
    return entries


# ---------------------------------------------------------------- onnxruntime-genai's builder


def _build(model_folder: Path, output_dir: Path, architecture: str) -> None:
    """The fp32 bundle by the builder, in a process of its own. BuildFailed with the last lines it printed."""
    with tempfile.TemporaryDirectory() as cache:
        options = {"-i": model_folder, "-o": output_dir, "-p": "fp32", "-e": "cpu", "-c": cache}
        words = [str(word) for option in options.items() for word in option]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *words]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        last = " / ".join(ended.stderr.strip().splitlines()[-3:])
        raise BuildFailed(
            f"{model_folder}: onnxruntime-genai's builder (of edgedisp[bench]) could not write family "
            f"{architecture!r}: {last}"
        )


def _fix_shapes(bundle: Path, head_dim: int) -> list[str]:
    """Write the head dimension of the builder's caches as a number, as transformers.js reads a symbol as 0.
    Returns the names of the weights."""
    model = read_graph(bundle / GRAPH)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if str(value.name).startswith(("past_key_values.", "present.")) and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:3], head_dim])
    (bundle / GRAPH).write_bytes(to_bytes(model))
    return list(model.graph.initializers)


def _builder_weight_map(names: list[str], rows: dict[str, int]) -> WeightMap:
    """The map of the builder's graph with weights `names`; `rows`: torch parameter -> its first dimension."""
    entries: WeightMap = {}
    for name in sorted(names):
        words = name.removesuffix(".MatMul.weight").split(".")
        if name == EMBEDDING:
            entries[name] = {"torch": [EMBEDDING], "transposed": False}
        elif name == "lm_head.MatMul.weight":
            is_tied = "lm_head.weight" not in rows
            entries[name] = {"torch": [EMBEDDING if is_tied else "lm_head.weight"], "transposed": True}
            entries[name] |= {"tied_head": True} if is_tied else {}
        elif words[:2] == ["model", "layers"] and name.endswith(".MatMul.weight"):
            entries[name] = _builder_linear(".".join(words[:3]), ".".join(words[3:]), rows)
    return entries


def _builder_linear(layer: str, linear: str, rows: dict[str, int]) -> dict[str, Any]:
    """One linear map of one layer. Phi-3's gate and up are one torch parameter, which the builder cuts."""
    joined = f"{layer}.mlp.gate_up_proj.weight"
    if linear in ("mlp.gate_proj", "mlp.up_proj") and joined in rows:
        half = rows[joined] // 2
        first = 0 if linear == "mlp.gate_proj" else half
        return {"torch": [joined], "transposed": True, "rows": list(range(first, first + half))}
    choices = BUILDER_NAMES.get(linear, [[linear.replace("attn.", "self_attn.")]])
    choices = [[f"{layer}.{module}.weight" for module in modules] for modules in choices]
    return {"torch": next(names for names in choices if rows.keys() >= set(names)), "transposed": True}
