"""What a reader of the before/after table must know: runs that cannot be compared, tasks that say nothing."""

from __future__ import annotations

from collections.abc import Sequence

from edgedisp.report.reading import Summary, arms, at, branch, label, number, precisions, tasks

UNLIKE = {
    "base models": ("model", "weights_sha256"),
    "training texts (and so held-out texts)": ("corpus", "tokens_sha256"),
    "context lengths": ("corpus", "context"),
    "numbers of held-out documents": ("corpus", "heldout_documents"),
}
"""What must be the same in two runs whose figures are compared, and where it stands."""


def unlike(summaries: Sequence[Summary]) -> list[str]:
    """What differs between runs so that their figures must not be compared with each other."""
    found = []
    for what, path in UNLIKE.items():
        values = {str(value) for summary in summaries if (value := at(summary, *path)) is not None}
        if len(values) > 1:
            found.append(what)
    if not found:
        return []
    return [f"The runs have different {', '.join(found)}: compare arms within a run, not across these runs."]


def missing(summary: Summary) -> list[str]:
    """Which model the baseline is, where that is told; tasks that could not be scored, items not paired."""
    apart = at(summary, "apart")
    first = at(summary, "baseline_is")
    named = [f"The baseline here is {first}."] if first else []
    unpaired = [f"Not paired: {reason}." for reason in apart] if isinstance(apart, list) else []
    unscored = [f"Not scored: {reason}" for reason in branch(summary, "missing_tasks").values()]
    return [*named, *unscored, *unpaired]


def at_chance(summary: Summary) -> list[str]:
    """Tasks where no arm is above the chance level, its interval reaching down to it, say nothing there."""
    found: dict[str, list[str]] = {}
    for precision in precisions(summary):
        for task, result in tasks(summary).items():
            chance = number(result.get("chance"))
            paths = [("accuracy", arm, precision, task) for arm in arms(summary)]
            ends = [[number(at(summary, *path, end)) for end in ("low", "high")] for path in paths]
            known = [(low, high) for low, high in ends if low is not None and high is not None]
            if chance is not None and known and all(low <= chance for low, _ in known):
                found.setdefault(f"{task} is at chance ({100 * chance:.0f} %)", []).append(label(precision))
    return [
        f"{what} in every arm at {', '.join(where)}: it says nothing there." for what, where in found.items()
    ]


def cut_short(summary: Summary) -> list[str]:
    """Tasks of which some items were longer than a model's context; alike for the arms of a build."""
    found = []
    for task, result in tasks(summary).items():
        counts = {}
        for arm in arms(summary):
            cut = [at(one, task, "truncated") for one in branch(summary, "accuracy", arm).values()]
            counts[arm] = max((number(each) or 0.0 for each in cut), default=0.0)
        what = f"requests of its {number(result.get('n')) or 0:.0f} items were longer than the context and"
        if len(set(counts.values())) > 1:
            each = ", ".join(f"{arm}: {count:.0f}" for arm, count in counts.items())
            found.append(f"{task}: {what} lost tokens on the left, not alike in all models ({each}).")
        elif any(counts.values()):
            found.append(f"{task}: {max(counts.values()):.0f} {what} lost tokens on the left.")
    return found
