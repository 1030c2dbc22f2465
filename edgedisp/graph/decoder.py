"""Writes the ONNX graph of a decoder with KV cache out of ONNX Runtime's fused operators.

The interface is the one of onnxruntime-genai's builder, so genai, transformers.js and optimum open it:
inputs `input_ids`, `attention_mask` [batch, total tokens] and `past_key_values.N.key/value` [batch, kv heads,
past, head_dim]; outputs `logits` [batch, tokens, vocab] and `present.N.key/value`. The head dimension is a
number, not a symbol (transformers.js turns unknown symbols into 0). Positions come from the mask, so there is
no `position_ids` input, and right-padded prefill and cached decode are both right.

Choices that were measured (SmolLM2-135M, 2 cores): see docs in the room's tests and `_head`.
Weights go straight to `model.onnx.data`, one tensor in memory at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.external_data_helper import save_external_data, set_external_data

from edgedisp import Progress, silent
from edgedisp.graph.families import Decoder, Layer, Linear, Norm

import os
OPT = dict(kv.split("=") for kv in os.environ.get("OPT", "").split(",") if kv)
GRAPH, DATA = "model.onnx", "model.onnx.data"
OPSET, IR_VERSION = 21, 10
MICROSOFT = "com.microsoft"
INLINE_BYTES = 1024  # smaller tensors stay in the graph file
PAGE = 4096  # offsets of the others, so that a runtime can map them


class GraphWriter:
    def __init__(self, folder: Path) -> None:
        self.folder, self.nodes, self.weights, self.size = folder, [], [], 0

    def op(self, kind, inputs, output, domain="", **attributes):
        outputs = [output] if isinstance(output, str) else output
        self.nodes.append(helper.make_node(kind, inputs, outputs, name=outputs[0], domain=domain, **attributes))
        return outputs[0]

    def weight(self, name, array):
        tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        if len(tensor.raw_data) > INLINE_BYTES:
            offset = -(-self.size // PAGE) * PAGE
            self.size = offset + len(tensor.raw_data)
            set_external_data(tensor, DATA, offset)
            save_external_data(tensor, str(self.folder))
            tensor.ClearField("raw_data")
        self.weights.append(tensor)
        return name


def write(decoder: Decoder, folder: Path, progress: Progress = silent) -> None:
    graph = GraphWriter(folder)
    _shared(graph, decoder)
    x = _embedding(graph, decoder)
    states = None
    for index, layer in enumerate(decoder.layers):
        progress(index, len(decoder.layers), "writing layers")
        x = _block(graph, decoder, layer, index, x)
    hidden = _normed(graph, decoder.final_norm, x, last=True)[0]
    _head(graph, decoder, hidden)
    _save(graph, decoder)


def _shared(graph, decoder):
    graph.weight("one", np.array([1], np.int64)); graph.weight("index_one", np.array(1, np.int64))
    graph.op("ReduceSum", ["attention_mask", "one"], "mask_sum", keepdims=0)
    graph.op("Sub", ["mask_sum", "one"], "last_position")
    graph.op("Cast", ["last_position"], "seqlens_k", to=TensorProto.INT32)
    graph.op("Shape", ["attention_mask"], "mask_shape")
    graph.op("Gather", ["mask_shape", "index_one"], "total_tokens", axis=0)
    graph.op("Cast", ["total_tokens"], "total_sequence_length", to=TensorProto.INT32)
    for name, (cos, sin) in (decoder.ropes or {}).items():
        graph.weight(f"{name}.cos_cache", cos.numpy()); graph.weight(f"{name}.sin_cache", sin.numpy())


EMB = "model.embed_tokens.weight"


def _embedding(graph, decoder):
    if not (decoder.head is None and OPT.get("head") == "transpose"):
        graph.weight(EMB, _n(decoder.embedding))
        graph.op("Gather", [EMB, "input_ids"], "model.embed_tokens")
    else:
        graph.weight(EMB + "T", _n(decoder.embedding.t()))
        graph.op("Transpose", [EMB + "T"], "embT", perm=[1, 0])
        graph.op("Gather", ["embT", "input_ids"], "model.embed_tokens")
    x = "model.embed_tokens"
    if decoder.embedding_scale != 1.0:
        graph.weight("embedding_scale", np.array([decoder.embedding_scale], np.float32))
        x = graph.op("Mul", [x, "embedding_scale"], "model.embed_tokens.scaled")
    if decoder.positions is not None:
        graph.weight("wpe", _n(decoder.positions))
        graph.weight("zero", np.array(0, np.int64)); graph.weight("zero1", np.array([0], np.int64))
        graph.op("Shape", ["input_ids"], "ids_shape")
        graph.op("Gather", ["ids_shape", "index_one"], "tokens", axis=0)
        graph.op("Sub", ["mask_sum", "tokens"], "pp"); graph.op("Max", ["pp", "zero"], "past")
        graph.op("Unsqueeze", ["past", "one"], "past_column")
        graph.op("Range", ["zero", "tokens", "index_one"], "steps")
        graph.op("Add", ["past_column", "steps"], "position_ids")
        graph.op("Gather", ["wpe", "position_ids"], "model.embed_positions")
        return (x, "model.embed_positions", None)
    return (x, None, None)


def _n(t):
    return t.detach().numpy()


def _normed(graph, norm: Norm, x, last=False):
    """x = (stream, pending, bias) -> (normed, new stream)"""
    stream, pending, bias = x
    graph.weight(norm.name + ".weight", _n(norm.weight))
    params = [norm.name + ".weight"]
    rms = norm.bias is None
    if not rms:
        params.append(graph.weight(norm.name + ".bias", _n(norm.bias)))
    if pending is None:
        kind = "SimplifiedLayerNormalization" if rms else "LayerNormalization"
        extra = dict(stash_type=1) if rms else {}
        return graph.op(kind, [stream, *params], norm.name, epsilon=norm.epsilon, axis=-1, **extra), stream
    kind = "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization"
    total = norm.name + ".stream"
    outputs = [norm.name] if last else [norm.name, "", "", total]
    graph.op(kind, [stream, pending, *params, *([bias] if bias else [])], outputs, MICROSOFT, epsilon=norm.epsilon)
    return norm.name, total


def _linear(graph, linear, x):
    w = torch.cat(linear.weights) if len(linear.weights) > 1 else linear.weights[0]
    graph.weight(linear.name + ".weight", _n(w.t()))
    return graph.op("MatMul", [x, linear.name + ".weight"], linear.name)


def _bias(graph, linear):
    if not linear.biases: return None
    return graph.weight(linear.name + ".bias", _n(torch.cat(linear.biases)))


def _block(graph, decoder, layer: Layer, index, x):
    normed, stream = _normed(graph, layer.attention_norm, x)
    out, bias = _attention(graph, decoder, layer, index, normed)
    if layer.attention_output_norm:
        out, bias = _normed(graph, layer.attention_output_norm, (out, None, None))[0], None
    normed, stream = _normed(graph, layer.mlp_norm, (stream, out, bias))
    out, bias = _mlp(graph, decoder, layer, normed)
    if layer.mlp_output_norm:
        out, bias = _normed(graph, layer.mlp_output_norm, (out, None, None))[0], None
    return (stream, out, bias)


def _attention(graph, decoder, layer, index, normed):
    name = f"model.layers.{index}.attn"
    qkv = _linear(graph, layer.qkv, normed)
    b = _bias(graph, layer.qkv)
    if b:
        qkv = graph.op("Add", [qkv, b], layer.qkv.name + ".biased")
    q, k, v = qkv, "", ""
    tail = []
    if layer.q_norm:
        if OPT.get("qknorm") == "fused":
            graph.weight(layer.q_norm.name + ".weight", _n(layer.q_norm.weight))
            graph.weight(layer.k_norm.name + ".weight", _n(layer.k_norm.weight))
            tail = ["", "", "", "", "", layer.q_norm.name + ".weight", layer.k_norm.name + ".weight"]
        else:
            h, kv, d = decoder.heads, decoder.kv_heads, decoder.head_dim
            if "split" not in [w.name for w in graph.weights]:
                graph.weight("split", np.array([h * d, kv * d, kv * d], np.int64))
                graph.weight("to_heads", np.array([0, 0, -1, d], np.int64))
                graph.weight("from_heads", np.array([0, 0, -1], np.int64))
            graph.op("Split", [qkv, "split"], [f"{name}.q", f"{name}.k", f"{name}.v"], axis=-1)
            q, k, v = [f"{name}.{p}" for p in "qkv"]
            res = []
            for part, norm, dim in ((q, layer.q_norm, h), (k, layer.k_norm, kv)):
                graph.op("Reshape", [part, "to_heads"], norm.name + ".heads")
                graph.weight(norm.name + ".weight", _n(norm.weight))
                graph.op("SimplifiedLayerNormalization", [norm.name + ".heads", norm.name + ".weight"], norm.name + ".normed", epsilon=norm.epsilon, axis=-1, stash_type=1)
                res.append(graph.op("Reshape", [norm.name + ".normed", "from_heads"], norm.name))
            q, k = res
    rope = [f"{layer.rope}.cos_cache", f"{layer.rope}.sin_cache"] if layer.rope else ["", ""]
    inputs = [q, k, v, f"past_key_values.{index}.key", f"past_key_values.{index}.value", "seqlens_k", "total_sequence_length", *rope, *tail]
    while inputs[-1] == "": inputs.pop()
    attrs = {}
    if decoder.attention_softcap: attrs["softcap"] = decoder.attention_softcap
    if tail: attrs["qk_norm_epsilon"] = layer.q_norm.epsilon
    graph.op("GroupQueryAttention", inputs, [name, f"present.{index}.key", f"present.{index}.value"], MICROSOFT,
             num_heads=decoder.heads, kv_num_heads=decoder.kv_heads, scale=layer.scale, local_window_size=(layer.window if layer.window else -1),
             do_rotary=int(layer.rope is not None), rotary_interleaved=0, **attrs)
    return _linear(graph, layer.attention_output, name), _bias(graph, layer.attention_output)


def _act(graph, decoder, x, bias, out):
    a = decoder.activation
    if a == "gelu_tanh":
        return graph.op("FastGelu", [x, bias] if bias else [x], out, MICROSOFT)
    if bias:
        x = graph.op("Add", [x, bias], out + ".biased")
    if a == "silu":
        if OPT.get("silu") == "quick":
            return graph.op("QuickGelu", [x], out, MICROSOFT, alpha=1.0)
        graph.op("Sigmoid", [x], out + ".sigmoid")
        return graph.op("Mul", [x, out + ".sigmoid"], out)
    if a == "gelu": return graph.op("Gelu", [x], out, MICROSOFT)
    if a == "quick_gelu": return graph.op("QuickGelu", [x], out, MICROSOFT, alpha=1.702)
    return graph.op("Relu", [x], out)


def _mlp(graph, decoder, layer, normed):
    name = layer.down.name.rsplit(".", 1)[0]
    if layer.gate is None:
        up = _linear(graph, layer.up, normed)
        hidden = _act(graph, decoder, up, _bias(graph, layer.up), name + ".act")
    elif OPT.get("gateup") == "packed":
        both = Linear(name + ".gate_up_proj", layer.gate.weights + layer.up.weights)
        y = _linear(graph, both, normed)
        graph.op("Split", [y], [name + ".gate", name + ".up"], axis=-1, num_outputs=2)
        g = _act(graph, decoder, name + ".gate", None, name + ".act")
        hidden = graph.op("Mul", [g, name + ".up"], name + ".gated")
    else:
        g = _linear(graph, layer.gate, normed)
        g = _act(graph, decoder, g, _bias(graph, layer.gate), name + ".act")
        up = _linear(graph, layer.up, normed)
        b = _bias(graph, layer.up)
        if b: up = graph.op("Add", [up, b], layer.up.name + ".biased")
        hidden = graph.op("Mul", [g, up], name + ".gated")
    return _linear(graph, layer.down, hidden), _bias(graph, layer.down)


def _head(graph, decoder, hidden):
    out = "logits" if not decoder.logit_softcap else "raw"
    form = OPT.get("head", "fused")
    if decoder.head is not None:
        graph.weight("lm_head.weight", _n(decoder.head.t()))
        graph.op("MatMul", [hidden, "lm_head.weight"], out)
    elif form == "fused":
        graph.op("FusedMatMul", [hidden, EMB], out, MICROSOFT, transB=1)
    elif form == "transpose":
        graph.op("MatMul", [hidden, EMB + "T"], out)
    elif form == "tmatmul":
        graph.op("Transpose", [EMB], "embT", perm=[1, 0])
        graph.op("MatMul", [hidden, "embT"], out)
    elif form == "gemm":
        graph.weight("flat", np.array([-1, decoder.hidden], np.int64))
        graph.op("Reshape", [hidden, "flat"], "hidden2d")
        graph.op("Gemm", ["hidden2d", EMB], "logits2d", transB=1)
        graph.op("Shape", ["input_ids"], "ids_shape_head"); graph.weight("vocab", np.array([decoder.vocab_size], np.int64))
        graph.op("Concat", ["ids_shape_head", "vocab"], "logits_shape", axis=0)
        graph.op("Reshape", ["logits2d", "logits_shape"], out)
    if decoder.logit_softcap:
        graph.weight("cap", np.array([decoder.logit_softcap], np.float32))
        graph.op("Div", [out, "cap"], "capd"); graph.op("Tanh", ["capd"], "capt"); graph.op("Mul", ["capt", "cap"], "logits")


def _save(graph, decoder):
    info = helper.make_tensor_value_info
    F, I = TensorProto.FLOAT, TensorProto.INT64
    kv = lambda prefix, length: [info(f"{prefix}.{i}.{part}", F, ["batch_size", decoder.kv_heads, length, decoder.head_dim]) for i in range(len(decoder.layers)) for part in ("key", "value")]
    inputs = [info("input_ids", I, ["batch_size", "sequence_length"]), info("attention_mask", I, ["batch_size", "total_sequence_length"]), *kv("past_key_values", "past_sequence_length")]
    outputs = [info("logits", F, ["batch_size", "sequence_length", decoder.vocab_size]), *kv("present", "total_sequence_length")]
    g = helper.make_graph(graph.nodes, "decoder", inputs, outputs, graph.weights)
    model = helper.make_model(g, opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)], ir_version=IR_VERSION, producer_name="edgedisp")
    (graph.folder / GRAPH).write_bytes(model.SerializeToString())
