"""Rewrites an fp32 bundle with quantized weights: products become `MatMulNBits`, the embedding `GatherBlockQuantized`.

Every product with a constant 2-D weight is replaced, whoever wrote the graph (`MatMul`, `FusedMatMul`, `Gemm`).
Norms, biases and learned positions stay fp32: they are small and sensitive. A tied embedding is stored once and
read by both operators. It lies in the file as the gather reads it, [vocab, bytes]; the product sees it through a
`Reshape` that the runtime folds at load and drops once its kernel has packed the weight. The other way round
(the genai builder's) leaves a second copy in memory: 27 MB more for 49,152 x 576 at 8 bits.

Weights are read through a memory map in slices and written one tensor at a time, so memory is bounded by the
largest packed tensor. Activations are not touched: `accuracy_level` 4 lets the kernel round them to 8 bits on the
fly, which is what makes few-bit weights fast on CPUs.

Left out: other methods than rounding to nearest, and mixed bits but for the embedding and the head.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper

from edgedisp import BadInput, Progress, silent
from edgedisp.quantize.grid import Blocks, Float, Grid, Packed, dequantize, pack, quantize
from edgedisp.quantize.store import DATA, GRAPH, TensorStore

MICROSOFT = "com.microsoft"
SLICE_VALUES = (
    1 << 22
)  # weight values rounded at a time: 16 MB of fp32, and a few times that for the steps between

# First match names the component; graphs of this package and of the genai builder use these words.
COMPONENTS = (
    ("norm", "norm"),
    ("lm_head", "head"),
    ("position", "positions"),
    ("_cache", "positions"),
    ("embed", "embedding"),
    ("attn", "attention"),
    ("mlp", "mlp"),
)


@dataclass(frozen=True)
class Use:
    """A node that reads a weight. `gather`: it looks rows up, else it multiplies. `rows_first`: stored as [out, in]."""

    index: int  # of the node in the graph
    gather: bool
    rows_first: bool


def quantize_bundle(
    source: Path,
    out: Path,
    *,
    bits: int,
    group: int = 32,
    symmetric: bool = True,
    accuracy_level: int = 4,
    head_bits: int = 8,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the bundle `source` (fp32) into the empty folder `out` with `bits` bits a weight.

    `head_bits` holds for the embedding and the head. Returns {bits, group, symmetric, accuracy_level, head_bits,
    tied, tensors, size_bytes, nodes: {op: n}, by_component: {name: {size_bytes, parameters}}, by_tensor: [{name,
    component, shape [out, in], bits, group, size_bytes, mean_squared_error, relative_error}]}; the relative error is
    |w' - w| / |w| over the tensor. BadInput for a bundle without fp32 products or a grid that no kernel has.
    """
    if accuracy_level not in (0, 1, 4):
        raise BadInput(
            f"accuracy_level is {accuracy_level}; use 0 or 1 (fp32 arithmetic) or 4 (8-bit activations)"
        )
    body, ends = Grid(bits, group, symmetric), Grid(head_bits, group, symmetric)
    model = onnx.load(source / GRAPH, load_external_data=False)
    uses = find_uses(model.graph)
    products = [(use.index, name) for name, users in uses.items() for use in users if not use.gather]
    if not products:
        raise BadInput(f"{source}: no matrix product with a constant fp32 weight; is it quantized already?")
    head = max(products)[1]  # the last product of a decoder makes the logits
    store, rows = TensorStore(source, out), []
    replaced: dict[int, list[NodeProto]] = {}
    for done, tensor in enumerate(model.graph.initializer):
        progress(done, len(model.graph.initializer), f"quantizing {tensor.name}")
        users = uses.get(tensor.name)
        if users is None:
            store.copy(tensor)
            continue
        grid = ends if tensor.name == head or any(use.gather for use in users) else body
        values = store.read(tensor)
        packed, squared_error, squared_norm = _round(values if users[0].rows_first else values.T, grid)
        replaced |= _operators(model.graph, tensor.name, users, packed, grid, accuracy_level, store)
        rows.append(_row(tensor.name, packed, grid, squared_error, squared_norm))
    _write(model, replaced, store)
    _copy_others(source, out)
    return {
        "bits": bits,
        "group": group,
        "symmetric": symmetric,
        "accuracy_level": accuracy_level,
        "head_bits": head_bits,
        "tied": any(use.gather for use in uses[head]),
        "tensors": len(rows),
        "size_bytes": sum((out / name).stat().st_size for name in (GRAPH, DATA)),
        "nodes": dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        "by_component": _by_component(rows, model.graph),
        "by_tensor": rows,
    }


