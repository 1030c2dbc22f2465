"""Reading a summary that may lack parts.

A smoke run has one layer less, a single-arm run has no comparison, a run without `latency` has no
timings, and a figure that could not be taken is None. So nothing here indexes a summary directly: `at`
walks a path and gives None for whatever is absent, and `number` lets only finite numbers through.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

Summary = Mapping[str, Any]

BASELINE, DISPERSED = "baseline", "dispersed"
PRECISION = re.compile(r"torch|bf16|fp\d+|int\d+")
CHANGES_FORWARD = ("neftune", "embedding_dropout")
"""Techniques that change what the model is given, so that an arm's first loss is not the baseline's."""
GIVEN = "as given"
"""The precision of a model that was not built here but handed over, as `edgedisp compare` takes it."""
LABELS = {"torch": "torch fp32", "fp32": "onnx fp32"}


def at(tree: Any, *path: str) -> Any:
    """The value under `path`, or None when any step of it is absent."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def branch(tree: Any, *path: str) -> dict[str, Any]:
    """The dict under `path`, empty when there is none."""
    found = at(tree, *path)
    return dict(found) if isinstance(found, Mapping) else {}


def number(value: Any) -> float | None:
    """A finite number as float; None for everything else (a bool is not a number here)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def whole(value: Any) -> int | None:
    """A count: the number rounded to int, or None."""
    found = number(value)
    return None if found is None else round(found)


def bits(precision: str) -> float:
    """Bits of a weight, from the precision's name; `torch` is the full-precision original (33, first)."""
    found = re.search(r"\d+", precision)
    return 33.0 if precision == "torch" else float(found.group()) if found else 32.5


def label(precision: str) -> str:
    """How a precision is called in tables: `torch fp32`, `onnx fp32`, `int8`, `int4`."""
    return LABELS.get(precision, precision)


def arms(summary: Summary) -> list[str]:
    """The arms that were built, `baseline` and `dispersed` first, others in the order given."""
    listed = at(summary, "arms")
    names = [str(arm) for arm in listed] if isinstance(listed, list | tuple) else []
    for part in ("midtrain", "accuracy", "bundles"):
        names += [arm for arm in branch(summary, part) if arm not in names]
    return sorted(names, key=lambda arm: (arm != BASELINE, arm != DISPERSED))


def compared(summary: Summary) -> dict[str, dict[str, Any]]:
    """arm -> precision -> task -> its paired comparison with the baseline.

    Reports of format 1 had no level of arms: theirs is the arm `dispersed`.
    """
    found = branch(summary, "comparison")
    if any(PRECISION.fullmatch(key) for key in found):
        return {DISPERSED: found}
    return {arm: branch(found, arm) for arm in found}


def focus(summary: Summary) -> str | None:
    """The arm that the verdict is about: `dispersed`, else the first with dispersion, else the first other.

    None without a baseline, or without an arm to compare with it.
    """
    built = arms(summary)
    others = [arm for arm in built if arm != BASELINE]
    if BASELINE not in built or not others:
        return None
    if DISPERSED in others:
        return DISPERSED
    return next((arm for arm in others if at(summary, "techniques", arm, "dispersion")), others[0])


def seeds(summary: Summary) -> int:
    """How many times every arm was trained."""
    listed = at(summary, "seeds")
    return max(1, len(listed)) if isinstance(listed, list | tuple) else 1


def trainings(summary: Summary, arm: str) -> dict[str, dict[str, Any]]:
    """folder -> what is recorded of each of an arm's trainings, the first seed's first."""
    found = {arm: branch(summary, "midtrain", arm)}
    for name, replica in branch(summary, "replicas").items():
        if at(replica, "arm") == arm:
            found[name] = branch(replica, "midtrain")
    return found


def twins(summary: Summary, arm: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(baseline's training, the arm's) for each seed: same tokens in the same order, same settings."""
    return list(zip(trainings(summary, BASELINE).values(), trainings(summary, arm).values()))


def changes_forward(summary: Summary, arm: str) -> bool:
    """Whether an arm's technique changes the very first loss."""
    return any(at(summary, "techniques", arm, name) is not None for name in CHANGES_FORWARD)


def first_losses(summary: Summary, arm: str) -> list[tuple[float, float]] | None:
    """For each seed, cross-entropy of (baseline, arm) before the first update, where one model saw one batch.

    None where it was not recorded, and for an arm whose technique changes what the model is given.
    """
    if changes_forward(summary, arm):
        return None
    found = []
    for pair in twins(summary, arm):
        losses = [_first_loss(training.get("log")) for training in pair]
        if None in losses:
            return None
        found.append((losses[0] or 0.0, losses[1] or 0.0))
    return found or None


def _first_loss(log: Any) -> float | None:
    first = log[0] if isinstance(log, list) and log and isinstance(log[0], dict) else {}
    return number(first.get("loss")) if first.get("step") == 1 else None


def precisions(summary: Summary) -> list[str]:
    """Every precision named anywhere, most bits first (torch, fp32, int8, int4)."""
    listed = at(summary, "precisions")
    names = {str(name) for name in listed} if isinstance(listed, list | tuple) else set()
    for part in ("accuracy", "bundles"):
        for by_precision in branch(summary, part).values():
            names |= set(branch(by_precision))
    names |= {name for by_precision in compared(summary).values() for name in by_precision}
    return sorted(names, key=lambda name: (-bits(name), name))


def tasks(summary: Summary) -> dict[str, dict[str, Any]]:
    """task -> one of its results (for metric, direction and chance); perplexity tasks come first."""
    found: dict[str, dict[str, Any]] = {}
    for by_precision in branch(summary, "accuracy").values():
        for by_task in branch(by_precision).values():
            for task, result in branch(by_task).items():
                found.setdefault(task, branch(result))
    for by_precision in compared(summary).values():
        for by_task in by_precision.values():
            for task, result in branch(by_task).items():
                found.setdefault(task, branch(result))
    return dict(sorted(found.items(), key=lambda item: not is_loss(item[1])))


def is_loss(result: Mapping[str, Any]) -> bool:
    """Whether a result is a perplexity."""
    return "perplexity" in str(result.get("metric") or "")


def run_title(summary: Summary) -> str:
    """`name-hash8`, as the run folder is called."""
    name, hash8 = str(at(summary, "name") or "unnamed"), at(summary, "hash8")
    return f"{name}-{hash8}" if hash8 else name


def finite(tree: Any) -> tuple[Any, list[str]]:
    """The same tree with every infinite or undefined number as None, and the paths where that was done.

    JSON knows neither, and a perplexity does overflow when a quantized model is broken. The paths are told in
    the report, so that nothing disappears without a word.
    """
    lost: list[str] = []

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Mapping):
            return {
                str(key): walk(value, f"{path}.{key}" if path else str(key)) for key, value in node.items()
            }
        if isinstance(node, list | tuple):
            return [walk(value, f"{path}[{index}]") for index, value in enumerate(node)]
        if isinstance(node, float) and not math.isfinite(node):
            lost.append(path)
            return None
        return node

    return walk(tree, ""), lost


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of nested dicts as (dotted path, value); lists count as leaves."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree
