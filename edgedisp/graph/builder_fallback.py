"""Architectures that this package does not write itself, through onnxruntime-genai's model builder.

The bundle has the same interface. The builder's output is shown only if it fails. Left out: vision, audio,
mixtures of experts.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgedisp.core.errors import BuildFailed
from edgedisp.core.files import read_json, write_json
from edgedisp.core.progress import Progress, silent
from edgedisp.graph import genai_config
from edgedisp.graph.onnx_graph import GRAPH

# Architectures whose graph was compared with torch on a tiny random model (builder 0.18, transformers
# 5.23): the logits are equal to 1e-4, phi's to 2e-3. Not among them: olmo (off by 4), nemotron (1e-2),
# gemma2 (its cache holds the window alone, which only genai handles).
ARCHITECTURES = ("ernie4_5", "gemma", "granite", "phi", "phi3", "smollm3")

# The builder's name of a linear map -> the torch modules that it may stand for.
BUILDER_NAMES = {
    "attn.qkv_proj": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.qkv_proj"]],
    "attn.o_proj": [["self_attn.o_proj"], ["self_attn.dense"]],
}


def build(
    model_folder: Path, output_dir: Path, *, architecture: str, threads: int, progress: Progress = silent
) -> None:
    """Build an fp32 bundle in `output_dir`. BuildFailed with the builder's reason or the missing package."""
    progress(0, 1, f"onnxruntime-genai's builder writes {architecture}")
    printed = io.StringIO()
    try:
        with tempfile.TemporaryDirectory() as cache, _quiet(printed):
            from onnxruntime_genai.models.builder import create_model, parse_extra_options

            place = ("", str(model_folder), str(output_dir), "fp32", "cpu", cache)
            create_model(*place, **parse_extra_options(*place, []))
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
    config["model"]["eos_token_id"] = genai_config.end_ids(
        output_dir
    )  # the builder writes configured ones alone
    write_json(output_dir / genai_config.GENAI_CONFIG, config)
    genai_config.set_threads(output_dir, threads)
    _set_head_dimension(output_dir, config["model"]["decoder"]["head_size"])
    progress(1, 1, "graph written")


@contextlib.contextmanager
def _quiet(printed: io.StringIO) -> Iterator[None]:
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


def _set_head_dimension(bundle: Path, head_dim: int) -> None:
    """Replace the symbol of the caches' last dimension, which transformers.js reads as 0, by its number."""
    model = ir.load(bundle / GRAPH)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if str(value.name).startswith(("past_key_values.", "present.")) and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:3], head_dim])
    ir.save(model, bundle / GRAPH)


def weight_map(names: Iterable[str], shapes: dict[str, tuple[int, ...]]) -> dict[str, dict[str, Any]]:
    """The map of a graph with the initializers `names` of a torch model with parameters of `shapes`."""
    embedding, entries = "model.embed_tokens.weight", {}
    for name in sorted(names):
        words = name.removesuffix(".MatMul.weight").split(".")
        if name == embedding:
            entries[name] = {"torch": [embedding], "transposed": False}
        elif name == "lm_head.MatMul.weight" and "lm_head.weight" in shapes:
            entries[name] = {"torch": ["lm_head.weight"], "transposed": True}
        elif name == "lm_head.MatMul.weight":
            entries[name] = {"torch": [embedding], "transposed": True, "tied_head": True}
        elif words[:2] == ["model", "layers"] and name.endswith(".MatMul.weight"):
            entries[name] = _linear(".".join(words[:3]), ".".join(words[3:]), shapes)
    return entries


def _linear(layer: str, linear: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
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
