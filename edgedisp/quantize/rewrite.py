"""From an fp32 bundle to one with quantized weights: `MatMulNBits` for products, `GatherBlockQuantized`
for the embedding.

Every product with a constant matrix is replaced, whoever wrote the graph (`MatMul`, `FusedMatMul`, `Gemm`).
Norms, biases and learned positions stay fp32: they are small and sensitive. No fp32 copy of a quantized
weight is left behind, and all other files of the bundle are copied. Each weight has a grid, a method and an
accuracy level of its own (`assignment.py`); `quantize_bundle` is the case of one for all.

Weights are read, rounded in slices and written one tensor at a time, so memory is bounded by the largest
tensor. Activations are not touched: `accuracy_level` 4 lets the kernel round them to 8 bits on
the fly, which is what makes few-bit weights fast on CPUs.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.quantize import operators
from edgedisp.quantize.assignment import Assignment, Choice, ends, uniform
from edgedisp.quantize.components import by_component, tensor_row
from edgedisp.quantize.grid import Blocks, Grid, Packed, dequantize, pack
from edgedisp.quantize.made import Made
from edgedisp.quantize.store import DATA, GRAPH, SizesOnly, TensorStore
from edgedisp.quantize.uses import Use, find_uses

SLICE_VALUES = 1 << 22  # weight values compared at a time: 16 MB of fp32, and a few times that in between


def quantize_bundle(
    source: Path,
    out: Path,
    *,
    bits: int,
    group: int = 32,
    symmetric: bool = True,
    accuracy_level: int = 4,
    head_bits: int = 8,
    method: str = "rtn",
    made: Made | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the bundle `source` (fp32) into the empty folder `out` with `bits` bits a weight.

    `head_bits` hold for the embedding and the head. `method` rounds every weight (a name in
    `methods.METHODS`) but those that `made` has rounded already, on the same grids; with `made`, every
    product of the layers must be among them.

    Returns {bits, group, symmetric, accuracy_level, head_bits, method} and what
    `quantize_assigned` returns. BadInput for a bundle without fp32 products, a grid that no kernel has, or a
    weight that is not finite.
    """
    body = Choice(Grid(bits, group, symmetric), method, accuracy_level)
    outer = Choice(Grid(head_bits, group, symmetric), method, accuracy_level)
    assignment = uniform(weights_of(source), body, outer)
    chosen = {
        "bits": bits,
        "group": group,
        "symmetric": symmetric,
        "accuracy_level": accuracy_level,
        "head_bits": head_bits,
        "method": method,
    }
    return chosen | quantize_assigned(source, out, assignment, made=made, progress=progress)


def quantize_assigned(
    source: Path, out: Path, assignment: Assignment, *, made: Made | None = None, progress: Progress = silent
) -> dict[str, Any]:
    """Write the bundle `source` (fp32) into the empty folder `out`, each weight as `assignment` says.

    The keys are the weights that `weights_of` lists. Blocks that `made` has are taken as they are; with
    `made`, it must have every weight of the layers that is quantized.

    Returns {calibrated_tensors, tied, tensors, size_bytes, nodes: {op: n}, by_component: {name: {size_bytes,
    parameters}}, by_tensor: [{name, component, shape [out, in], bits, group, symmetric, method, calibrated,
    accuracy_level, size_bytes, mean_squared_error, relative_error}]}; size_bytes counts graph and weights,
    the relative error is |w' - w| / |w|. BadInput as in `quantize_bundle`; ValueError for other keys, or for
    blocks of `made` on another grid.
    """
    model, store = onnx.load(source / GRAPH, load_external_data=False), TensorStore(source, out)
    rows: list[dict[str, Any]] = []
    uses = _checked(source, find_uses(model.graph), assignment)
    outside = ends(uses)

    def packed(tensor: TensorProto, users: list[Use], choice: Choice) -> Packed:
        progress(len(rows), len(uses), "quantizing")
        stored = torch.from_numpy(store.read(tensor))
        values = stored if users[0].rows_first else stored.T
        blocks = None if made is None else _made_blocks(made, tensor.name, values, choice.grid)
        if made is not None and blocks is None and tensor.name not in outside:
            raise BuildFailed(f"{source}: {tensor.name} is no weight of the model that was calibrated")
        found, error, norm = _round(tensor.name, values, choice, blocks)
        rows.append(tensor_row(tensor.name, found, choice, blocks is not None, error, norm))
        return found

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
        "by_component": by_component(rows, model.graph),
        "by_tensor": rows,
    }


