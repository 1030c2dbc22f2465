"""A finished build as one typed `Run`: the input of the report and of `edgedisp compare`.

It is read from the records of the stages alone. The paired comparisons with the baseline are made here, from
the per-item results that the measure stages stored; nothing is scored again. With several seeds an arm's
scores and comparisons are over all of them.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgedisp.bench.system import describe, installed_version
from edgedisp.core.errors import BadInput
from edgedisp.core.files import from_json, git_commit
from edgedisp.core.results import BASELINE, REPORT_FORMAT, Bundle, DeviceResult, Json, Measurement, Training
from edgedisp.core.run import Replica, Run, Stage, arms_in_order
from edgedisp.evaluate import comparison
from edgedisp.evaluate.comparison import Results
from edgedisp.evaluate.statistics import Resampling
from edgedisp.pipeline.options import ITEMS
from edgedisp.pipeline.stage import Passed
from edgedisp.recipe import Recipe

PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "peft", "bitsandbytes", "lm-eval")

Items = dict[tuple[str, str], list[Results]]
"""(arm, precision) -> for each seed, task -> result with its items."""


def run_results(recipe: Recipe, passed: list[Passed]) -> Run:
    """The results of a build that has passed all its stages."""
    records = {step.name: step.record.results for step in passed}
    arms = arms_in_order([arm.name for arm in recipe.arms])
    precisions = ["torch", *sorted(recipe.precisions, key=lambda name: -int(name.strip("fpint")))]
    quantized = [name for name in precisions if name not in ("torch", "fp32")]
    training = {run.name: from_json(Training, records[f"{run.name}/model"]) for run in recipe.arm_runs}
    measured = {
        run.name: {name: from_json(Measurement, records[f"{run.name}/measure-{name}"]) for name in precisions}
        for run in recipe.arm_runs
    }
    replicas = {
        run.name: Replica(run.arm, run.seed, training[run.name], measured[run.name])
        for run in recipe.arm_runs
        if run.replica
    }
    items = _items(recipe, {step.name: step.record.folder for step in passed}, precisions)
    resampling = Resampling(recipe.evaluate.bootstrap, recipe.seed)
    scores = {
        key: {
            task: comparison.average_task([results[task] for results in by_seed], resampling)
            for task in by_seed[0]
        }
        for key, by_seed in items.items()
    }
    if recipe.seeds > 1:
        for arm in arms:
            by_precision = measured[arm].items()
            measured[arm] = {name: replace(found, scores=scores[arm, name]) for name, found in by_precision}
    base = recipe.model.base
    if recipe.is_smoke:
        base = f"a tiny random {recipe.model.architecture} in the place of {base}"
    run = Run(
        name=recipe.name,
        arms=arms,
        precisions=precisions,
        hash8=recipe.hash8,
        smoke=recipe.is_smoke,
        recipe_yaml=recipe.to_yaml(),
        seeds=[recipe.seed + replica for replica in range(recipe.seeds)],
        techniques={run.arm: run.adds for run in recipe.arm_runs if run.replica == 0},
        model={"base": base, **records["base"]},
        corpus=records["corpus"],
        training={arm: training[arm] for arm in arms},
        bundles={arm: {name: _bundle(records, arm, name) for name in recipe.precisions} for arm in arms},
        measurements={arm: measured[arm] for arm in arms},
        delta_survival={
            arm: {name: _delta_survival(records[f"{arm}/survival-{name}"]) for name in quantized}
            for arm in arms
        },
        replicas=replicas,
        missing_tasks=records["items"]["missing"],
        latency=from_json(DeviceResult, records["latency"]),
        packages={arm: [f"{arm}/{target}" for target in recipe.targets] for arm in arms},
        stages=[Stage(step.name, step.record.seconds, step.cached) for step in passed],
        **surroundings(),
    )
    return replace(run, **_comparisons(run, items, scores, resampling))


def _items(recipe: Recipe, folders: Mapping[str, Path], precisions: list[str]) -> Items:
    items: Items = {}
    for run in recipe.arm_runs:
        for precision in precisions:
            text = (folders[f"{run.name}/measure-{precision}"] / ITEMS).read_text(encoding="utf-8")
            items.setdefault((run.arm, precision), []).append(from_json(Results, json.loads(text)))
    return items


def _comparisons(
    run: Run, items: Items, scores: Mapping[tuple[str, str], Any], resampling: Resampling
) -> dict[str, Any]:
    """`comparisons`, `means` and `loss_survival` of a run: each arm against the baseline over all seeds."""
    comparisons: Json = {arm: {} for arm in run.compared_arms}
    means: Json = {}
    loss_survival: Json = {arm: {} for arm in run.compared_arms}
    for arm, name in ((arm, name) for arm in run.compared_arms for name in run.precisions):
        pairs = list(zip(items[BASELINE, name], items[arm, name], strict=True))
        tasks = {
            task: comparison.compare_task([(a[task], b[task]) for a, b in pairs], resampling)
            for task in pairs[0][0]
        }
        comparisons[arm][name] = tasks
        mean = comparison.mean_difference(scores[BASELINE, name], scores[arm, name], tasks)
        if mean is not None:
            means.setdefault(arm, {})[name] = mean
        if name in ("torch", "fp32"):
            continue
        exact = zip(items[BASELINE, "torch"], items[arm, "torch"], strict=True)
        by_seed = [(*before, *after) for before, after in zip(exact, pairs, strict=True)]
        loss_survival[arm][name] = {
            task: comparison.loss_survival(
                [(a[task], b[task], c[task], d[task]) for a, b, c, d in by_seed], resampling
            )
            for task, result in by_seed[0][0].items()
            if comparison.is_loss(result)
        }
    return {"comparisons": comparisons, "means": means, "loss_survival": loss_survival}


def _bundle(records: Mapping[str, Any], arm: str, precision: str) -> Bundle:
    record = records[f"{arm}/{precision}"]
    tensors = record.get("by_tensor", [])
    return from_json(Bundle, {**record, "path": f"{arm}/{precision}", "tensors": tensors})


def _delta_survival(record: Mapping[str, Any]) -> Json:
    """What is left of training in a bundle's weights, without the figures of every tensor."""
    references = {
        name: {key: value for key, value in reference.items() if key != "tensors"}
        for name, reference in record["references"].items()
    }
    return {**record, "references": references}


def surroundings() -> dict[str, Any]:
    """When, by which command, on which machine and with which versions a report is made."""
    versions = {name: version for name in PACKAGES if (version := installed_version(name))}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["edgedisp", *sys.argv[1:]]),
        "machine": {key: value for key, value in describe().items() if key != "packages"},
        "versions": versions,
        "git_commit": git_commit(),
    }


def is_run(path: Path) -> bool:
    """Whether a path names a finished run, or its report.json."""
    return (path / "report.json").is_file() or path.suffix == ".json"


def load(run: Path) -> Run:
    """The results of a finished run folder, or of a report.json.

    Raises BadInput if there is none, or if it is damaged or of another shape.
    """
    path = run / "report.json" if run.is_dir() else run
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != REPORT_FORMAT:
            raise ValueError(f"it is no report of format {REPORT_FORMAT}")
        return from_json(Run, document["run"])
    except OSError:
        raise BadInput(f"{run}: holds no report.json; `edgedisp build` writes one when it ends") from None
    except (ValueError, KeyError) as error:
        raise BadInput(
            f"{path}: cannot be read ({error}); delete it and run `edgedisp build` again"
        ) from None
