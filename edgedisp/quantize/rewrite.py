"""Rewrites an fp32 bundle with quantized weights: `MatMulNBits` for products (`MatMulBnb4` in NF4),
`GatherBlockQuantized` for the embedding.

Every product with a constant matrix is replaced, whoever wrote the graph (`MatMul`, `FusedMatMul`, `Gemm`).
Norms, biases and learned positions stay fp32: they are small and sensitive. No fp32 copy of a quantized
weight is left behind, and all other files of the bundle are copied.

Weights are read through a memory map in slices and written one tensor at a time, so memory is bounded by the
largest packed tensor. Activations are not touched: `accuracy_level` 4 lets the kernel round them to 8 bits on
the fly, which is what makes few-bit weights fast on CPUs.

Left out: mixed bits but for the embedding and the head.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, NodeProto, TensorProto, helper
from torch import Tensor

from edgedisp import BadInput, BuildFailed, Progress, silent
from edgedisp.quantize import nf4, operators
from edgedisp.quantize.grid import Blocks, Grid, Packed, concatenate, dequantize, pack
from edgedisp.quantize.made import Made
from edgedisp.quantize.methods import METHODS
from edgedisp.quantize.store import DATA, GRAPH, TensorStore
from edgedisp.quantize.uses import find_uses, head_name

SLICE_VALUES = 1 << 22  # weight values rounded at a time: 16 MB of fp32, and a few times that in between

# The first word found in a tensor's name tells its component; the genai builder uses the same words.
COMPONENTS = (
    ("norm", "norm"),
    ("lm_head", "head"),
    ("position", "positions"),
    ("_cache", "positions"),
    ("embed", "embedding"),
    ("attn", "attention"),
    ("mlp", "mlp"),
)


def quantize_bundle(
    source: Path,
    out: Path,
    *,
    bits: int,
    group: int = 32,
    symmetric: bool = True,
    accuracy_level: int = 4,
    head_bits: int = 8,
    head_group: int | None = None,
    method: str = "rtn",
    made: Made | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write the bundle `source` (fp32) into the empty folder `out` with `bits` bits a weight.

    `head_bits` and `head_group` (None: as `group`) hold for the embedding and the head. `method` rounds every
    weight (a name in `methods.METHODS`) but those that `made` has rounded already, on the same grids; with
    `made`, every product of the layers must be among them. Method `nf4` gives the layers NF4 in blocks of
    `group`, and rounds the embedding and the head by `k_quant`.

    Returns {bits, group, symmetric, accuracy_level, head_bits, head_group, method, calibrated_tensors, tied,
    tensors, size_bytes, nodes: {op: n}, by_component: {name: {size_bytes, parameters}}, by_tensor: [{name,
    component, shape [out, in], bits, group, size_bytes, mean_squared_error, relative_error}]}; size_bytes
    counts graph and weights, the relative error is |w' - w| / |w|. BadInput for a bundle without fp32
    products, a grid that no kernel has, or a weight that is not finite.
    """
    if accuracy_level not in (0, 1, 4):
        raise BadInput(f"accuracy_level is {accuracy_level}; 0 and 1 compute in fp32, 4 on 8-bit activations")
    in_nf4 = method == "nf4"
    if not in_nf4 and method not in METHODS:
        raise BadInput(f"method {method!r} rounds no weight alone; known: {', '.join([*METHODS, 'nf4'])}")
    if in_nf4 and bits != 4:
        raise BadInput(f"method nf4 has 4 bits, not {bits}")
    body, ends = Grid(bits, group, symmetric), Grid(head_bits, head_group or group, symmetric)
    if made is not None and body not in made.grids:
        raise ValueError(f"weights were rounded to {made.grids}, the bundle is made of {body}")
    model = onnx.load(source / GRAPH, load_external_data=False)
    uses = find_uses(model.graph)
    head = head_name(uses)
    if head is None:
        raise BadInput(f"{source}: no product with a constant fp32 weight; is this bundle quantized already?")
    store, rows, calibrated = TensorStore(source, out), [], 0
    replaced: dict[int, list[NodeProto]] = {}
    for done, tensor in enumerate(model.graph.initializer):
        progress(done, len(model.graph.initializer), f"quantizing to {bits} bits")
        users = uses.get(tensor.name)
        if users is None:
            store.copy(tensor)
            continue
        is_end = tensor.name == head or any(use.gather for use in users)
        grid = ends if is_end else body
        stored = torch.from_numpy(store.read(tensor))
        values = stored if users[0].rows_first else stored.T
        if in_nf4 and not is_end:
            levels, error, norm = _round_to_levels(tensor.name, values, group)
            replaced |= operators.replace_by_levels(model.graph, tensor.name, users, levels, store)
            rows.append(_row(tensor.name, levels, body, error, norm))
            continue
        found = None if made is None else made.find(values)
        if made is not None and not is_end and found is None:
            raise BuildFailed(f"{source}: {tensor.name} is no weight of the model that was calibrated")
        if found is not None and found[1] != grid:
            raise ValueError(f"{tensor.name} was rounded to {found[1]}, the bundle holds it in {grid}")
        calibrated += found is not None
        how, blocks = "k_quant" if in_nf4 else method, found[0] if found else None
        packed, error, norm = _round(tensor.name, values, grid, how, blocks)
        replaced |= operators.replace(model.graph, tensor.name, users, packed, grid, accuracy_level, store)
        rows.append(_row(tensor.name, packed, grid, error, norm))
    _write(model, replaced, store)
    for path in source.iterdir():
        if path.is_file() and path.name not in (GRAPH, DATA):
            shutil.copyfile(path, out / path.name)
    progress(len(rows), len(rows), f"quantized to {bits} bits")
    return {
        "bits": bits,
        "group": group,
        "symmetric": symmetric,
        "accuracy_level": accuracy_level,
        "head_bits": head_bits,
        "head_group": ends.group,
        "method": method,
        "calibrated_tensors": calibrated,
        "tied": any(use.gather for use in uses[head]),
        "tensors": len(rows),
        "size_bytes": sum((out / name).stat().st_size for name in (GRAPH, DATA)),
        "nodes": dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        "by_component": _by_component(rows, model.graph),
        "by_tensor": rows,
    }


