"""Open, load and save: model folders, .gguf files and hub ids through transformers, always checked first.

transformers is generous: it fills missing weights with random numbers and says so in a log line, opens an
encoder as a decoder, and draws progress bars. Here a base is either whole and a causal language model, or it
is refused with the reason, and loading is silent.

A .gguf file is expanded to float32. transformers marks the result as quantized, which it no longer is, and
then refuses to train or save it; the marks are taken off.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress, silent
from edgedisp.models import hub

GGUF_MAGIC = b"GGUF"
CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
IN_A_LAYER = re.compile(r"\.\d+\.")  # model.layers.3.mlp.up_proj.weight; old files also keep inv_freq there


def open_base(
    base: Path | str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    architecture: str | None = None,
    progress: Progress = silent,
) -> tuple[Any, Any]:
    """(model in float32 and eval mode, tokenizer) from a folder, a .gguf file or a hub id.

    architecture: the `model_type` that the recipe promises (llama, qwen3, gemma3_text, gpt2, ...), compared
    with the model's own. revision is for hub ids.

    Raises BadInput: not there, not a causal language model, incomplete or damaged weights, pickled weights
    only, already quantized, another architecture than promised, no tokenizer, hub unreachable.
    """
    path = Path(base)
    name = str(base)
    if isinstance(base, str) and not path.exists():
        path = hub.snapshot(base, revision, trust_remote_code, progress)
    if not path.exists():
        raise BadInput(f"{name}: no such model file or folder.")
    if path.is_file():
        model, tokenizer = _open_gguf(path, progress)
    else:
        model = _open_folder(path, name, torch.float32, trust_remote_code, architecture)
        tokenizer = _tokenizer(path, name, trust_remote_code)
    _check_architecture(model.config, architecture, name)
    return model, tokenizer


def load(folder: Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> Any:
    """The model of a Hugging Face folder in eval mode; in float32 its weights are bit for bit what was saved.

    Raises BadInput like `open_base`.
    """
    return _open_folder(Path(folder), str(folder), dtype, trust_remote_code, None)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder. Raises BadInput if there is none."""
    return _tokenizer(Path(folder), str(folder), trust_remote_code)


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a plain Hugging Face folder: configuration, generation settings, model.safetensors, tokenizer.

    Tied weights are written once. Raises OSError on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for weights in folder.glob("*.safetensors"):
        # A model loaded from here still reads this file through memory: take the name away, not the bytes.
        weights.unlink()
    _forget_gguf(model)
    # Where the tokenizer came from is of no use to who opens the folder.
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # safetensors creates its files for the owner alone (0600); give them the mode that any new file has here.
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)


@contextmanager
def quiet(progress: Progress = silent) -> Iterator[None]:
    """No progress bars and no warnings of transformers and its hub client inside; as before afterwards."""
    from transformers.utils import logging

    hub_utils: Any = import_module("huggingface_hub.utils")
    gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars = not hub_utils.are_progress_bars_disabled()
    gguf_bar: Any = gguf.tqdm

    def counted(tensors: Any, desc: str = "") -> Iterator[Any]:
        for done, tensor in enumerate(tensors):
            progress(done, len(tensors), "expanding the .gguf file")
            yield tensor

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf.tqdm = counted  # this one bar does not ask the setting
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            hub_utils.enable_progress_bars()
        else:
            hub_utils.disable_progress_bars()


# --- folders ---------------------------------------------------------------------------------------------


