"""A finished build as one typed `Run`: the input of the report and of `edgedisp compare`.

It is read from the records of the stages alone. The paired comparisons with the baseline are made here, from
the per-item results that the measure stages stored; nothing is scored again. With several seeds an arm's
scores and comparisons are over all of them.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
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
    MeanDifference,
    Measurement,
    TaskDifference,
    TaskScore,
    Training,
)
from edgedisp.core.run import Replica, Run, Stage, arms_in_order
from edgedisp.evaluate.comparison import (
    Results,
    average_task,
    compare_task,
    is_loss,
    loss_survival,
    mean_difference,
)
from edgedisp.evaluate.statistics import Resampling
from edgedisp.pipeline.stage import Passed
from edgedisp.recipe import Recipe

PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "peft", "bitsandbytes", "lm-eval")


def run_results(recipe: Recipe, passed: list[Passed]) -> Run:
    """The results of a build that has passed all its stages."""
    records = {step.name: step.record.results for step in passed}
    arms = arms_in_order([arm.name for arm in recipe.arms])
    precisions = ["torch", *sorted(recipe.precisions, key=lambda name: -int(name.strip("fpint")))]
    scored = _Scored(recipe, {step.name: step.record.folder for step in passed})
    measured = {arm: {one: _measurement(records, arm, one) for one in precisions} for arm in arms}
    for arm in arms if recipe.seeds > 1 else []:
        for one, measurement in measured[arm].items():
            measured[arm][one] = dataclasses.replace(measurement, scores=scored.scores(arm, one))
    base = recipe.model.base
    if recipe.is_smoke:
        base = f"a tiny random {recipe.model.architecture} in the place of {base}"
    compared = [arm for arm in arms if arm != BASELINE] if BASELINE in arms else []
    return Run(
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
        training={arm: _known(Training, records[f"{arm}/model"]) for arm in arms},
        bundles={arm: {one: _bundle(records, arm, one) for one in recipe.precisions} for arm in arms},
        measurements=measured,
        comparisons={arm: {one: scored.differences(arm, one) for one in precisions} for arm in compared},
        means={arm: means for arm in compared if (means := scored.means(arm, precisions))},
        loss_survival={arm: scored.survival(arm, records) for arm in compared},
        delta_survival={arm: _delta_survival(recipe, arm, records) for arm in arms},
        replicas={
            run.name: Replica(
                run.arm,
                run.seed,
                _known(Training, records[f"{run.name}/model"]),
                {one: _measurement(records, run.name, one) for one in precisions},
            )
            for run in recipe.arm_runs
            if run.replica
        },
        missing_tasks=records["items"]["missing"],
        latency=from_json(DeviceResult, records["latency"]),
        packages={arm: [f"{arm}/{target}" for target in recipe.targets] for arm in arms},
        stages=[Stage(step.name, step.record.seconds, step.cached) for step in passed],
        **surroundings(),
    )


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


def _known(kind: Any, record: Mapping[str, Any], **more: Any) -> Any:
    """A dataclass from those of a record's values that it knows."""
    names = {part.name for part in dataclasses.fields(kind)}
    return from_json(kind, {key: value for key, value in {**record, **more}.items() if key in names})


def _measurement(records: Mapping[str, Any], arm: str, precision: str) -> Measurement:
    return from_json(Measurement, records[f"{arm}/measure-{precision}"])


def _bundle(records: Mapping[str, Any], arm: str, precision: str) -> Bundle:
    record = records[f"{arm}/{precision}"]
    tensors = record.get("by_tensor", [])
    found: Bundle = _known(Bundle, record, path=f"{arm}/{precision}", tensors=tensors)
    return found


def _delta_survival(recipe: Recipe, arm: str, records: Mapping[str, Any]) -> dict[str, Json]:
    """precision -> what is left of training in a bundle's weights, without the figures of every tensor."""
    found: dict[str, Json] = {}
    for precision in recipe.precisions:
        if (record := records.get(f"{arm}/survival-{precision}")) is not None:
            references = {
                name: {key: value for key, value in one.items() if key != "tensors"}
                for name, one in record["references"].items()
            }
            found[precision] = {**record, "references": references}
    return found


class _Scored:
    """The per-item results of every training; comparisons are made when they are asked for, once."""

    def __init__(self, recipe: Recipe, folders: Mapping[str, Path]) -> None:
        self.recipe = recipe
        self.folders = folders
        self.resampling = Resampling(recipe.evaluate.bootstrap, recipe.seed)
        self._items: dict[tuple[str, str], list[Results]] = {}
        self._differences: dict[tuple[str, str], dict[str, TaskDifference]] = {}

    def items(self, arm: str, precision: str) -> list[Results]:
        """For each seed, task -> result with its items."""
        if (arm, precision) not in self._items:
            runs = [run.name for run in self.recipe.arm_runs if run.arm == arm]
            paths = [self.folders[f"{run}/measure-{precision}"] / "items.json" for run in runs]
            read = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
            self._items[arm, precision] = [from_json(Results, one) for one in read]
        return self._items[arm, precision]

    def scores(self, arm: str, precision: str) -> dict[str, TaskScore]:
        """Task -> the arm's score over all seeds."""
        by_seed = self.items(arm, precision)
        return {task: average_task([one[task] for one in by_seed], self.resampling) for task in by_seed[0]}

    def differences(self, arm: str, precision: str) -> dict[str, TaskDifference]:
        """Task -> arm - baseline over all seeds."""
        if (arm, precision) not in self._differences:
            pairs = list(zip(self.items(BASELINE, precision), self.items(arm, precision), strict=True))
            self._differences[arm, precision] = {
                task: compare_task([(first[task], second[task]) for first, second in pairs], self.resampling)
                for task in pairs[0][0]
            }
        return self._differences[arm, precision]

    def means(self, arm: str, precisions: list[str]) -> dict[str, MeanDifference]:
        """precision -> the mean over tasks, where there are two tasks to average."""
        found = {
            one: mean_difference(
                self.scores(BASELINE, one), self.scores(arm, one), self.differences(arm, one)
            )
            for one in precisions
        }
        return {precision: mean for precision, mean in found.items() if mean is not None}

    def survival(self, arm: str, records: Mapping[str, Any]) -> dict[str, dict[str, LossSurvival]]:
        """precision -> task -> what quantization leaves of the difference, for tasks that are losses."""
        found: dict[str, dict[str, LossSurvival]] = {}
        for precision in self.recipe.precisions:
            if f"{arm}/survival-{precision}" not in records:
                continue
            sides = [self.items(one, at) for at in ("torch", precision) for one in (BASELINE, arm)]
            by_seed = list(zip(*sides, strict=True))
            found[precision] = {
                task: loss_survival(
                    [(a[task], b[task], c[task], d[task]) for a, b, c, d in by_seed], self.resampling
                )
                for task, result in by_seed[0][0].items()
                if is_loss(result)
            }
        return found
