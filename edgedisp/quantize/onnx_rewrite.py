"""From an fp32 bundle to a quantized one: `MatMulNBits` products, `GatherBlockQuantized` for the embedding.

Every product with a constant matrix is replaced, whoever wrote the graph (`MatMul`, `FusedMatMul`, `Gemm`).
Norms, biases and learned positions stay fp32: they are small and sensitive. Weights are read, rounded and
written one at a time.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.graph.onnx_graph import DATA, GRAPH, MICROSOFT
from edgedisp.quantize.grid import Blocks, Grid, Packed, concatenate, pack
from edgedisp.quantize.onnx_weights import (
    TensorStore,
    Use,
    component,
    find_uses,
    outer_weights,
    read_graph,
    read_tensor,
)
from edgedisp.quantize.rounding_methods import METHODS

ROUNDED_VALUES = 1 << 17  # values rounded at a time: half a MB, so that a method works in the cache
FP16 = ".fp16"  # ends the name of scales as they are stored

BlocksOf = Callable[[str], Blocks | None]
"""Weight of the graph -> its blocks, rows in the graph's order; None where it has to be rounded."""


@dataclass(frozen=True)
class Choice:
    """How one weight is stored and multiplied. method: a name in `METHODS`. accuracy_level: 0 and 1 compute
    in fp32; 4 rounds activations to 8 bits, which makes few-bit weights fast on CPUs."""

    grid: Grid
    method: str = "rtn"
    accuracy_level: int = 4

    def blocks(self, weight: Tensor, importance: Tensor | None = None) -> Blocks:
        """`weight` fp32 [out, in] rounded by the method, a few rows at a time: rows are independent."""
        step = max(1, ROUNDED_VALUES // weight.shape[1])
        parts = (METHODS[self.method](rows, self.grid, importance) for rows in weight.split(step))
        return concatenate(list(parts))


class BundleOptions(TypedDict, total=False):
    """Of a bundle with one choice for all layers; `head_bits` are those of the embedding and the head."""

    bits: int
    group: int
    symmetric: bool
    accuracy_level: int
    head_bits: int
    method: str


DEFAULTS: BundleOptions = {
    "group": 32,
    "symmetric": True,
    "accuracy_level": 4,
    "head_bits": 8,
    "method": "rtn",
}


def quantize_bundle(
    source: Path,
    output_dir: Path,
    *,
    blocks: BlocksOf | None = None,
    progress: Progress = silent,
    **options: Unpack[BundleOptions],
) -> dict[str, Any]:
    """Write the fp32 bundle `source` into the empty folder `output_dir`, one choice for all layers.

    Returns the options and what `quantize_assigned` returns. BadInput names a weight that is not finite, or a
    grid that ONNX Runtime does not have.
    """
    chosen: BundleOptions = {**DEFAULTS, **options}
    layers, outer = (
        Choice(Grid(bits, chosen["group"], chosen["symmetric"]), chosen["method"], chosen["accuracy_level"])
        for bits in (chosen["bits"], chosen["head_bits"])
    )
    uses = find_uses(read_graph(source).graph)
    assignment = dict.fromkeys(uses, layers) | dict.fromkeys(outer_weights(uses), outer)
    return {**chosen, **quantize_assigned(source, output_dir, assignment, blocks=blocks, progress=progress)}


def quantize_assigned(
    source: Path,
    output_dir: Path,
    assignment: Mapping[str, Choice],
    *,
    blocks: BlocksOf | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the fp32 bundle `source` into the empty folder `output_dir`, each weight of `find_uses` by its
    choice. With `blocks`, every weight of the layers must have some.

    Returns {size_bytes (graph and weights), nodes {operator: count}, by_tensor [{name, component, bits,
    group, symmetric, method, size_bytes}]}. BadInput names a weight that is not finite.
    """
    model, store = read_graph(source), TensorStore(source, output_dir)
    uses = find_uses(model.graph)
    outer, rows = outer_weights(uses), list[dict[str, Any]]()

    def packed(tensor: TensorProto, rows_first: bool, choice: Choice) -> Packed:
        name, grid = tensor.name, choice.grid
        progress(len(rows), len(uses), "quantizing")
        rounded = None if blocks is None else blocks(name)
        if rounded is None:
            if blocks is not None and name not in outer:
                raise BuildFailed(f"{source}: {name} is no weight of the model that was calibrated")
            stored = torch.from_numpy(read_tensor(source, tensor))
            try:
                rounded = choice.blocks(stored if rows_first else stored.T)
            except BadInput as error:
                raise BadInput(f"{name}: {error}") from error
        result = pack(rounded, grid)
        row = {"name": name, "component": component(name), "bits": grid.bits, "group": grid.group}
        row |= {"symmetric": grid.symmetric, "method": choice.method, "size_bytes": result.size_bytes}
        rows.append(row)
        return result

    _rewrite(model, uses, assignment, store, packed)
    (output_dir / GRAPH).write_bytes(model.SerializeToString())
    for path in source.iterdir():
        if path.is_file() and path.name not in (GRAPH, DATA):
            shutil.copyfile(path, output_dir / path.name)
    progress(len(uses), len(uses), "quantized")
    return {
        "size_bytes": sum((output_dir / name).stat().st_size for name in (GRAPH, DATA)),
        "nodes": dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        "by_tensor": rows,
    }


def bundle_bytes(source: Path, assignment: Mapping[str, Choice]) -> int:
    """`size_bytes` of the bundle that `quantize_assigned` would write; nothing is rounded."""
    model, store = read_graph(source), TensorStore(source, None)

    def empty(tensor: TensorProto, rows_first: bool, choice: Choice) -> Packed:
        rows, columns = tensor.dims if rows_first else reversed(tensor.dims)
        return choice.grid.empty(rows, columns)

    _rewrite(model, find_uses(model.graph), assignment, store, empty)
    return store.size_bytes + len(model.SerializeToString())


def _rewrite(
    model: ModelProto,
    uses: dict[str, list[Use]],
    assignment: Mapping[str, Choice],
    store: TensorStore,
    packed: Callable[[TensorProto, bool, Choice], Packed],
) -> None:
    """Store every tensor, the assigned ones as `packed`; put in the nodes that read those; drop the nodes
    that nobody reads any more (constant transposes)."""
    graph = model.graph
    replaced: dict[int, list[NodeProto]] = {}
    for tensor in graph.initializer:
        if tensor.name not in assignment:
            store.copy(tensor)
            continue
        users, choice = uses[tensor.name], assignment[tensor.name]
        readers = [graph.node[use.index] for use in users]
        nodes = _nodes(tensor.name, readers, packed(tensor, users[0].rows_first, choice), choice, store)
        replaced |= {use.index: new for use, new in zip(users, nodes)}
    needed, remaining = {output.name for output in graph.output}, []
    for index in reversed(range(len(graph.node))):
        for node in reversed(replaced.get(index, [graph.node[index]])):
            if needed.intersection(node.output):
                needed.update(node.input)
                remaining.append(NodeProto.FromString(node.SerializeToString()))
    for field in ("node", "initializer", "value_info"):
        graph.ClearField(field)
    graph.node.extend(reversed(remaining))
    graph.initializer.extend(tensor for tensor in store.tensors if tensor.name in needed)
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def _nodes(
    name: str, readers: list[NodeProto], packed: Packed, choice: Choice, store: TensorStore
) -> list[list[NodeProto]]:
    """Store the packed weight; for each reader the nodes that take its place.

    A tied embedding is stored once, as the gather reads it ([vocab, bytes]); the product sees it through a
    `Reshape`, which the runtime folds at load. fp16 scales go through a `Cast`, folded too. With graph
    optimizations off they are not, and `MatMulNBits` at level 4 (onnxruntime 1.31) then gives wrong numbers
    for a constant weight: the `Identity` makes the weight no constant there, and costs nothing elsewhere.
    """
    bits = choice.grid.bits
    rows, groups, width = packed.data.shape
    gathered = any(node.op_type == "Gather" for node in readers)
    data = store.add(f"{name}.q{bits}", packed.data.reshape(rows, -1) if gathered else packed.data)
    scales, blocks = f"{name}.scales", f"{data}.blocks"
    parameters, half = [scales], store.add(f"{scales}{FP16}", packed.scales)
    setup = [helper.make_node("Cast", [half], [scales], name=scales, to=TensorProto.FLOAT)]
    if packed.zero_points is not None:
        parameters.append(store.add(f"{name}.zero_points", packed.zero_points))
    if gathered:
        shape = store.add(f"{data}.shape", np.array([rows, groups, width], np.int64))
        setup.append(helper.make_node("Reshape", [data, shape], [blocks], name=blocks))
    else:
        setup.append(helper.make_node("Identity", [data], [blocks], name=blocks))
    nodes = [
        _gather(node, [data, node.input[1], *parameters], packed, choice.grid, store)
        if node.op_type == "Gather"
        else _product(node, [node.input[0], blocks, *parameters], packed, choice)
        for node in readers
    ]
    return [[*setup, *nodes[0]], *nodes[1:]]  # once, before the first reader


def _product(old: NodeProto, inputs: list[str], packed: Packed, choice: Choice) -> list[NodeProto]:
    """`MatMulNBits` in the place of a product, followed by `Add` for a Gemm with a bias."""
    biased = old.op_type == "Gemm" and len(old.input) > 2
    output = f"{old.output[0]}.product" if biased else old.output[0]
    sizes: dict[str, Any] = {"K": packed.columns, "N": len(packed.data)}
    sizes |= {"bits": choice.grid.bits, "block_size": choice.grid.group}
    level = choice.accuracy_level
    node = helper.make_node(
        "MatMulNBits", inputs, [output], old.name, domain=MICROSOFT, **sizes, accuracy_level=level
    )
    if not biased:
        return [node]
    return [node, helper.make_node("Add", [output, old.input[2]], [old.output[0]], name=f"{old.name}.biased")]


def _gather(
    old: NodeProto, inputs: list[str], packed: Packed, grid: Grid, store: TensorStore
) -> list[NodeProto]:
    """`GatherBlockQuantized`; a row that does not fill its last group comes out padded and is cut."""
    padded = packed.data.shape[1] * grid.group != packed.columns
    output = f"{old.output[0]}.padded" if padded else old.output[0]
    sizes: dict[str, Any] = {
        "bits": grid.bits,
        "block_size": grid.group,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    node = helper.make_node("GatherBlockQuantized", inputs, [output], old.name, domain=MICROSOFT, **sizes)
    if not padded:
        return [node]
    limits = (("start", 0), ("end", packed.columns), ("axis", -1))
    cut = [store.add(f"{output}.{part}", np.array([value], np.int64)) for part, value in limits]
    return [node, helper.make_node("Slice", [output, *cut], [old.output[0]], name=f"{output}.cut")]
