"""A model's hub id -> a local folder: the hub's own cache, filled when needed.

Fetched are the configuration, the tokenizer, the safetensors weights and the licence at the top of the
repository; pickled weights never are. If the hub does not answer, only the cache is looked at.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.hub import first_line, repository_info, unreachable_error
from edgedisp.core.progress import Progress, silent

PATTERNS = [
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "chat_template*", "spiece.model", "sentencepiece*",
    "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip


def snapshot(
    name: str, revision: str | None, trust_remote_code: bool = False, progress: Progress = silent
) -> Path:
    """The folder of `name` at `revision` (branch, tag or commit; None: main), from the hub or its cache.

    Raises BadInput: hub unreachable and nothing cached, no such model or revision, gated, no safetensors.
    Raises BuildFailed if the download breaks off.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    unreachable = _unreachable(name, revision)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=PATTERNS + (["*.py"] if trust_remote_code else []),
                ignore_patterns=["*/*"],
                local_files_only=unreachable is not None,
                tqdm_class=_bytes_to(progress, name),
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError) as problem:
        if unreachable is not None:
            raise unreachable_error("model", name, unreachable) from problem
        raise BuildFailed(f"{name}: the download from the hub broke off: {first_line(problem)}") from problem


def configuration(name: str, revision: str | None) -> Path:
    """A folder with the config.json of `name`, which is all that is fetched. BadInput as in `snapshot`."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cached = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        return Path(cached).parent
    unreachable = _unreachable(name, revision)
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                name, "config.json", revision=revision, local_files_only=unreachable is not None
            )
        ).parent
    except (LocalEntryNotFoundError, HfHubHTTPError) as problem:
        raise unreachable_error("model", name, unreachable or first_line(problem)) from problem


def _unreachable(name: str, revision: str | None) -> str | None:
    """Why the hub gives no answer about this model; None if it has the model, with weights we may open."""
    info, unreachable = repository_info("model", name, revision)
    if info is not None:
        names = [sibling.rfilename for sibling in info.siblings or []]
        if "config.json" not in names:
            raise BadInput(
                f"{name}: not a transformers model (no config.json). It holds: {', '.join(names[:8])}."
            )
        if not any(file.endswith(".safetensors") for file in names):
            raise BadInput(f"{name}: the model has no safetensors weights; pickled weights are never opened.")
    return unreachable


def _bytes_to(progress: Progress, name: str) -> type[Any]:
    """A progress bar that draws nothing and hands the bytes downloaded so far to `progress`."""
    tqdm: Any = import_module("huggingface_hub.utils").tqdm

    class Bytes(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            self.seen = 0
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            if self.counts_bytes:
                self.seen += int(n or 0)
                progress(self.seen, int(self.total or 0), f"downloading {name}")
            return None

    return Bytes
