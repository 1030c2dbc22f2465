"""Reads the GPT kind: LayerNorm and biases, an MLP without a gate. GPT-2, OPT and GPT-NeoX (Pythia).

GPT-NeoX rotates only the first part of each head, a quarter in Pythia. The kernel pairs dimension i with
i + d/2 of the whole head, so the dimensions of each query and key head are put into another order, in which
the rotated pairs stand so; the angles of all other pairs are zero. A dot product does not depend on the order
of its terms, and the order is one of rows of the weight, which quantization rounds one by one. The kernel's
own partial rotation was left alone: it takes multiples of 16 alone (Pythia 2.8B rotates 20 of 80).

Left out: OPT-350M, whose norms come after each part and whose embedding is narrower than its layers.
"""

from __future__ import annotations

from typing import Any

import torch

from edgedisp.core.errors import BadInput
from edgedisp.graph import parts
from edgedisp.graph.description import Decoder, Layer, Linear, Rope


def gpt2(model: Any, context: int) -> Decoder:
    """GPT-2: learned positions, one product for q, k and v, and Conv1D, which stores [in, out]."""
    config, body = model.config, model.transformer

    def linear(name: str, conv: Any) -> Linear:
        return Linear(name, (conv.weight.t(),), (conv.bias,))

    layers = tuple(
        Layer(
            attention_norm=parts.layer_norm(f"model.layers.{i}.input_layernorm", block.ln_1),
            qkv=linear(f"model.layers.{i}.attn.qkv_proj", block.attn.c_attn),
            attention_output=linear(f"model.layers.{i}.attn.o_proj", block.attn.c_proj),
            mlp_norm=parts.layer_norm(f"model.layers.{i}.post_attention_layernorm", block.ln_2),
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
        activation=parts.activation(config.activation_function),
        embedding=body.wte.weight,
        positions=body.wpe.weight[:context],
        layers=layers,
        final_norm=parts.layer_norm("model.norm", body.ln_f),
        head=parts.head(model, body.wte.weight),
    )


def opt(model: Any, context: int) -> Decoder:
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
    positions = body.embed_positions
    return Decoder(
        family=config.model_type,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        vocab_size=len(body.embed_tokens.weight),
        context=context,
        activation=parts.activation(config.activation_function),
        embedding=body.embed_tokens.weight,
        positions=positions.weight[positions.offset : positions.offset + context],
        layers=tuple(_opt_layer(f"model.layers.{i}", block) for i, block in enumerate(body.layers)),
        final_norm=parts.layer_norm("model.norm", body.final_layer_norm),
        head=parts.head(model, body.embed_tokens.weight),
    )


def _opt_layer(name: str, block: Any) -> Layer:
    attention = block.self_attn
    return Layer(
        attention_norm=parts.layer_norm(f"{name}.input_layernorm", block.self_attn_layer_norm),
        qkv=parts.linear(f"{name}.attn.qkv_proj", attention.q_proj, attention.k_proj, attention.v_proj),
        attention_output=parts.linear(f"{name}.attn.o_proj", attention.out_proj),
        mlp_norm=parts.layer_norm(f"{name}.post_attention_layernorm", block.final_layer_norm),
        up=parts.linear(f"{name}.mlp.up_proj", block.fc1),
        down=parts.linear(f"{name}.mlp.down_proj", block.fc2),
        scale=float(attention.scaling),  # torch scales the queries, bias and all: the same product
    )


def gpt_neox(model: Any, context: int) -> Decoder:
    """GPT-NeoX: both parts of a layer read its input, and q, k and v of one head stand together."""
    config, body = model.config, model.gpt_neox
    head_dim = config.hidden_size // config.num_attention_heads
    cos, sin = parts.rotary(body.rotary_emb, context)["rope"]
    order = _rotated_first(head_dim, 2 * cos.shape[1])
    return Decoder(
        family=config.model_type,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        vocab_size=len(body.embed_in.weight),
        context=context,
        activation=parts.activation(config.hidden_act),
        embedding=body.embed_in.weight,
        layers=tuple(
            _neox_layer(f"model.layers.{i}", block, config.num_attention_heads, order)
            for i, block in enumerate(body.layers)
        ),
        final_norm=parts.layer_norm("model.norm", body.final_layer_norm),
        head=parts.head(model, body.embed_in.weight),
        ropes={"rope": _whole_head(cos, sin, head_dim // 2)},
    )


def _neox_layer(name: str, block: Any, heads: int, order: torch.Tensor) -> Layer:
    attention, mlp = block.attention, block.mlp
    output = parts.linear(f"{name}.attn.o_proj", attention.dense)
    down = parts.linear(f"{name}.mlp.down_proj", mlp.dense_4h_to_h)
    if block.use_parallel_residual and output.biases and down.biases:
        # Both are added to the same stream, so one of them can carry the sum.
        down = Linear(down.name, down.weights, (output.biases[0] + down.biases[0],))
        output = Linear(output.name, output.weights)
    return Layer(
        attention_norm=parts.layer_norm(f"{name}.input_layernorm", block.input_layernorm),
        qkv=_neox_heads(f"{name}.attn.qkv_proj", attention.query_key_value, heads, order),
        attention_output=output,
        mlp_norm=parts.layer_norm(f"{name}.post_attention_layernorm", block.post_attention_layernorm),
        up=parts.linear(f"{name}.mlp.up_proj", mlp.dense_h_to_4h),
        down=down,
        scale=float(attention.scaling),
        rope="rope",
        is_parallel=block.use_parallel_residual,
    )


def _neox_heads(name: str, joined: Any, heads: int, order: torch.Tensor) -> Linear:
    """Rows [heads, (q, k, v), head_dim] as q, k and v [heads * head_dim], q and k in `order` in each head."""
    by_head = torch.arange(3 * heads * len(order)).view(heads, 3, len(order))
    rows = torch.cat([part.flatten() for part in (by_head[:, 0, order], by_head[:, 1, order], by_head[:, 2])])
    return Linear(name, (joined.weight,), () if joined.bias is None else (joined.bias,), rows)


def _rotated_first(head_dim: int, rotated: int) -> torch.Tensor:
    """Old dimension of each new one: pairs (i, i + rotated/2) come to stand as (i, i + head_dim/2)."""
    lows, highs = torch.arange(rotated).chunk(2)
    rest = torch.arange(rotated, head_dim).tensor_split(2)
    return torch.cat([lows, rest[0], highs, rest[1]])


def _whole_head(cos: torch.Tensor, sin: torch.Tensor, half: int) -> Rope:
    """The tables with angle zero for the pairs that are not rotated: [context, half]."""
    rest = len(cos), half - cos.shape[1]
    return torch.cat([cos, torch.ones(rest)], dim=1), torch.cat([sin, torch.zeros(rest)], dim=1)
