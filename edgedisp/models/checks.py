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

import torch

from edgedisp.core.errors import BadInput

CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
IN_A_LAYER = re.compile(r"\.\d+\.")  # model.layers.3.mlp.up_proj.weight; old files also keep inv_freq there


def one_line(problem: BaseException) -> str:
    """An exception's message on one line, at most 300 characters."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(problem).__name__


def check_files(folder: Path, name: str) -> None:
    """Refuse a folder without configuration or whole safetensors files, and one that holds an adapter."""
    if not folder.is_dir():
        raise BadInput(f"{name}: no such model folder.")
    names = sorted(path.name for path in folder.iterdir())
    if "config.json" not in names:
        ggufs = [entry for entry in names if entry.endswith(".gguf")]
        hint = f" Did you mean {folder / ggufs[0]}?" if ggufs else ""
        if "adapter_config.json" in names:
            hint = " It holds a PEFT adapter: merge it into its base first."
        raise BadInput(f"{name}: not a model folder, there is no config.json.{hint}")
    if "adapter_config.json" in names:
        raise BadInput(
            f"{name}: holds a PEFT adapter (adapter_config.json) and a whole model, and does not say whether "
            "the weights contain the adapter. If they do (merge_and_unload), move adapter_config.json and "
            "adapter_model.safetensors away; if not, merge it first."
        )
    files = _weight_files(folder, names, name)
    missing = sorted(set(files) - set(names))
    if missing:
        raise BadInput(f"{name}: {len(missing)} weight files are missing: {', '.join(missing[:5])}.")
    for file in files:
        _check_header(folder / file)


def _weight_files(folder: Path, names: list[str], name: str) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as problem:
            raise BadInput(f"{name}: {index.name} is not a readable index of weight files.") from problem
    if "model.safetensors" in names:
        return ["model.safetensors"]
    pickles = [entry for entry in names if entry.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    reason = f"{pickles[0]} is a pickle, which can run any code and is never opened. " if pickles else ""
    raise BadInput(
        f"{name}: there is no model.safetensors. {reason}Save the model again with "
        "`model.save_pretrained(folder)` of a recent transformers, in a place that you trust."
    )


def _check_header(file: Path) -> None:
    """Refuse a file that is cut off or damaged by its header, before its weights are read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as problem:
        raise BadInput(
            f"{file}: the file is cut off or damaged: its {file.stat().st_size} bytes do not fit its "
            f"header ({one_line(problem)}). Fetch or save it again."
        ) from problem


def is_causal_family(model_type: str) -> bool:
    """transformers has a causal language model of the family and no masked one: that would be BERT's kin."""
    from transformers.models.auto import modeling_auto as auto

    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in masked


def check_config(config: Any, architecture: str | None, name: str) -> None:
    """Refuse what is no causal language model in full precision, or not of the promised `architecture`.

    An attention kernel in the configuration is set aside.
    """
    classes = list(getattr(config, "architectures", None) or [])
    causal = any(entry.endswith(CAUSAL_ENDINGS) for entry in classes) if classes else True
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = is_causal_family(config.model_type) or custom
    if getattr(config, "is_encoder_decoder", False) or not (causal and known):
        what = f"{', '.join(classes) or 'no architecture named'} (model_type {config.model_type})"
        raise BadInput(
            f"{name}: not a causal language model: {what}. What works: a decoder such as llama, qwen2, "
            "qwen3, gemma3_text or gpt2, whose config.json names a ...ForCausalLM or ...LMHeadModel."
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise BadInput(
            f"{name}: the weights are already quantized ({getattr(method, 'value', method)}). Training and "
            "export start from full precision: name the original model, or a .gguf file, which is expanded."
        )
    check_architecture(config, architecture, name)
    text = config.get_text_config()
    padding, vocabulary = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if isinstance(padding, int) and isinstance(vocabulary, int) and padding >= vocabulary:
        raise BadInput(
            f"{name}: config.json has pad_token_id {padding}, but the embedding has {vocabulary} rows. Set "
            "pad_token_id to a token of the vocabulary, such as the eos token, or to null."
        )
    reset_attention(config)


def reset_attention(config: Any) -> None:
    """Take out a kernel such as flash_attention_2: it belongs to the machine that saved the model."""
    if config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = None


def check_architecture(config: Any, architecture: str | None, name: str) -> None:
    if architecture is not None and config.model_type != architecture:
        raise BadInput(
            f"{name}: the model's architecture is {config.model_type!r}, the recipe says {architecture!r}. "
            f"Write `architecture: {config.model_type}` or leave it out."
        )


def check_dtype(folder: Path, name: str) -> None:
    """Refuse a dtype that torch does not have, on which transformers fails without naming the file."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        return  # transformers names the place
    dtype = config.get("dtype") if isinstance(config, dict) else None
    if dtype is not None and not (
        isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
    ):
        raise BadInput(f"{name}: config.json has dtype {dtype!r}; write float32, float16 or bfloat16.")


def check_whole(report: dict[str, Any], name: str) -> None:
    """Refuse weights that transformers had to make up (absent ones, and ones of another shape), and layers,
    or parts of layers, that it left unused in the files."""
    missing = sorted(report["missing_keys"])
    others = sorted(
        f"{key} {list(found)} for {list(expected)}" for key, found, expected in report["mismatched_keys"]
    )
    unused = sorted(
        key for key in report["unexpected_keys"] if IN_A_LAYER.search(key) and not key.endswith("inv_freq")
    )
    for what, keys in (
        ("weights are not in the files", missing),
        ("weights have another shape", others),
        ("weights in the files have no place in the model that config.json describes", unused),
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
    if vocab_size is None:
        return
    outside = [token for token, number in tokenizer.get_vocab().items() if number >= vocab_size]
    if outside:
        raise BadInput(
            f"{name}: {len(outside)} tokens of the tokenizer have no row in the model's embedding of "
            f"{vocab_size} rows: {', '.join(sorted(outside)[:4])}. Call "
            "`model.resize_token_embeddings(len(tokenizer))` and save the model, or remove the tokens."
        )
