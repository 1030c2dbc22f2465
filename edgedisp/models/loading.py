"""Open, check and save: model folders, .gguf files and hub ids through transformers.

transformers fills missing weights with random numbers, opens an encoder as a decoder, lays an adapter of the
folder over the weights, and keeps settings of the machine that wrote it. Here each is refused or reset. Of a
hub id configuration, tokenizer, safetensors weights and licence are fetched into the hub's cache.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgedisp.core.errors import BadInput
from edgedisp.core.files import read_json
from edgedisp.core.hub import check_repository, one_line, unreachable, unreachable_error
from edgedisp.core.progress import Progress, silent, warn
from edgedisp.recipe import Model

HUB_FILES = [
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "chat_template*", "spiece.model", "sentencepiece*",
    "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip
UNUSABLE = (Exception,)  # transformers over a file that it cannot use: tokenizers raises Exception itself
IN_A_LAYER = re.compile(r"\.\d+\.")  # model.layers.3.mlp.up_proj.weight


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

    _check_folder(path)
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
        except UNUSABLE as problem:
            raise BadInput(
                f"{path}: the weights cannot be opened (damaged?): {one_line(problem)}"
            ) from problem
    model, report = loaded
    _check_loading(report, str(path))
    if path != folder:  # expanded, but marked as quantized: transformers would neither train nor save it
        del model.config.quantization_config, model.quantization_method
        model.hf_quantizer, model.is_quantized = None, False
    return model.float().eval()


def empty_model(base: Path | str, section: Model | None = None) -> nn.Module:
    """The model of a folder, a .gguf file or a hub id without its weights: config.json is all that is read.

    Parameters are on the meta device; buffers are real. BadInput as `open_base`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    section = section or Model(base=str(base))
    path = _local(base, section, ["config.json"])
    with quiet(), init_empty_weights():
        _, _, config = _config(path, section)
        try:
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except UNUSABLE as problem:
            raise BadInput(f"{base}: its configuration cannot be used: {one_line(problem)}") from problem
    model.tie_weights()  # moving a parameter to the meta device takes it out of the head that shares it
    empty: nn.Module = model.eval()
    return empty


def load_tokenizer(path: Path, trust_remote_code: bool = False, vocab_size: int | None = None) -> Any:
    """The tokenizer of a folder or a .gguf file. vocab_size: rows of the embedding; None: of config.json.

    Truncation and padding, which fine-tuning scripts leave in tokenizer.json, are switched off with a line on
    stderr. Raises BadInput if there is none, or for tokens without a row in the embedding.
    """
    from transformers import AutoTokenizer

    folder, options = _folder(path)
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
        except UNUSABLE as problem:
            works = "a SentencePiece file alone needs `pip install sentencepiece protobuf`"
            raise BadInput(f"{path}: no usable tokenizer: {one_line(problem)} ({works})") from problem
    if vocab_size is None:
        config = read_json(folder / "config.json")
        text_config = config.get("text_config")
        vocab_size = (text_config if isinstance(text_config, dict) else config).get("vocab_size")
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        active = [kind for kind in ("truncation", "padding") if getattr(backend, kind) is not None]
        if active:
            warn(f"{path}: {' and '.join(active)} in tokenizer.json switched off: no text is cut or padded")
        backend.no_truncation()
        backend.no_padding()
    rows = vocab_size if isinstance(vocab_size, int) else None
    outside = [token for token, index in tokenizer.get_vocab().items() if rows is not None and index >= rows]
    if outside:
        raise BadInput(
            f"{path}: {len(outside)} tokens of the tokenizer have no row in the model's embedding of "
            f"{rows} rows: {', '.join(sorted(outside)[:4])}. Call "
            "`model.resize_token_embeddings(len(tokenizer))` and save the model, or remove the tokens."
        )
    return tokenizer


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a plain Hugging Face folder: configuration, generation settings, model.safetensors, tokenizer.

    Tied weights are written once. Raises OSError on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for weights in folder.glob("*.safetensors"):
        # A model loaded from this folder still maps the file: unlink the name and leave the bytes.
        weights.unlink()
    for key in ("is_local", "local_files_only"):  # where the tokenizer came from
        tokenizer.init_kwargs.pop(key, None)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # safetensors creates its files for the owner alone (0600); give them the mode of any new file.
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)


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


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no warnings of transformers and its hub client inside; as before afterwards."""
    from transformers.utils import logging

    gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    level, bars, gguf_bar = logging.get_verbosity(), logging.is_progress_bar_enabled(), gguf.tqdm
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf.tqdm = lambda tensors, desc: tensors  # this one bar ignores the setting
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def is_causal_family(model_type: str) -> bool:
    """Whether transformers has a causal language model of the family and no masked one, as BERT's kin has."""
    from transformers.models.auto import modeling_auto as auto

    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in masked


def _folder(path: Path) -> tuple[Path, dict[str, Any]]:
    """Folder and option with which transformers opens a model folder or a .gguf file."""
    return (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})


def _config(path: Path, section: Model) -> tuple[Path, dict[str, Any], Any]:
    """`_folder` with options, and the checked configuration."""
    from transformers import AutoConfig

    folder, options = _folder(path)
    options["trust_remote_code"] = section.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(folder, **options)
    except UNUSABLE as problem:
        what = "config.json cannot be used" if path == folder else "the .gguf file cannot be opened"
        raise BadInput(f"{path}: {what}: {one_line(problem)}") from problem
    _check_config(config, section.architecture, str(path))
    return folder, options, config


def _local(base: Path | str, section: Model, patterns: list[str], progress: Progress = silent) -> Path:
    """The path of a base; of a hub id its folder at the section's revision, from the hub or its cache."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(base, Path) or Path(base).exists():
        return Path(base)
    tqdm: Any = import_module("huggingface_hub.utils").tqdm

    class Bytes(tqdm):  # type: ignore[misc]
        """A bar that draws nothing and passes the bytes downloaded so far to `progress`."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes, self.seen = kwargs.get("unit") == "B", 0
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            if self.counts_bytes:
                self.seen += int(n or 0)
                progress(self.seen, int(self.total or 0), f"downloading {base}")
            return None

    check_repository("model", base, section.revision)
    try:
        folder = huggingface_hub.snapshot_download(
            base,
            revision=section.revision,
            allow_patterns=[*patterns, "*.py"] if section.trust_remote_code else patterns,
            ignore_patterns=["*/*"],
            local_files_only=unreachable() is not None,
            tqdm_class=Bytes,
        )
    except (LocalEntryNotFoundError, HfHubHTTPError) as problem:
        raise unreachable_error("model", base, problem) from problem
    return Path(folder)


# ---------------------------------------------------------------- what a model must be


def _check_folder(folder: Path) -> None:
    """Refuse a folder without configuration or safetensors files, and one that holds an adapter."""
    if folder.is_file():
        return
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such model folder.")
    if (folder / "adapter_config.json").exists():
        raise BadInput(f"{folder}: holds a PEFT adapter: merge it into its base (merge_and_unload) first.")
    if not (folder / "config.json").exists():
        hint = "".join(f" Did you mean {path}?" for path in sorted(folder.glob("*.gguf"))[:1])
        raise BadInput(f"{folder}: not a model folder, there is no config.json.{hint}")
    _weight_files(folder)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, sharded or not. BadInput if there are none, or one is missing."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
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
    if config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = None  # flash_attention_2 is a choice of the machine that saved it
    if architecture is not None and config.model_type != architecture:
        raise BadInput(
            f"{name}: the model's architecture is {config.model_type!r}, the recipe says {architecture!r}. "
            f"Write `architecture: {config.model_type}` or leave it out."
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
