"""Open, load and save: model folders, .gguf files and hub ids through transformers, always checked first.

A base is either whole and a causal language model, or it is refused with the reason (checks.py). A .gguf file
is expanded to float32; transformers marks the result as quantized, which it no longer is, and then refuses to
train or save it; the marks are taken off.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgedisp.core.errors import BadInput
from edgedisp.core.hub import one_line
from edgedisp.core.progress import Progress, silent
from edgedisp.models import checks
from edgedisp.models.hub import CONFIG, PATTERNS, snapshot

# What transformers raises over a file that it cannot use.
UNUSABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError, AssertionError,
)  # fmt: skip


def open_base(
    base: Path | str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    architecture: str | None = None,
    progress: Progress = silent,
) -> tuple[Any, Any]:
    """(model in float32 and eval mode, tokenizer) from a folder, a .gguf file or a hub id (at a revision).

    architecture: the `model_type` that the recipe promises. Raises BadInput: not there, not a causal language
    model, incomplete, damaged or pickled weights, already quantized, another architecture, no tokenizer,
    tokens outside the embedding, hub unreachable.
    """
    path = Path(base)
    if isinstance(base, str) and not path.exists():
        patterns = PATTERNS + (["*.py"] if trust_remote_code else [])
        path = snapshot(base, revision, patterns, progress)
    if path.is_file():
        model, tokenizer = _open_gguf(path, progress)
        checks.check_architecture(model.config, architecture, str(base))
        return model, tokenizer
    model = load(path, trust_remote_code=trust_remote_code, architecture=architecture)
    return model, load_tokenizer(path, trust_remote_code)


def load(folder: Path, trust_remote_code: bool = False, architecture: str | None = None) -> Any:
    """The model of a Hugging Face folder, float32 and in eval mode. Raises BadInput like `open_base`."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    checks.check_files(folder)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except UNUSABLE as problem:
            raise BadInput(f"{folder}: config.json cannot be used: {one_line(problem)}") from problem
        checks.check_config(config, architecture, str(folder))
        checks.reset_attention(config)
        try:
            opened: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_loading` refuses them with their names
                trust_remote_code=trust_remote_code,
            )
        except (SafetensorError, *UNUSABLE) as problem:
            raise BadInput(f"{folder}: the weights cannot be opened: {one_line(problem)}") from problem
    model, report = opened
    checks.check_loading(report, str(folder))
    return model.eval()


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder. Raises BadInput if there is none, or for tokens outside the embedding."""
    from transformers import AutoTokenizer

    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except UNUSABLE as problem:
            raise BadInput(
                f"{folder}: no usable tokenizer in the folder: {one_line(problem)} (a SentencePiece file "
                "alone needs `pip install sentencepiece protobuf`)"
            ) from problem
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        rows = None
    checks.check_tokenizer(tokenizer, rows if isinstance(rows, int) else None, str(folder))
    return tokenizer


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a plain Hugging Face folder: configuration, generation settings, model.safetensors, tokenizer.

    Tied weights are written once. Raises OSError on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for weights in folder.glob("*.safetensors"):
        # A model loaded from here still reads this file through memory: take the name away, not the bytes.
        weights.unlink()
    _remove_gguf_marks(model)
    # Where the tokenizer came from is of no use to who opens the folder.
    for key in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(key, None)
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # safetensors creates its files for the owner alone (0600); give them the mode that any new file has here.
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)


def empty_model(
    base: Path | str, *, revision: str | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """The model of a folder, a .gguf file or a hub id without its weights: config.json is all that is read.

    Parameters are on the meta device; buffers are real. Raises BadInput: no such model, hub unreachable, an
    unusable configuration.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(base)
    if isinstance(base, str) and not path.exists():
        path = snapshot(base, revision, CONFIG)
    folder, options = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
    with quiet(), init_empty_weights():
        try:
            config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
            checks.reset_attention(config)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except UNUSABLE as problem:
            raise BadInput(f"{base}: its configuration cannot be used: {one_line(problem)}") from problem
    model.tie_weights()  # moving a parameter to the meta device takes it out of the head that shares it
    empty: nn.Module = model.eval()
    return empty


@contextmanager
def quiet(progress: Progress = silent) -> Iterator[None]:
    """No progress bars and no warnings of transformers and its hub client inside; as before afterwards."""
    from transformers.utils import logging

    gguf: Any = import_module("transformers.modeling_gguf_pytorch_utils")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    gguf_bar: Any = gguf.tqdm

    def tensors_counted(tensors: Any, desc: str = "") -> Iterator[Any]:
        for number, tensor in enumerate(tensors):
            progress(number, len(tensors), "expanding the .gguf file")
            yield tensor

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf.tqdm = tensors_counted  # this one bar ignores the setting
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _open_gguf(path: Path, progress: Progress) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise BadInput(f"{path}: not a .gguf file. Name a .gguf file or the model's folder.")
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
        except UNUSABLE as problem:
            raise BadInput(f"{path}: the .gguf file cannot be opened: {one_line(problem)}") from problem
    model, report = opened
    checks.check_loading(report, str(path))
    _remove_gguf_marks(model)
    checks.check_tokenizer(tokenizer, int(model.get_input_embeddings().weight.shape[0]), str(path))
    return model.float().eval(), tokenizer


def _remove_gguf_marks(model: Any) -> None:
    """Take off the marks of a quantized model: its weights were expanded while loading."""
    config = getattr(model.config, "quantization_config", None)
    if getattr(getattr(config, "quant_method", None), "value", None) != "gguf":
        return
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model, "quantization_method"):
        del model.quantization_method