def _round(
    name: str, weight: Tensor, grid: Grid, method: str, blocks: Blocks | None
) -> tuple[Packed, float, float]:
    """Quantize [out, in] by slices of rows, where there are no blocks yet; also the sums of squares of the
    error and of the weight."""
    step = max(1, SLICE_VALUES // weight.shape[1])
    try:
        made = blocks or concatenate([METHODS[method](rows, grid, None) for rows in weight.split(step)])
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from error
    return pack(made, grid), *_squares(weight, dequantize(made, grid))


def _round_to_levels(name: str, weight: Tensor, group: int) -> tuple[nf4.Levels, float, float]:
    """The same in NF4; of the whole weight at once, as its blocks span rows."""
    try:
        levels = nf4.quantize(weight, group)
    except BadInput as error:
        raise BadInput(f"{name}: {error}") from error
    return levels, *_squares(weight, nf4.dequantize(levels))


def _squares(weight: Tensor, held: Tensor) -> tuple[float, float]:
    """Sums of squares of the error and of the weight."""
    step = max(1, SLICE_VALUES // weight.shape[1])
    squared_error, squared_norm = 0.0, 0.0
    for rows, there in zip(weight.split(step), held.split(step)):
        squared_error += float((there - rows).double().square().sum())
        squared_norm += float(rows.double().square().sum())
    return squared_error, squared_norm


def _write(model: onnx.ModelProto, replaced: dict[int, list[NodeProto]], store: TensorStore) -> None:
    """Put the new nodes in, drop what nobody reads any more (constant transposes), and save the graph."""
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
    graph.initializer.extend(tensor for tensor in store.tensors if tensor.name in needed)
    if not any(opset.domain == operators.MICROSOFT for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(operators.MICROSOFT, 1))
    (store.out / GRAPH).write_bytes(model.SerializeToString())


def _component(name: str) -> str:
    return next((component for word, component in COMPONENTS if word in name), "other")


def _row(
    name: str, packed: Packed | nf4.Levels, grid: Grid, squared_error: float, squared_norm: float
) -> dict[str, Any]:
    parameters = packed.rows * packed.columns
    return {
        "name": name,
        "component": _component(name),
        "shape": [packed.rows, packed.columns],
        "bits": grid.bits,
        "group": grid.group,
        "size_bytes": packed.size_bytes,
        "mean_squared_error": squared_error / parameters,
        "relative_error": (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0,
    }


def _by_component(rows: list[dict[str, Any]], graph: GraphProto) -> dict[str, dict[str, int]]:
    """Bytes stored and values they stand for. Quantized weights count with their scales and zero points."""
    sizes: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    for row in rows:
        sizes[row["component"]] += row["size_bytes"]
        parameters[row["component"]] += row["shape"][0] * row["shape"][1]
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and not tensor.name.endswith(".scales"):
            values = int(np.prod(tensor.dims))
            sizes[_component(tensor.name)] += 4 * values
            parameters[_component(tensor.name)] += values
    return {name: {"size_bytes": sizes[name], "parameters": parameters[name]} for name in sorted(sizes)}
