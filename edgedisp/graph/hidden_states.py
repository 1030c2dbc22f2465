"""Hidden states of a bundle: what every layer of the graph that ships computes, quantized or not.

A bundle's graph has no outputs for them: they would cost memory and copies at every token on the device. They
are added to a copy in memory over the same weights file; what only served the logits is cut off.

The tensors are found by what they do, whoever wrote the graph. Attention with a cache marks a layer. The norm
before its projection has the layer's input: its own input, or the sum that it writes beside the normed one,
where adding and norming are one kernel. The norm before the head has the last layer's output and the final
normed state. Walking back past one product skips norms of queries and keys, which stand after it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.graph.onnx_graph import GRAPH, PRODUCTS, remove_unused, to_bytes
from edgedisp.graph.session import open_session, read_config

ATTENTION = "GroupQueryAttention"
ADDING_NORMS = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")
NORMS = (*ADDING_NORMS, "SimplifiedLayerNormalization", "LayerNormalization", "RMSNormalization")
SUM = 3  # which output of an adding norm is the sum

States = list[NDArray[np.float32]]


class HiddenStates:
    """A bundle as a source of hidden states: `HiddenStates(bundle, threads)(ids)`.

    BadInput if the folder is no bundle or its graph shows no hidden states, BuildFailed if onnxruntime cannot
    open it.
    """

    def __init__(self, bundle: Path, threads: int) -> None:
        if threads < 1:
            raise BadInput(f"threads is {threads}; at least 1 is needed")
        self.bundle, config = bundle, read_config(bundle)
        self.context = int(config["context_length"])
        self.layers = int(config["decoder"]["num_hidden_layers"])
        model = _read(bundle)
        states = hidden_states(model.graph)
        self.names = [str(state.name) for state in states]
        if len(states) != self.layers + 2:
            raise BadInput(
                f"{bundle}: hidden states of {max(0, len(states) - 2)} layers are found in model.onnx "
                f"but it has {self.layers}; graphs with {ATTENTION} can be measured, as "
                "`edgedisp export` and onnxruntime-genai's builder write them"
            )
        model.graph.outputs.clear()
        model.graph.outputs.extend(states)
        remove_unused(model)
        for state in states:
            state.type, state.shape = ir.TensorType(ir.DataType.FLOAT), None
        self._session = open_session(bundle, threads, to_bytes(model))
        head_dim = int(config["decoder"]["head_size"])
        self._fixed = {
            value.name: np.zeros((1, int(value.shape[1]), 0, head_dim), np.float32)
            for value in self._session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self._wants_positions = any(v.name == "position_ids" for v in self._session.get_inputs())

    def __call__(self, ids: NDArray[np.int64]) -> States:
        """ids int64 [tokens] -> layers + 2 arrays float32 [tokens, features].

        The first is the embedding's output, then each block's, then the last one after the final norm.
        ValueError for no tokens, or more than the context. BuildFailed if onnxruntime cannot run the graph.
        """
        if not 0 < len(ids) <= self.context:
            raise ValueError(f"{len(ids)} tokens given; 1 to {self.context} (the context) are possible")
        row = np.asarray(ids, np.int64)[None]
        feed = {"input_ids": row, "attention_mask": np.ones_like(row), **self._fixed}
        if self._wants_positions:
            feed["position_ids"] = np.arange(len(ids), dtype=np.int64)[None]
        try:
            states = self._session.run(self.names, feed)
        except Exception as error:  # onnxruntime has no common base class for its errors
            raise BuildFailed(f"{self.bundle}: onnxruntime cannot run model.onnx: {error}") from error
        return [state[0] for state in states]


def _read(bundle: Path) -> ir.Model:
    path = bundle / GRAPH
    if not path.is_file():
        raise BadInput(f"{bundle}: no bundle ({GRAPH} is missing); `edgedisp export` makes one")
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's errors have no base class that it promises
        raise BadInput(f"{path}: is no ONNX graph, or a damaged one: {error}") from error


def hidden_states(graph: ir.Graph) -> list[ir.Value]:
    """The embedding's output, each layer's output, and the final normed state, in order.

    Fewer where a norm cannot be found. An adding norm that does not write its sum is made to.
    """
    starts = [node.inputs[0] for node in graph if node.op_type == ATTENTION]
    starts += [value for value in graph.outputs if value.name == "logits"]
    states: list[ir.Value] = []
    norm = None
    for value in starts:
        norm = _norm_behind(value)
        if norm is None:
            return states
        states.append(_residual(norm))
    return states if norm is None else [*states, norm.outputs[0]]


def _norm_behind(value: ir.Value | None) -> ir.Node | None:
    """The norm whose output went through one product, and perhaps more, to become `value`."""
    passed_product = False
    node = value.producer() if value is not None else None
    while node is not None:
        if passed_product and node.op_type in NORMS:
            return node
        passed_product = passed_product or node.op_type in PRODUCTS
        makers = (given.producer() for given in node.inputs if given is not None)
        node = next((maker for maker in makers if maker is not None), None)
    return None


def _residual(norm: ir.Node) -> Any:
    """The stream that a norm reads, summed."""
    if norm.op_type not in ADDING_NORMS:
        return norm.inputs[0]
    if len(norm.outputs) <= SUM:
        norm.resize_outputs(SUM + 1)
        for value in norm.outputs[1:]:
            value.name = value.name or ""
    total = norm.outputs[SUM]
    total.name = total.name or f"{norm.outputs[0].name}.stream"
    return total
