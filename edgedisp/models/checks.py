"""What a model folder must be before it is opened, and what must be true of it afterwards.

transformers is generous: it fills missing weights with random numbers, opens an encoder as a decoder, lays an
adapter that is in the folder over the weights, and keeps the attention and truncation choices of the machine
that wrote the folder. Here each of these is refused with the reason, or set aside.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput

CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
IN_A_LAYER = re.compile(r"\.\d+\.")  # model.layers.3.mlp.up_proj.weight


def check_files(folder: Path) -> None:
    """Refuse a folder without configuration or whole safetensors files, and one that holds an adapter."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such model folder.")
    if (folder / "adapter_config.json").exists():
        raise BadInput(f"{folder}: holds a PEFT adapter: merge it into its base (merge_and_unload) first.")
    if not (folder / "config.json").exists():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f" Did you mean {ggufs[0]}?" if ggufs else ""
        raise BadInput(f"{folder}: not a model folder, there is no config.json.{hint}")
    weight_files(folder)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, sharded or not. BadInput if there are none, or one is missing."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as problem:
            raise BadInput(f"{index}: is not a readable index of weight files.") from problem
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadInput(
            f"{folder}: there is no {', '.join(missing[:5])}. Pickled weights (.bin, .pt), which can run any "
            "code, are never opened: save the model again with `model.save_pretrained(folder)`."
        )
    return [folder / name for name in names]


def is_causal_family(model_type: str) -> bool:
    """transformers has a causal language model of the family and no masked one: that would be BERT's kin."""
    from transformers.models.auto import modeling_auto as auto

    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in masked


def check_config(config: Any, architecture: str | None, name: str) -> None:
    """Refuse what is no causal language model in full precision, or not of the promised `architecture`."""
    classes = list(getattr(config, "architectures", None) or [])
    causal = not classes or any(entry.endswith(CAUSAL_ENDINGS) for entry in classes)
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = custom or is_causal_family(config.model_type)
    if getattr(config, "is_encoder_decoder", False) or not (causal and known):
        what = f"{', '.join(classes) or 'no architecture named'} (model_type {config.model_type})"
        raise BadInput(
            f"{name}: not a causal language model: {what}. What works: a decoder such as "
            "llama, qwen3, gemma3_text or gpt2."
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise BadInput(
            f"{name}: the weights are already quantized ({getattr(method, 'value', method)}). Training and "
            "export start from full precision: name the original model, or a .gguf file, which is expanded."
        )
    check_architecture(config, architecture, name)


def check_architecture(config: Any, architecture: str | None, name: str) -> None:
    if architecture is not None and config.model_type != architecture:
        raise BadInput(
            f"{name}: the model's architecture is {config.model_type!r}, the recipe says {architecture!r}. "
            f"Write `architecture: {config.model_type}` or leave it out."
        )


def reset_attention(config: Any) -> None:
    """Take out a kernel such as flash_attention_2: it belongs to the machine that saved the model."""
    if config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = None


def check_loading(report: dict[str, Any], name: str) -> None:
    """Refuse weights that transformers had to make up (absent ones, and ones of another shape), and layers,
    or parts of layers, that it left unused in the files."""
    shapes = [
        f"{key} {list(actual)} for {list(expected)}" for key, actual, expected in report["mismatched_keys"]
    ]
    unused = [  # old files also keep inv_freq, which is computed now
        key for key in report["unexpected_keys"] if IN_A_LAYER.search(key) and not key.endswith("inv_freq")
    ]
    for what, keys in (
        ("weights are not in the files", sorted(report["missing_keys"])),
        ("weights have another shape", sorted(shapes)),
        ("weights in the files have no place in the model that config.json describes", sorted(unused)),
    ):
        if keys:
            raise BadInput(
                f"{name}: {len(keys)} {what}: {', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''}. "
                "The model is incomplete, or its configuration belongs to another one."
            )


def check_tokenizer(tokenizer: Any, vocab_size: int | None, name: str) -> None:
    """Refuse tokens without a row in the embedding; take truncation and padding out of the tokenizer.

    Both are left in tokenizer.json by fine-tuning scripts, and would cut or pad every text.
    """
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    outside = [] if vocab_size is None else [t for t, i in tokenizer.get_vocab().items() if i >= vocab_size]
    if outside:
        raise BadInput(
            f"{name}: {len(outside)} tokens of the tokenizer have no row in the model's embedding of "
            f"{vocab_size} rows: {', '.join(sorted(outside)[:4])}. Call "
            "`model.resize_token_embeddings(len(tokenizer))` and save the model, or remove the tokens."
        )
