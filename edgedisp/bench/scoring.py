"""Items scored on a host, after everything is timed: token ids go there, log-likelihoods come back.

No tokenizer and no text is needed there: `Wanted.requests` holds, for each bundle, items of requests (context
ids, continuation ids), in the order in which they are to be answered. The answers, (sum of log-probabilities,
all greedy) for each request, stand in the result as `answers`, bundle -> items; what they mean for a task is
not this room's matter.

Each bundle has a process of its own, an item is one line to it, so a host that is lost leaves the items that
it had answered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgedisp.bench.devices import DeviceLost
from edgedisp.bench.host import Host
from edgedisp.bench.worker import Worker
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress

Item = Sequence[tuple[Sequence[int], Sequence[int]]]
FEWEST_POSITIONS = 2


def with_answers(
    result: dict[str, Any],
    host: Host,
    bundles: Mapping[str, Path],
    requests: Mapping[str, Sequence[Item]],
    timeout_s: float,
    progress: Progress,
) -> dict[str, Any]:
    """`result`, which timing gave, with `answers` of the bundles that it timed.

    Raises DeviceLost, with the answers until then, where a worker refuses, dies, says something else, or is
    silent for `timeout_s`.
    """
    answers: dict[str, list[Any]] = {label: [] for label in requests}
    told = result["options"]["threads"]
    done, total = 0, sum(map(len, requests.values()))
    try:
        for label, items in requests.items():
            threads = told[label] if isinstance(told, Mapping) else told
            words = ["--score", str(positions(items)), "--threads", str(threads), "--page-cache", "found"]
            with Worker(label, host.command(bundles[label], words), timeout_s) as worker:
                for item in items:
                    answers[label].append(checked(item, worker.ask({"score": item}).get("scores"), label))
                    done += 1
                    progress(done, total, f"{label}: scored")
    except (BadInput, BuildFailed) as error:
        lost = f"{host.name}: lost while it scored: {error}"
        raise DeviceLost(lost, {**result, "answers": answers, "lost": str(error)}) from error
    return {**result, "answers": answers}


def positions(items: Sequence[Item]) -> int:
    """Most positions that a request takes: the last token is only predicted."""
    sizes = [len(context) + len(continuation) - 1 for item in items for context, continuation in item]
    return max([FEWEST_POSITIONS, *sizes])


def checked(item: Item, found: Any, label: str) -> list[tuple[float, bool]]:
    """The answers to one item. BuildFailed for anything else."""
    right = isinstance(found, list) and len(found) == len(item)
    if not right or not all(
        isinstance(one, list)
        and len(one) == 2
        and isinstance(one[0], (int, float))
        and math.isfinite(one[0])
        and isinstance(one[1], bool)
        for one in found
    ):
        raise BuildFailed(f"{label}: sent something else than {len(item)} scores: {str(found)[:200]}")
    return [(float(total), greedy) for total, greedy in found]
