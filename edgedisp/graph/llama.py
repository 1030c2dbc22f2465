"""Reads Llama and what is built like it: RMSNorm, rotary positions, a gated MLP."""

from __future__ import annotations

from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.graph import parts
from edgedisp.graph.description import Decoder, Layer, Norm


def llama_like(model: Any, context: int, offset: float = 0.0, named_ropes: bool = False) -> Decoder:
    """Llama, Mistral, Qwen2, Qwen3 and Gemma 3: one shape, parts present or not. `offset`: Gemma's 1 + w."""
    config, body = model.config, model.model
    kinds = list(config.layer_types) if named_ropes else None
    ropes = kinds or ["rope"] * len(body.layers)
    windows = _windows(config, context)
    return Decoder(
        family=config.model_type,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=len(body.embed_tokens.weight),
        context=context,
        activation=parts.activation(getattr(config, "hidden_activation", None) or config.hidden_act),
        embedding=body.embed_tokens.weight,
        embedding_scale=float(getattr(body.embed_tokens, "embed_scale", 1.0)),
        layers=tuple(
            _llama_layer(f"model.layers.{index}", block, rope, window, offset)
            for index, (block, rope, window) in enumerate(zip(body.layers, ropes, windows))
        ),
        final_norm=parts.rms("model.norm", body.norm, offset),
        head=parts.head(model, body.embed_tokens.weight),
        ropes=parts.rotary(body.rotary_emb, context, sorted(set(kinds)) if kinds else None),
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def _llama_layer(name: str, block: Any, rope: str, window: int | None, offset: float) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    # Gemma norms around both parts, and what Llama calls post_attention_layernorm has another name there.
    around = hasattr(block, "pre_feedforward_layernorm")
    normed = hasattr(attention, "q_norm")

    def norm(part: str) -> Norm:
        return parts.rms(f"{name}.{part}", getattr(block, part), offset)

    return Layer(
        attention_norm=norm("input_layernorm"),
        qkv=parts.linear(f"{name}.attn.qkv_proj", attention.q_proj, attention.k_proj, attention.v_proj),
        attention_output=parts.linear(f"{name}.attn.o_proj", attention.o_proj),
        mlp_norm=norm("pre_feedforward_layernorm" if around else "post_attention_layernorm"),
        up=parts.linear(f"{name}.mlp.gate_up_proj", mlp.gate_proj, mlp.up_proj),
        down=parts.linear(f"{name}.mlp.down_proj", mlp.down_proj),
        scale=float(attention.scaling),
        is_gated=True,
        window=window,
        rope=rope,
        q_norm=parts.rms(f"{name}.attn.q_norm", attention.q_norm, offset) if normed else None,
        k_norm=parts.rms(f"{name}.attn.k_norm", attention.k_norm, offset) if normed else None,
        attention_output_norm=norm("post_attention_layernorm") if around else None,
        mlp_output_norm=norm("post_feedforward_layernorm") if around else None,
    )


def _windows(config: Any, context: int) -> list[int | None]:
    """Attention window of each layer in tokens, the current one included; None sees everything."""
    window = getattr(config, "sliding_window", None)
    if window is not None and window >= context:
        window = None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def gemma3(model: Any, context: int) -> Decoder:
    if getattr(model.config, "use_bidirectional_attention", False):
        raise BadInput(
            "this Gemma 3 attends in both directions (an encoder): it cannot decode with a KV cache"
        )
    return llama_like(model, context, offset=1.0, named_ropes=True)
