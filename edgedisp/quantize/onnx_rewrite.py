"""From an fp32 bundle to a quantized one: `MatMulNBits` products, `GatherBlockQuantized` for the embedding.

Every product with a constant matrix is replaced, whoever wrote the graph (`MatMul`, `FusedMatMul`, `Gemm`).
Norms, biases and learned positions stay fp32: they are small and sensitive. Weights are read, rounded and
written one at a time.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.graph.onnx_graph import DATA, GRAPH, MICROSOFT, PACKED, TensorStore
from edgedisp.quantize.grid import Blocks, Grid, Packed, pack
from edgedisp.quantize.onnx_weights import (
    component,
    embedding_and_head,
    find_uses,
    read_fp32_graph,
    read_tensor,
)
from edgedisp.quantize.rounding_methods import Choice

FP16 = ".fp16"  # ends the name of scales as they are stored

BlocksOf = Callable[[str], Blocks | None]
"""Weight of the graph -> its blocks, rows in the graph's order; None where it has to be rounded."""


class BundleOptions(TypedDict, total=False):
    """One choice for all layers; `head_bits` are those of the embedding and the head. accuracy_level: 0 and
    1 compute in fp32; 4 rounds activations to 8 bits, which makes few-bit weights fast on CPUs."""

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

    Returns the options and what `quantize_assigned` returns. BadInput as `read_fp32_graph`, for a weight that
    is not finite, and for a grid that ONNX Runtime does not have.
    """
    used: BundleOptions = {**DEFAULTS, **options}
    layers, outer = (
        Choice(Grid(bits, used["group"], used["symmetric"]), used["method"])
        for bits in (used["bits"], used["head_bits"])
    )
    uses = find_uses(read_fp32_graph(source).graph)
    record = quantize_assigned(
        source,
        output_dir,
        dict.fromkeys(uses, layers) | dict.fromkeys(embedding_and_head(uses), outer),
        accuracy_level=used["accuracy_level"],
        blocks=blocks,
        progress=progress,
    )
    return {**used, **record}


def quantize_assigned(
    source: Path,
    output_dir: Path,
    assignment: Mapping[str, Choice],
    *,
    accuracy_level: int = 4,
    blocks: BlocksOf | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the fp32 bundle `source` into the empty folder `output_dir`, each weight of `find_uses` by its
    choice. With `blocks`, every weight of the layers must have some.

    Returns {size_bytes (graph and weights), nodes {operator: count}, by_tensor [{name, component, bits,
    group, symmetric, method, size_bytes}]}. BadInput as `quantize_bundle`.
    """
    model, store = read_fp32_graph(source), TensorStore(output_dir)
    graph, uses = model.graph, find_uses(model.graph)
    outer, rows = embedding_and_head(uses), list[dict[str, Any]]()
    replaced: dict[int, list[NodeProto]] = {}
    for tensor in graph.initializer:
        name, values = tensor.name, read_tensor(source, tensor)
        if name not in assignment:
            store.add(name, values)
            continue
        progress(len(rows), len(uses), "quantizing")
        users, choice, grid = uses[name], assignment[name], assignment[name].grid
        rounded = None if blocks is None else blocks(name)
        if rounded is None:
            if blocks is not None and name not in outer:
                raise BuildFailed(f"{source}: {name} is no weight of the model that was calibrated")
            rounded = _round(name, values if users[0].rows_first else values.T, choice)
        row = {"name": name, "component": component(name), "bits": grid.bits, "group": grid.group}
        row |= {"symmetric": grid.symmetric, "method": choice.method}
        rows.append(row | {"size_bytes": grid.size_bytes(len(rounded.q), rounded.columns)})
        readers = [graph.node[use.index] for use in users]
        packed = _PackedWeight(name, pack(rounded, grid), grid, accuracy_level, store)
        replaced |= {use.index: nodes for use, nodes in zip(users, packed.nodes(readers))}
    _replace_nodes(model, replaced, store)
    (output_dir / GRAPH).write_bytes(model.SerializeToString())
    for path in source.iterdir():
        if path.is_file() and path.name not in (GRAPH, DATA):
            shutil.copyfile(path, output_dir / path.name)
    progress(len(uses), len(uses), "quantized")
    return {
        "size_bytes": sum((output_dir / name).stat().st_size for name in (GRAPH, DATA)),
        "nodes": dict(sorted(Counter(node.op_type for node in graph.node).items())),
        "by_tensor": rows,
    }


def _round(name: str, weight: NDArray[np.float32], choice: Choice) -> Blocks:
    try:
        return choice.blocks(torch.from_numpy(weight))
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from error


