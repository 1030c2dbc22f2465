"""Open, check and save: model folders, .gguf files and hub ids through transformers.

transformers fills missing weights with random numbers, opens an encoder as a decoder, lays an adapter of the
folder over the weights, and keeps settings of the machine that wrote it. Here each is refused or reset. Of a
hub id configuration, tokenizer, safetensors weights and licence are fetched into the hub's cache.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgedisp.core.errors import BadInput
from edgedisp.core.files import read_json
from edgedisp.core.hub import download_model, one_line, quiet
from edgedisp.core.progress import Progress, silent
from edgedisp.models.tokenizer import load_tokenizer, opened_as, read_config, rows_of
from edgedisp.recipe import Model

HUB_FILES = [
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "config.json", "adapter_config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "spiece.model", "sentencepiece*",
    "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip
IN_A_LAYER = re.compile(r"\.\d+\.")  # model.layers.3.mlp.up_proj.weight


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """Inside the block transformers reads a .gguf file once, and makes its map of names once.

    It does so for the configuration, the tokenizer and the weights each (and the map for every module): 30 s
    for the 49,152 tokens of SmolLM2-135M.
    """
    gguf: Any = import_module("gguf")
    plain = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = lru_cache(plain[0]), lru_cache(plain[1])
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = plain


def open_base(base: Path | str, section: Model | None = None, progress: Progress = silent) -> tuple[Any, Any]:
    """(model in float32 and eval mode, tokenizer) from a folder, a .gguf file or a hub id.

    section: revision, trust_remote_code, and the architecture (`model_type`) that the recipe promises. Raises
    BadInput: not there, not a causal language model, incomplete, damaged or pickled weights, already
    quantized, another architecture, no tokenizer, tokens outside the embedding, hub unreachable.
    """
    section = section or Model(base=str(base))
    path = _local(base, section, HUB_FILES, progress)
    progress(0, 0, f"opening {base}")
    model = load(path, section)
    rows = int(model.get_input_embeddings().weight.shape[0])
    return model, load_tokenizer(path, section.trust_remote_code, rows)


def load(path: Path, section: Model | None = None) -> Any:
    """The model of a folder or a .gguf file, float32 and in eval mode. BadInput as `open_base`."""
    from transformers import AutoModelForCausalLM

    _check_folder(path, weights=True)
    with quiet():
        folder, options, config = _config(path, section or Model(base=str(path)))
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_check_loading` refuses them with their names
                **options,
            )
        except Exception as problem:  # of no common type
            raise BadInput(
                f"{path}: the weights cannot be opened (damaged?): {one_line(problem)}"
            ) from problem
    model, report = loaded
    _check_loading(report, str(path))
    _check_finite(model, path)
    if path != folder:  # expanded, but marked as quantized: transformers would neither train nor save it
        del model.config.quantization_config, model.quantization_method
        model.hf_quantizer, model.is_quantized = None, False
    return model.float().eval()


def empty_model(base: Path | str, section: Model | None = None) -> nn.Module:
    """The model of a folder, a .gguf file or a hub id without its weights, of which none is read.

    Parameters are on the meta device; buffers are real. BadInput as `open_base`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    section = section or Model(base=str(base))
    path = _local(base, section, ["config.json", "adapter_config.json"])
    _check_folder(path, weights=Path(base).exists())
    with quiet(), init_empty_weights():
        _, _, config = _config(path, section)
        try:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except Exception as problem:  # of no common type
            raise BadInput(f"{base}: its configuration cannot be used: {one_line(problem)}") from problem
    model.tie_weights()  # moving a parameter to the meta device takes it out of the head that shares it
    empty: nn.Module = model.eval()
    return empty


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a plain Hugging Face folder: configuration, generation settings, model.safetensors, tokenizer.

    Tied weights are written once. Raises OSError on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for weights in folder.glob("*.safetensors*"):
        # A model loaded from this folder still maps the file: unlink the name and leave the bytes.
        weights.unlink()
    for key in ("is_local", "local_files_only"):  # where the tokenizer came from
        tokenizer.init_kwargs.pop(key, None)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    content = json.dumps(config | _old_rotary_keys(config), indent=2, sort_keys=True)
    path.write_text(content + "\n", encoding="utf-8")
    # safetensors creates its files for the owner alone (0600); give them the mode of any new file.
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)


