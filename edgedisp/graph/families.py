"""Reads a Hugging Face model folder into a `Decoder`, whatever its family.

A family differs from the next in few things: names, norms, biases, activation, positions, window, scaling.
This module alone knows those differences; `decoder.py` sees a `Decoder` and writes nodes. The model is opened
by transformers, so old checkpoint names, shards, tied weights and half precision are handled where they are
known best. Rotary tables come from the model's own rotary module, so that every `rope_type` is right.

Left out: mixtures of experts, encoder-decoders, ALiBi, partial rotary positions and vision towers. A folder
of such a family goes to `builder.py` or is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edgedisp import BadInput
from edgedisp.graph.description import Decoder, Layer, Linear, Norm, Rope

DEFAULT_CONTEXT = 8192
"""Positions that a bundle is made for unless asked otherwise: rotary tables and KV buffers grow with it."""

# transformers' activation name -> what the graph computes. All three tanh forms are the same function.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}


def family_of(folder: Path) -> str:
    """The `model_type` of a model folder. BadInput if it is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise BadInput(f"{folder}: not a model folder (config.json is missing)")
    return str(json.loads(path.read_text(encoding="utf-8")).get("model_type", "unknown"))


def read(folder: Path, max_context: int | None = None) -> Decoder:
    """Open the model folder in fp32 and describe it. BadInput for what is not written here."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    reader = READERS.get(family_of(folder))
    if reader is None:
        raise BadInput(f"{folder}: no graph is written for its family; written are: {', '.join(READERS)}")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder}: transformers cannot open this model: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    model, loaded = opened
    if loaded["missing_keys"]:  # transformers makes them up at random and goes on
        missing = ", ".join(sorted(loaded["missing_keys"])[:5])
        raise BadInput(f"{folder}: {len(loaded['missing_keys'])} weights are missing: {missing}")
    return reader(model.eval(), _context(model.config, max_context))


def _context(config: Any, asked: int | None) -> int:
    """Positions of the bundle: the model's own, at most `asked` or 8192; see the loop for two rope types."""
    own = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    for table in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        # These two change their frequencies with the sequence length: one table is right only below that.
        if table.get("rope_type") in ("dynamic", "longrope"):
            own = min(own, int(table.get("original_max_position_embeddings") or own))
    return min(own, asked or DEFAULT_CONTEXT)


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise BadInput(
            f"activation {name!r} has no counterpart in the graph; known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def _rotary(model: Any, context: int, names: list[str] | None) -> dict[str, Rope]:
    """The tables of the model's own rotary module, one for each kind of layer where `names` lists kinds."""
    rotary, like = model.model.rotary_emb, torch.zeros(1, dtype=torch.float32)
    positions = torch.arange(context)[None]
    ropes = {}
    for name in names or ["rope"]:
        with torch.no_grad():
            cos, sin = rotary(like, positions, name) if names else rotary(like, positions)
        half = cos.shape[-1] // 2  # both halves of a row are the same angles
        ropes[name] = (cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
    return ropes


def _linear(name: str, *modules: Any) -> Linear:
    biases = tuple(module.bias for module in modules if module.bias is not None)
    if biases and len(biases) != len(modules):
        raise BadInput(f"{name}: some of its parts have a bias and some have none; that form is not written")
    return Linear(name, tuple(module.weight for module in modules), biases)


def _rms(name: str, module: Any, offset: float = 0.0) -> Norm:
    epsilon = getattr(module, "variance_epsilon", None) or module.eps
    return Norm(name, module.weight + offset if offset else module.weight, float(epsilon))


def _windows(config: Any, context: int) -> list[int | None]:
    """Attention window of each layer in tokens, the current one included; None sees everything."""
    window = getattr(config, "sliding_window", None)
    if window is not None and window >= context:
        window = None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _llama_like(model: Any, context: int, offset: float = 0.0, named_ropes: bool = False) -> Decoder:
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
        activation=_activation(getattr(config, "hidden_activation", None) or config.hidden_act),
        embedding=body.embed_tokens.weight,
        embedding_scale=float(getattr(body.embed_tokens, "embed_scale", 1.0)),
        layers=tuple(
            _llama_layer(f"model.layers.{index}", block, rope, window, offset)
            for index, (block, rope, window) in enumerate(zip(body.layers, ropes, windows))
        ),
        final_norm=_rms("model.norm", body.norm, offset),
        head=_head(model, body.embed_tokens.weight),
        ropes=_rotary(model, context, sorted(set(kinds)) if kinds else None),
        logit_softcap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
    )


def _llama_layer(name: str, block: Any, rope: str, window: int | None, offset: float) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    # Gemma norms around both parts, and what Llama calls post_attention_layernorm has another name there.
    around = hasattr(block, "pre_feedforward_layernorm")
    normed = hasattr(attention, "q_norm")

    def norm(part: str) -> Norm:
        return _rms(f"{name}.{part}", getattr(block, part), offset)

    return Layer(
        attention_norm=norm("input_layernorm"),
        qkv=_linear(f"{name}.attn.qkv_proj", attention.q_proj, attention.k_proj, attention.v_proj),
        attention_output=_linear(f"{name}.attn.o_proj", attention.o_proj),
        mlp_norm=norm("pre_feedforward_layernorm" if around else "post_attention_layernorm"),
        gate=_linear(f"{name}.mlp.gate_proj", mlp.gate_proj),
        up=_linear(f"{name}.mlp.up_proj", mlp.up_proj),
        down=_linear(f"{name}.mlp.down_proj", mlp.down_proj),
        scale=float(attention.scaling),
        window=window,
        rope=rope,
        q_norm=_rms(f"{name}.attn.q_norm", attention.q_norm, offset) if normed else None,
        k_norm=_rms(f"{name}.attn.k_norm", attention.k_norm, offset) if normed else None,
        attention_output_norm=norm("post_attention_layernorm") if around else None,
        mlp_output_norm=norm("post_feedforward_layernorm") if around else None,
    )


def _head(model: Any, embedding: torch.Tensor) -> torch.Tensor | None:
    head = model.lm_head.weight
    return None if head is embedding or head.data_ptr() == embedding.data_ptr() else head


def _gemma3(model: Any, context: int) -> Decoder:
    if getattr(model.config, "use_bidirectional_attention", False):
        raise BadInput(
            "this Gemma 3 attends in both directions (an encoder): it cannot decode with a KV cache"
        )
    return _llama_like(model, context, offset=1.0, named_ropes=True)


def _gpt2(model: Any, context: int) -> Decoder:
    """GPT-2: learned positions, LayerNorm, biases everywhere, and Conv1D, which stores [in, out]."""
    config, body = model.config, model.transformer

    def linear(name: str, conv: Any) -> Linear:
        return Linear(name, (conv.weight.t(),), (conv.bias,))

    def norm(name: str, module: Any) -> Norm:
        return Norm(name, module.weight, float(module.eps), module.bias)

    layers = tuple(
        Layer(
            attention_norm=norm(f"model.layers.{i}.input_layernorm", block.ln_1),
            qkv=linear(f"model.layers.{i}.attn.qkv_proj", block.attn.c_attn),
            attention_output=linear(f"model.layers.{i}.attn.o_proj", block.attn.c_proj),
            mlp_norm=norm(f"model.layers.{i}.post_attention_layernorm", block.ln_2),
            gate=None,
            up=linear(f"model.layers.{i}.mlp.up_proj", block.mlp.c_fc),
            down=linear(f"model.layers.{i}.mlp.down_proj", block.mlp.c_proj),
            scale=float(block.attn.scaling),
        )
        for i, block in enumerate(body.h)
    )
    return Decoder(
        family=config.model_type,
        hidden=config.n_embd,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=config.n_embd // config.n_head,
        vocab_size=len(body.wte.weight),
        context=context,
        activation=_activation(config.activation_function),
        embedding=body.wte.weight,
        positions=body.wpe.weight[:context],
        layers=layers,
        final_norm=norm("model.norm", body.ln_f),
        head=_head(model, body.wte.weight),
    )


READERS: dict[str, Callable[[Any, int], Decoder]] = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "qwen3": _llama_like,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
}
