"""Hidden states of a bundle: what every layer of the graph that ships computes, quantized or not.

A bundle's graph has no outputs for them: they would cost memory and copies at every token on the device, and
onnxruntime-genai allocates every output there is. So the outputs are added when they are wanted, to a copy of
the graph in memory that reads the same weights file; what only served the logits is cut off. No byte of the
bundle changes, and bundles made long ago, or by onnxruntime-genai's builder, are measured as well.

The tensors are found by what they do, whoever named them. Attention with a cache marks a layer. The norm
that feeds its projection has the layer's input: its own input, or the sum that it writes beside the normed
one, where adding and norming are one kernel. The norm that feeds the head has the last layer's output and the
final normed state. Walking back past one product skips the norms of queries and keys, which stand after it.

Left out: graphs without GroupQueryAttention, such as those of transformers.js.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.graph.last_logits import PRODUCTS
from edgedisp.graph.session import open_session, read_config
from edgedisp.graph.writer import GRAPH

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
        self.names = hidden_names(model.graph)
        if len(self.names) != self.layers + 2:
            raise BadInput(
                f"{bundle}: hidden states of {max(0, len(self.names) - 2)} layers are found in model.onnx "
                f"but it has {self.layers}; graphs with {ATTENTION} can be measured, as "
                "`edgedisp export` and onnxruntime-genai's builder write them"
            )
        _put_out(model.graph, self.names)
        self._session = open_session(bundle, threads, model.SerializeToString())
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
            found = self._session.run(self.names, feed)
        except Exception as error:  # onnxruntime has no common base class for its errors
            raise BuildFailed(f"{self.bundle}: onnxruntime cannot run model.onnx: {error}") from error
        return [state[0] for state in found]


def _read(bundle: Path) -> ModelProto:
    path = bundle / GRAPH
    if not path.is_file():
        raise BadInput(f"{bundle}: no bundle ({GRAPH} is missing); `edgedisp export` makes one")
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's errors have no base class that it promises
        raise BadInput(f"{path}: is no ONNX graph, or a damaged one: {error}") from error


def hidden_names(graph: GraphProto) -> list[str]:
    """Names of the embedding's output, each layer's output, and the final normed state, in order.

    Fewer where a norm cannot be found. An adding norm that does not write its sum is made to.
    """
    makers = {name: node for node in graph.node for name in node.output if name}
    feeds = [node.input[0] for node in graph.node if node.op_type == ATTENTION]
    found: list[str] = []
    normed = ""
    for name in [*feeds, "logits"]:
        norm = _norm_behind(name, makers)
        if norm is None:
            return found
        found.append(_residual(norm))
        normed = norm.output[0]
    return [*found, normed]


def _norm_behind(name: str, makers: dict[str, NodeProto]) -> NodeProto | None:
    """The norm whose output went through one product, and perhaps more, to become the tensor `name`."""
    passed = False
    while name in makers:
        node = makers[name]
        if passed and node.op_type in NORMS:
            return node
        passed = passed or node.op_type in PRODUCTS
        name = next((given for given in node.input if given in makers), "")
    return None


def _residual(norm: NodeProto) -> str:
    """The stream that a norm reads, summed."""
    if norm.op_type not in ADDING_NORMS:
        return str(norm.input[0])
    while len(norm.output) <= SUM:
        norm.output.append("")
    if not norm.output[SUM]:
        norm.output[SUM] = f"{norm.output[0]}.stream"
    return str(norm.output[SUM])


def _put_out(graph: GraphProto, names: list[str]) -> None:
    """Make `names` the only outputs, and drop what nobody reads any more."""
    needed: set[str] = set(names)
    kept: list[Any] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    weights = [TensorProto.FromString(tensor.SerializeToString()) for tensor in weights]
    for field in ("node", "initializer", "output", "value_info"):
        graph.ClearField(field)
    graph.node.extend(kept)
    graph.initializer.extend(weights)
    graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
