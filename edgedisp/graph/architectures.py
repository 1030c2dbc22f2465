"""Reads a torch model into a `Decoder` (decoder_graph.py) by a table of where an architecture has its parts,
and says what can be exported at all: by decoder_graph.py, or by onnxruntime-genai's builder.

Norms, biases, positions, window and scaling are read from the modules and the configuration. Rotary tables
come from the model's rotary module, so every `rope_type` is right. Weights are views of the torch model.

Left out: mixtures of experts, encoder-decoders, ALiBi, vision towers, and OPT-350M (norms after each part, an
embedding narrower than its layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from edgedisp.core.errors import BadInput
from edgedisp.graph.decoder_graph import Decoder, Layer, Linear, Norm, Rope

DEFAULT_CONTEXT = 8192
"""Default for the most positions of a bundle: rotary tables and KV buffers grow with it."""

# transformers' activation name -> the operator. All three tanh forms are the same function.
ACTIVATIONS = {
    **dict.fromkeys(("silu", "swish"), "Silu"),
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "FastGelu"),
    "gelu": "Gelu",
    "quick_gelu": "QuickGelu",
    "relu": "Relu",
}
# Architectures whose graph by the builder was compared with torch on a tiny random model (builder 0.18,
# transformers 5.23): the logits are equal to 1e-4, phi's to 2e-3. Not among them: olmo (off by 4), nemotron
# (1e-2), gemma2 (its cache holds the window alone, which only genai handles).
BUILDER_ARCHITECTURES = ("ernie4_5", "gemma", "granite", "phi", "phi3", "smollm3")
BUILDER_ROPES = ("default", "linear", "longrope")

NORM_NAMES = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Family:
    """Paths of an architecture's modules: from the model, its body or, for parts of a layer, the layer."""

    body: str = "model"
    embedding: str = "embed_tokens"
    positions: str | None = None  # learned ones
    layers: str = "layers"
    final_norm: str = "norm"
    attention: str = "self_attn"
    norms: tuple[str, str] = NORM_NAMES  # before attention and MLP
    output_norms: tuple[str, str] | None = None  # of what they add
    norm_offset: float = 0.0  # that the model adds to the weights of its norms
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    attention_output: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"


# fmt: off
LLAMA = Family()
ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA),
    "gemma3_text": Family(
        norms=("input_layernorm", "pre_feedforward_layernorm"), norm_offset=1.0,
        output_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
    "gpt2": Family(
        body="transformer", embedding="wte", positions="wpe", layers="h", final_norm="ln_f",
        attention="attn", norms=("ln_1", "ln_2"), qkv=("attn.c_attn",), attention_output="attn.c_proj",
        up=("mlp.c_fc",), down="mlp.c_proj",
    ),
    "opt": Family(
        body="model.decoder", positions="embed_positions", final_norm="final_layer_norm",
        norms=("self_attn_layer_norm", "final_layer_norm"), attention_output="self_attn.out_proj",
        up=("fc1",), down="fc2",
    ),
    "gpt_neox": Family(
        body="gpt_neox", embedding="embed_in", final_norm="final_layer_norm", attention="attention",
        qkv=("attention.query_key_value",), attention_output="attention.dense",
        up=("mlp.dense_h_to_4h",), down="mlp.dense_4h_to_h",
    ),
}
# fmt: on


def check_export(model: Any, max_context: int | None = None) -> Decoder | None:
    """The decoder of a model, None where the builder reads its folder; BadInput for what cannot be exported.

    A model without weights is enough (`models.empty_model`).
    """
    config, known = model.config, (*ARCHITECTURES, *BUILDER_ARCHITECTURES)
    try:
        if config.model_type in ARCHITECTURES:
            return read_decoder(model, max_context)
        if config.model_type not in known:
            names = ", ".join(sorted(known))
            raise BadInput(f"models of type {config.model_type!r} cannot be exported; known types: {names}")
        _check_form(config)
    except BadInput as problem:
        raise BadInput(f"{config.name_or_path or 'the model'}: {problem}") from None
    return None


