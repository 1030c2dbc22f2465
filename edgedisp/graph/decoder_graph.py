"""Writes the ONNX graph of a `Decoder` with KV cache out of ONNX Runtime's fused operators.

Inputs and outputs are those of onnxruntime-genai's builder. The head dimension is a number, as
transformers.js reads symbols as 0. Positions come from the sums of the mask: right-padded prefill and ragged
cached decoding are both right without `position_ids`.

SmolLM2-135M, 2 threads: a tied embedding stored once and read by `FusedMatMul` takes 108 MB less memory than
the builder's transpose at the same speed; one product for q, k, v and one for gate and up decode 2 to 5 %
faster at 4 bits. onnxruntime fuses `Sigmoid` and `Mul`; it has no CPU kernel for norms of q and k (1.31).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgedisp.core.progress import Progress, silent
from edgedisp.graph.onnx_graph import ATTENTION, EMBEDDING, GRAPH, NewNodes, TensorStore, to_bytes

OPSET, IR_VERSION = 21, 10

Rope = tuple[torch.Tensor, torch.Tensor]
"""cos and sin of the rotary angles, each [context, head_dim / 2]."""


@dataclass(frozen=True)
class Linear:
    """`y = x W^T + b`. `weights` [out_i, in] are stored as one [sum(out_i), in]; `biases` alike, if any.

    `parameters`: the torch names of the weights; `is_conv1d`: torch stores them [in, out].
    `rows` int64 [sum(out_i)]: the order in which rows (and biases) are stored; None: as they are.
    """

    name: str
    parameters: tuple[str, ...]
    weights: tuple[torch.Tensor, ...]
    biases: tuple[torch.Tensor, ...] = ()
    is_conv1d: bool = False
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
    is_parallel: bool = False


@dataclass(frozen=True)
class Decoder:
    """What a decoder-only model computes, with views of its weights. `embedding` [vocab, hidden]; `lm_head`
    None means tied to it; `positions` learned [context, hidden]."""

    architecture: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    context: int
    activation: str
    embedding: Linear
    layers: tuple[Layer, ...]
    final_norm: Norm
    lm_head: Linear | None = None
    embedding_scale: float = 1.0
    positions: torch.Tensor | None = None
    ropes: dict[str, Rope] = field(default_factory=dict)
    logit_softcap: float = 0.0

    @property
    def vocab_size(self) -> int:
        return len(self.embedding.weights[0])


@dataclass(frozen=True)
class Residual:
    """The residual between two norms: `stream` + `added` + `bias`, summed inside the next norm's kernel."""

    stream: ir.Value
    added: ir.Value | None = None
    bias: ir.Value | None = None


def write(decoder: Decoder, output_dir: Path, progress: Progress = silent) -> None:
    """Write `model.onnx` and `model.onnx.data` (fp32) of `decoder` into `output_dir`."""
    writer, count = GraphWriter(decoder, output_dir), len(decoder.layers)
    writer.lengths()
    residual = writer.embedding()
    for index, layer in enumerate(decoder.layers):
        progress(index, count, "writing the graph")
        residual = writer.block(layer, index, residual)
    writer.lm_head(writer.norm(decoder.final_norm, residual)[0])
    writer.graph.extend(writer.nodes)
    writer.graph.outputs.insert(0, writer.graph.outputs.pop())  # the logits
    model = ir.Model(writer.graph, ir_version=IR_VERSION, producer_name="edgedisp")
    (output_dir / GRAPH).write_bytes(to_bytes(model))
    progress(count, count, "graph written")


