"""Candidates beside the baseline of their rung: differences with paired intervals, from what the stages kept.

The loss is paired by window and its interval resamples documents; cosines are paired and resampled by
sequence (evaluate/statistics.py).
"""

from __future__ import annotations

import json
from typing import Any

from edgedisp.core.stage_folder import Record
from edgedisp.pilot.halving import Difference, Judged

FILE = "judged.json"
BOOTSTRAP = 2000
COSINES = ("cosine_raw", "cosine_mean_removed")


def compared(name: str, baseline: Record, candidate: Record, seed: int) -> dict[str, Any]:
    """A candidate's figures, fit for JSON.

    `loss`, `cosine_raw` and `cosine_mean_removed`, each {baseline, candidate, difference, low, high}, or
    `diverged`, which says why there are none; `effect`, in words.
    """
    if why := candidate.results.get("diverged"):
        return {"diverged": why, "effect": Judged(name, None, None).effect}
    before, after = _read(baseline), _read(candidate)
    found = {figure: _paired(figure, before, after, seed) for figure in ("loss", *COSINES)}
    return {**found, "effect": judged(name, found).effect}


def judged(name: str, found: dict[str, Any]) -> Judged:
    """What the rule needs of a candidate's figures."""
    if "diverged" in found:
        return Judged(name, None, None)
    return Judged(name, *(_difference(found[figure]) for figure in ("loss", "cosine_raw")))


def _difference(part: dict[str, Any]) -> Difference:
    return Difference(part["difference"], part["low"], part["high"])


def _read(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((record.folder / FILE).read_text(encoding="utf-8"))
    return found


def _paired(figure: str, before: dict[str, Any], after: dict[str, Any], seed: int) -> dict[str, Any]:
    from edgedisp.evaluate.statistics import VALUE, Metric, Resampling, difference  # brings scipy

    metric = Metric("loss", "nll", "tokens", higher_is_better=False) if figure == "loss" else VALUE
    first, second = (
        side["items"] if figure == "loss" else _by_sequence(side[figure]) for side in (before, after)
    )
    whole = difference(first, second, metric, Resampling(BOOTSTRAP, seed))
    return {
        "baseline": whole.first,
        "candidate": whole.second,
        "difference": whole.estimate.value,
        "low": whole.estimate.low,
        "high": whole.estimate.high,
    }


def _by_sequence(values: list[float]) -> list[dict[str, Any]]:
    return [{"id": str(place), "document": place, "value": value} for place, value in enumerate(values)]
