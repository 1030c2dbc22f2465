"""A data set on the hub -> rows, through the package `datasets` (extra `train`).

If the hub does not answer, `datasets` looks in its cache alone. With a limit the set is streamed, so that a
thousand documents do not cost the download of all of it. `datasets` runs no code of a data set since
version 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.core.hub import first_line, repository_info, unreachable_error
from edgedisp.data.rows import Row


def rows(
    name: str, *, text: str, config: str | None, split: str, revision: str | None, limit: int | None
) -> Iterator[Row]:
    """The rows of one split, in order; values hold the column `text` alone.

    Raises BadInput: `datasets` missing, hub unreachable and nothing cached, no such set, configuration,
    split, revision or column.
    """
    try:
        import datasets
    except ImportError as problem:
        raise BadInput(
            f'{name}: data sets of a hub need the package `datasets`: pip install "edgedisp[train]"'
        ) from problem
    _, unreachable = repository_info("dataset", name, revision)
    streamed = limit is not None and unreachable is None
    try:
        with _quiet(datasets, offline=unreachable is not None):
            table: Any = datasets.load_dataset(
                name, config, split=split, revision=revision, streaming=streamed
            )
    except (ConnectionError, FileNotFoundError, ValueError, RuntimeError) as problem:
        if unreachable is not None or isinstance(problem, ConnectionError):
            raise unreachable_error("dataset", name, unreachable or first_line(problem)) from problem
        raise BadInput(f"{name}: the hub's data set cannot be read: {first_line(problem)}") from problem
    number = 0
    for batch in table.iter(batch_size=1024):
        if text not in batch:
            yield Row(name, "0", dict.fromkeys(batch))
            return
        for value in batch[text]:
            yield Row(f"{name} row {number}", str(number), {text: value})
            number += 1


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