def find_uses(graph: GraphProto) -> dict[str, list[Use]]:
    """Weight name -> the nodes that read it, for fp32 matrices that are read by products and embedding gathers alone.

    A constant `Transpose` between the weight and its reader is looked through (the genai builder gathers so).
    """
    matrices = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
    seen_as = {name: (name, True) for name in matrices}  # value name -> weight, whether it is as stored
    transposes = [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in matrices]
    seen_as |= {node.output[0]: (node.input[0], False) for node in transposes}
    uses: dict[str, list[Use]] = {}
    other: set[str] = set()
    for index, node in enumerate(graph.node):
        if node in transposes:
            continue
        for position, value in enumerate(node.input):
            if value not in seen_as:
                continue
            weight, as_stored = seen_as[value]
            transposed = _reads_transposed(node, position)
            if transposed is None:
                other.add(weight)
                continue
            use = Use(index, node.op_type == "Gather", transposed == as_stored)
            uses.setdefault(weight, []).append(use)
    # One stored order per weight: what is read both ways, or by something else, stays fp32.
    return {
        name: users
        for name, users in uses.items()
        if name not in other and len({use.rows_first for use in users}) == 1
    }


def _reads_transposed(node: NodeProto, position: int) -> bool | None:
    """Whether the node takes input `position` as a weight [out, in] (True), [in, out] (False), or not as one (None)."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    plain = attributes.get("alpha", 1.0) == 1.0 and not attributes.get("transA", 0)
    if node.op_type == "Gather":
        return (
            True
            if position == 0 and attributes.get("axis", 0) == 0 and node.input[1] == "input_ids"
            else None
        )
    if position != 1:
        return None
    if node.op_type == "MatMul":
        return False
    batch = attributes.get("transBatchA", 0) or attributes.get("transBatchB", 0)
    if node.op_type == "FusedMatMul" and plain and not batch:
        return bool(attributes.get("transB", 0))
    if node.op_type == "Gemm" and plain and attributes.get("beta", 1.0) == 1.0:
        return bool(attributes.get("transB", 0))
    return None


def _round(weight: Float, grid: Grid) -> tuple[Packed, float, float]:
    """Quantize [out, in] in slices of rows; also the sums of squares of the error and of the weight."""
    step = max(1, SLICE_VALUES // weight.shape[1])
    parts, squared_error, squared_norm = [], 0.0, 0.0
    for start in range(0, len(weight), step):
        values = np.ascontiguousarray(weight[start : start + step])
        blocks: Blocks = quantize(values, grid)
        squared_error += float(np.square(dequantize(blocks, grid) - values, dtype=np.float64).sum())
        squared_norm += float(np.square(values, dtype=np.float64).sum())
        parts.append(pack(blocks, grid))
    if len(parts) == 1:
        return parts[0], squared_error, squared_norm
    zero_points = (
        None
        if grid.symmetric
        else np.concatenate([p.zero_points for p in parts if p.zero_points is not None])
    )
    data, scales = np.concatenate([p.data for p in parts]), np.concatenate([p.scales for p in parts])
    return Packed(data, scales, zero_points, weight.shape[1]), squared_error, squared_norm


def _operators(
    graph: GraphProto,
    name: str,
    users: list[Use],
    packed: Packed,
    grid: Grid,
    accuracy_level: int,
    store: TensorStore,
) -> dict[int, list[NodeProto]]:
    """Store the packed weight and return the nodes that take the place of each of its readers, by index."""
    rows, groups, width = packed.data.shape
    gathered = any(use.gather for use in users)
    data = store.add(f"{name}.q{grid.bits}", packed.data.reshape(rows, -1) if gathered else packed.data)
    parameters = [store.add(f"{name}.scales", packed.scales)]
    if packed.zero_points is not None:
        parameters.append(store.add(f"{name}.zero_points", packed.zero_points))
    shared = {"bits": grid.bits, "block_size": grid.group}
    replaced: dict[int, list[NodeProto]] = {}
    for use in users:
        old = graph.node[use.index]
        if use.gather:
            replaced[use.index] = _gather(
                old, [data, old.input[1], *parameters], packed.columns, groups, shared, store
            )
            continue
        nodes, blocks = [], data
        if gathered:
            blocks = f"{data}.blocks"
            shape = store.add(f"{data}.shape", np.array([rows, groups, width], np.int64))
            nodes.append(helper.make_node("Reshape", [data, shape], [blocks], name=blocks))
        has_bias = old.op_type == "Gemm" and len(old.input) > 2
        product = f"{old.output[0]}.product" if has_bias else old.output[0]
        sizes = {"K": packed.columns, "N": rows, "accuracy_level": accuracy_level}
        inputs = [old.input[0], blocks, *parameters]
        nodes.append(
            helper.make_node(
                "MatMulNBits", inputs, [product], name=old.name, domain=MICROSOFT, **shared, **sizes
            )
        )
        if has_bias:
            nodes.append(
                helper.make_node("Add", [product, old.input[2]], [old.output[0]], name=f"{old.name}.bias")
            )
        replaced[use.index] = nodes
    return replaced


def _gather(
    old: NodeProto, inputs: list[str], columns: int, groups: int, shared: dict[str, int], store: TensorStore
) -> list[NodeProto]:
    """The embedding look-up; a row that does not fill its last group comes out padded and is cut."""
    axes = {"gather_axis": 0, "quantize_axis": 1}
    padded = groups * shared["block_size"] != columns
    output = f"{old.output[0]}.padded" if padded else old.output[0]
    node = helper.make_node(
        "GatherBlockQuantized", inputs, [output], name=old.name, domain=MICROSOFT, **shared, **axes
    )
    if not padded:
        return [node]
    cut = [
        store.add(f"{output}.{part}", np.array([v], np.int64))
        for part, v in (("start", 0), ("end", columns), ("axis", -1))
    ]
    return [node, helper.make_node("Slice", [output, *cut], [old.output[0]], name=f"{output}.cut")]


def _write(model: onnx.ModelProto, replaced: dict[int, list[NodeProto]], store: TensorStore) -> None:
    """Put the new nodes in, drop what nobody reads any more (constant transposes), and save the graph."""
    graph = model.graph
    nodes = [new for index, old in enumerate(graph.node) for new in replaced.get(index, [old])]
    needed, kept = {output.name for output in graph.output}, []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    kept.reverse()
    graph.ClearField("node")
    graph.node.extend(kept)
    graph.ClearField("initializer")
    graph.initializer.extend(store.tensors)
    graph.ClearField("value_info")
    if not any(opset.domain == MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    (store.out / GRAPH).write_bytes(model.SerializeToString())


def _copy_others(source: Path, out: Path) -> None:
    for path in source.iterdir():
        if path.name not in (GRAPH, DATA) and path.is_file():
            shutil.copy2(path, out / path.name)


def _component(name: str) -> str:
    return next((component for word, component in COMPONENTS if word in name), "other")


def _row(name: str, packed: Packed, grid: Grid, squared_error: float, squared_norm: float) -> dict[str, Any]:
    out_features = len(packed.data)
    return {
        "name": name,
        "component": _component(name),
        "shape": [out_features, packed.columns],
        "bits": grid.bits,
        "group": grid.group,
        "size_bytes": packed.size_bytes,
        "mean_squared_error": squared_error / (out_features * packed.columns),
        "relative_error": (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0,
    }


def _by_component(rows: list[dict[str, Any]], graph: GraphProto) -> dict[str, dict[str, int]]:
    """Bytes of weights stored and values they stand for, by component. Quantized tensors count with their scales."""
    components: dict[str, dict[str, int]] = {}

    def count(component: str, size_bytes: int, parameters: int) -> None:
        entry = components.setdefault(component, {"size_bytes": 0, "parameters": 0})
        entry["size_bytes"] += size_bytes
        entry["parameters"] += parameters

    for row in rows:
        count(row["component"], row["size_bytes"], row["shape"][0] * row["shape"][1])
    for tensor in graph.initializer:
        # What stayed fp32; integers are scales' neighbours (packed values, shapes) and counted above or tiny.
        if tensor.data_type == TensorProto.FLOAT and not tensor.name.endswith(".scales"):
            values = int(np.prod(tensor.dims))
            count(_component(tensor.name), 4 * values, values)
    return dict(sorted(components.items()))
