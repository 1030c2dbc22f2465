"""What a finished build says of itself, as one dict: the input of the report and of `edgedisp compare`.

It is read from the records of the stages alone. The paired comparisons of the arms with the baseline are made
here, from the per-item results that the accuracy stages kept; nothing is scored again.

With several seeds, an arm's scores and comparisons are over all of them (evaluate/seeds.py). All else that
stands under an arm's name is its first training's; the others' stands under `replicas`.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgedisp.bench.system import describe, installed_version
from edgedisp.core.errors import BadInput
from edgedisp.core.stage_folder import git_commit
from edgedisp.evaluate.means import mean_difference
from edgedisp.evaluate.seeds import average_task, compare_tasks
from edgedisp.evaluate.survival import is_measured_by, loss_survival
from edgedisp.pipeline import Walked
from edgedisp.recipe import ArmRun, Recipe

PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "peft", "bitsandbytes", "lm-eval")
BASELINE = "baseline"


def summarise(recipe: Recipe, walked: list[Walked]) -> dict[str, Any]:
    """The summary of a build; see `edgedisp.report` for its schema."""
    results = {step.name: step.record.results for step in walked}
    precisions = ["torch", *recipe.precisions]
    scored = _Scored(recipe, walked)
    arms = [arm.name for arm in recipe.arms]
    machine = describe()
    return {
        "name": recipe.name,
        "hash8": recipe.hash8,
        "smoke": recipe.is_smoke,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["edgedisp", *sys.argv[1:]]),
        "recipe_yaml": recipe.to_yaml(),
        "machine": {key: value for key, value in machine.items() if key != "packages"},
        "versions": {name: version for name in PACKAGES if (version := installed_version(name))},
        "git_commit": git_commit(),
        "seed": recipe.seed,
        "arms": arms,
        "seeds": [recipe.seed + replica for replica in range(recipe.seeds)],
        "techniques": {run.arm: run.adds for run in recipe.arm_runs if run.replica == 0},
        "precisions": precisions,
        "model": {"base": _base_name(recipe), **results["base"]},
        "corpus": results["corpus"],
        "midtrain": {arm: results[f"{arm}/model"] for arm in arms},
        "condensation": {arm: results[f"{arm}/condensation"] for arm in arms},
        "condensation_bundles": _by_precision(arms, recipe.precisions, "condensation", results),
        "bundles": {arm: _bundles(recipe, arm, results) for arm in arms},
        "verify": _by_precision(arms, recipe.precisions, "verify", results),
        "accuracy": {
            arm: {precision: scored.arm(arm, precision) for precision in precisions} for arm in arms
        },
        "comparison": compare_arms(scored, precisions),
        "means": mean_differences(scored, precisions),
        "noise": _noise(arms, precisions, results),
        "divergence": _divergence(recipe, arms, results),
        "survival": {arm: _survival(recipe, arm, results, scored) for arm in arms},
        "replicas": {run.name: _replica(run, recipe, results) for run in recipe.arm_runs if run.replica},
        "missing_tasks": results["items"]["missing"],
        "latency": _latency(results["latency"]),
        "packed": {arm: [f"{arm}/{target}" for target in recipe.targets] for arm in arms},
        "stages": [{"name": step.name, "seconds": step.record.seconds, "kept": step.kept} for step in walked],
    }


def _base_name(recipe: Recipe) -> str:
    if recipe.is_smoke:
        return f"a tiny random {recipe.model.architecture} in the place of {recipe.model.base}"
    return recipe.model.base


def _bundles(recipe: Recipe, arm: str, results: dict[str, Any]) -> dict[str, Any]:
    return {
        precision: {"path": f"{arm}/{precision}", **results[f"{arm}/{precision}"]}
        for precision in recipe.precisions
    }


def _by_precision(
    arms: Sequence[str], precisions: Sequence[str], stage: str, results: dict[str, Any]
) -> dict[str, Any]:
    return {
        arm: {precision: results[f"{arm}/{stage}-{precision}"] for precision in precisions} for arm in arms
    }


def _noise(arms: Sequence[str], precisions: Sequence[str], results: dict[str, Any]) -> dict[str, Any]:
    steady = BASELINE if BASELINE in arms else arms[0]
    return {precision: results[f"{steady}/noise-{precision}"] for precision in precisions}


def _divergence(recipe: Recipe, arms: Sequence[str], results: dict[str, Any]) -> dict[str, Any]:
    """Of each bundle that was compared with another."""
    return {
        arm: {
            precision: found
            for precision in recipe.precisions
            if (found := results.get(f"{arm}/divergence-{precision}")) is not None
        }
        for arm in arms
    }


def _replica(run: ArmRun, recipe: Recipe, results: dict[str, Any]) -> dict[str, Any]:
    """What is told of one training with another seed than the first."""
    scored = ["torch", *recipe.precisions]
    return {
        "arm": run.arm,
        "seed": run.seed,
        "midtrain": results[f"{run.name}/model"],
        "verify": _by_precision([run.name], recipe.precisions, "verify", results)[run.name],
        "accuracy": _by_precision([run.name], scored, "accuracy", results)[run.name],
    }


def _survival(
    recipe: Recipe, arm: str, results: dict[str, Any], scored: _Scored
) -> dict[str, dict[str, Any]]:
    """precision -> what is left of training in an arm's bundle: of its weights, and of its loss's difference
    from the baseline. The stage's record also tells of every tensor."""
    found: dict[str, dict[str, Any]] = {}
    for precision in recipe.precisions:
        if (weights := results.get(f"{arm}/survival-{precision}")) is None:
            continue
        references = {
            name: {key: value for key, value in reference.items() if key != "tensors"}
            for name, reference in weights["references"].items()
        }
        found[precision] = {"weights": {**weights, "references": references}}
        if arm != BASELINE and BASELINE in {run.arm for run in recipe.arm_runs}:
            found[precision]["loss"] = scored.survival(BASELINE, arm, precision)
    return found


