"""From a model folder to an fp32 bundle, and `weight_map.json`: what its matrices are made of.

    {initializer: {"torch": [parameter, ...], "transposed": bool, "rows": [int, ...], "tied_head": true}}

The torch parameters are concatenated along dimension 0, then `rows` (only where the order differs) picks
rows, then `transposed` says that the initializer is the transpose. `tied_head` marks the one matrix that is
both embedding and output head. Linear maps, embedding and head are listed: what a quantizer may pack.

Architectures that decoder_graph.py does not write go through onnxruntime-genai's model builder; the bundle
has the same interface.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgedisp import models
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import read_json, write_json
from edgedisp.core.progress import Progress, silent
from edgedisp.graph import decoder_graph, genai_config
from edgedisp.graph.architectures import READERS, read_decoder
from edgedisp.graph.decoder_graph import EMBEDDING, Decoder, Linear
from edgedisp.graph.onnx_graph import DATA, GRAPH

WEIGHT_MAP = "weight_map.json"

# Architectures whose graph by the builder was compared with torch on a tiny random model (builder 0.18,
# transformers 5.23): the logits are equal to 1e-4, phi's to 2e-3. Not among them: olmo (off by 4), nemotron
# (1e-2), gemma2 (its cache holds the window alone, which only genai handles).
BUILDER_ARCHITECTURES = ("ernie4_5", "gemma", "granite", "phi", "phi3", "smollm3")

# The builder's name of a linear map -> the torch modules that it may stand for.
BUILDER_NAMES = {
    "attn.qkv_proj": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.qkv_proj"]],
    "attn.o_proj": [["self_attn.o_proj"], ["self_attn.dense"]],
}

WeightMap = dict[str, dict[str, Any]]
Shapes = dict[str, tuple[int, ...]]


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
    if not (model_folder / "config.json").is_file():
        raise BadInput(f"{model_folder}: not a model folder (config.json is missing)")
    architecture = str(read_json(model_folder / "config.json").get("model_type", "unknown"))
    if architecture not in (*READERS, *BUILDER_ARCHITECTURES):
        raise BadInput(
            f"{model_folder}: models of type {architecture!r} cannot be exported; "
            f"known types: {', '.join(sorted((*READERS, *BUILDER_ARCHITECTURES)))}"
        )
    model = models.load(model_folder)
    _check_finite(model, model_folder)
    if architecture in READERS:
        decoder = read_decoder(model, max_context)
        decoder_graph.write(decoder, output_dir, progress)
        genai_config.write_configs(decoder, model_folder, output_dir, threads)
        graph = ir.load(output_dir / GRAPH).graph
        weight_map = _weight_map(decoder, model)
    else:
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        del model  # the builder reads the folder itself
        progress(0, 1, f"onnxruntime-genai's builder writes {architecture}")
        _build(model_folder, output_dir, architecture, threads)
        graph = ir.load(output_dir / GRAPH).graph
        weight_map = _builder_weight_map(graph.initializers, shapes)
        progress(1, 1, "graph written")
    lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in weight_map.items()]
    (output_dir / WEIGHT_MAP).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    return {
        "family": architecture,
        "exporter": "edgedisp" if architecture in READERS else "onnxruntime-genai",
        "runtime_layout": "onnxruntime-genai",
        "context": genai_config.context_length(output_dir),
        "threads": threads,
        "size_bytes": sum((output_dir / name).stat().st_size for name in (GRAPH, DATA)),
        "nodes": dict(sorted(Counter(node.op_type for node in graph).items())),
    }


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


def _weight_map(decoder: Decoder, model: Any) -> WeightMap:
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
        for linear in (layer.qkv, layer.attention_output, layer.up, layer.down):
            entries[f"{linear.name}.weight"] = entry(linear)
    if decoder.lm_head is None:
        entries[EMBEDDING]["tied_head"] = True
    else:
        entries["lm_head.weight"] = entry(Linear("lm_head", (decoder.lm_head,)))
    return entries


# ---------------------------------------------------------------- onnxruntime-genai's builder


def _build(model_folder: Path, output_dir: Path, architecture: str, threads: int) -> None:
    """The fp32 bundle by the builder. BuildFailed with its reason and last output, or the missing package."""
    printed = io.StringIO()
    try:
        with tempfile.TemporaryDirectory() as cache, _captured(printed):
            from onnxruntime_genai.models.builder import create_model, parse_extra_options

            arguments = ("", str(model_folder), str(output_dir), "fp32", "cpu", cache)
            create_model(*arguments, **parse_extra_options(*arguments, []))
    except ModuleNotFoundError as error:
        raise BuildFailed(
            f"{model_folder}: family {architecture!r} needs onnxruntime-genai's builder, which needs "
            f"{error.name}; install edgedisp[bench]"
        ) from error
    except Exception as error:  # whatever the builder meets in a model is a failure of this build
        last = " / ".join(printed.getvalue().strip().splitlines()[-3:])
        raise BuildFailed(
            f"{model_folder}: onnxruntime-genai's builder could not write family {architecture!r}: "
            f"{type(error).__name__}: {error}. It said last: {last}"
        ) from error
    genai_config.copy_files(model_folder, output_dir)
    config = read_json(output_dir / genai_config.GENAI_CONFIG)
    config["model"]["eos_token_id"] = genai_config.end_ids(output_dir)  # the builder: the configured ones
    write_json(output_dir / genai_config.GENAI_CONFIG, config)
    genai_config.set_threads(output_dir, threads)
    model = ir.load(output_dir / GRAPH)
    for value in [*model.graph.inputs, *model.graph.outputs]:  # transformers.js reads a symbol as 0
        if str(value.name).startswith(("past_key_values.", "present.")) and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:3], config["model"]["decoder"]["head_size"]])
    ir.save(model, output_dir / GRAPH)


@contextlib.contextmanager
def _captured(printed: io.StringIO) -> Iterator[None]:
    """Send prints and log lines of the builder to `printed`."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = [logging.StreamHandler(printed)]
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
    finally:
        root.handlers = handlers
        root.setLevel(level)


