"""Open, load and save: model folders, .gguf files and hub ids through transformers, always checked first.

A base is whole and a causal language model, or it is refused with the reason (checks.py). Of a hub id the
configuration, tokenizer, safetensors weights and licence are fetched into the hub's own cache, never pickles;
if the hub cannot be reached, the cache alone is used.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgedisp.core.errors import BadInput
from edgedisp.core.files import read_object
from edgedisp.core.hub import check_repository, one_line, unreachable, unreachable_error
from edgedisp.core.progress import Progress, silent
from edgedisp.models import checks

HUB_FILES = [
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "chat_template*", "spiece.model", "sentencepiece*",
    "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip
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
        code = ["*.py"] if trust_remote_code else []
        path = _snapshot(base, revision, [*HUB_FILES, *code], progress)
    progress(0, 0, f"opening {base}")
    model = load(path, trust_remote_code, architecture)
    rows = int(model.get_input_embeddings().weight.shape[0])
    return model, load_tokenizer(path, trust_remote_code, rows)


def load(path: Path, trust_remote_code: bool = False, architecture: str | None = None) -> Any:
    """The model of a folder or a .gguf file, float32 and in eval mode. Raises BadInput like `open_base`."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    checks.check_files(path)
    folder, options = _folder(path)
    options["trust_remote_code"] = trust_remote_code
    with quiet():
        try:
            config = AutoConfig.from_pretrained(folder, **options)
        except UNUSABLE as problem:
            what = "config.json cannot be used" if path == folder else "the .gguf file cannot be opened"
            raise BadInput(f"{path}: {what}: {one_line(problem)}") from problem
        checks.check_config(config, architecture, str(path))
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `check_loading` refuses them with their names
                **options,
            )
        except (SafetensorError, *UNUSABLE) as problem:
            raise BadInput(f"{path}: the weights cannot be opened: {one_line(problem)}") from problem
    model, report = loaded
    checks.check_loading(report, str(path))
    if path != folder:  # expanded, but marked as quantized: transformers would neither train nor save it
        del model.config.quantization_config, model.quantization_method
        model.hf_quantizer, model.is_quantized = None, False
    return model.float().eval()


def load_tokenizer(path: Path, trust_remote_code: bool = False, vocab_size: int | None = None) -> Any:
    """The tokenizer of a folder or a .gguf file. vocab_size: rows of the embedding; None: of config.json.

    Raises BadInput if there is none, or for tokens outside the embedding.
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
        config = read_object(folder / "config.json")
        text_config = config.get("text_config")
        vocab_size = (text_config if isinstance(text_config, dict) else config).get("vocab_size")
    checks.check_tokenizer(tokenizer, vocab_size if isinstance(vocab_size, int) else None, str(path))
    return tokenizer


def _folder(path: Path) -> tuple[Path, dict[str, Any]]:
    """Folder and option with which transformers opens a model folder or a .gguf file."""
    return (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})


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

    files = checks.weight_files(folder)
    return {name: tensor.float() for path in files for name, tensor in load_file(path).items()}


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
        path = _snapshot(base, revision, ["config.json"])
    folder, options = _folder(path)
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


def _snapshot(name: str, revision: str | None, patterns: list[str], progress: Progress = silent) -> Path:
    """The folder of a hub model at a branch, tag or commit (None: main), from the hub or its cache."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    tqdm: Any = import_module("huggingface_hub.utils").tqdm

    class Bytes(tqdm):  # type: ignore[misc]
        """A bar that draws nothing and passes the bytes downloaded so far to `progress`."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes, self.seen = kwargs.get("unit") == "B", 0
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            if self.counts_bytes:
                self.seen += int(n or 0)
                progress(self.seen, int(self.total or 0), f"downloading {name}")
            return None

    check_repository("model", name, revision)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                local_files_only=unreachable() is not None,
                tqdm_class=Bytes,
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError) as problem:
        raise unreachable_error("model", name, problem) from problem
