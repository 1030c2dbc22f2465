"""Writes the ONNX graph of a `Decoder` with KV cache out of ONNX Runtime's fused operators.

Inputs and outputs are those of onnxruntime-genai's builder, so that genai, transformers.js and optimum open
it. The head dimension is a number, as transformers.js reads unknown symbols as 0. Positions come from the
sums of the mask: there is no `position_ids`, and right-padded prefill and ragged cached decoding are both
right.

Measured on SmolLM2-135M with 2 threads: a tied embedding stored once as [vocab, hidden] and read by
`FusedMatMul` with transB takes 108 MB less memory than the builder's transpose and is as fast; one product
for q, k, v and one for gate and up decode 2 to 5 % faster at 4 bits. `Sigmoid` and `Mul` stay apart, as
onnxruntime fuses them; its attention has no CPU kernel for norms of q and k (1.31), so these stand before
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from edgedisp.core.progress import Progress, silent
from edgedisp.graph.decoder_spec import Decoder, Layer, Linear, Norm
from edgedisp.graph.onnx_graph import DATA, GRAPH, MICROSOFT, PAGE

OPSET, IR_VERSION = 21, 10
INLINE_BYTES = 1024  # smaller tensors stay inside the graph file
EMBEDDING = "model.embed_tokens.weight"


class GraphWriter:
    """Nodes in order of computation, and initializers under plain readable names, for a bundle's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes: list[NodeProto] = []
        self._weights: dict[str, TensorProto] = {}

    def node(
        self, op: str, inputs: Sequence[str], *outputs: str, domain: str = "", **attributes: int | float
    ) -> str:
        """Append a node named after its first output; return that. Empty inputs at the end are dropped."""
        names = list(inputs)
        while names and not names[-1]:
            names.pop()
        options: dict[str, Any] = attributes
        node = helper.make_node(op, names, list(outputs), name=outputs[0], domain=domain, **options)
        self.nodes.append(node)
        return outputs[0]

    def weight(self, name: str, values: torch.Tensor | NDArray[Any]) -> str:
        """Store a tensor under `name`, once; large ones go to the data file at a page's start."""
        if name in self._weights:
            return name
        array = np.ascontiguousarray(values.detach().numpy() if isinstance(values, torch.Tensor) else values)
        small = array.nbytes <= INLINE_BYTES
        self._weights[name] = numpy_helper.from_array(array, name) if small else self._outside(name, array)
        return name

    def _outside(self, name: str, array: NDArray[Any]) -> TensorProto:
        """Append `array` to the data file straight from its memory; onnx's own function copies it twice."""
        with (self.folder / DATA).open("ab") as file:
            file.write(bytes(-file.tell() % PAGE))
            tensor = external_tensor(name, array, file.tell())
            array.tofile(file)
        return tensor

    def integers(self, name: str, *values: int) -> str:
        """A constant int64 vector: shapes, axes, splits."""
        return self.weight(name, np.array(values, np.int64))

    def save(self, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> None:
        """Write `model.onnx`; the weights already lie in `model.onnx.data`."""
        (self.folder / GRAPH).write_bytes(self.model(inputs, outputs).SerializeToString())

    def model(self, inputs: list[ValueInfoProto], outputs: list[ValueInfoProto]) -> ModelProto:
        """What `save` writes."""
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, list(self._weights.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgedisp")


def external_tensor(name: str, array: NDArray[Any], offset: int) -> TensorProto:
    """The entry of a tensor whose values lie at `offset` of the data file."""
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", DATA), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


@dataclass(frozen=True)
class Residual:
    """The residual between two norms: `stream` + `added` + `bias`, summed inside the next norm's kernel."""

    stream: str
    added: str = ""
    bias: str = ""


def write(decoder: Decoder, folder: Path, progress: Progress = silent) -> None:
    """Write `model.onnx` and `model.onnx.data` (fp32) of `decoder` into `folder`."""
    graph = GraphWriter(folder)
    graph.save(*compose(graph, decoder, progress))
    progress(len(decoder.layers), len(decoder.layers), "graph written")


def compose(
    graph: GraphWriter, decoder: Decoder, progress: Progress = silent
) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
    """Give `graph` the nodes and weights of `decoder`; returns the graph's inputs and outputs."""
    _lengths(graph)
    for name, (cos, sin) in decoder.ropes.items():
        graph.weight(f"{name}.cos_cache", cos)
        graph.weight(f"{name}.sin_cache", sin)
    residual = _embedding(graph, decoder)
    for index, layer in enumerate(decoder.layers):
        progress(index, len(decoder.layers), "writing the graph")
        residual = _block(graph, decoder, layer, index, residual)
    hidden, _ = _norm(graph, decoder.final_norm, residual)
    _head(graph, decoder, hidden)
    return _interface(decoder)


def _lengths(graph: GraphWriter) -> None:
    """What attention needs to know: each row's last real position (`seqlens_k`), and the longest total."""
    graph.weight("index_1", np.array(1, np.int64))
    graph.node("ReduceSum", ["attention_mask", graph.integers("axis_1", 1)], "real_tokens", keepdims=1)
    graph.node("Sub", ["real_tokens", "index_1"], "last_positions")
    graph.node("Squeeze", ["last_positions", "axis_1"], "last_position")
    graph.node("Cast", ["last_position"], "seqlens_k", to=TensorProto.INT32)
    graph.node("Shape", ["attention_mask"], "mask_shape")
    graph.node("Gather", ["mask_shape", "index_1"], "total_tokens", axis=0)
    graph.node("Cast", ["total_tokens"], "total_sequence_length", to=TensorProto.INT32)


def _embedding(graph: GraphWriter, decoder: Decoder) -> Residual:
    weight = graph.weight(EMBEDDING, decoder.embedding)
    tokens = graph.node("Gather", [weight, "input_ids"], "model.embed_tokens", axis=0)
    if decoder.embedding_scale != 1.0:
        scale = graph.weight("model.embed_scale", np.array(decoder.embedding_scale, np.float32))
        tokens = graph.node("Mul", [tokens, scale], "model.embed_tokens.scaled")
    if decoder.positions is None:
        return Residual(tokens)
    return Residual(tokens, _learned_positions(graph, decoder.positions))


def _learned_positions(graph: GraphWriter, table: torch.Tensor) -> str:
    """GPT-2's position vectors.

    A row starts at max(real tokens - new tokens, 0): at 0 in a right-padded prefill, where the mask counts
    fewer tokens than there are, and at the number of cached tokens when decoding.
    """
    graph.weight("index_0", np.array(0, np.int64))
    graph.node("Shape", ["input_ids"], "ids_shape")
    graph.node("Gather", ["ids_shape", "index_1"], "new_tokens", axis=0)
    graph.node("Sub", ["real_tokens", "new_tokens"], "cached_or_negative")
    graph.node("Max", ["cached_or_negative", "index_0"], "cached_tokens")
    graph.node("Range", ["index_0", "new_tokens", "index_1"], "steps")
    graph.node("Add", ["cached_tokens", "steps"], "position_ids")
    weight = graph.weight("model.embed_positions.weight", table)
    return graph.node("Gather", [weight, "position_ids"], "model.embed_positions", axis=0)


def _block(graph: GraphWriter, decoder: Decoder, layer: Layer, index: int, residual: Residual) -> Residual:
    hidden, stream = _norm(graph, layer.attention_norm, residual)
    added, bias = _attention(graph, decoder, layer, index, hidden)
    if layer.is_parallel:
        return _parallel_mlp(graph, decoder.activation, layer, stream, added, bias)
    residual = _normed_addition(graph, layer.attention_output_norm, stream, added, bias)
    hidden, stream = _norm(graph, layer.mlp_norm, residual)
    added, bias = _mlp(graph, decoder.activation, layer, hidden)
    return _normed_addition(graph, layer.mlp_output_norm, stream, added, bias)


def _parallel_mlp(
    graph: GraphWriter, activation: str, layer: Layer, stream: str, added: str, bias: str
) -> Residual:
    """The MLP of a layer whose attention `added` and `bias` to the stream that the MLP reads as well."""
    hidden, _ = _norm(graph, layer.mlp_norm, Residual(stream))
    if bias:  # the next norm's kernel has room for one bias
        added = graph.node("Add", [added, bias], f"{added}.biased")
    more, bias = _mlp(graph, activation, layer, hidden)
    return Residual(stream, graph.node("Add", [added, more], f"{more}.and_attention"), bias)


def _normed_addition(graph: GraphWriter, norm: Norm | None, stream: str, added: str, bias: str) -> Residual:
    """What a part adds to the stream; Gemma norms it first."""
    if norm is None:
        return Residual(stream, added, bias)
    if bias:
        added = graph.node("Add", [added, bias], f"{added}.biased")
    return Residual(stream, _norm(graph, norm, Residual(added))[0])


def _norm(graph: GraphWriter, norm: Norm, residual: Residual) -> tuple[str, str]:
    """Sum the residual and norm it, in one kernel where there is a sum: (normed, the summed stream)."""
    rms = norm.bias is None
    parameters = [graph.weight(f"{norm.name}.weight", norm.weight)]
    if norm.bias is not None:
        parameters.append(graph.weight(f"{norm.name}.bias", norm.bias))
    if not residual.added:
        op = "SimplifiedLayerNormalization" if rms else "LayerNormalization"
        graph.node(op, [residual.stream, *parameters], norm.name, axis=-1, epsilon=norm.epsilon)
        return norm.name, residual.stream
    op = "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization"
    inputs = [residual.stream, residual.added, *parameters, residual.bias]
    total = f"{norm.name}.stream"
    graph.node(op, inputs, norm.name, "", "", total, domain=MICROSOFT, epsilon=norm.epsilon)
    return norm.name, total


def _linear(graph: GraphWriter, linear: Linear, hidden: str) -> str:
    """hidden W^T without the bias; the weight is stored [in, out] as MatMul reads it."""
    weight = linear.joined(linear.weights).t()
    return graph.node("MatMul", [hidden, graph.weight(f"{linear.name}.weight", weight)], linear.name)


def _bias(graph: GraphWriter, linear: Linear) -> str:
    """The stored bias's name, or "" without one: it is left to the next kernel to add."""
    return graph.weight(f"{linear.name}.bias", linear.joined(linear.biases)) if linear.biases else ""


def _biased(graph: GraphWriter, linear: Linear, hidden: str) -> str:
    product, bias = _linear(graph, linear, hidden), _bias(graph, linear)
    return graph.node("Add", [product, bias], f"{linear.name}.biased") if bias else product


def _attention(
    graph: GraphWriter, decoder: Decoder, layer: Layer, index: int, hidden: str
) -> tuple[str, str]:
    """Grouped-query attention with rotary positions, window and cache in one operator; then its output."""
    name = f"model.layers.{index}.attn"
    query, key, value = _biased(graph, layer.qkv, hidden), "", ""  # packed: the operator cuts it itself
    if layer.q_norm and layer.k_norm:
        query, key, value = _normed_heads(graph, decoder, name, query, layer.q_norm, layer.k_norm)
    past = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
    rope = [f"{layer.rope}.cos_cache", f"{layer.rope}.sin_cache"] if layer.rope else []
    graph.node(
        "GroupQueryAttention",
        [query, key, value, *past, "seqlens_k", "total_sequence_length", *rope],
        name,
        f"present.{index}.key",
        f"present.{index}.value",
        domain=MICROSOFT,
        num_heads=decoder.heads,
        kv_num_heads=decoder.kv_heads,
        scale=layer.scale,
        do_rotary=int(layer.rope is not None),
        local_window_size=layer.window or -1,
    )
    return _linear(graph, layer.attention_output, name), _bias(graph, layer.attention_output)


def _normed_heads(
    graph: GraphWriter, decoder: Decoder, name: str, packed: str, q_norm: Norm, k_norm: Norm
) -> tuple[str, str, str]:
    """Split the packed product and norm every head of q and k over its own dimensions."""
    q_width, kv_width = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    widths = graph.integers("qkv_widths", q_width, kv_width, kv_width)
    parts = [f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"]
    graph.node("Split", [packed, widths], *parts, axis=-1)
    heads = graph.integers("to_heads", 0, 0, -1, decoder.head_dim)
    flat = graph.integers("from_heads", 0, 0, -1)
    normed = []
    for part, norm in zip(parts, (q_norm, k_norm)):
        cut = graph.node("Reshape", [part, heads], f"{part}.heads")
        _norm(graph, norm, Residual(cut))
        normed.append(graph.node("Reshape", [norm.name, flat], f"{part}.normed"))
    return normed[0], normed[1], parts[2]


def _mlp(graph: GraphWriter, activation: str, layer: Layer, hidden: str) -> tuple[str, str]:
    name = layer.down.name.rpartition(".")[0]
    if not layer.is_gated:
        inner = _linear(graph, layer.up, hidden)
        inner = _activation(graph, activation, inner, _bias(graph, layer.up), f"{name}.act")
    else:
        widths = graph.integers("gate_up_widths", *map(len, layer.up.weights))
        gate, up = f"{name}.gate_proj", f"{name}.up_proj"
        graph.node("Split", [_biased(graph, layer.up, hidden), widths], gate, up, axis=-1)
        opened = _activation(graph, activation, gate, "", f"{name}.act")
        inner = graph.node("Mul", [opened, up], f"{name}.gated")
    return _linear(graph, layer.down, inner), _bias(graph, layer.down)


def _activation(graph: GraphWriter, activation: str, hidden: str, bias: str, name: str) -> str:
    if activation == "gelu_tanh":  # the one kernel that also adds a bias
        return graph.node("FastGelu", [hidden, bias], name, domain=MICROSOFT)
    if bias:
        hidden = graph.node("Add", [hidden, bias], f"{name}.biased")
    if activation == "silu":
        return graph.node("Mul", [hidden, graph.node("Sigmoid", [hidden], f"{name}.sigmoid")], name)
    if activation == "quick_gelu":
        return graph.node("QuickGelu", [hidden], name, domain=MICROSOFT, alpha=1.702)
    if activation == "gelu":
        return graph.node("Gelu", [hidden], name, domain=MICROSOFT)
    return graph.node("Relu", [hidden], name)


def _head(graph: GraphWriter, decoder: Decoder, hidden: str) -> None:
    cap = decoder.logit_softcap
    output = "uncapped_logits" if cap else "logits"
    if decoder.head is None:
        graph.node("FusedMatMul", [hidden, EMBEDDING], output, domain=MICROSOFT, transB=1)
    else:
        graph.node("MatMul", [hidden, graph.weight("lm_head.weight", decoder.head.t())], output)
    if cap:
        limit = graph.weight("logit_softcap", np.array(cap, np.float32))
        bent = graph.node("Tanh", [graph.node("Div", [output, limit], "scaled_logits")], "bent_logits")
        graph.node("Mul", [bent, limit], "logits")


def _interface(decoder: Decoder) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
    """Inputs and outputs with their shapes."""

    def caches(prefix: str, tokens: str) -> list[ValueInfoProto]:
        shape: list[str | int | None] = ["batch_size", decoder.kv_heads, tokens, decoder.head_dim]
        names = [f"{prefix}.{i}.{part}" for i in range(len(decoder.layers)) for part in ("key", "value")]
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]

    def tokens(name: str, width: str) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.INT64, ["batch_size", width])

    logits: list[str | int | None] = ["batch_size", "sequence_length", decoder.vocab_size]
    inputs = [tokens("input_ids", "sequence_length"), tokens("attention_mask", "total_sequence_length")]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, logits)]
    return (
        inputs + caches("past_key_values", "past_sequence_length"),
        outputs + caches("present", "total_sequence_length"),
    )
