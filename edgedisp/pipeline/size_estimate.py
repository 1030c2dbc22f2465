"""What every bundle of a recipe will weigh, to 2 %, from the base's configuration alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from edgedisp import data, models
from edgedisp.core.progress import Progress
from edgedisp.graph import architectures
from edgedisp.models import component_of
from edgedisp.pipeline.rounding import uniform_grids
from edgedisp.quantize.grid import Grid
from edgedisp.quantize.mixed_precision import FOUR_BITS, out_of_reach
from edgedisp.recipe import Model, QuantizeBits

SMOKE_CONTEXT = 512  # positions of the twin, as `start.twin_base` makes it
TOLERANCE = 0.02  # of the sizes told here
GRAPH_BYTES, NODE_BYTES = 6_000, 6_000  # of model.onnx without weights, and of each layer in it

StoredBytes = Callable[[int, int, bool], int]
"""(rows, columns, whether it is embedding or head) -> bytes of a weight."""


def size_account(
    opened: Any, quantized: Mapping[str, tuple[int, QuantizeBits]], positions: Mapping[str, int]
) -> dict[str, Any]:
    """Bytes of the fp32 bundle and of each of `quantized` (precision -> bits and options), by component, and
    of the KV cache of one sequence at each of `positions` (target -> positions, capped by the model's).

    opened: a torch model, or one without weights (`models.empty_model`).

    Returns {tied, context, precisions {name: {components {name: bytes}, size_bytes}}, kv_cache {target:
    {positions, size_bytes}}}. BadInput where an export would be refused for the model's configuration.
    """
    tables, context, a_position = _positions(opened)
    precisions = {"fp32": _sizes(opened, tables, lambda rows, columns, outer: 4 * rows * columns)}
    for name, (bits, section) in quantized.items():
        body, ends = uniform_grids(section, bits)
        precisions[name] = _sizes(opened, tables, _on(body, ends))
    capped = {target: min(most, context) for target, most in positions.items()}
    return {
        "tied": models.count_parameters(opened)["tied"],
        "context": context,
        "precisions": precisions,
        "kv_cache": {
            target: {"positions": most, "size_bytes": a_position * most} for target, most in capped.items()
        },
    }


def _on(body: Grid, ends: Grid) -> StoredBytes:
    return lambda rows, columns, outer: (ends if outer else body).size_bytes(rows, columns)


def _positions(opened: Any) -> tuple[int, int, int]:
    """Bytes of the rotary tables, positions of the bundle, bytes of the fp32 cache for each position."""
    config = opened.config
    if config.model_type in architectures.READERS:
        decoder = architectures.read_decoder(opened)
        tables = sum(4 * part.numel() for rope in decoder.ropes.values() for part in rope)
        heads, width, context = decoder.kv_heads, decoder.head_dim, decoder.context
    else:
        context = int(getattr(config, "max_position_embeddings", None) or architectures.DEFAULT_CONTEXT)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        tables = 4 * context * width  # cos and sin, each half as wide
    return tables, context, 2 * 4 * config.num_hidden_layers * heads * width


def _sizes(opened: Any, tables: int, stored: StoredBytes) -> dict[str, Any]:
    """By component, of a model whose matrices take `stored` bytes; all else stays in fp32."""
    modules, sizes = dict(opened.named_modules()), Counter[str]({"positions": tables})
    outer = {id(opened.get_input_embeddings().weight), id(opened.get_output_embeddings().weight)}
    for name, parameter in opened.named_parameters():  # yields a shared parameter once
        owner = name.rpartition(".")[0]
        is_outer = id(parameter) in outer
        if is_outer or (parameter.ndim == 2 and isinstance(modules[owner], nn.Linear | Conv1D)):
            rows, columns = (
                reversed(parameter.shape) if isinstance(modules[owner], Conv1D) else parameter.shape
            )
            size = stored(rows, columns, is_outer)
        else:
            size = 4 * parameter.numel()
        part = component_of(owner, modules[owner])
        if part == "embedding" and not is_outer:
            part = "positions"
        elif is_outer and modules[owner] is opened.get_output_embeddings():
            part = "head"
        sizes[part] += size
    graph = GRAPH_BYTES + NODE_BYTES * opened.config.num_hidden_layers
    return {"components": dict(sorted(sizes.items())), "size_bytes": sum(sizes.values()) + graph}


def smallest_bytes(budget: int, opened: Any) -> int:
    """Bytes of the smallest bundle that a search could choose. BadInput for a budget clearly below it; what
    is closer is found out by the search."""

    def smallest(rows: int, columns: int, outer: bool) -> int:
        return min(grid.size_bytes(rows, columns) for grid in FOUR_BITS)

    size: int = _sizes(opened, _positions(opened)[0], smallest)["size_bytes"]
    if size * (1 - TOLERANCE) > budget:
        raise out_of_reach(budget, size)
    return size


def base_skeleton(
    section: Model, beside: Path, made: Path | None, smoke: bool, progress: Progress, *, download: bool = True
) -> Any:
    """The base without its weights: from the stage folder `made` if there is one, else from the source.

    None where that would be a download and `download` is off. A smoke run's twin is opened: it is tiny.
    """
    if made is not None:
        return models.empty_model(made)
    if smoke:
        texts = [document.text for document in data.synthetic_documents(50, seed=0)]
        return models.tiny_model(section.architecture or "", texts, seed=0, context=SMOKE_CONTEXT)[0]
    if not download and data.needs_download(section.base):
        return None
    where = data.fetch(section.base, sha256=section.sha256, base_dir=beside, progress=progress)
    return models.empty_model(where, revision=section.revision, trust_remote_code=section.trust_remote_code)