class GraphWriter(NewNodes):
    """Nodes in order of computation and weights of one decoder."""

    def __init__(self, decoder: Decoder, output_dir: Path) -> None:
        self.decoder = decoder
        self.ids = ir.val("input_ids", ir.DataType.INT64, ("batch_size", "sequence_length"))
        self.mask = ir.val("attention_mask", ir.DataType.INT64, ("batch_size", "total_sequence_length"))
        cache = ("batch_size", decoder.kv_heads, "past_sequence_length", decoder.head_dim)
        self.past = [
            ir.val(f"past_key_values.{index}.{part}", ir.DataType.FLOAT, cache)
            for index in range(len(decoder.layers))
            for part in ("key", "value")
        ]
        inputs = [self.ids, self.mask, *self.past]
        graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": OPSET}, name="decoder")
        super().__init__(graph, store=TensorStore(output_dir))

    def output(self, value: ir.Value, *shape: int | str) -> None:
        """Make a value an output of the graph."""
        value.shape, value.type = ir.Shape(("batch_size", *shape)), ir.TensorType(ir.DataType.FLOAT)
        self.graph.outputs.append(value)

    def weight(self, name: str, values: Any) -> ir.Value:
        return self.constant(name, values.detach().numpy())

    def lengths(self) -> None:
        """What attention needs: each row's last real position (`seqlens_k`), longest total, rotary tables."""
        index_1, axis_1 = self.constant("index_1", 1), self.constant("axis_1", [1])
        self.real_tokens = self.op("ReduceSum", [self.mask, axis_1], "real_tokens", keepdims=1)
        last = self.op("Sub", [self.real_tokens, index_1], "last_positions")
        last = self.op("Squeeze", [last, axis_1], "last_position")
        self.seqlens = self.op("Cast", [last], "seqlens_k", to=ir.DataType.INT32)
        shape = self.op("Shape", [self.mask], "mask_shape")
        total = self.op("Gather", [shape, index_1], "total_tokens", axis=0)
        self.total = self.op("Cast", [total], "total_sequence_length", to=ir.DataType.INT32)
        self.ropes = {
            name: [self.weight(f"{name}.cos_cache", cos), self.weight(f"{name}.sin_cache", sin)]
            for name, (cos, sin) in self.decoder.ropes.items()
        }

    def embedding(self) -> Residual:
        decoder = self.decoder
        weight = self.weight(EMBEDDING, decoder.embedding.weights[0])
        tokens = self.op("Gather", [weight, self.ids], "model.embed_tokens", axis=0)
        if decoder.embedding_scale != 1.0:
            scale = self.constant("model.embed_scale", np.array(decoder.embedding_scale, np.float32))
            tokens = self.op("Mul", [tokens, scale], "model.embed_tokens.scaled")
        return Residual(tokens, self.learned_positions() if decoder.positions is not None else None)

    def learned_positions(self) -> ir.Value:
        """GPT-2's position vectors.

        A row starts at max(real tokens - new tokens, 0): at 0 in a right-padded prefill, where the mask
        counts fewer tokens than there are, and at the number of cached tokens when decoding.
        """
        index_0, index_1 = self.constant("index_0", 0), self.constant("index_1", 1)
        count = self.op("Gather", [self.op("Shape", [self.ids], "ids_shape"), index_1], "new_tokens", axis=0)
        cached = self.op("Sub", [self.real_tokens, count], "cached_or_negative")
        cached = self.op("Max", [cached, index_0], "cached_tokens")
        steps = self.op("Range", [index_0, count, index_1], "steps")
        ids = self.op("Add", [cached, steps], "position_ids")
        weight = self.weight("model.embed_positions.weight", self.decoder.positions)
        return self.op("Gather", [weight, ids], "model.embed_positions", axis=0)

    def block(self, layer: Layer, index: int, residual: Residual) -> Residual:
        hidden, stream = self.norm(layer.attention_norm, residual)
        added, bias = self.attention(layer, index, hidden)
        if layer.is_parallel:
            hidden, _ = self.norm(layer.mlp_norm, Residual(stream))
            added = self.biased(added, bias)  # the next norm's kernel has room for one bias
            more, bias = self.mlp(layer, hidden)
            return Residual(stream, self.op("Add", [added, more], f"{more.name}.and_attention"), bias)
        residual = self.normed_addition(layer.attention_output_norm, stream, added, bias)
        hidden, stream = self.norm(layer.mlp_norm, residual)
        added, bias = self.mlp(layer, hidden)
        return self.normed_addition(layer.mlp_output_norm, stream, added, bias)

    def normed_addition(
        self, norm: Norm | None, stream: ir.Value, added: ir.Value, bias: ir.Value | None
    ) -> Residual:
        """What a part adds to the stream; Gemma norms it first."""
        if norm is None:
            return Residual(stream, added, bias)
        return Residual(stream, self.norm(norm, Residual(self.biased(added, bias)))[0])

    def norm(self, norm: Norm, residual: Residual) -> tuple[ir.Value, ir.Value]:
        """Sum the residual and norm it, in one kernel where there is a sum: (normed, the summed stream)."""
        kind = "SimplifiedLayerNormalization" if norm.bias is None else "LayerNormalization"
        parameters = [self.weight(f"{norm.name}.weight", norm.weight)]
        if norm.bias is not None:
            parameters.append(self.weight(f"{norm.name}.bias", norm.bias))
        if residual.added is None:
            inputs = [residual.stream, *parameters]
            return self.op(kind, inputs, norm.name, axis=-1, epsilon=norm.epsilon), residual.stream
        terms = [residual.stream, residual.added, *parameters, residual.bias]
        outputs = (norm.name, "", "", f"{norm.name}.stream")
        normed = self.op(f"Skip{kind}", terms, *outputs, epsilon=norm.epsilon)
        return normed, self.nodes[-1].outputs[-1]

    def linear(self, linear: Linear, hidden: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        """hidden W^T, the weight stored [in, out] as MatMul reads it, and the bias, which is left to the next
        kernel to add."""
        weight = self.weight(f"{linear.name}.weight", linear.joined(linear.weights).t())
        product = self.op("MatMul", [hidden, weight], linear.name)
        if not linear.biases:
            return product, None
        return product, self.weight(f"{linear.name}.bias", linear.joined(linear.biases))

    def biased(self, hidden: ir.Value, bias: ir.Value | None) -> ir.Value:
        return hidden if bias is None else self.op("Add", [hidden, bias], f"{hidden.name}.biased")

    def attention(self, layer: Layer, index: int, hidden: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        """Grouped-query attention with rotary positions, window and cache in one operator; then o_proj."""
        name = f"model.layers.{index}.attn"
        inputs: list[ir.Value | None] = [self.biased(*self.linear(layer.qkv, hidden)), None, None]  # packed
        if layer.q_norm and layer.k_norm:
            inputs = [*self.normed_heads(name, inputs[0], layer.q_norm, layer.k_norm)]
        past = self.past[2 * index : 2 * index + 2]
        rope = [] if layer.rope is None else self.ropes[layer.rope]
        attended = self.op(
            ATTENTION,
            [*inputs, *past, self.seqlens, self.total, *rope],
            name,
            f"present.{index}.key",
            f"present.{index}.value",
            num_heads=self.decoder.heads,
            kv_num_heads=self.decoder.kv_heads,
            scale=layer.scale,
            do_rotary=int(layer.rope is not None),
            local_window_size=layer.window or -1,
        )
        for present in self.nodes[-1].outputs[1:]:
            self.output(present, self.decoder.kv_heads, "total_sequence_length", self.decoder.head_dim)
        return self.linear(layer.attention_output, attended)

    def normed_heads(
        self, name: str, packed: ir.Value | None, q_norm: Norm, k_norm: Norm
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Split the packed product and norm every head of q and k over its own dimensions."""
        head_dim = self.decoder.head_dim
        q_width, kv_width = self.decoder.heads * head_dim, self.decoder.kv_heads * head_dim
        widths = self.constant("qkv_widths", [q_width, kv_width, kv_width])
        self.op("Split", [packed, widths], *(f"{name}.{part}_proj" for part in "qkv"), axis=-1)
        query, key, value = self.nodes[-1].outputs
        heads, flat = self.constant("to_heads", [0, 0, -1, head_dim]), self.constant("from_heads", [0, 0, -1])
        normed = []
        for part, norm in ((query, q_norm), (key, k_norm)):
            split = Residual(self.op("Reshape", [part, heads], f"{part.name}.heads"))
            normed.append(self.op("Reshape", [self.norm(norm, split)[0], flat], f"{part.name}.normed"))
        return normed[0], normed[1], value

    def mlp(self, layer: Layer, hidden: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        name, widths = layer.down.name.rpartition(".")[0], [len(weight) for weight in layer.up.weights]
        product, bias = self.linear(layer.up, hidden)
        if len(widths) == 1:
            return self.linear(layer.down, self.activation(product, bias, f"{name}.act"))
        product = self.biased(product, bias)
        sizes = self.constant("gate_up_widths", widths)
        self.op("Split", [product, sizes], f"{name}.gate_proj", f"{name}.up_proj", axis=-1)
        gate, up = self.nodes[-1].outputs
        activated = self.activation(gate, None, f"{name}.act")
        return self.linear(layer.down, self.op("Mul", [activated, up], f"{name}.gated"))

    def activation(self, hidden: ir.Value, bias: ir.Value | None, name: str) -> ir.Value:
        activation = self.decoder.activation
        if activation == "FastGelu":  # the one kernel that also adds a bias
            return self.op(activation, [hidden, bias], name)
        hidden = self.biased(hidden, bias)
        if activation == "Silu":
            return self.op("Mul", [hidden, self.op("Sigmoid", [hidden], f"{name}.sigmoid")], name)
        return self.op(activation, [hidden], name, **({"alpha": 1.702} if activation == "QuickGelu" else {}))

    def lm_head(self, hidden: ir.Value) -> None:
        cap, decoder = self.decoder.logit_softcap, self.decoder
        name = "uncapped_logits" if cap else "logits"
        if decoder.lm_head is None:
            logits = self.op("FusedMatMul", [hidden, self.graph.initializers[EMBEDDING]], name, transB=1)
        else:
            weight = self.weight("lm_head.weight", decoder.lm_head.weights[0].t())
            logits = self.op("MatMul", [hidden, weight], name)
        if cap:
            limit = self.constant("logit_softcap", np.array(cap, np.float32))
            bent = self.op("Tanh", [self.op("Div", [logits, limit], "scaled_logits")], "bent_logits")
            logits = self.op("Mul", [bent, limit], "logits")
        self.output(logits, "sequence_length", decoder.vocab_size)