def _open_folder(
    folder: Path, name: str, dtype: torch.dtype, trust_remote_code: bool, architecture: str | None
) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    _check_files(folder, name)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise BadInput(f"{name}: config.json cannot be used: {_one_line(problem)}") from problem
        _check_causal(config, name)
        _check_architecture(config, architecture, name)
        try:
            opened: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_check_whole` refuses them with their names
                trust_remote_code=trust_remote_code,
            )
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, ImportError) as problem:
            raise BadInput(f"{name}: the weights cannot be opened: {_one_line(problem)}") from problem
    model, report = opened
    _check_whole(report, name)
    return model.eval()


def _check_files(folder: Path, name: str) -> None:
    if not folder.is_dir():
        raise BadInput(f"{name}: no such model folder.")
    names = sorted(path.name for path in folder.iterdir())
    if "config.json" not in names:
        ggufs = [entry for entry in names if entry.endswith(".gguf")]
        hint = f" Did you mean {folder / ggufs[0]}?" if ggufs else ""
        if "adapter_config.json" in names:
            hint = " It holds a PEFT adapter: merge it into its base first."
        raise BadInput(f"{name}: not a model folder, there is no config.json.{hint}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as problem:
            raise BadInput(f"{name}: {index.name} is not a readable index of weight files.") from problem
        missing = sorted(wanted - set(names))
        if missing:
            raise BadInput(f"{name}: {len(missing)} weight files are missing: {', '.join(missing[:5])}.")
        _check_readable([folder / entry for entry in sorted(wanted)])
    elif "model.safetensors" in names:
        _check_readable([folder / "model.safetensors"])
    else:
        pickles = [n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        found = f"{pickles[0]} is a pickle, which can run any code and is never opened. " if pickles else ""
        raise BadInput(
            f"{name}: there is no model.safetensors. {found}Save the model again with "
            "`model.save_pretrained(folder)` of a recent transformers, in a place that you trust."
        )


def _check_readable(files: list[Path]) -> None:
    """Refuse a file that is cut off or damaged by its header, before its weights are read."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as problem:
            raise BadInput(
                f"{file}: the file is cut off or damaged: its {file.stat().st_size} bytes do not fit its "
                f"header ({_one_line(problem)}). Fetch or save it again."
            ) from problem


def is_causal_family(model_type: str) -> bool:
    """transformers has a causal language model of the family and no masked one: that would be BERT's kin."""
    from transformers.models.auto import modeling_auto as auto

    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and model_type not in masked


def _check_causal(config: Any, name: str) -> None:
    """Refuse what transformers would open as a causal language model although it was trained as another."""
    named = list(getattr(config, "architectures", None) or [])
    causal = any(architecture.endswith(CAUSAL_ENDINGS) for architecture in named) if named else True
    known = is_causal_family(config.model_type)
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if getattr(config, "is_encoder_decoder", False) or not (causal and (known or custom)):
        what = f"{', '.join(named) or 'no architecture named'} (model_type {config.model_type})"
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


def _check_architecture(config: Any, architecture: str | None, name: str) -> None:
    if architecture is not None and config.model_type != architecture:
        raise BadInput(
            f"{name}: the model's architecture is {config.model_type!r}, the recipe says {architecture!r}. "
            f"Write `architecture: {config.model_type}` or leave it out."
        )


def _check_whole(report: dict[str, Any], name: str) -> None:
    """Refuse weights that transformers had to make up (absent ones, and ones of another shape), and layers,
    or parts of layers, that it left lying in the files."""
    missing = sorted(report["missing_keys"])
    others = sorted(
        f"{key} {list(found)} for {list(wanted)}" for key, found, wanted in report["mismatched_keys"]
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


def _tokenizer(folder: Path, name: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    with quiet():
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as problem:
            raise BadInput(f"{name}: no usable tokenizer in the folder: {_one_line(problem)}") from problem


# --- .gguf -----------------------------------------------------------------------------------------------


def _open_gguf(path: Path, progress: Progress) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with path.open("rb") as file:
        if file.read(4) != GGUF_MAGIC:
            raise BadInput(
                f"{path}: not a .gguf file. A single file must be GGUF; otherwise name the model's folder."
            )
    with quiet(progress):
        try:
            opened: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        # Whatever a reader of a binary format may stumble over; the reason travels on.
        except (
            ValueError,
            KeyError,
            IndexError,
            TypeError,
            NotImplementedError,
            RuntimeError,
            OSError,
        ) as problem:
            raise BadInput(f"{path}: the .gguf file cannot be opened: {_one_line(problem)}") from problem
    model, report = opened
    _check_whole(report, str(path))
    _forget_gguf(model)
    return model.float().eval(), tokenizer


def _forget_gguf(model: Any) -> None:
    """Take off the marks of a quantized model: its weights were expanded while loading."""
    config = getattr(model.config, "quantization_config", None)
    if config is None or getattr(getattr(config, "quant_method", None), "value", None) != "gguf":
        return
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        del model.quantization_method


def _one_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(problem).__name__