def _replace_nodes(model: ModelProto, replaced: dict[int, list[NodeProto]], store: TensorStore) -> None:
    """Put in the nodes that read packed weights; drop nodes and weights that nobody reads any more."""
    graph = model.graph
    needed, remaining = {output.name for output in graph.output}, []
    for index in reversed(range(len(graph.node))):
        for node in reversed(replaced.get(index, [graph.node[index]])):
            if needed.intersection(node.output):
                needed.update(node.input)
                remaining.append(NodeProto.FromString(node.SerializeToString()))
    for field in ("node", "initializer", "value_info"):
        graph.ClearField(field)
    graph.node.extend(reversed(remaining))
    graph.initializer.extend(tensor for name, tensor in store.tensors.items() if name in needed)
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


class _PackedWeight:
    """Stores a packed weight and makes the nodes that read it."""

    def __init__(
        self, name: str, packed: Packed, grid: Grid, accuracy_level: int, store: TensorStore
    ) -> None:
        self.name, self.packed, self.grid, self.store = name, packed, grid, store
        self.accuracy_level = accuracy_level

    def nodes(self, readers: list[NodeProto]) -> list[list[NodeProto]]:
        """For each reader the nodes that take its place.

        A tied embedding is stored once, as the gather reads it ([vocab, bytes]); the product sees it through
        a `Reshape`, which the runtime folds at load. fp16 scales go through a `Cast`, folded too. With graph
        optimizations off they are not, and `MatMulNBits` at level 4 (onnxruntime 1.31) then gives wrong
        numbers for a constant weight: the `Identity` makes the weight no constant there.
        """
        packed, add, name = self.packed, self.store.add, self.name
        rows, groups, width = packed.data.shape
        gathered = any(node.op_type == "Gather" for node in readers)
        data = add(f"{name}.q{self.grid.bits}", packed.data.reshape(rows, -1) if gathered else packed.data)
        scales, blocks = f"{name}.scales", f"{data}.blocks"
        parameters, half = [scales], add(f"{scales}{FP16}", packed.scales)
        setup = [helper.make_node("Cast", [half], [scales], name=scales, to=TensorProto.FLOAT)]
        if packed.zero_points is not None:
            parameters.append(add(f"{name}.zero_points", packed.zero_points))
        if gathered:
            shape = add(f"{data}.shape", np.array([rows, groups, width], np.int64))
            setup.append(helper.make_node("Reshape", [data, shape], [blocks], name=blocks))
        else:
            setup.append(helper.make_node("Identity", [data], [blocks], name=blocks))
        nodes = [
            self._gather(node, [data, node.input[1], *parameters])
            if node.op_type == "Gather"
            else self._product(node, [node.input[0], blocks, *parameters])
            for node in readers
        ]
        return [[*setup, *nodes[0]], *nodes[1:]]  # once, before the first reader

    def _product(self, old: NodeProto, inputs: list[str]) -> list[NodeProto]:
        """`MatMulNBits`, followed by `Add` for a Gemm with a bias."""
        biased = old.op_type == "Gemm" and len(old.input) > 2
        output = f"{old.output[0]}.product" if biased else old.output[0]
        sizes: dict[str, Any] = {"K": self.packed.columns, "N": len(self.packed.data)}
        sizes |= {"bits": self.grid.bits, "block_size": self.grid.group}
        sizes |= {"accuracy_level": self.accuracy_level}
        node = helper.make_node(PACKED, inputs, [output], old.name, domain=MICROSOFT, **sizes)
        if not biased:
            return [node]
        add = helper.make_node("Add", [output, old.input[2]], [old.output[0]], name=f"{old.name}.biased")
        return [node, add]

    def _gather(self, old: NodeProto, inputs: list[str]) -> list[NodeProto]:
        """`GatherBlockQuantized`; a row that does not fill its last group comes out padded and is cut."""
        padded = self.packed.data.shape[1] * self.grid.group != self.packed.columns
        output = f"{old.output[0]}.padded" if padded else old.output[0]
        sizes: dict[str, Any] = {"bits": self.grid.bits, "block_size": self.grid.group}
        sizes |= {"gather_axis": 0, "quantize_axis": 1}
        node = helper.make_node("GatherBlockQuantized", inputs, [output], old.name, domain=MICROSOFT, **sizes)
        if not padded:
            return [node]
        limits = (("start", 0), ("end", self.packed.columns), ("axis", -1))
        cut = [self.store.add(f"{output}.{part}", np.array([limit], np.int64)) for part, limit in limits]
        return [node, helper.make_node("Slice", [output, *cut], [old.output[0]], name=f"{output}.cut")]