def _builder_weight_map(names: Iterable[str], shapes: Shapes) -> WeightMap:
    """The map of the builder's graph with initializers `names`; `shapes`: of the torch parameters."""
    entries: WeightMap = {}
    for name in sorted(names):
        words = name.removesuffix(".MatMul.weight").split(".")
        if name == EMBEDDING:
            entries[name] = {"torch": [EMBEDDING], "transposed": False}
        elif name == "lm_head.MatMul.weight" and "lm_head.weight" in shapes:
            entries[name] = {"torch": ["lm_head.weight"], "transposed": True}
        elif name == "lm_head.MatMul.weight":
            entries[name] = {"torch": [EMBEDDING], "transposed": True, "tied_head": True}
        elif words[:2] == ["model", "layers"] and name.endswith(".MatMul.weight"):
            entries[name] = _builder_linear(".".join(words[:3]), ".".join(words[3:]), shapes)
    return entries


def _builder_linear(layer: str, linear: str, shapes: Shapes) -> dict[str, Any]:
    """One linear map of one layer. Phi-3's gate and up are one torch parameter, which the builder cuts."""
    joined = f"{layer}.mlp.gate_up_proj.weight"
    if linear in ("mlp.gate_proj", "mlp.up_proj") and joined in shapes:
        half = shapes[joined][0] // 2
        first = 0 if linear == "mlp.gate_proj" else half
        return {"torch": [joined], "transposed": True, "rows": list(range(first, first + half))}
    for modules in BUILDER_NAMES.get(linear, [[linear.replace("attn.", "self_attn.")]]):
        names = [f"{layer}.{module}.weight" for module in modules]
        if all(name in shapes for name in names):
            return {"torch": names, "transposed": True}
    raise KeyError(f"{layer}.{linear}: no torch parameter is known for it")
