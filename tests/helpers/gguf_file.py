"""A tiny model as llama.cpp would hold it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_gguf(path: Path, model: Any, tokenizer_json: Path, family: str = "qwen2") -> None:
    """The twin as llama.cpp would hold it. (llama itself reorders its heads names; qwen2 does not.)"""
    import gguf

    tokenizer = json.loads(tokenizer_json.read_text())["model"]
    vocabulary = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    config = model.config
    writer = gguf.GGUFWriter(str(path), family)
    for key, value in {
        "name": "tiny", "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size, "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads, "layer_norm_rms_eps": config.rms_norm_eps,
        "rope_freq_base": 10000.0, "tokenizer_model": "gpt2", "token_list": vocabulary,
        "token_types": [3] * 3 + [1] * (len(vocabulary) - 3),
        "token_merges": [" ".join(pair) for pair in tokenizer["merges"]],
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2,
    }.items():  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    parts |= {f"self_attn.{x}_proj": f"attn_{x if x != 'o' else 'output'}" for x in "qkvo"}
    parts |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for name, parameter in model.named_parameters():
        names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        if name not in names:
            _, _, layer, rest = name.split(".", 3)
            stem, _, kind = rest.rpartition(".")
            names[name] = f"blk.{layer}.{parts[stem]}.{kind}"
        writer.add_tensor(names[name], parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
