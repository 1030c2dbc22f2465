"""A bundle's graph changed to read trees of tokens, for scoring: each shared beginning is computed once.

A tree of token sequences lies in one row of the batch, a node a token (evaluate/forest.py). Three things
change in the graph, in a copy in memory over the same weights file; no weight and no other kernel does:

- attention gets the nodes' depths as positions, and a mask that leaves each node its ancestors and itself.
- the head reads the nodes alone whose logits are wanted.
- one token stands in the cache before the first node, and nobody sees it: without a cache the CPU kernel
  takes position i for token i, whatever positions it is given (onnxruntime 1.31).

The mask's products are summed in another order than without one. With fp32 activations a logit moves by 1e-5;
where activations are rounded to int8 the last bit moves some by a whole step, so that two ways to run one
bundle differ as two runtimes do.

Left out: graphs without GroupQueryAttention.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from edgedisp.graph.device_graph import LAST_HIDDEN
from edgedisp.graph.onnx_graph import PRODUCTS

ATTENTION = "GroupQueryAttention"
POSITION_INPUT, BIAS_INPUT = 9, 10
POSITIONS, WANTED, BIAS = "tree.positions", "tree.wanted", "tree.bias"
HIDDEN = -1e30  # added to a score that nobody may see


def read_trees(model: ModelProto) -> list[int] | None:
    """Change the graph in place. New inputs: `tree.positions` int64 [1, nodes], `tree.wanted` int64 [wanted],
    and for each window there is `tree.bias.<window>` float32 [1, 1, nodes, 1 + nodes]. `logits` become
    [1, wanted, vocab].

    Returns the windows (-1: none), or None where the graph cannot be changed so.
    """
    graph = model.graph
    head = _head_of(graph)
    attention = [node for node in graph.node if node.op_type == ATTENTION]
    given = [name for node in attention for name in node.input[POSITION_INPUT:] if name]  # "": not given
    if head is None or not attention or given:
        return None
    for node in graph.node:  # learned positions, or rotary ones outside attention
        for place, name in enumerate(node.input):
            if name == "position_ids":
                node.input[place] = POSITIONS
    windows = []
    for node in attention:
        window = next((one for one in node.attribute if one.name == "local_window_size"), None)
        size = -1 if window is None else int(window.i)
        if window is not None:  # counted in places of the row; here it is in the mask, counted in depths
            window.i = -1
        node.input.extend([""] * (BIAS_INPUT + 1 - len(node.input)))
        node.input[POSITION_INPUT], node.input[BIAS_INPUT] = POSITIONS, f"{BIAS}.{size}"
        windows.append(size)
    makers = {name: node for node in graph.node for name in node.output}
    hidden = head.input[0]
    if hidden == LAST_HIDDEN:  # packed for a device
        hidden = makers[hidden].input[0]
    head.input[0] = "tree.hidden"
    _insert(graph, head, helper.make_node("Gather", [hidden, WANTED], ["tree.hidden"], "tree.hidden", axis=1))
    found = sorted(set(windows))
    inputs = [value for value in graph.input if value.name != "position_ids"]
    del graph.input[:]
    graph.input.extend(inputs)
    graph.input.extend(
        [
            helper.make_tensor_value_info(POSITIONS, TensorProto.INT64, [1, "nodes"]),
            helper.make_tensor_value_info(WANTED, TensorProto.INT64, ["wanted"]),
            *(
                helper.make_tensor_value_info(f"{BIAS}.{size}", TensorProto.FLOAT, [1, 1, "nodes", "seen"])
                for size in found
            ),
        ]
    )
    del graph.value_info[:]
    for value in graph.output:
        if value.name == "logits":
            value.type.tensor_type.shape.dim[1].Clear()
            value.type.tensor_type.shape.dim[1].dim_param = "wanted"
    return found


def _head_of(graph: GraphProto) -> NodeProto | None:
    """The product nearest to the logits; between them there may be a soft cap, a bias or a cast."""
    makers = {output: node for node in graph.node for output in node.output}
    seen, waiting = set(), ["logits"]
    while waiting:
        node = makers.get(waiting.pop(0))
        if node is None or id(node) in seen:
            continue
        if node.op_type in PRODUCTS:
            return node
        seen.add(id(node))
        waiting += node.input
    return None


def feed(
    depths: NDArray[np.int64], ends: NDArray[np.int64], wanted: NDArray[np.int64], windows: list[int]
) -> dict[str, Any]:
    """The inputs that `read_trees` added, and the mask that counts the token nobody sees."""
    nodes = len(depths)
    places = np.arange(nodes)
    seen = (places <= places[:, None]) & (places[:, None] < ends)
    masks = {}
    for window in windows:
        near = seen if window < 0 else seen & (depths[:, None] - depths < window)
        bias = np.full((1, 1, nodes, 1 + nodes), HIDDEN, np.float32)
        bias[0, 0, :, 1:][near] = 0
        masks[f"{BIAS}.{window}"] = bias
    mask = np.ones((1, 1 + nodes), np.int64)
    return {POSITIONS: depths[None], WANTED: wanted, "attention_mask": mask, **masks}


def _insert(graph: GraphProto, before: NodeProto, new: NodeProto) -> None:
    at = next(place for place, node in enumerate(graph.node) if node is before)
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*nodes[:at], new, *nodes[at:]])
