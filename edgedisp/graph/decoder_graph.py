"""Writes the ONNX graph of a `Decoder` with KV cache out of ONNX Runtime's fused operators.

A `Decoder` is the neutral description of a decoder-only model; its weights are views of the torch model.

Inputs and outputs are those of onnxruntime-genai's builder. The head dimension is a number, as
transformers.js reads symbols as 0. Positions come from the sums of the mask: right-padded prefill and ragged
cached decoding are both right without `position_ids`.

SmolLM2-135M, 2 threads: a tied embedding stored once and read by `FusedMatMul` takes 108 MB less memory than
the builder's transpose at the same speed; one product for q, k, v and one for gate and up decode 2 to 5 %
faster at 4 bits. onnxruntime fuses `Sigmoid` and `Mul`; it has no CPU kernel for norms of q and k (1.31).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from edgedisp.core.progress import Progress, silent
from edgedisp.graph.onnx_graph import GRAPH, MICROSOFT, TensorStore

OPSET, IR_VERSION = 21, 10
EMBEDDING = "model.embed_tokens.weight"

Rope = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of the rotary angles, each [context, head_dim / 2]."""


@dataclass(frozen=True)
class Linear:
    """`y = x W^T + b`. `weights` [out_i, in] are stored as one [sum(out_i), in]; `biases` alike, if any.

    `rows` int64 [sum(out_i)]: the order in which rows (and biases) are stored; None: as they are.
    """

    name: str
    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...] = ()
    rows: torch.Tensor | None = None

    def joined(self, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """`weights` or `biases` as one tensor, rows in stored order."""
        whole = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return whole if self.rows is None else whole[self.rows]


@dataclass(frozen=True)
class Norm:
    """`weight` [n] as it multiplies (Gemma's 1 + w already added). LayerNorm with a bias, RMSNorm without."""

    name: str
    weight: torch.Tensor
    epsilon: float
    bias: torch.Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """One block: x + attention(norm(x)), then x + mlp(norm(x)). Gemma also norms what is added; a parallel
    block is x + attention(norm(x)) + mlp(other_norm(x)). A gated MLP has gate and up as one product in `up`.
    """

    attention_norm: Norm
    qkv: Linear
    attention_output: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear
    scale: float
    window: int | None = None
    rope: str | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    attention_output_norm: Norm | None = None
    mlp_output_norm: Norm | None = None
    is_gated: bool = False
    is_parallel: bool = False


@dataclass(frozen=True)
class Decoder:
    """What a decoder-only model computes. `embedding` [vocab, hidden]; `lm_head` None means tied to it;
    `positions` learned [context, hidden]."""

    architecture: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context: int
    activation: str
    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    final_norm: Norm
    lm_head: torch.Tensor | None = None
    embedding_scale: float = 1.0
    positions: torch.Tensor | None = None
    ropes: dict[str, Rope] = field(default_factory=dict)
    logit_softcap: float = 0.0


@dataclass(frozen=True)
class Residual:
    """The residual between two norms: `stream` + `added` + `bias`, summed inside the next norm's kernel."""

    stream: str
    added: str = ""
    bias: str = ""


def write(decoder: Decoder, output_dir: Path, progress: Progress = silent) -> None:
    """Write `model.onnx` and `model.onnx.data` (fp32) of `decoder` into `output_dir`."""
    graph, count = GraphWriter(decoder, output_dir), len(decoder.layers)
    graph.lengths()
    residual = graph.embedding()
    for index, layer in enumerate(decoder.layers):
        progress(index, count, "writing the graph")
        residual = graph.block(layer, index, residual)
    graph.lm_head(graph.norm(decoder.final_norm, residual)[0])
    graph.save()
    progress(count, count, "graph written")


class GraphWriter:
    """Nodes in order of computation and initializers of one decoder. Methods return names of outputs."""

    def __init__(self, decoder: Decoder, output_dir: Path) -> None:
        self.decoder, self.output_dir = decoder, output_dir
        self.nodes: list[NodeProto] = []
        self.store = TensorStore(output_dir)

    def node(self, op: str, inputs: Sequence[str], *outputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with the name of its first output, which is returned."""
        names = list(inputs)
        while not names[-1]:  # optional inputs that are absent
            names.pop()
        node = helper.make_node(op, names, list(outputs), name=outputs[0], domain=domain, **attributes)
        self.nodes.append(node)
        return outputs[0]

    def weight(self, name: str, values: torch.Tensor | NDArray[Any]) -> str:
        """Store a tensor under `name`, once."""
        if name in self.store.tensors:
            return name
        return self.store.add(name, values.detach().numpy() if isinstance(values, torch.Tensor) else values)

    def integers(self, name: str, values: int | Sequence[int]) -> str:
        """A constant int64 scalar or vector: indices, shapes, axes, widths."""
        return self.weight(name, np.array(values, np.int64))

    def save(self) -> None:
        """Write `model.onnx`; the large weights already lie in `model.onnx.data`."""
        graph = helper.make_graph(self.nodes, "decoder", *self.interface(), list(self.store.tensors.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgedisp"
        )
        (self.output_dir / GRAPH).write_bytes(model.SerializeToString())

    def interface(self) -> tuple[list[ValueInfoProto], list[ValueInfoProto]]:
        """Inputs and outputs with their shapes."""
        decoder = self.decoder

        def value(name: str, kind: int, *shape: str | int) -> ValueInfoProto:
            return helper.make_tensor_value_info(name, kind, ["batch_size", *shape])

        def caches(prefix: str, tokens: str) -> list[ValueInfoProto]:
            shape = (decoder.kv_heads, tokens, decoder.head_dim)
            names = [f"{prefix}.{i}.{part}" for i in range(len(decoder.layers)) for part in ("key", "value")]
            return [value(name, TensorProto.FLOAT, *shape) for name in names]

        inputs = [
            value("input_ids", TensorProto.INT64, "sequence_length"),
            value("attention_mask", TensorProto.INT64, "total_sequence_length"),
            *caches("past_key_values", "past_sequence_length"),
        ]
        logits = value("logits", TensorProto.FLOAT, "sequence_length", decoder.vocab_size)
        return inputs, [logits, *caches("present", "total_sequence_length")]

    def lengths(self) -> None:
        """What attention needs: each row's last real position (`seqlens_k`), longest total, rotary tables."""
        self.integers("index_1", 1)
        self.node("ReduceSum", ["attention_mask", self.integers("axis_1", [1])], "real_tokens", keepdims=1)
        self.node("Sub", ["real_tokens", "index_1"], "last_positions")
        self.node("Squeeze", ["last_positions", "axis_1"], "last_position")
        self.node("Cast", ["last_position"], "seqlens_k", to=TensorProto.INT32)
        self.node("Shape", ["attention_mask"], "mask_shape")
        self.node("Gather", ["mask_shape", "index_1"], "total_tokens", axis=0)
        self.node("Cast", ["total_tokens"], "total_sequence_length", to=TensorProto.INT32)
        for name, (cos, sin) in self.decoder.ropes.items():
            self.weight(f"{name}.cos_cache", cos)
            self.weight(f"{name}.sin_cache", sin)

    def embedding(self) -> Residual:
        decoder = self.decoder
        weight = self.weight(EMBEDDING, decoder.embedding)
        tokens = self.node("Gather", [weight, "input_ids"], "model.embed_tokens", axis=0)
        if decoder.embedding_scale != 1.0:
            scale = self.weight("model.embed_scale", np.array(decoder.embedding_scale, np.float32))
            tokens = self.node("Mul", [tokens, scale], "model.embed_tokens.scaled")
        if decoder.positions is None:
            return Residual(tokens)
        return Residual(tokens, self.learned_positions(decoder.positions))

    def learned_positions(self, table: torch.Tensor) -> str:
        """GPT-2's position vectors.

        A row starts at max(real tokens - new tokens, 0): at 0 in a right-padded prefill, where the mask
        counts fewer tokens than there are, and at the number of cached tokens when decoding.
        """
        self.integers("index_0", 0)
        self.node("Shape", ["input_ids"], "ids_shape")
        self.node("Gather", ["ids_shape", "index_1"], "new_tokens", axis=0)
        self.node("Sub", ["real_tokens", "new_tokens"], "cached_or_negative")
        self.node("Max", ["cached_or_negative", "index_0"], "cached_tokens")
        self.node("Range", ["index_0", "new_tokens", "index_1"], "steps")
        self.node("Add", ["cached_tokens", "steps"], "position_ids")
        weight = self.weight("model.embed_positions.weight", table)
        return self.node("Gather", [weight, "position_ids"], "model.embed_positions", axis=0)

    def block(self, layer: Layer, index: int, residual: Residual) -> Residual:
        hidden, stream = self.norm(layer.attention_norm, residual)
        added, bias = self.attention(layer, index, hidden)
        if layer.is_parallel:
            hidden, _ = self.norm(layer.mlp_norm, Residual(stream))
            added = self.biased(added, bias)  # the next norm's kernel has room for one bias
            more, bias = self.mlp(layer, hidden)
            return Residual(stream, self.node("Add", [added, more], f"{more}.and_attention"), bias)
        residual = self.normed_addition(layer.attention_output_norm, stream, added, bias)
        hidden, stream = self.norm(layer.mlp_norm, residual)
        added, bias = self.mlp(layer, hidden)
        return self.normed_addition(layer.mlp_output_norm, stream, added, bias)

    def normed_addition(self, norm: Norm | None, stream: str, added: str, bias: str) -> Residual:
        """What a part adds to the stream; Gemma norms it first."""
        if norm is None:
            return Residual(stream, added, bias)
        return Residual(stream, self.norm(norm, Residual(self.biased(added, bias)))[0])

    def norm(self, norm: Norm, residual: Residual) -> tuple[str, str]:
        """Sum the residual and norm it, in one kernel where there is a sum: (normed, the summed stream)."""
        kind = "SimplifiedLayerNormalization" if norm.bias is None else "LayerNormalization"
        parameters = [self.weight(f"{norm.name}.weight", norm.weight)]
        if norm.bias is not None:
            parameters.append(self.weight(f"{norm.name}.bias", norm.bias))
        if not residual.added:
            self.node(kind, [residual.stream, *parameters], norm.name, axis=-1, epsilon=norm.epsilon)
            return norm.name, residual.stream
        inputs = [residual.stream, residual.added, *parameters, residual.bias]
        total = f"{norm.name}.stream"
        outputs = (norm.name, "", "", total)
        self.node(f"Skip{kind}", inputs, *outputs, domain=MICROSOFT, epsilon=norm.epsilon)
        return norm.name, total

    def linear(self, linear: Linear, hidden: str) -> tuple[str, str]:
        """hidden W^T, the weight stored [in, out] as MatMul reads it, and the bias ("" without one), which is
        left to the next kernel to add."""
        weight = self.weight(f"{linear.name}.weight", linear.joined(linear.weights).t())
        product = self.node("MatMul", [hidden, weight], linear.name)
        if not linear.biases:
            return product, ""
        return product, self.weight(f"{linear.name}.bias", linear.joined(linear.biases))

    def biased(self, hidden: str, bias: str) -> str:
        return self.node("Add", [hidden, bias], f"{hidden}.biased") if bias else hidden

    def attention(self, layer: Layer, index: int, hidden: str) -> tuple[str, str]:
        """Grouped-query attention with rotary positions, window and cache in one operator; then o_proj."""
        name = f"model.layers.{index}.attn"
        query, key, value = self.biased(*self.linear(layer.qkv, hidden)), "", ""  # one packed input
        if layer.q_norm and layer.k_norm:
            query, key, value = self.normed_heads(name, query, layer.q_norm, layer.k_norm)
        past = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        rope = [f"{layer.rope}.cos_cache", f"{layer.rope}.sin_cache"] if layer.rope else []
        self.node(
            "GroupQueryAttention",
            [query, key, value, *past, "seqlens_k", "total_sequence_length", *rope],
            name,
            f"present.{index}.key",
            f"present.{index}.value",
            domain=MICROSOFT,
            num_heads=self.decoder.heads,
            kv_num_heads=self.decoder.kv_heads,
            scale=layer.scale,
            do_rotary=int(layer.rope is not None),
            local_window_size=layer.window or -1,
        )
        return self.linear(layer.attention_output, name)

    def normed_heads(self, name: str, packed: str, q_norm: Norm, k_norm: Norm) -> tuple[str, str, str]:
        """Split the packed product and norm every head of q and k over its own dimensions."""
        head_dim = self.decoder.head_dim
        q_width, kv_width = self.decoder.heads * head_dim, self.decoder.kv_heads * head_dim
        parts = [f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"]
        widths = self.integers("qkv_widths", [q_width, kv_width, kv_width])
        self.node("Split", [packed, widths], *parts, axis=-1)
        heads = self.integers("to_heads", [0, 0, -1, head_dim])
        flat = self.integers("from_heads", [0, 0, -1])
        normed = []
        for part, norm in zip(parts, (q_norm, k_norm)):
            self.norm(norm, Residual(self.node("Reshape", [part, heads], f"{part}.heads")))
            normed.append(self.node("Reshape", [norm.name, flat], f"{part}.normed"))
        return normed[0], normed[1], parts[2]

    def mlp(self, layer: Layer, hidden: str) -> tuple[str, str]:
        name = layer.down.name.rpartition(".")[0]
        product, bias = self.linear(layer.up, hidden)
        if not layer.is_gated:
            return self.linear(layer.down, self.activation(product, bias, f"{name}.act"))
        widths = self.integers("gate_up_widths", [len(weight) for weight in layer.up.weights])
        gate, up = f"{name}.gate_proj", f"{name}.up_proj"
        self.node("Split", [self.biased(product, bias), widths], gate, up, axis=-1)
        activated = self.activation(gate, "", f"{name}.act")
        return self.linear(layer.down, self.node("Mul", [activated, up], f"{name}.gated"))

    def activation(self, hidden: str, bias: str, name: str) -> str:
        activation = self.decoder.activation
        if activation == "gelu_tanh":  # the one kernel that also adds a bias
            return self.node("FastGelu", [hidden, bias], name, domain=MICROSOFT)
        hidden = self.biased(hidden, bias)
        if activation == "silu":
            return self.node("Mul", [hidden, self.node("Sigmoid", [hidden], f"{name}.sigmoid")], name)
        if activation == "quick_gelu":
            return self.node("QuickGelu", [hidden], name, domain=MICROSOFT, alpha=1.702)
        if activation == "gelu":
            return self.node("Gelu", [hidden], name, domain=MICROSOFT)
        return self.node("Relu", [hidden], name)

    def lm_head(self, hidden: str) -> None:
        cap = self.decoder.logit_softcap
        output = "uncapped_logits" if cap else "logits"
        if self.decoder.lm_head is None:
            self.node("FusedMatMul", [hidden, EMBEDDING], output, domain=MICROSOFT, transB=1)
        else:
            self.node("MatMul", [hidden, self.weight("lm_head.weight", self.decoder.lm_head.t())], output)
        if cap:
            limit = self.weight("logit_softcap", np.array(cap, np.float32))
            bent = self.node("Tanh", [self.node("Div", [output, limit], "scaled_logits")], "bent_logits")
            self.node("Mul", [bent, limit], "logits")
