"""A model's hub id -> a local folder: the hub's own cache, filled when needed.

Fetched are the configuration, the tokenizer, the safetensors weights and the licence at the top of the
repository; pickled weights never are. If the hub does not answer, only the cache is looked at.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from edgedisp.core.hub import one_line, repository_info, unreachable_error
from edgedisp.core.progress import Progress, silent

CONFIG = ["config.json"]
PATTERNS = [
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "chat_template*", "spiece.model", "sentencepiece*",
    "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip


def snapshot(
    name: str, revision: str | None, patterns: list[str] = PATTERNS, progress: Progress = silent
) -> Path:
    """The folder of `name` at `revision` (branch, tag or commit; None: main), from the hub or its cache.

    Raises BadInput: hub unreachable and nothing cached, no such model or revision, gated, download broke off.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    _, unreachable = repository_info("model", name, revision)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
                local_files_only=unreachable is not None,
                tqdm_class=_progress_bar(progress, name),
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError) as problem:
        raise unreachable_error("model", name, unreachable or one_line(problem)) from problem


def _progress_bar(progress: Progress, name: str) -> type[Any]:
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
