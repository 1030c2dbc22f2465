"""From an fp32 bundle to a quantized one: `MatMulNBits` for products, `GatherBlockQuantized` for the
embedding.

Every product with a constant matrix is replaced, whoever wrote the graph (`MatMul`, `FusedMatMul`, `Gemm`).
Norms, biases and learned positions stay fp32: they are small and sensitive. Weights are read, rounded and
written one at a time. `accuracy_level` 4 lets the kernel round activations to 8 bits, which makes few-bit
weights fast on CPUs.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.graph.onnx_graph import DATA, GRAPH, MICROSOFT
from edgedisp.quantize.grid import Blocks, Grid, Packed, concatenate, dequantize, pack
from edgedisp.quantize.onnx_weights import TensorStore, Use, component, find_uses, outer_weights, read_tensor
from edgedisp.quantize.rounding_methods import METHODS

ACCURACY_LEVELS = (0, 1, 4)
ROUNDED_VALUES = 1 << 17  # values rounded at a time: half a MB, so that a method works in the cache
COMPARED_VALUES = 1 << 22  # values compared at a time
FP16 = ".fp16"  # ends the name of scales as they are stored

BlocksOf = Callable[[str], Blocks | None]
"""Weight of the graph -> its blocks, rows in the graph's order; None where it has to be rounded."""


@dataclass(frozen=True)
class Choice:
    """How one weight is stored and multiplied.

    method: a name in `METHODS`, for a weight without blocks. accuracy_level: 0 and 1 compute in fp32, 4 on
    activations rounded to 8 bits. BadInput for what no kernel has.
    """

    grid: Grid
    method: str = "rtn"
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise BadInput(
                f"accuracy_level is {self.accuracy_level}; 0 and 1 compute in fp32, 4 on 8-bit activations"
            )
        if self.method not in METHODS:
            raise BadInput(f"method {self.method!r} rounds no weight alone; known: {', '.join(METHODS)}")

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
    out: Path,
    *,
    blocks: BlocksOf | None = None,
    progress: Progress = silent,
    **options: Unpack[BundleOptions],
) -> dict[str, Any]:
    """Write the fp32 bundle `source` into the empty folder `out`, one choice for all layers.

    Returns the options and what `quantize_assigned` returns. BadInput for a bundle without fp32 products, a
    grid that no kernel has, or a weight that is not finite.
    """
    chosen: BundleOptions = {**DEFAULTS, **options}
    method, level = chosen["method"], chosen["accuracy_level"]
    body, outer = (
        Choice(Grid(bits, chosen["group"], chosen["symmetric"]), method, level)
        for bits in (chosen["bits"], chosen["head_bits"])
    )
    uses = weights_of(source)
    outside = outer_weights(uses)
    assignment = {name: outer if name in outside else body for name in uses}
    return {**chosen, **quantize_assigned(source, out, assignment, blocks=blocks, progress=progress)}


