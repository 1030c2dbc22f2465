"""From an fp32 bundle to a quantized one: `MatMulNBits` products, `GatherBlockQuantized` for the embedding.

Every weight of `find_uses` is replaced, whoever wrote the graph. Norms, biases and learned positions stay
fp32: they are small and sensitive. Weights are read, rounded and written one at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.graph.export import size_and_nodes
from edgedisp.graph.onnx_graph import DATA, GRAPH, PACKED, PACKED_GATHER, NewNodes, TensorStore, to_bytes
from edgedisp.quantize.grid import Blocks, Choice, Grid, pack, uniform_grids
from edgedisp.quantize.onnx_weights import (
    Use,
    embedding_and_head,
    find_uses,
    read_fp32_graph,
    read_tensor,
    read_weight_map,
)

# Word in a weight's name -> the part of the model that it belongs to; the genai builder uses the same words.
COMPONENTS = {"lm_head": "head", "embed": "embedding", "attn": "attention", "mlp": "mlp"}


@dataclass(frozen=True)
class BundleOptions:
    """One choice for all layers; `head_bits` are those of the embedding and the head. accuracy_level: 0 and
    1 compute in fp32; 4 rounds activations to 8 bits, which makes few-bit weights fast on CPUs."""

    bits: int
    group: int = 32
    symmetric: bool = True
    accuracy_level: int = 4
    head_bits: int = 8
    method: str = "rtn"


def quantize_bundle(
    source: Path,
    output_dir: Path,
    *,
    blocks: Mapping[str, Blocks] | None = None,
    progress: Progress = silent,
    **fields: Any,
) -> dict[str, Any]:
    """Write the fp32 bundle `source` into the empty folder `output_dir`; fields: of `BundleOptions`.

    Returns the options and what `quantize_assigned` returns. BadInput as `read_fp32_graph`.
    """
    options = BundleOptions(**fields)
    uses = find_uses(read_fp32_graph(source).graph)
    grids = uniform_grids(options.bits, options.group, options.symmetric, options.head_bits)
    layers, outer = (Choice(grid, options.method) for grid in grids)
    assignment = dict.fromkeys(uses, layers) | dict.fromkeys(embedding_and_head(uses), outer)
    level = options.accuracy_level
    record = quantize_assigned(
        source, output_dir, assignment, accuracy_level=level, blocks=blocks, progress=progress
    )
    return {**asdict(options), **record}


def quantize_assigned(
    source: Path,
    output_dir: Path,
    assignment: Mapping[str, Choice],
    *,
    accuracy_level: int = 4,
    blocks: Mapping[str, Blocks] | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the fp32 bundle `source` into the empty folder `output_dir`, each weight of `find_uses` by its
    choice. blocks: torch parameter -> its blocks, where weights are rounded already; all of the layers then.

    Returns {size_bytes (graph and weights), nodes {operator: count}, by_tensor [{name, component, bits,
    group, symmetric, method, size_bytes}]}. BadInput as `quantize_bundle`; BuildFailed names a weight of the
    layers that has no blocks.
    """
    model, store = read_fp32_graph(source), TensorStore(output_dir)
    graph, uses = model.graph, find_uses(model.graph)
    outer, origins, rows = embedding_and_head(uses), read_weight_map(source), list[dict[str, Any]]()
    for name, value in list(graph.initializers.items()):
        values = read_tensor(value.const_value)
        if name not in assignment:
            value.const_value = store.add(name, values)
            continue
        progress(len(rows), len(uses), "quantizing")
        choice, grid = assignment[name], assignment[name].grid
        rounded = origins[name].blocks(blocks) if blocks is not None else None
        if rounded is None:
            if blocks is not None and name not in outer:
                raise BuildFailed(f"{source}: {name} is no weight of the model that was calibrated")
            rounded = choice.blocks(torch.from_numpy(values if uses[name][0].rows_first else values.T))
        size = grid.size_bytes(len(rounded.q), rounded.columns)
        part = next((part for word, part in COMPONENTS.items() if word in name), "other")
        row = {"name": name, "component": part, "bits": grid.bits, "group": grid.group}
        rows.append(row | {"symmetric": grid.symmetric, "method": choice.method, "size_bytes": size})
        _replace_readers(store, name, uses[name], rounded, grid, accuracy_level)
    (output_dir / GRAPH).write_bytes(to_bytes(model))
    for path in source.iterdir():
        if path.is_file() and path.name not in (GRAPH, DATA):
            shutil.copyfile(path, output_dir / path.name)
    progress(len(uses), len(uses), "quantized")
    return {**size_and_nodes(output_dir), "by_tensor": rows}


def _replace_readers(
    store: TensorStore, name: str, users: Sequence[Use], blocks: Blocks, grid: Grid, accuracy_level: int
) -> None:
    """Store the packed weight `name`, and put packed operators in the place of its readers.

    A tied embedding is stored once, as the gather reads it ([vocab, bytes]); the product sees it through a
    `Reshape`, which the runtime folds at load. fp16 scales go through a `Cast`, folded too. With graph
    optimizations off they are not, and `MatMulNBits` at level 4 (onnxruntime 1.31) then gives wrong numbers
    for a constant weight: the `Identity` makes the weight no constant there.
    """
    graph: Any = users[0].node.graph
    packed, setup, gathered = pack(blocks, grid), NewNodes(graph, store=store), any(u.gather for u in users)
    shape, sizes = packed.data.shape, {"bits": grid.bits, "block_size": grid.group}
    data = packed.data.reshape(len(packed.data), -1) if gathered else packed.data
    stored = setup.constant(f"{name}.q{grid.bits}", data)
    half = setup.constant(f"{name}.scales.fp16", packed.scales)
    parameters = [setup.op("Cast", [half], f"{name}.scales", to=ir.DataType.FLOAT)]
    if packed.zero_points is not None:
        parameters.append(setup.constant(f"{name}.zero_points", packed.zero_points))
    if gathered:
        unfolded = setup.op("Reshape", [stored, setup.constant(f"{name}.shape", shape)], f"{name}.blocks")
    else:
        unfolded = setup.op("Identity", [stored], f"{name}.blocks")
    graph.insert_before(users[0].node, setup.nodes)
    for use in users:
        new, node = NewNodes(graph, store=store), use.node
        if not use.gather:
            inputs = [node.inputs[0], unfolded, *parameters]
            whole = {"K": packed.columns, "N": shape[0], "accuracy_level": accuracy_level}
            new.op(PACKED, inputs, str(node.name), **sizes, **whole)
        else:
            axes = {"gather_axis": 0, "quantize_axis": 1}
            looked_up = new.op(
                PACKED_GATHER, [stored, node.inputs[1], *parameters], f"{name}.rows", **sizes, **axes
            )
            if shape[1] * grid.group != packed.columns:  # rows come out as whole groups
                limits = (("start", 0), ("end", packed.columns), ("axis", -1))
                cut = [new.constant(f"{name}.{part}", [limit]) for part, limit in limits]
                new.op("Slice", [looked_up, *cut], f"{name}.cut")
        new.replace(node)