def read_decoder(model: Any, max_context: int | None = None) -> Decoder:
    """The decoder that a torch model of one of ARCHITECTURES computes; weights are views.

    BadInput for a form of the architecture that the graph writer does not cover.
    """
    config, heads = model.config, model.config.num_attention_heads
    head_dim = _check_form(config)
    family, context = ARCHITECTURES[config.model_type], _context(config, max_context)
    body = model.get_submodule(family.body)
    embedding = _linear(model, "model.embed_tokens", f"{family.body}.{family.embedding}")
    lm_head = _linear(model, "lm_head", "lm_head")
    layer_types = list(config.layer_types) if config.model_type == "gemma3_text" else None
    ropes = _rotary(body.rotary_emb, context, layer_types) if hasattr(body, "rotary_emb") else {}
    blocks = body.get_submodule(family.layers)
    names = layer_types or [next(iter(ropes), None)] * len(blocks)
    layers = [
        replace(_layer(model, family, index), rope=rope, window=window)
        for index, (rope, window) in enumerate(zip(names, _windows(config, context)))
    ]
    qkv_heads = sum(map(len, layers[0].qkv.weights)) // head_dim
    positions = None
    if family.positions is not None:
        table = body.get_submodule(family.positions)
        first = getattr(table, "offset", 0)  # OPT's table starts with two rows that no token uses
        positions = table.weight[first : first + context]
    decoder = Decoder(
        architecture=config.model_type,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=(qkv_heads - heads) // 2,
        head_dim=head_dim,
        context=context,
        activation=ACTIVATIONS[_activation(config)],
        embedding=embedding,
        layers=tuple(layers),
        final_norm=_norm("model.norm", body.get_submodule(family.final_norm), family.norm_offset),
        lm_head=None if model.lm_head.weight.data_ptr() == embedding.weights[0].data_ptr() else lm_head,
        embedding_scale=float(getattr(body.get_submodule(family.embedding), "embed_scale", 1.0)),
        positions=positions,
        ropes=ropes,
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )
    return _neox(decoder, blocks) if config.model_type == "gpt_neox" else decoder


