"""`edgedisp compare`: several finished builds, or any two models, as one summary that the report can show.

Builds are joined: the first one's baseline stays the baseline, and every other training, of all runs, is an
arm beside it. What is compared is items, not means: only those that both were asked in the very same words
are paired (evaluate/result.py, `common`), whatever the recipes; a task without a single one is left out and
the reason told, and runs without any are refused.

Two models need no build: a Hugging Face folder or a bundle, from anywhere. They are scored here on the tasks
that are named, in a folder that keeps the scores, so that an interrupted comparison continues.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgedisp import BadInput, Progress, corpus, model
from edgedisp.bench.machine import describe, physical_cores
from edgedisp.evaluate import tasks
from edgedisp.evaluate.kept import Kept
from edgedisp.evaluate.means import mean_difference
from edgedisp.evaluate.result import TaskResult, common
from edgedisp.evaluate.seeds import average_task, compare_tasks
from edgedisp.evaluate.sets import expand
from edgedisp.folder import check_files, digest, git_commit, write_json
from edgedisp.graph.session import OnnxModel
from edgedisp.report import write as write_report
from edgedisp.report.reading import GIVEN, run_title
from edgedisp.stages.figures import scored_name
from edgedisp.summary import BASELINE, renamed
from edgedisp.summary import load as load_summary

PARTS = ("midtrain", "condensation", "condensation_bundles", "bundles", "verify")

Results = dict[str, TaskResult]
Pair = tuple[TaskResult, TaskResult]


@dataclass(frozen=True)
class _Scored:
    """One arm of one run: its name in the joint summary, and its results by precision and seed."""

    label: str
    run: int
    arm: str
    by_precision: dict[str, list[Results]]


def is_run(path: Path) -> bool:
    """Whether a path names a finished run, or its report.json."""
    return (path / "report.json").is_file() or path.suffix == ".json"


# Runs


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
        _Scored(label, place, arm, _items(run, summary, arm))
        for place, (run, summary) in enumerate(zip(runs, summaries))
        for arm, label in _labels(place, summary, summaries)
    ]
    comparison, means, apart = _paired(found)
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
        "accuracy": {one.label: _averaged(one) for one in found},
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
            path = folder / training / f"accuracy-{precision}" / "items.json"
            if not path.is_file():
                raise BadInput(
                    f"{run}: {path.relative_to(folder)} is not there; comparing runs needs the run folder "
                    "with its items, a report alone holds means"
                )
            found.setdefault(precision, []).append(json.loads(path.read_text(encoding="utf-8")))
    return found


def _averaged(one: _Scored) -> dict[str, Any]:
    return {
        precision: {task: average_task([results[task] for results in by_seed]) for task in by_seed[0]}
        for precision, by_seed in one.by_precision.items()
    }


def _paired(found: Sequence[_Scored]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The comparisons of all others with the first, the means over their tasks, and what was left out."""
    first, *others = found
    comparison: dict[str, Any] = {}
    means: dict[str, Any] = {}
    apart: list[str] = []
    for other in others:
        for precision in (name for name in first.by_precision if name in other.by_precision):
            seeds = list(zip(first.by_precision[precision], other.by_precision[precision]))
            pairs, why = _alike(seeds)
            apart += [f"{other.label}, {reason}" for reason in why]
            if not pairs:
                continue
            entries = {task: compare_tasks(pair) for task, pair in pairs.items()}
            named = {task: renamed(entry) for task, entry in entries.items()}
            comparison.setdefault(other.label, {})[precision] = named
            before, after = ({task: pair[0][side] for task, pair in pairs.items()} for side in (0, 1))
            if (mean := mean_difference(before, after, entries)) is not None:
                means.setdefault(other.label, {})[precision] = mean
    return comparison, means, list(dict.fromkeys(apart))


def _alike(seeds: Sequence[tuple[Results, Results]]) -> tuple[dict[str, list[Pair]], list[str]]:
    """task -> for each seed both results, cut to the items that all were asked; and why tasks are missing."""
    pairs: dict[str, list[Pair]] = {}
    why: list[str] = []
    first, second = seeds[0]
    for task in first:
        if task not in second:
            continue
        every = [results[task] for pair in seeds for results in pair]
        try:
            cut = common(every)
        except ValueError as problem:
            why.append(f"{problem} (other text, tokenizer, context or seed)")
            continue
        if len(cut[0]["items"]) < max(len(one["items"]) for one in every):
            why.append(f"{task}: {len(cut[0]['items'])} items in common of {max(one['n'] for one in every)}")
        pairs[task] = list(zip(cut[::2], cut[1::2]))
    return pairs, why


