"""A finished build as one typed `Run`: the input of the report and of `edgedisp compare`.

It is read from the records of the stages alone. The paired comparisons with the baseline are made here, from
the per-item results that the measure stages stored; nothing is scored again. With several seeds an arm's
scores and comparisons are over all of them.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from edgedisp.bench.system import describe, installed_version
from edgedisp.core.errors import BadInput
from edgedisp.core.files import from_json, git_commit
from edgedisp.core.results import (
    BASELINE,
    REPORT_FORMAT,
    Bundle,
    DeviceResult,
    Json,
    LossSurvival,
    Measurement,
    Training,
)
from edgedisp.core.run import Replica, Run, Stage, arms_in_order
from edgedisp.evaluate import comparison
from edgedisp.evaluate.comparison import Pair, Results
from edgedisp.evaluate.statistics import DEFAULT, Resampling
from edgedisp.pipeline.options import ITEMS
from edgedisp.pipeline.stage import Passed
from edgedisp.recipe import Recipe

PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "peft", "bitsandbytes", "lm-eval")

Scored = dict[str, list[Results]]
"""Results of one arm: precision -> one for each seed."""


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
    scored = {arm: read_scored(passed[0].record.folder.parent, run, arm) for arm in arms}
    resampling = Resampling(recipe.evaluate.bootstrap, recipe.seed)
    for group in [arms] if BASELINE in arms else [[arm] for arm in arms]:
        join(run, {arm: scored[arm] for arm in group}, resampling)
    for arm in run.compared_arms:
        run.loss_survival[arm] = {
            precision: _loss_survival(scored[BASELINE], scored[arm], precision, resampling)
            for precision in quantized
        }
    return run


def read_scored(path: Path, run: Run, arm: str) -> Scored:
    """The results of an arm with their items, as the measure stages of the run stored them. Raises BadInput
    where one cannot be read."""
    folder = path if path.is_dir() else path.parent
    trainings = [arm, *(name for name, replica in run.replicas.items() if replica.arm == arm)]
    scored: Scored = {precision: [] for precision in run.precisions}
    for precision, by_seed in scored.items():
        for training in trainings:
            file = folder / training / f"measure-{precision}" / ITEMS
            try:
                by_seed.append(from_json(Results, json.loads(file.read_text(encoding="utf-8"))))
            except (OSError, ValueError) as problem:
                raise BadInput(
                    f"{path}: comparing runs needs the run folder with its items, not a report alone, and "
                    f"{file.relative_to(folder)} cannot be read ({problem}); `edgedisp build` makes it again"
                ) from None
    return scored


def _loss_survival(
    baseline: Scored, arm: Scored, precision: str, resampling: Resampling
) -> dict[str, LossSurvival]:
    """Task -> what quantization leaves of the difference, for losses per token: no other is fine enough."""
    models = baseline["torch"], arm["torch"], baseline[precision], arm[precision]
    return {
        task: comparison.loss_survival([[seed[task] for seed in model] for model in models], resampling)
        for task, result in baseline["torch"][0].items()
        if result.main.scale == "exp" and result.main.denominator is not None
    }


def join(run: Run, arms: Mapping[str, Scored], resampling: Resampling = DEFAULT) -> None:
    """Enter the scores of a run's arms, and compare each with the first on the items that both hold.

    `run.unpaired` gets what cannot be compared, and why.
    """
    average = partial(comparison.average_task, resampling=resampling)
    (_, first), *rest = arms.items()
    for label, scored in arms.items():
        for precision, by_seed in scored.items():
            scores = {task: average([results[task] for results in by_seed]) for task in by_seed[0]}
            measured = replace(run.measured(label, precision), scores=scores)
            run.measurements.setdefault(label, {})[precision] = measured
    for label, other in rest:
        for precision in (name for name in first if name in other):
            pairs, reasons = _common(first[precision], other[precision])
            texts = dict.fromkeys(f"{label}, {reason}" for reason in reasons)
            run.unpaired.extend(text for text in texts if text not in run.unpaired)
            if not pairs:
                continue
            differences = {task: comparison.compare_task(seeds, resampling) for task, seeds in pairs.items()}
            run.comparisons.setdefault(label, {})[precision] = differences
            before, after = (
                {task: average([pair[side] for pair in seeds]) for task, seeds in pairs.items()}
                for side in (0, 1)
            )
            if (mean := comparison.mean_difference(before, after, differences)) is not None:
                run.means.setdefault(label, {})[precision] = mean


def _common(first: Sequence[Results], second: Sequence[Results]) -> tuple[dict[str, list[Pair]], list[str]]:
    """task -> both results of each seed, cut to their common items; and why tasks or items are missing."""
    pairs, seeds = {}, list(zip(first, second))
    tasks, other_tasks = first[0].keys(), second[0].keys()
    reasons = [f"{task}: scored in one of the two alone" for task in sorted(tasks ^ other_tasks)]
    for task in (name for name in tasks if name in other_tasks):
        results = [result[task] for pair in seeds for result in pair]
        try:
            cut = comparison.common_items(results)
        except ValueError as problem:
            reasons.append(f"{problem} (other text, tokenizer, context or seed)")
            continue
        most = max(len(result.items) for result in results)
        if len(cut[0].items) < most:
            reasons.append(f"{task}: {len(cut[0].items)} items in common of {most}")
        pairs[task] = list(zip(cut[::2], cut[1::2]))
    if len(first) != len(second):
        most = max(len(first), len(second))
        reasons.append(f"{len(seeds)} of {most} trainings have one to be paired with")
    return pairs, reasons


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