def quantize_assigned(
    source: Path,
    out: Path,
    assignment: Mapping[str, Choice | None],
    *,
    blocks: BlocksOf | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the fp32 bundle `source` into the empty folder `out`, each weight of `weights_of` by its choice
    (None: fp32). With `blocks`, every weight of the layers must have some.

    Returns {calibrated_tensors, tied, tensors, size_bytes, nodes: {op: n}, by_component: {name: {size_bytes,
    parameters}}, by_tensor: [row of `_row`]}; size_bytes counts graph and weights. BadInput as in
    `quantize_bundle`; ValueError for other weights, or for blocks on another grid.
    """
    model, store = onnx.load(source / GRAPH, load_external_data=False), TensorStore(source, out)
    uses = _checked(source, find_uses(model.graph), assignment)
    outside, rows = outer_weights(uses), list[dict[str, Any]]()

    def packed(tensor: TensorProto, users: list[Use], choice: Choice) -> Packed:
        progress(len(rows), len(uses), "quantizing")
        stored = torch.from_numpy(read_tensor(source, tensor))
        values = stored if users[0].rows_first else stored.T
        given = None if blocks is None else blocks(tensor.name)
        if blocks is not None and given is None and tensor.name not in outside:
            raise BuildFailed(f"{source}: {tensor.name} is no weight of the model that was calibrated")
        try:
            rounded = given or choice.blocks(values)
        except BadInput as error:
            raise BadInput(f"{tensor.name}: {error}") from error
        if given is not None and not _on_grid(given, choice.grid, values):
            raise ValueError(f"{tensor.name} was not rounded to {choice.grid}, which the bundle is made of")
        result = pack(rounded, choice.grid)
        rows.append(_row(tensor.name, result, choice, given is not None))
        rows[-1] |= _errors(values, dequantize(rounded, choice.grid))
        return result

    _rewrite(model, uses, assignment, store, packed)
    (out / GRAPH).write_bytes(model.SerializeToString())
    for path in source.iterdir():
        if path.is_file() and path.name not in (GRAPH, DATA):
            shutil.copyfile(path, out / path.name)
    progress(len(uses), len(uses), "quantized")
    return {
        "calibrated_tensors": sum(row["calibrated"] for row in rows),
        "tied": any(len({use.gather for use in uses[name]}) == 2 for name in outside),
        "tensors": len(rows),
        "size_bytes": sum((out / name).stat().st_size for name in (GRAPH, DATA)),
        "nodes": dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        "by_component": _by_component(rows, model),
        "by_tensor": rows,
    }


def bundle_bytes(source: Path, assignment: Mapping[str, Choice | None]) -> int:
    """`size_bytes` of the bundle that `quantize_assigned` would write; nothing is rounded."""
    model, store = onnx.load(source / GRAPH, load_external_data=False), TensorStore(source, None)
    uses = _checked(source, find_uses(model.graph), assignment)

    def empty(tensor: TensorProto, users: list[Use], choice: Choice) -> Packed:
        rows, columns = tensor.dims if users[0].rows_first else reversed(tensor.dims)
        return choice.grid.empty(rows, columns)

    _rewrite(model, uses, assignment, store, empty)
    return store.size_bytes + len(model.SerializeToString())


def weights_of(source: Path) -> dict[str, list[Use]]:
    """The weights of a bundle that can be quantized, and the nodes that read them."""
    uses = find_uses(onnx.load(source / GRAPH, load_external_data=False).graph)
    return _checked(source, uses, dict.fromkeys(uses))


def _checked(
    source: Path, uses: dict[str, list[Use]], assignment: Mapping[str, Choice | None]
) -> dict[str, list[Use]]:
    if all(use.gather for users in uses.values() for use in users):
        raise BadInput(f"{source}: no product with a constant fp32 weight; is this bundle quantized already?")
    if set(assignment) != set(uses):
        strange = sorted(set(assignment) ^ set(uses))
        raise ValueError(f"the assignment and the bundle's weights differ: {', '.join(strange[:4])}")
    return uses


def _on_grid(blocks: Blocks, grid: Grid, weight: Tensor) -> bool:
    same = blocks.q.shape[2] == grid.group and (blocks.zero_points is None) == grid.symmetric
    return same and (len(blocks.q), blocks.columns) == weight.shape and int(blocks.q.max()) <= grid.highest


def _row(name: str, packed: Packed, choice: Choice, calibrated: bool) -> dict[str, Any]:
    """What the record says of one weight; `calibrated`: its blocks came from outside."""
    return {
        "name": name,
        "component": component(name),
        "shape": [packed.rows, packed.columns],
        "bits": choice.grid.bits,
        "group": choice.grid.group,
        "symmetric": choice.grid.symmetric,
        "method": choice.method,
        "calibrated": calibrated,
        "accuracy_level": choice.accuracy_level,
        "size_bytes": packed.size_bytes,
    }


def _errors(weight: Tensor, rounded: Tensor) -> dict[str, float]:
    """Mean squared error, and |w' - w| / |w|."""
    step = max(1, COMPARED_VALUES // weight.shape[1])
    error, norm = 0.0, 0.0
    for before, after in zip(weight.split(step), rounded.split(step)):
        error += float((after - before).double().square().sum())
        norm += float(before.double().square().sum())
    relative = (error / norm) ** 0.5 if norm else 0.0
    return {"mean_squared_error": error / weight.numel(), "relative_error": relative}


def _by_component(rows: list[dict[str, Any]], model: ModelProto) -> dict[str, dict[str, int]]:
    """Bytes stored and values they stand for. Quantized weights count with their scales and zero points."""
    sizes, parameters = Counter[str](), Counter[str]()
    for row in rows:
        sizes[row["component"]] += row["size_bytes"]
        parameters[row["component"]] += row["shape"][0] * row["shape"][1]
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and not tensor.name.endswith(".scales"):
            values = int(np.prod(tensor.dims))
            sizes[component(tensor.name)] += 4 * values
            parameters[component(tensor.name)] += values
    return {name: {"size_bytes": sizes[name], "parameters": parameters[name]} for name in sorted(sizes)}


def _rewrite(
    model: ModelProto,
    uses: dict[str, list[Use]],
    assignment: Mapping[str, Choice | None],
    store: TensorStore,
    packed: Callable[[TensorProto, list[Use], Choice], Packed],
) -> None:
    """Store every tensor, the assigned ones as `packed`, put in the nodes that read those, and drop the nodes
    that nobody reads any more (constant transposes)."""
    graph = model.graph
    replaced: dict[int, list[NodeProto]] = {}
    for tensor in graph.initializer:
        choice = assignment.get(tensor.name)
        if choice is None:
            store.copy(tensor)
        else:
            users = uses[tensor.name]
            readers = [graph.node[use.index] for use in users]
            nodes = _nodes(tensor.name, readers, packed(tensor, users, choice), choice, store)
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
    node = helper.make_node(
        "MatMulNBits",
        inputs,
        [output],
        name=old.name,
        domain=MICROSOFT,
        K=packed.columns,
        N=packed.rows,
        bits=choice.grid.bits,
        block_size=choice.grid.group,
        accuracy_level=choice.accuracy_level,
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
    node = helper.make_node(
        "GatherBlockQuantized",
        inputs,
        [output],
        name=old.name,
        domain=MICROSOFT,
        bits=grid.bits,
        block_size=grid.group,
        gather_axis=0,
        quantize_axis=1,
    )
    if not padded:
        return [node]
    limits = (("start", 0), ("end", packed.columns), ("axis", -1))
    cut = [store.add(f"{output}.{part}", np.array([value], np.int64)) for part, value in limits]
    return [node, helper.make_node("Slice", [output, *cut], [old.output[0]], name=f"{output}.cut")]