def _timings(one: _Scored, summary: dict[str, Any]) -> list[dict[str, Any]]:
    rows = summary.get("latency", {}).get("rows", [])
    return [{**row, "arm": one.label} for row in rows if row["arm"] == one.arm]


# Models


def scored_pair(
    first: Path,
    second: Path,
    names: Sequence[str],
    out: Path,
    *,
    text: Path | None,
    tasks_path: Path | None,
    limit: int,
    context: int,
    progress: Progress,
) -> dict[str, Any]:
    """Score two models or bundles on the same items, write a report of it into `out`, return its summary.

    `text`: documents for the held-out tasks. Raises BadInput for what is no model, for tasks that do not
    exist or whose data cannot be had, and for models without an item in common.
    """
    folders = [_checked(first), _checked(second)]
    chosen = [*names] or (["heldout"] if text is not None else [])
    if not chosen:
        raise BadInput(
            "--tasks: say what to compare the models on, such as small; or --text FILE for held-out text"
        )
    documents = [] if text is None else corpus.read_documents(text)
    if text is None and (held := [name for name in expand(chosen) if name.startswith("heldout")]):
        raise BadInput(f"--tasks {held[0]}: is made from text; name a file of documents with --text")
    labels = _short(first, second)
    suites = []
    for folder in folders:
        tokenizer = model.load_tokenizer(folder)
        suite = tasks.prepare(
            tokenizer,
            chosen,
            documents,
            end_of_text=model.end_of_text_id(tokenizer),
            context=context,
            limit=limit,
            tasks_path=tasks_path,
        )
        suites.append(suite)
    out.mkdir(parents=True, exist_ok=True)  # from here on there are scores to keep
    found = []
    threads = physical_cores()
    for folder, label, suite in zip(folders, labels, suites):
        with closing(Kept(out / "scores.sqlite", scored_name(folder, threads))) as kept:
            results = suite.run(_opened(folder, threads), kept=kept, progress=_named(progress, label))
        found.append(_Scored(label, 0, label, {GIVEN: [results]}))
    comparison, means, apart = _paired(found)
    if not comparison:
        raise BadInput(f"{first} and {second}: no item in common: {'; '.join(apart)}")
    summary = {
        "name": f"{labels[1]} against {labels[0]}",
        "smoke": False,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"edgedisp compare {first} {second} --tasks {','.join(chosen)}",
        "machine": {key: value for key, value in describe().items() if key != "packages"},
        "git_commit": git_commit(),
        "arms": [BASELINE, labels[1]],
        "precisions": [GIVEN],
        "baseline_is": labels[0],
        "corpus": {"context": context},
        "accuracy": {name: _averaged(one) for name, one in zip((BASELINE, labels[1]), found)},
        "comparison": comparison,
        "means": means,
        "missing_tasks": {task: why for suite in suites for task, why in suite.missing.items()},
        "apart": apart,
    }
    write_json(out / "items.json", {one.label: one.by_precision[GIVEN][0] for one in found})
    write_report(summary, out)
    return summary


def folder_for(first: Path, second: Path, chosen: Sequence[str], text: Path | None) -> Path:
    """Where a comparison of two models is kept unless --out says so."""
    key = digest([str(first.resolve()), str(second.resolve()), [*chosen], str(text)])[:8]
    names = [label.replace("/", "-") for label in _short(first, second)]
    return Path("comparisons") / f"{'-'.join(names)}-{key}"


def _checked(folder: Path) -> Path:
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; compare takes runs, Hugging Face folders and bundles")
    if not any((folder / name).is_file() for name in ("config.json", "model.onnx")):
        raise BadInput(
            f"{folder}: is no run (no report.json), no model (no config.json) and no bundle (no model.onnx)"
        )
    check_files(folder)
    return folder


def _opened(folder: Path, threads: int) -> Any:
    if (folder / "model.onnx").is_file():
        return OnnxModel(folder, threads)
    return model.TorchModel(model.load(folder), threads)


def _short(first: Path, second: Path) -> list[str]:
    """The shortest endings of both paths that differ; a folder against itself is numbered."""
    parts = [path.resolve().parts for path in (first, second)]
    for depth in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-depth:]) for part in parts]
        if short[0] != short[1]:
            return short
    return [f"{first.name} (1)", f"{first.name} (2)"]


def _named(progress: Progress, label: str) -> Progress:
    return lambda done, total, note: progress(done, total, f"{label}: {note}")
