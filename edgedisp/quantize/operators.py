"""The nodes that read a packed weight, in the place of those that read it in fp32.

A tied embedding is stored once and read by both operators. It lies in the file as the gather reads it,
[vocab, bytes]; the product sees it through a `Reshape`, which the runtime folds at load and drops once its
kernel has packed the weight. The other way round (the genai builder's) leaves a second copy in memory: 27
MB more for 49,152 x 576 at 8 bits.

Scales stored in fp16 are cast to fp32, which the kernels need; the runtime folds that, too. With all graph
optimizations turned off it does not, and then `MatMulNBits` at level 4 (onnxruntime 1.31) gives wrong numbers
without a word: it packs a constant weight ahead, for which scales have to be constant as well. So the weight
goes through an `Identity`, which costs nothing, as it is dropped at load. Where it is not, the weight is no
constant either, and the product is right, only slow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import GraphProto, NodeProto, TensorProto, helper

from edgedisp.quantize.grid import Grid, Packed
from edgedisp.quantize.store import TensorStore
from edgedisp.quantize.uses import Use

MICROSOFT = "com.microsoft"
HALF = ".fp16"  # ends the name of scales as they are stored


def replace(
    graph: GraphProto,
    name: str,
    users: list[Use],
    packed: Packed,
    grid: Grid,
    accuracy_level: int,
    store: TensorStore,
) -> dict[int, list[NodeProto]]:
    """Store the packed weight `name`; return the nodes that take the place of each reader, by its index."""
    gathered = any(use.gather for use in users)
    rows, groups, width = packed.data.shape
    data = store.add(f"{name}.q{grid.bits}", packed.data.reshape(rows, -1) if gathered else packed.data)
    scales = f"{name}.scales"
    parameters, half = [scales], store.add(f"{scales}{HALF}", packed.scales)
    setup = [helper.make_node("Cast", [half], [scales], name=scales, to=TensorProto.FLOAT)]
    if packed.zero_points is not None:
        parameters.append(store.add(f"{name}.zero_points", packed.zero_points))
    blocks = f"{data}.blocks"
    if gathered:
        shape = store.add(f"{data}.shape", np.array([rows, groups, width], np.int64))
        setup.append(helper.make_node("Reshape", [data, shape], [blocks], name=blocks))
    else:
        setup.append(helper.make_node("Identity", [data], [blocks], name=blocks))
    replaced: dict[int, list[NodeProto]] = {}
    for use in users:
        old = graph.node[use.index]
        if use.gather:
            nodes = _gather(old, data, parameters, packed.columns, groups, grid, store)
        else:
            nodes = _product(old, blocks, parameters, rows, packed.columns, grid, accuracy_level)
        replaced[use.index] = [*setup, *nodes]
        setup = []  # once is enough, before the first reader
    return replaced


def _product(
    old: NodeProto,
    blocks: str,
    parameters: list[str],
    rows: int,
    columns: int,
    grid: Grid,
    accuracy_level: int,
) -> list[NodeProto]:
    return _in_place_of(
        old,
        "MatMulNBits",
        [blocks, *parameters],
        K=columns,
        N=rows,
        bits=grid.bits,
        block_size=grid.group,
        accuracy_level=accuracy_level,
    )


def _in_place_of(old: NodeProto, operator: str, weight: list[str], **attributes: Any) -> list[NodeProto]:
    """A product by `operator`, followed by `Add` for a Gemm with a bias."""
    biased = old.op_type == "Gemm" and len(old.input) > 2
    output = f"{old.output[0]}.product" if biased else old.output[0]
    inputs = [old.input[0], *weight]
    node = helper.make_node(operator, inputs, [output], name=old.name, domain=MICROSOFT, **attributes)
    if not biased:
        return [node]
    return [node, helper.make_node("Add", [output, old.input[2]], [old.output[0]], name=f"{old.name}.biased")]


def _gather(
    old: NodeProto,
    data: str,
    parameters: list[str],
    columns: int,
    groups: int,
    grid: Grid,
    store: TensorStore,
) -> list[NodeProto]:
    """`GatherBlockQuantized`; a row that does not fill its last group comes out padded and is cut."""
    padded = groups * grid.group != columns
    output = f"{old.output[0]}.padded" if padded else old.output[0]
    node = helper.make_node(
        "GatherBlockQuantized",
        [data, old.input[1], *parameters],
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
    limits = (("start", 0), ("end", columns), ("axis", -1))
    cut = [store.add(f"{output}.{part}", np.array([value], np.int64)) for part, value in limits]
    return [node, helper.make_node("Slice", [output, *cut], [old.output[0]], name=f"{output}.cut")]