def _check_form(config: Any) -> int:
    """The width of a head. BadInput for what the table does not say, and no graph writer writes."""
    hidden, activation, family = config.hidden_size, _activation(config), ARCHITECTURES.get(config.model_type)
    head_dim = int(getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    width = getattr(config, "word_embed_proj_dim", hidden)
    has_final_norm = not getattr(config, "_remove_final_layer_norm", False)
    norms_before = getattr(config, "do_layer_norm_before", True) and has_final_norm
    multiple = 16 if family is None or family.positions is None else 8  # of GroupQueryAttention
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    for is_written, reason in (
        (not getattr(config, "use_bidirectional_attention", False), "it attends in both directions"),
        (norms_before, "it norms after each part, or has no final norm (of the released OPT only 350M)"),
        (width == hidden, f"it has an embedding of width {width} for layers of {hidden}"),
        (head_dim % multiple == 0, f"heads of {head_dim} dimensions, which are no multiple of {multiple}"),
        (activation in ACTIVATIONS, f"activation {activation!r} has no counterpart in the graph"),
        (family is not None or rope in BUILDER_ROPES, f"rotary positions of type {rope!r}"),
    ):
        if not is_written:
            raise BadInput(f"this {config.model_type} has a form that is not written: {reason}")
    return head_dim


def _context(config: Any, max_context: int | None) -> int:
    """Positions of the bundle: the model's own, at most `max_context` or 8192."""
    positions = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    for table in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        # These two change their frequencies with the sequence length: one table is right only below that.
        if table.get("rope_type") in ("dynamic", "longrope"):
            positions = min(positions, int(table.get("original_max_position_embeddings") or positions))
    return min(positions, max_context or DEFAULT_CONTEXT)


def _activation(config: Any) -> str:
    fields = ("activation_function", "hidden_activation", "hidden_act")  # Gemma has both of the last two
    return str(next(value for field in fields if (value := getattr(config, field, None))))


def _rotary(module: Any, context: int, layer_types: Sequence[str] | None) -> dict[str, Rope]:
    """Tables of the model's rotary module: one under "rope", or one for each of `layer_types`."""
    like, positions = torch.zeros(1, dtype=torch.float32), torch.arange(context)[None]
    ropes = {}
    for name in sorted(set(layer_types or ["rope"])):
        with torch.no_grad():
            cos, sin = module(like, positions, name) if layer_types else module(like, positions)
        half = cos.shape[-1] // 2  # both halves of a row are the same angles
        ropes[name] = (cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
    return ropes


def _windows(config: Any, context: int) -> list[int | None]:
    """Attention window of each layer in tokens, the current one included; None sees everything."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= context:
        return [None] * config.num_hidden_layers
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if layer_type == "sliding_attention" else None for layer_type in layer_types]


def _linear(model: Any, name: str, *paths: str) -> Linear:
    """Torch's linear maps (or the embedding) as one product. BadInput if only some of them have a bias."""
    modules = [model.get_submodule(path) for path in paths]
    biases = tuple(module.bias for module in modules if getattr(module, "bias", None) is not None)
    if biases and len(biases) != len(modules):
        raise BadInput(f"{name}: some of its parts have a bias and some have none; that form is not written")
    is_conv1d = isinstance(modules[0], Conv1D)
    weights = tuple(module.weight.t() if is_conv1d else module.weight for module in modules)
    return Linear(name, tuple(f"{path}.weight" for path in paths), weights, biases, is_conv1d)


def _norm(name: str, module: Any, offset: float) -> Norm:
    """LayerNorm, one without parameters multiplies by 1 and adds 0; else RMSNorm."""
    if not isinstance(module, nn.LayerNorm):
        epsilon = getattr(module, "variance_epsilon", None) or module.eps
        return Norm(name, module.weight + offset if offset else module.weight, float(epsilon))
    weight = torch.ones(module.normalized_shape) if module.weight is None else module.weight
    bias = torch.zeros(module.normalized_shape) if module.bias is None else module.bias
    return Norm(name, weight, float(module.eps), bias)


def _layer(model: Any, family: Family, index: int) -> Layer:
    path, name = f"{family.body}.{family.layers}.{index}", f"model.layers.{index}"
    block = model.get_submodule(path)
    attention = block.get_submodule(family.attention)

    def norm(part: str, module: str) -> Norm:
        return _norm(f"{name}.{part}", block.get_submodule(module), family.norm_offset)

    def linear(part: str, *modules: str) -> Linear:
        return _linear(model, f"{name}.{part}", *(f"{path}.{module}" for module in modules))

    outer, before = family.output_norms, family.norms
    names = NORM_NAMES if outer is None else before
    has_head_norms = hasattr(attention, "q_norm")
    return Layer(
        attention_norm=norm(names[0], before[0]),
        qkv=linear("attn.qkv_proj", *family.qkv),
        attention_output=linear("attn.o_proj", family.attention_output),
        mlp_norm=norm(names[1], before[1]),
        up=linear("mlp.up_proj" if len(family.up) == 1 else "mlp.gate_up_proj", *family.up),
        down=linear("mlp.down_proj", family.down),
        scale=float(attention.scaling),
        q_norm=norm("attn.q_norm", f"{family.attention}.q_norm") if has_head_norms else None,
        k_norm=norm("attn.k_norm", f"{family.attention}.k_norm") if has_head_norms else None,
        attention_output_norm=None if outer is None else norm(outer[0], outer[0]),
        mlp_output_norm=None if outer is None else norm(outer[1], outer[1]),
    )


def _neox(decoder: Decoder, blocks: Sequence[Any]) -> Decoder:
    """GPT-NeoX (Pythia): both parts of a layer read its input; q, k and v of one head stand together.

    It rotates only the first part of each head, a quarter in Pythia. The kernel pairs dimension i with i +
    d/2 of the whole head, so the rows of each query and key head are stored in an order in which the
    rotated pairs stand so; the angles of all other pairs are zero. A dot product does not depend on the
    order of its terms, and quantization rounds row by row. The kernel's own partial rotation takes
    multiples of 16 alone (Pythia 2.8B rotates 20 of 80).
    """
    head_dim, (cos, sin) = decoder.head_dim, decoder.ropes["rope"]
    rotated = 2 * cos.shape[1]
    lows, highs = torch.arange(rotated).chunk(2)
    rest = torch.arange(rotated, head_dim).tensor_split(2)
    order = torch.cat([lows, rest[0], highs, rest[1]])  # old dimension of each new one
    unrotated = len(cos), head_dim // 2 - cos.shape[1]
    rope = (torch.cat([cos, torch.ones(unrotated)], 1), torch.cat([sin, torch.zeros(unrotated)], 1))
    rows = torch.arange(3 * decoder.hidden).view(-1, 3, head_dim)  # [heads, (q, k, v), dim]
    qkv_rows = torch.cat([part.flatten() for part in (rows[:, 0, order], rows[:, 1, order], rows[:, 2])])
    layers = []
    for layer, block in zip(decoder.layers, blocks):
        layer = replace(
            layer, qkv=replace(layer.qkv, rows=qkv_rows), is_parallel=bool(block.use_parallel_residual)
        )
        output, down = layer.attention_output, layer.down
        if layer.is_parallel and output.biases and down.biases:
            # Both are added to the same stream, so one of them can carry the sum.
            down = replace(down, biases=(output.biases[0] + down.biases[0],))
            layer = replace(layer, attention_output=replace(output, biases=()), down=down)
        layers.append(layer)
    return replace(decoder, layers=tuple(layers), ropes={"rope": rope})
