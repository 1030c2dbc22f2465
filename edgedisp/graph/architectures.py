"""Reads a torch model into a `Decoder` (decoder_graph.py), whatever its architecture.

Architectures differ in names, norms, biases, activation, positions, window and scaling. Rotary tables come
from the model's rotary module, so every `rope_type` is right. Weights are views of the torch model, not
copies.

Left out: mixtures of experts, encoder-decoders, ALiBi, vision towers, and OPT-350M (norms after each part, an
embedding narrower than its layers).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from edgedisp.core.errors import BadInput
from edgedisp.graph.decoder_graph import Decoder, Layer, Linear, Norm, Rope

DEFAULT_CONTEXT = 8192
"""Default for the most positions of a bundle: rotary tables and KV buffers grow with it."""

# transformers' activation name -> what the graph computes. All three tanh forms are the same function.
ACTIVATIONS = {
    **{name: name for name in ("silu", "gelu", "quick_gelu", "relu")},
    **dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh"),
    "swish": "silu",
}


def read_decoder(model: Any, max_context: int | None = None) -> Decoder:
    """The decoder that a torch model of an architecture in READERS computes; weights are views.

    BadInput for a form of the architecture that the graph writer does not cover.
    """
    decoder = READERS[model.config.model_type](model, _context(model.config, max_context))
    if decoder.ropes and decoder.head_dim % 16:
        raise BadInput(
            f"heads of {decoder.head_dim} dimensions with rotary positions: "
            "onnxruntime's fused attention takes multiples of 16 alone"
        )
    return decoder


def _context(config: Any, max_context: int | None) -> int:
    """Positions of the bundle: the model's own, at most `max_context` or 8192."""
    positions = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    for table in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        # These two change their frequencies with the sequence length: one table is right only below that.
        if table.get("rope_type") in ("dynamic", "longrope"):
            positions = min(positions, int(table.get("original_max_position_embeddings") or positions))
    return min(positions, max_context or DEFAULT_CONTEXT)


# ---------------------------------------------------------------- parts that every reader needs


