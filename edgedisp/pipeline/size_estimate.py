"""From the base's configuration alone: what every bundle will weigh, to 2 %, and whether a build can fit."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from edgedisp import models
from edgedisp.bench.system import gpu_capability, runner
from edgedisp.core.distributed import get_world_size
from edgedisp.core.errors import BadInput
from edgedisp.core.files import RECORD
from edgedisp.core.progress import Progress
from edgedisp.graph import architectures
from edgedisp.models.torch_model import component_of
from edgedisp.pipeline.options import BundleRounding
from edgedisp.pipeline.rounding import grids
from edgedisp.pipeline.stage import Inputs
from edgedisp.quantize.mixed_precision import FOUR_BITS, out_of_reach
from edgedisp.recipe import Recipe

TRAINING_BYTES_PER_WEIGHT = 16  # float32 weight, gradient and the two moments of AdamW
TOLERANCE = 0.02  # of the sizes computed here
GRAPH_BYTES, NODE_BYTES = 6_000, 6_000  # of model.onnx without weights, and of each layer in it

StoredBytes = Callable[[int, int], int]
"""(rows, columns) of a weight -> its bytes."""
FP32: StoredBytes = lambda rows, columns: 4 * rows * columns  # noqa: E731


def size_account(
    model: Any, roundings: Mapping[str, BundleRounding], contexts: Mapping[str, int]
) -> dict[str, Any]:
    """Bytes of the fp32 bundle and of each rounding (precision -> rounding), by component, and of the KV
    cache of one sequence at each of `contexts` (target -> positions, capped by the model's).

    model: a torch model, or one without weights (`models.empty_model`).
    Returns {tied, context, precisions {name: {components {name: bytes}, size_bytes}}, kv_cache {target:
    {positions, size_bytes}}}. BadInput where an export would be refused for the model's configuration.
    """
    tables, context, position_bytes = _positions(model)
    stored: dict[str, list[StoredBytes]] = {"fp32": [FP32, FP32]}
    stored |= {name: [grid.size_bytes for grid in grids(rounding)] for name, rounding in roundings.items()}
    capped = {target: min(positions, context) for target, positions in contexts.items()}
    return {
        "tied": models.count_parameters(model)["tied"],
        "context": context,
        "precisions": {name: _sizes(model, tables, *pair) for name, pair in stored.items()},
        "kv_cache": {
            target: {"positions": positions, "size_bytes": position_bytes * positions}
            for target, positions in capped.items()
        },
    }


def _positions(model: Any) -> tuple[int, int, int]:
    """Bytes of the rotary tables, positions of the bundle, bytes of the fp32 cache for each position."""
    config = model.config
    if (decoder := architectures.check_export(model)) is not None:
        tables = sum(4 * part.numel() for rope in decoder.ropes.values() for part in rope)
        heads, width, context = decoder.kv_heads, decoder.head_dim, decoder.context
    else:
        context = int(getattr(config, "max_position_embeddings", None) or architectures.DEFAULT_CONTEXT)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        tables = 4 * context * width  # cos and sin, each half as wide
    return tables, context, 2 * 4 * config.num_hidden_layers * heads * width


def _sizes(model: Any, tables: int, stored: StoredBytes, stored_outer: StoredBytes) -> dict[str, Any]:
    """By component: `stored` gives the bytes of the layers' matrices, `stored_outer` those of embedding and
    lm_head; all else stays in fp32."""
    modules, sizes = dict(model.named_modules()), Counter[str]({"positions": tables})
    embedding, lm_head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for name, parameter in model.named_parameters():  # yields a shared parameter once
        module = modules[name.rpartition(".")[0]]
        is_outer = parameter is embedding or parameter is lm_head
        size = 4 * parameter.numel()
        if is_outer or (parameter.ndim == 2 and isinstance(module, nn.Linear | Conv1D)):
            rows, columns = reversed(parameter.shape) if isinstance(module, Conv1D) else parameter.shape
            size = (stored_outer if is_outer else stored)(rows, columns)
        part = component_of(name.rpartition(".")[0], module)
        if part == "embedding" and not is_outer:
            part = "positions"
        elif is_outer and parameter is not embedding:
            part = "head"
        sizes[part] += size
    graph = GRAPH_BYTES + NODE_BYTES * model.config.num_hidden_layers
    return {"components": dict(sorted(sizes.items())), "size_bytes": sum(sizes.values()) + graph}


def check_fits(
    recipe: Recipe, run: Path, model: Any, leaves: Sequence[str] = ("model", "fp32")
) -> str | None:
    """Whether the recipe can work with this model on this machine, as far as that is certain.

    leaves: folders with weights in fp32 that every training leaves. Raises BadInput for more tokens than a
    bundle has positions and for less free space than is certainly written; returns a warning where training
    needs more memory than is free.
    """
    positions = min(_positions(model)[1], models.context_length(model.config))
    timed = recipe.latency.prompt + recipe.latency.generate
    lengths = ("data.context", recipe.data.context, ""), ("latency.prompt", timed, " with latency.generate")
    for key, tokens, which in lengths:
        if tokens > positions:
            words = f"{tokens:,} tokens{which}, but bundles of this base have {positions:,} positions"
            raise BadInput(f"{recipe.where(key)}: {words}")
    parameters: int = models.count_parameters(model)["total"]
    folders = (run / arm.name / name for arm in recipe.arm_runs for name in leaves)
    written = 4 * parameters * sum(not (folder / RECORD).is_file() for folder in folders)
    if not (run / "corpus" / RECORD).is_file():
        written += 4 * (recipe.steps or 0) * recipe.tokens_per_step  # uint32
    existing = next(path for path in (run.absolute(), *run.absolute().parents) if path.exists())
    if written > (free := shutil.disk_usage(existing).free):
        words = f"the build writes more than {_mb(written)} into {run}, where {_mb(free)} are free"
        key = recipe.where("train.tokens")
        raise BadInput(f"{key}: {words}: fewer tokens, seeds or arms, or another --out")
    return _low_memory(recipe, model, parameters)


def _low_memory(recipe: Recipe, model: Any, parameters: int) -> str | None:
    """A warning where the weights, their gradients and AdamW's moments, and what each layer gets of one
    micro-batch do not fit. A GPU and several processes have other memory."""
    free = runner().memory()["memory_available_bytes"]
    if free is None or gpu_capability() is not None or get_world_size() > 1:
        return None
    free += sum(4 * weight.numel() for weight in model.parameters() if not weight.is_meta)  # loaded already
    config, adapter = model.config.get_text_config(), recipe.train.adapter
    weight_bytes = (
        TRAINING_BYTES_PER_WEIGHT if adapter is None else {"nf4": 0.5, "int8": 1}.get(adapter.base or "", 4)
    )
    weights = int(weight_bytes * parameters)
    inputs = 4 * config.num_hidden_layers * config.hidden_size * recipe.train.batch * recipe.data.context
    if weights + inputs <= free:
        return None
    key, batch = recipe.where("train.batch"), recipe.train.batch
    needs = f"training takes more than {_mb(weights + inputs)} of memory, and {_mb(free)} are free"
    remedies = f"a batch below {batch}, a shorter data.context{', an adapter' * (adapter is None)}"
    return f"{key}: {needs}: {remedies}"


def _mb(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def check_budget(budget: int, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """{smallest_bytes} of the smallest bundle that a search could choose, before anything is trained.

    Raises BadInput for a budget (bytes) clearly below it; what is closer is found out by the search.
    """
    model = models.empty_model(inputs["base"])

    def smallest(rows: int, columns: int) -> int:
        return min(grid.size_bytes(rows, columns) for grid in FOUR_BITS)

    size: int = _sizes(model, _positions(model)[0], smallest, smallest)["size_bytes"]
    if size * (1 - TOLERANCE) > budget:
        raise out_of_reach(budget, size)
    return {"smallest_bytes": size}