def bundle_bytes(source: Path, assignment: Assignment) -> int:
    """`size_bytes` of the bundle that `quantize_assigned` would write, to the byte; nothing is rounded."""
    model, store = onnx.load(source / GRAPH, load_external_data=False), SizesOnly(source)
    uses = _checked(source, find_uses(model.graph), assignment)

    def empty(tensor: TensorProto, users: list[Use], choice: Choice) -> Packed:
        rows, columns = tensor.dims if users[0].rows_first else reversed(tensor.dims)
        return choice.grid.empty(rows, columns)

    _rewrite(model, uses, assignment, store, empty)
    return store.written + len(model.SerializeToString())


def weights_of(source: Path) -> dict[str, list[Use]]:
    """The weights of a bundle that can be quantized, and the nodes that read them."""
    uses = find_uses(onnx.load(source / GRAPH, load_external_data=False).graph)
    return _checked(source, uses, dict.fromkeys(uses))


def _checked(source: Path, uses: dict[str, list[Use]], assignment: Assignment) -> dict[str, list[Use]]:
    if all(use.gather for users in uses.values() for use in users):
        raise BadInput(f"{source}: no product with a constant fp32 weight; is this bundle quantized already?")
    if set(assignment) != set(uses):
        strange = sorted(set(assignment) ^ set(uses))
        raise ValueError(f"the assignment and the bundle's weights differ: {', '.join(strange[:4])}")
    return uses


def _made_blocks(made: Made, name: str, weight: Tensor, grid: Grid) -> Blocks | None:
    found = made.find(weight)
    if found is None:
        return None
    blocks, of = found
    if of != grid:
        raise ValueError(f"{name} was rounded to {of}, the bundle is made of {grid}")
    return blocks


def _round(name: str, weight: Tensor, choice: Choice, blocks: Blocks | None) -> tuple[Packed, float, float]:
    """Quantize [out, in] by slices of rows, where there are no blocks yet; also the sums of squares of the
    error and of the weight."""
    grid = choice.grid
    try:
        made = blocks or choice.blocks(weight)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from error
    return pack(made, grid), *_squares(weight, dequantize(made, grid))


def _squares(weight: Tensor, held: Tensor) -> tuple[float, float]:
    """Sums of squares of the error and of the weight."""
    step = max(1, SLICE_VALUES // weight.shape[1])
    squared_error, squared_norm = 0.0, 0.0
    for rows, there in zip(weight.split(step), held.split(step)):
        squared_error += float((there - rows).double().square().sum())
        squared_norm += float(rows.double().square().sum())
    return squared_error, squared_norm


def _rewrite(
    model: onnx.ModelProto,
    uses: dict[str, list[Use]],
    assignment: Assignment,
    store: TensorStore,
    packed: Callable[[TensorProto, list[Use], Choice], Packed],
) -> None:
    """Store every tensor, the assigned ones as `packed`, and put the nodes that read those into the graph."""
    replaced: dict[int, list[NodeProto]] = {}
    for tensor in model.graph.initializer:
        choice = assignment.get(tensor.name)
        if choice is None:
            store.copy(tensor)
            continue
        users = uses[tensor.name]
        weight = packed(tensor, users, choice)
        level = choice.accuracy_level
        replaced |= operators.replace(model.graph, tensor.name, users, weight, choice.grid, level, store)
    assemble(model, replaced, store.tensors)


def assemble(
    model: onnx.ModelProto, replaced: dict[int, list[NodeProto]], tensors: list[TensorProto]
) -> None:
    """Put the new nodes in, and drop what nobody reads any more (constant transposes)."""
    graph = model.graph
    needed, kept = {output.name for output in graph.output}, []
    for index in reversed(range(len(graph.node))):
        for node in reversed(replaced.get(index, [graph.node[index]])):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(NodeProto.FromString(node.SerializeToString()))
    for field in ("node", "initializer", "value_info"):
        graph.ClearField(field)
    graph.node.extend(reversed(kept))
    graph.initializer.extend(tensor for tensor in tensors if tensor.name in needed)
    if not any(opset.domain == operators.MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(operators.MICROSOFT, 1))