def _activation(config: Any) -> str:
    fields = ("activation_function", "hidden_activation", "hidden_act")  # Gemma has both of the last two
    name = next(value for field in fields if (value := getattr(config, field, None)))
    if name not in ACTIVATIONS:
        raise BadInput(
            f"activation {name!r} has no counterpart in the graph; known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _rotary(module: Any, context: int, layer_types: list[str] | None = None) -> dict[str, Rope]:
    """Tables of the model's rotary module: one under "rope", or one for each of `layer_types`."""
    like, positions = torch.zeros(1, dtype=torch.float32), torch.arange(context)[None]
    ropes = {}
    for name in layer_types or ["rope"]:
        with torch.no_grad():
            cos, sin = module(like, positions, name) if layer_types else module(like, positions)
        half = cos.shape[-1] // 2  # both halves of a row are the same angles
        ropes[name] = (cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
    return ropes


def _linear(name: str, *modules: Any) -> Linear:
    """Torch's linear maps as one product. BadInput if only some of them have a bias."""
    biases = tuple(module.bias for module in modules if module.bias is not None)
    if biases and len(biases) != len(modules):
        raise BadInput(f"{name}: some of its parts have a bias and some have none; that form is not written")
    # Conv1D (GPT-2, with the attribute nf) stores [in, out].
    weights = (module.weight.t() if hasattr(module, "nf") else module.weight for module in modules)
    return Linear(name, tuple(weights), biases)


def _rms_norm(name: str, module: Any, offset: float = 0.0) -> Norm:
    """RMSNorm; `offset` is what the architecture adds to the stored weight (Gemma: 1)."""
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    return Norm(name, module.weight + offset if offset else module.weight, float(epsilon))


def _layer_norm(name: str, module: Any) -> Norm:
    """LayerNorm; one without parameters multiplies by 1 and adds 0."""
    width = module.normalized_shape
    weight = torch.ones(width) if module.weight is None else module.weight
    bias = torch.zeros(width) if module.bias is None else module.bias
    return Norm(name, weight, float(module.eps), bias)


def _decoder(model: Any, context: int, embedding: torch.Tensor, **fields: Any) -> Decoder:
    """A Decoder of `fields` and those that are read alike in every architecture."""
    config, lm_head = model.config, model.lm_head.weight
    heads = config.num_attention_heads
    common = {
        "architecture": config.model_type,
        "hidden": config.hidden_size,
        "heads": heads,
        "kv_heads": heads,
        "head_dim": config.hidden_size // heads,
        "vocab_size": len(embedding),
        "context": context,
        "activation": _activation(config),
        "embedding": embedding,
        "lm_head": None if lm_head.data_ptr() == embedding.data_ptr() else lm_head,
    }
    return Decoder(**{**common, **fields})


# ---------------------------------------------------------------- RMSNorm, rotary positions, a gated MLP


def _llama_like(model: Any, context: int) -> Decoder:
    """Llama, Mistral, Qwen2, Qwen3 and Gemma 3: one shape, parts present or not."""
    config, body = model.config, model.model
    is_gemma = config.model_type == "gemma3_text"
    if is_gemma and getattr(config, "use_bidirectional_attention", False):
        raise BadInput(
            "this Gemma 3 attends in both directions (an encoder): it cannot decode with a KV cache"
        )
    layer_types = list(config.layer_types) if is_gemma else None
    ropes = layer_types or ["rope"] * len(body.layers)
    offset = 1.0 if is_gemma else 0.0
    return _decoder(
        model,
        context,
        body.embed_tokens.weight,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        embedding_scale=float(getattr(body.embed_tokens, "embed_scale", 1.0)),
        layers=tuple(
            _llama_layer(f"model.layers.{index}", block, rope, window, offset)
            for index, (block, rope, window) in enumerate(zip(body.layers, ropes, _windows(config, context)))
        ),
        final_norm=_rms_norm("model.norm", body.norm, offset),
        ropes=_rotary(body.rotary_emb, context, sorted(set(layer_types)) if layer_types else None),
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def _llama_layer(name: str, block: Any, rope: str, window: int | None, offset: float) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    # Gemma norms around both parts, and what Llama calls post_attention_layernorm has another name there.
    norms_around = hasattr(block, "pre_feedforward_layernorm")
    norms_heads = hasattr(attention, "q_norm")

    def norm(part: str) -> Norm:
        return _rms_norm(f"{name}.{part}", getattr(block, part), offset)

    return Layer(
        attention_norm=norm("input_layernorm"),
        qkv=_linear(f"{name}.attn.qkv_proj", attention.q_proj, attention.k_proj, attention.v_proj),
        attention_output=_linear(f"{name}.attn.o_proj", attention.o_proj),
        mlp_norm=norm("pre_feedforward_layernorm" if norms_around else "post_attention_layernorm"),
        up=_linear(f"{name}.mlp.gate_up_proj", mlp.gate_proj, mlp.up_proj),
        down=_linear(f"{name}.mlp.down_proj", mlp.down_proj),
        scale=float(attention.scaling),
        window=window,
        rope=rope,
        q_norm=_rms_norm(f"{name}.attn.q_norm", attention.q_norm, offset) if norms_heads else None,
        k_norm=_rms_norm(f"{name}.attn.k_norm", attention.k_norm, offset) if norms_heads else None,
        attention_output_norm=norm("post_attention_layernorm") if norms_around else None,
        mlp_output_norm=norm("post_feedforward_layernorm") if norms_around else None,
        is_gated=True,
    )


def _windows(config: Any, context: int) -> list[int | None]:
    """Attention window of each layer in tokens, the current one included; None sees everything."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= context:
        return [None] * config.num_hidden_layers
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if layer_type == "sliding_attention" else None for layer_type in layer_types]


# ---------------------------------------------------------------- LayerNorm, biases, an MLP without a gate


def _plain_layer(
    index: int, norms: Sequence[Any], linears: Sequence[Sequence[Any]], scale: float, **options: Any
) -> Layer:
    """`norms`: before attention and MLP; `linears`: the modules of qkv, attention output, up and down."""
    name = f"model.layers.{index}"
    parts = ("attn.qkv_proj", "attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    qkv, output, up, down = (_linear(f"{name}.{part}", *modules) for part, modules in zip(parts, linears))
    return Layer(
        attention_norm=_layer_norm(f"{name}.input_layernorm", norms[0]),
        qkv=qkv,
        attention_output=output,
        mlp_norm=_layer_norm(f"{name}.post_attention_layernorm", norms[1]),
        up=up,
        down=down,
        scale=float(scale),
        **options,
    )


def _gpt2(model: Any, context: int) -> Decoder:
    """GPT-2: learned positions, one product for q, k and v."""
    body, layers = model.transformer, []
    for index, block in enumerate(body.h):
        attention, mlp = block.attn, block.mlp
        linears = [[attention.c_attn], [attention.c_proj], [mlp.c_fc], [mlp.c_proj]]
        layers.append(_plain_layer(index, (block.ln_1, block.ln_2), linears, attention.scaling))
    return _decoder(
        model,
        context,
        body.wte.weight,
        positions=body.wpe.weight[:context],
        layers=tuple(layers),
        final_norm=_layer_norm("model.norm", body.ln_f),
    )


def _opt(model: Any, context: int) -> Decoder:
    """OPT: learned positions, whose table starts with two rows that no token uses."""
    config, body = model.config, model.model.decoder
    if not config.do_layer_norm_before or body.final_layer_norm is None:
        raise BadInput(
            "this OPT norms after each part, or has no final norm (do_layer_norm_before, "
            "_remove_final_layer_norm); that form, which of the released sizes only 350M has, is not written"
        )
    if body.project_in is not None:
        raise BadInput(
            f"this OPT has an embedding of width {config.word_embed_proj_dim} for layers of "
            f"{config.hidden_size} (word_embed_proj_dim); that form is not written"
        )
    layers = []
    for index, block in enumerate(body.layers):
        attention = block.self_attn
        qkv = [attention.q_proj, attention.k_proj, attention.v_proj]
        linears = [qkv, [attention.out_proj], [block.fc1], [block.fc2]]
        norms = (block.self_attn_layer_norm, block.final_layer_norm)
        # torch scales the queries, bias and all: the same product
        layers.append(_plain_layer(index, norms, linears, attention.scaling))
    positions = body.embed_positions
    return _decoder(
        model,
        context,
        body.embed_tokens.weight,
        positions=positions.weight[positions.offset : positions.offset + context],
        layers=tuple(layers),
        final_norm=_layer_norm("model.norm", body.final_layer_norm),
    )


def _gpt_neox(model: Any, context: int) -> Decoder:
    """GPT-NeoX (Pythia): both parts of a layer read its input; q, k and v of one head stand together.

    It rotates only the first part of each head, a quarter in Pythia. The kernel pairs dimension i with i +
    d/2 of the whole head, so the rows of each query and key head are stored in an order in which the
    rotated pairs stand so; the angles of all other pairs are zero. A dot product does not depend on the
    order of its terms, and quantization rounds row by row. The kernel's own partial rotation takes
    multiples of 16 alone (Pythia 2.8B rotates 20 of 80).
    """
    config, body = model.config, model.gpt_neox
    head_dim = config.hidden_size // config.num_attention_heads
    cos, sin = _rotary(body.rotary_emb, context)["rope"]
    order = _rotated_first(head_dim, 2 * cos.shape[1])
    unrotated = len(cos), head_dim // 2 - cos.shape[1]
    ones, zeros = torch.ones(unrotated), torch.zeros(unrotated)
    return _decoder(
        model,
        context,
        body.embed_in.weight,
        layers=tuple(_neox_layer(index, block, order) for index, block in enumerate(body.layers)),
        final_norm=_layer_norm("model.norm", body.final_layer_norm),
        ropes={"rope": (torch.cat([cos, ones], dim=1), torch.cat([sin, zeros], dim=1))},
    )


def _neox_layer(index: int, block: Any, order: torch.Tensor) -> Layer:
    attention, mlp = block.attention, block.mlp
    linears = [[attention.query_key_value], [attention.dense], [mlp.dense_h_to_4h], [mlp.dense_4h_to_h]]
    norms, is_parallel = (block.input_layernorm, block.post_attention_layernorm), block.use_parallel_residual
    layer = _plain_layer(index, norms, linears, attention.scaling, rope="rope", is_parallel=is_parallel)
    rows = torch.arange(len(layer.qkv.weights[0])).view(-1, 3, len(order))  # [heads, (q, k, v), dim]
    q, k, v = rows[:, 0, order], rows[:, 1, order], rows[:, 2]
    layer = replace(layer, qkv=replace(layer.qkv, rows=torch.cat([q.flatten(), k.flatten(), v.flatten()])))
    output, down = layer.attention_output, layer.down
    if is_parallel and output.biases and down.biases:
        # Both are added to the same stream, so one of them can carry the sum.
        down = replace(down, biases=(output.biases[0] + down.biases[0],))
        layer = replace(layer, attention_output=replace(output, biases=()), down=down)
    return layer


def _rotated_first(head_dim: int, rotated: int) -> torch.Tensor:
    """Old dimension of each new one: pairs (i, i + rotated/2) come to stand as (i, i + head_dim/2)."""
    lows, highs = torch.arange(rotated).chunk(2)
    rest = torch.arange(rotated, head_dim).tensor_split(2)
    return torch.cat([lows, rest[0], highs, rest[1]])


READERS: dict[str, Callable[[Any, int], Decoder]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma3_text"), _llama_like),
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
}
