"""Finished builds as one summary: the first one's baseline stays the baseline, all else is an arm beside it.

A task without a single item in common is left out and the reason told; runs without any are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgedisp.comparison.pairing import Scored, averaged, paired_with_first
from edgedisp.core.errors import BadInput
from edgedisp.core.serialization import from_json
from edgedisp.core.stage_folder import git_commit
from edgedisp.evaluate.task_result import Results
from edgedisp.report.reading import run_title
from edgedisp.summary import BASELINE
from edgedisp.summary import load as load_summary

PARTS = ("midtrain", "condensation", "condensation_bundles", "bundles", "verify")


def joined(runs: Sequence[Path]) -> dict[str, Any]:
    """The runs as one summary; `apart` in it tells what could not be paired with the first baseline and why.

    Raises BadInput for a report without its run folder, which alone holds the items; for a first run without
    a baseline; and when no item is common to any two.
    """
    summaries = [load_summary(run) for run in runs]
    if BASELINE not in summaries[0]["arms"]:
        raise BadInput(
            f"{runs[0]}: has no arm `{BASELINE}` to compare the others with; name a run that has one first"
        )
    found = [
        Scored(label, place, arm, _items(run, summary, arm))
        for place, (run, summary) in enumerate(zip(runs, summaries))
        for arm, label in _labels(place, summary, summaries)
    ]
    comparison, means, apart = paired_with_first(found)
    for place, run in enumerate(runs[1:], start=1):
        if not any(one.label in comparison for one in found if one.run == place):
            raise BadInput(
                f"{runs[0]} and {run}: no item in common: {'; '.join(apart) or 'no task in common'}. Score "
                "both on the same text with the same tokenizer, context and seed"
            )
    first = summaries[0]
    joint: dict[str, Any] = {
        **{key: first[key] for key in ("machine", "versions", "seeds") if key in first},
        "runs": [_about(summary) for summary in summaries],
        "name": " and ".join(dict.fromkeys(summary["name"] for summary in summaries)),
        "smoke": any(summary.get("smoke") for summary in summaries),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"edgedisp compare {' '.join(map(str, runs))}",
        "git_commit": git_commit(),
        "arms": [one.label for one in found],
        "precisions": list(dict.fromkeys(name for one in summaries for name in one["precisions"])),
        "techniques": {one.label: summaries[one.run].get("techniques", {}).get(one.arm, {}) for one in found},
        "accuracy": {one.label: averaged(one) for one in found},
        "comparison": comparison,
        "means": means,
        "noise": first.get("noise", {}),
        "apart": apart,
        "latency": {"rows": [row for one in found for row in _timings(one, summaries[one.run])]},
    }
    for part in PARTS:
        joint[part] = {one.label: summaries[one.run].get(part, {}).get(one.arm, {}) for one in found}
    return joint


def _about(summary: dict[str, Any]) -> dict[str, Any]:
    """What a run was made from."""
    model_, text = summary["model"], summary["corpus"]
    found = {"title": run_title(summary), "base": model_["base"], "weights_sha256": model_["weights_sha256"]}
    return found | {key: text[key] for key in ("tokens_sha256", "context", "heldout_documents")}


def _labels(
    place: int, summary: dict[str, Any], summaries: Sequence[dict[str, Any]]
) -> list[tuple[str, str]]:
    """(arm, its name in the joint summary); arms of later runs carry their run's name."""
    if place == 0:
        return [(arm, arm) for arm in summary["arms"]]
    titles = [run_title(one) for one in summaries]
    names = [one["name"] for one in summaries]
    run = titles[place] if names.count(summary["name"]) > 1 else summary["name"]
    again = titles[:place].count(titles[place])
    run += f" ({again + 1})" if again else ""
    return [(arm, f"{arm} of {run}") for arm in summary["arms"]]


def _items(run: Path, summary: dict[str, Any], arm: str) -> dict[str, list[Results]]:
    """precision -> for each seed, task -> its result with items."""
    folder = run if run.is_dir() else run.parent
    trainings = [arm, *(name for name, one in summary.get("replicas", {}).items() if one["arm"] == arm)]
    found: dict[str, list[Results]] = {}
    for precision in summary["precisions"]:
        for training in trainings:
            path = folder / training / f"measure-{precision}" / "items.json"
            if not path.is_file():
                raise BadInput(
                    f"{run}: {path.relative_to(folder)} is not there; comparing runs needs the run folder "
                    "with its items, a report alone holds means"
                )
            try:
                results = from_json(Results, json.loads(path.read_text(encoding="utf-8")))
            except ValueError as problem:
                raise BadInput(
                    f"{path}: is damaged ({problem}); delete its folder and run `edgedisp build` again"
                ) from None
            found.setdefault(precision, []).append(results)
    return found


def _timings(one: Scored, summary: dict[str, Any]) -> list[dict[str, Any]]:
    rows = summary.get("latency", {}).get("rows", [])
    return [{**row, "arm": one.label} for row in rows if row["arm"] == one.arm]
