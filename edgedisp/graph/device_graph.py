"""A bundle for one kind of device: its threads, its context, and logits of the last token alone.

Logits within the device's context do not change. Tables of positions are cut to the context: with 8,192
positions those of SmolLM2-135M are 2 MB of a 104 MB bundle, and the cache that a runtime allocates at once
is 380 MB. Generating needs logits after each row's last token alone: a gather before the head, the widest
product of a small model, saves a fifth of a prompt's work.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgedisp.core.errors import BadInput
from edgedisp.core.files import read_json, write_json
from edgedisp.graph.export import WEIGHT_MAP
from edgedisp.graph.genai_config import GENAI_CONFIG, LENGTHS, context_length, set_threads
from edgedisp.graph.onnx_graph import DATA, GRAPH, NewNodes, TensorStore, find_head, forget_shapes

# Inputs of an operator that are tables of positions, one row each.
TABLES = {"GroupQueryAttention": (7, 8), "RotaryEmbedding": (2, 3)}
NOT_COPIED = ("record.json", "manifest.json", "README.md", WEIGHT_MAP, GRAPH, DATA)
PREFIX = "last_token."


def for_device(
    bundle: Path, output_dir: Path, *, threads: int, context: int | None = None, last_logits: bool = True
) -> dict[str, Any]:
    """Write `bundle` (graph and weights at its top) for a device into the empty folder `output_dir`.

    `context` None: the bundle's. Returns {threads, context, size_bytes}: the context is the smaller of
    `context` and the bundle's; size_bytes counts graph and weights. BadInput for less than one thread or
    position, or where there is no bundle.
    """
    if context is not None and context < 1:
        raise BadInput(f"context is {context}; at least 1 position is needed")
    if not (bundle / GRAPH).is_file():
        raise BadInput(f"{bundle}: no bundle ({GRAPH} is missing); `edgedisp export` makes one")
    available = context_length(bundle)
    positions = min(available, context or available)
    for path in sorted(bundle.iterdir()):
        if path.is_file() and path.name not in NOT_COPIED:
            shutil.copyfile(path, output_dir / path.name)
    model = ir.load(bundle / GRAPH)
    if positions < available:
        _cut_positions(model.graph, bundle, output_dir, available - positions)
    elif (bundle / DATA).is_file():
        shutil.copyfile(bundle / DATA, output_dir / DATA)
    if last_logits:
        keep_last(model)
    ir.save(model, output_dir / GRAPH)
    set_threads(output_dir, threads)
    _set_context(output_dir, positions)
    size = sum((output_dir / name).stat().st_size for name in (GRAPH, DATA) if (output_dir / name).is_file())
    return {"threads": threads, "context": positions, "size_bytes": size}


def _set_context(bundle: Path, positions: int) -> None:
    """Write the number of positions wherever a runtime looks for it."""
    genai, config = read_json(bundle / GENAI_CONFIG), read_json(bundle / "config.json")
    genai["model"]["context_length"] = positions
    genai["search"] = {**genai.get("search", {}), "max_length": positions}
    write_json(bundle / GENAI_CONFIG, genai)
    lengths = {name: min(positions, config[name]) for name in LENGTHS if isinstance(config.get(name), int)}
    write_json(bundle / "config.json", {**config, **lengths})


def position_tables(graph: ir.Graph) -> set[str]:
    """Names of the initializers that have one row for each position."""
    tables: set[ir.Value | None] = set()
    for node in graph:
        if node.op_type in TABLES:
            tables |= {node.inputs[index] for index in TABLES[node.op_type] if index < len(node.inputs)}
        elif node.op_type == "Gather" and "position" in str(node.inputs[0] and node.inputs[0].name):
            tables.add(node.inputs[0])  # learned positions
    return {name for name, value in graph.initializers.items() if value in tables}


def _cut_positions(graph: ir.Graph, bundle: Path, output_dir: Path, dropped_rows: int) -> None:
    """Copy the weights tensor by tensor, the tables of positions without their last rows.

    Rows are dropped at the end, so that an architecture whose first position has another row than 0 keeps it.
    """
    tables, store = position_tables(graph), TensorStore(output_dir)
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            path = bundle / tensor.location
            if path.parent.resolve() != bundle.resolve():
                raise BadInput(f"{bundle}: tensor {name} points outside the bundle, to {path}")
        elif tensor is None or name not in tables:
            continue
        array = tensor.numpy()[:-dropped_rows] if name in tables else tensor.numpy()
        store.add(name, array)
        value.const_value = ir.serde.deserialize_tensor(store.tensors[name], output_dir)
        value.shape = ir.Shape(array.shape)


def keep_last(model: ir.Model) -> None:
    """Change the graph in place: `logits` become [batch, 1, vocab], of each row's last real token.

    The head is found as the last product before the logits, whoever wrote the graph. BadInput where there is
    none, or where the graph does so already.
    """
    graph = model.graph
    head = find_head(graph)
    if head is None:
        raise BadInput("the graph makes no logits out of a product with the head's weights")
    if any(node.name and node.name.startswith(PREFIX) for node in graph):
        raise BadInput("the graph keeps the last token's logits alone already")
    inputs, new = {value.name: value for value in graph.inputs}, NewNodes(graph, PREFIX)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    index_1, last_axis = new.constant(f"{PREFIX}one", 1), new.constant(f"{PREFIX}last_axis", [-1])
    # real tokens - 1 counts from the start of the row, cached tokens included; a padded row that decodes may
    # have fewer than there are in the cache, and then its one new token is meant.
    real = new.op("ReduceSum", [mask, new.constant(f"{PREFIX}axis", [1])], "real", keepdims=1)
    total = new.op("Gather", [new.op("Shape", [mask], "mask_shape"), index_1], "total", axis=0)
    count = new.op("Gather", [new.op("Shape", [ids], "ids_shape"), index_1], "new", axis=0)
    less_cached = new.op("Sub", [count, total], "less_cached")
    index = new.op("Sub", [new.op("Add", [real, less_cached], "count"), index_1], "index_or_negative")
    index = new.op("Max", [index, new.constant(f"{PREFIX}zero", 0)], "index")  # int64 [batch, 1]
    index = new.op("Unsqueeze", [index, last_axis], "indices")
    hidden = new.op("GatherND", [head.inputs[0], index], "hidden", batch_dims=1)
    head.replace_input_with(0, hidden)
    graph.insert_before(head, new.nodes)
    forget_shapes(graph)
    logits = next(value for value in graph.outputs if value.name == "logits")
    logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]]) if logits.shape else None
