"""What a model folder must be before it is opened, and what must be true of it afterwards.

transformers is generous: it fills missing weights with random numbers, opens an encoder as a decoder, lays
an adapter that is in the folder over the weights, and keeps attention and truncation settings of the machine
that wrote the folder. Here each of these is refused with the reason, or reset.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import warn

IN_A_LAYER = re.compile(r"\.\d+\.")  # model.layers.3.mlp.up_proj.weight


def check_files(folder: Path) -> None:
    """Refuse a folder without configuration or whole safetensors files, one that holds an adapter, and a file
    that is no .gguf file."""
    if folder.is_file():
        with folder.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BadInput(f"{folder}: not a .gguf file. Name a .gguf file or the model's folder.")
        return
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such model folder.")
    if (folder / "adapter_config.json").exists():
        raise BadInput(f"{folder}: holds a PEFT adapter: merge it into its base (merge_and_unload) first.")
    if not (folder / "config.json").exists():
        hint = "".join(f" Did you mean {path}?" for path in sorted(folder.glob("*.gguf"))[:1])
        raise BadInput(f"{folder}: not a model folder, there is no config.json.{hint}")
    for path in weight_files(folder):
        _check_size(path)


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


def _check_size(path: Path) -> None:
    """Refuse a safetensors file that is shorter or longer than its header says: 8 bytes, header, tensors."""
    size, again = path.stat().st_size, "Delete it, and download or copy it again."
    try:
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(header_size, size)))
        offsets = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        needed = 8 + header_size + max(offsets, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
        raise BadInput(f"{path}: {size:,} bytes without a whole safetensors header. {again}") from problem
    if size != needed:
        state = "cut off" if size < needed else "damaged"
        raise BadInput(f"{path}: is {state}: {size:,} bytes, its header needs {needed:,}. {again}")


def is_causal_family(model_type: str) -> bool:
    """Whether transformers has a causal language model of the family and no masked one, as BERT's kin has."""
    from transformers.models.auto import modeling_auto as auto

    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in masked


def check_config(config: Any, architecture: str | None, name: str) -> None:
    """Refuse what is no causal language model in full precision, or not of the recipe's `architecture`.

    Takes out an attention kernel such as flash_attention_2: it belongs to the machine that saved the model.
    """
    classes = list(getattr(config, "architectures", None) or [])
    is_causal = not classes or any(entry.endswith(("ForCausalLM", "LMHeadModel")) for entry in classes)
    is_custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    is_decoder = is_causal and (is_custom or is_causal_family(config.model_type))
    if getattr(config, "is_encoder_decoder", False) or not is_decoder:
        what = f"{', '.join(classes) or 'no architecture named'} (model_type {config.model_type})"
        works = "What works: a decoder such as llama, qwen3, gemma3_text or gpt2."
        raise BadInput(f"{name}: not a causal language model: {what}. {works}")
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        raise BadInput(
            f"{name}: the weights are already quantized ({getattr(method, 'value', method)}). Training and "
            "export start from full precision: name the original model, or a .gguf file, which is expanded."
        )
    reset_attention(config)
    if architecture is not None and config.model_type != architecture:
        raise BadInput(
            f"{name}: the model's architecture is {config.model_type!r}, the recipe says {architecture!r}. "
            f"Write `architecture: {config.model_type}` or leave it out."
        )


def reset_attention(config: Any) -> None:
    if config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = None


def check_loading(report: dict[str, Any], name: str) -> None:
    """Refuse weights that transformers had to make up (absent, or of another shape), and weights of layers
    in the files that it left unused."""
    shapes = [
        f"{key} {list(actual)} for {list(expected)}" for key, actual, expected in report["mismatched_keys"]
    ]
    unused = [  # old files also have inv_freq, which is computed now
        key for key in report["unexpected_keys"] if IN_A_LAYER.search(key) and not key.endswith("inv_freq")
    ]
    for what, keys in (
        ("weights are not in the files", report["missing_keys"]),
        ("weights have another shape", shapes),
        ("weights in the files have no place in the model that config.json describes", unused),
    ):
        if keys:
            names = ", ".join(sorted(keys)[:4]) + (" ..." if len(keys) > 4 else "")
            raise BadInput(
                f"{name}: {len(keys)} {what}: {names}. "
                "The model is incomplete, or its configuration belongs to another one."
            )


def check_tokenizer(tokenizer: Any, vocab_size: int | None, name: str) -> None:
    """Refuse tokens without a row in the embedding; switch off truncation and padding, with a line on stderr.

    Fine-tuning scripts leave both in tokenizer.json, where they would cut or pad every text.
    """
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        active = [kind for kind in ("truncation", "padding") if getattr(backend, kind) is not None]
        if active:
            warn(f"{name}: {' and '.join(active)} in tokenizer.json switched off: no text is cut or padded")
        backend.no_truncation()
        backend.no_padding()
    outside = [] if vocab_size is None else [t for t, i in tokenizer.get_vocab().items() if i >= vocab_size]
    if outside:
        raise BadInput(
            f"{name}: {len(outside)} tokens of the tokenizer have no row in the model's embedding of "
            f"{vocab_size} rows: {', '.join(sorted(outside)[:4])}. Call "
            "`model.resize_token_embeddings(len(tokenizer))` and save the model, or remove the tokens."
        )