class _Scored:
    """The per-item results of every training, read when they are asked for."""

    def __init__(self, recipe: Recipe, walked: list[Walked]) -> None:
        self.recipe = recipe
        self.records = {step.name: step.record for step in walked}
        self._pairs: dict[tuple[str, str, str], dict[str, Any]] = {}  # thousands of resamples each

    def arm(self, arm: str, precision: str) -> dict[str, Any]:
        """Task -> the arm's result over all seeds, without items."""
        if self.recipe.seeds == 1:
            return self.records[f"{arm}/accuracy-{precision}"].results
        by_seed = self.items(arm, precision)
        return {task: average_task([one[task] for one in by_seed], **self._options) for task in by_seed[0]}

    def pair(self, before: str, after: str, precision: str) -> dict[str, Any]:
        """Task -> the paired comparison of two arms over all seeds."""
        asked = before, after, precision
        if asked not in self._pairs:
            by_seed = list(zip(self.items(before, precision), self.items(after, precision), strict=True))
            self._pairs[asked] = {
                task: compare_tasks([(left[task], right[task]) for left, right in by_seed], **self._options)
                for task in by_seed[0][0]
            }
        return self._pairs[asked]

    def survival(self, before: str, after: str, precision: str) -> dict[str, Any]:
        """Task -> what quantization leaves of the difference between two arms, for tasks that are losses."""
        fours = list(
            zip(
                self.items(before, "torch"),
                self.items(after, "torch"),
                self.items(before, precision),
                self.items(after, precision),
                strict=True,
            )
        )
        tasks = [task for task, result in fours[0][0].items() if is_measured_by(result)]
        return {
            task: loss_survival([tuple(one[task] for one in four) for four in fours], **self._options)
            for task in tasks
        }

    def items(self, arm: str, precision: str) -> list[dict[str, Any]]:
        """For each seed, task -> result with its items."""
        runs = [run.name for run in self.recipe.arm_runs if run.arm == arm]
        paths = [self.records[f"{run}/accuracy-{precision}"].folder / "items.json" for run in runs]
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

    @property
    def _options(self) -> dict[str, int]:
        return {"bootstrap": self.recipe.evaluate.bootstrap, "seed": self.recipe.seed}


def compare_arms(scored: _Scored, precisions: list[str]) -> dict[str, Any]:
    """arm -> precision -> task -> arm - baseline, paired by item; empty without a baseline."""
    arms = [arm.name for arm in scored.recipe.arms]
    if BASELINE not in arms:
        return {}
    return {
        arm: {
            precision: {task: renamed(entry) for task, entry in scored.pair(BASELINE, arm, precision).items()}
            for precision in precisions
        }
        for arm in arms
        if arm != BASELINE
    }


def mean_differences(scored: _Scored, precisions: list[str]) -> dict[str, Any]:
    """arm -> precision -> the mean over tasks of arm - baseline, where there are two tasks to average."""
    arms = [arm.name for arm in scored.recipe.arms]
    if BASELINE not in arms:
        return {}
    found: dict[str, Any] = {}
    for arm in (name for name in arms if name != BASELINE):
        for precision in precisions:
            before, after = scored.arm(BASELINE, precision), scored.arm(arm, precision)
            record = mean_difference(before, after, scored.pair(BASELINE, arm, precision))
            if record is not None:
                found.setdefault(arm, {})[precision] = record
    return found


def renamed(entry: dict[str, Any]) -> dict[str, Any]:
    """`statistics.paired` calls the other arm `dispersed`; here it may be any, and is called `arm`."""
    names = {"dispersed": "arm", "only_dispersed": "only_arm"}
    found = {names.get(key, key): value for key, value in entry.items()}
    if "metrics" in found:
        found["metrics"] = {name: renamed(part) for name, part in found["metrics"].items()}
    return found


def _latency(results: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for row in results["rows"]:
        arm, precision = row["label"].split("/")
        rows.append({**row, "arm": arm, "precision": precision})
    return {**results, "device": "local", "rows": rows}


def load(run: Path) -> dict[str, Any]:
    """The summary of a finished run folder, or of a report.json file.

    Raises BadInput if there is none, or if the file is damaged.
    """
    path = run / "report.json" if run.is_dir() else run
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise BadInput(f"{run}: holds no report.json; `edgedisp build` writes one when it ends") from None
    except ValueError as error:
        raise BadInput(f"{path}: is damaged ({error}); delete it and run `edgedisp build` again") from None
    summary = report.get("summary", report) if isinstance(report, dict) else {}
    if not isinstance(summary, dict) or not {"name", "arms", "precisions"} <= summary.keys():
        raise BadInput(f"{path}: is no report of a build (it tells no name, arms and precisions)")
    return summary