def _old_rotary_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `rope_parameters` says, in the keys of transformers 4, which would silently take its defaults.
    transformers 5 reads these where `rope_parameters` has none."""
    rope = config.get("rope_parameters") or {}
    main, names = rope.get("full_attention", rope), ("rope_theta", "partial_rotary_factor")
    old_names = ("rotary_emb_base", "rotary_pct") if config["model_type"] == "gpt_neox" else names
    old = {old_name: main[name] for old_name, name in zip(old_names, names) if name in main}
    if "sliding_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    if main.get("rope_type", "default") != "default":
        old["rope_scaling"] = {key: value for key, value in main.items() if key not in names}
    return old


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Tensor name -> float32 values, memory-mapped, from a folder's safetensors files, sharded or not.

    A tied weight is there once, as it was saved. Raises BadInput for a folder without such files.
    """
    from safetensors.torch import load_file

    return {
        # transformers saves the lm_head of a GPT-NeoX under the name of its first release.
        "lm_head.weight" if name == "embed_out.weight" else name: tensor.float()
        for path in _weight_files(folder)
        for name, tensor in load_file(path).items()
    }


def is_causal_family(model_type: str) -> bool:
    """Whether transformers has a causal language model of the family and no masked one, as BERT's kin has."""
    from transformers.models.auto import modeling_auto as auto

    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in masked


def _local(base: Path | str, section: Model, patterns: list[str], progress: Progress = silent) -> Path:
    """The path of a base; of a hub id its folder at the section's revision."""
    if isinstance(base, Path) or Path(base).exists():
        return Path(base)
    patterns = [*patterns, "*.py"] if section.trust_remote_code else patterns
    return download_model(base, section.revision, patterns, progress)


def _config(path: Path, section: Model) -> tuple[Path, dict[str, Any], Any]:
    """Folder and options for transformers, and the checked configuration."""
    folder, options = opened_as(path, section.trust_remote_code)
    config = read_config(path, section.trust_remote_code)
    _check_config(config, section.architecture, str(path))
    for name, ids in (
        ("config.json", config.to_dict()),
        ("generation_config.json", read_json(folder / "generation_config.json")),
    ):
        _check_ids(ids, rows_of(config), f"{path}: {name}")
    return folder, options, config


# ---------------------------------------------------------------- what a model must be


def _check_folder(folder: Path, *, weights: bool) -> None:
    """Refuse a folder without configuration, or safetensors files if `weights`, and one with an adapter."""
    if folder.is_file():
        return
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such model folder.")
    if (folder / "adapter_config.json").exists():
        raise BadInput(f"{folder}: holds a PEFT adapter: merge it into its base (merge_and_unload) first.")
    if not (folder / "config.json").exists():
        hint = "".join(f" Did you mean {path}?" for path in sorted(folder.glob("*.gguf"))[:1])
        raise BadInput(f"{folder}: not a model folder, there is no config.json.{hint}")
    if weights:
        _weight_files(folder)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, sharded or not. BadInput if there are none, or one is missing, and
    for an index beside the one file, which transformers would not read."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        if (folder / names[0]).is_file():
            raise BadInput(f"{folder}: holds {names[0]} and {index.name}; remove the one that is stale.")
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as problem:
            raise BadInput(f"{index}: is not a readable index of weight files.") from problem
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadInput(
            f"{folder}: there is no {', '.join(missing[:5])}. Pickled weights (.bin, .pt), which can run any "
            "code, are never opened: save the model again with `model.save_pretrained(folder)`."
        )
    for name in names:
        (folder / name).open("rb").close()  # safetensors would call a forbidden file missing
    return [folder / name for name in names]


def _check_config(config: Any, architecture: str | None, name: str) -> None:
    """Refuse what is no causal language model in full precision, or not of the recipe's `architecture`."""
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
    if architecture is not None and config.model_type != architecture:
        raise BadInput(
            f"{name}: the model's architecture is {config.model_type!r}, the recipe says {architecture!r}. "
            f"Write `architecture: {config.model_type}` or leave it out."
        )


def _check_ids(ids: Mapping[str, Any], rows: int | None, where: str) -> None:
    """Refuse ids of tokens that have no row in the embedding."""
    for key, value in ids.items():
        listed = value if isinstance(value, list) else [value]
        outside = [index for index in listed if index is not None and index not in range(rows or 0)]
        if rows is not None and key.endswith("_token_id") and outside:
            raise BadInput(
                f"{where}: {key} is {outside[0]!r}, and the embedding has the rows 0 to {rows - 1}. Give the "
                "id of a token, or null; if tokens were added, call "
                "`model.resize_token_embeddings(len(tokenizer))` and save the model."
            )


def _check_loading(report: dict[str, Any], name: str) -> None:
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


def _check_finite(model: nn.Module, path: Path) -> None:
    """Refuse NaN and infinity, with the name of the first weight."""
    for key, weight in model.named_parameters():
        # A sum is not finite if a value is not, and needs no array of flags; but it may also overflow.
        if not weight.sum().isfinite() and not weight.isfinite().all():
            bad = f"{int((~weight.isfinite()).sum())} values that are not finite (NaN or infinity)"
            raise BadInput(f"{path}: {key} holds {bad}; the model is damaged, or its training diverged")
