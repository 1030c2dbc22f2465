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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgedisp.bench.system import describe, installed_version
from edgedisp.core.errors import BadInput
from edgedisp.core.results import (
    Condensation,
    Difference,
    Estimate,
    LayerProfile,
    LossSurvival,
    MeanDifference,
    Measurement,
    NoiseFloor,
    Parity,
    Score,
    Seeds,
    TaskDifference,
    TaskScore,
)
from edgedisp.core.serialization import from_json, to_json
from edgedisp.core.stage_folder import git_commit
from edgedisp.evaluate.quantization_survival import is_loss, loss_survival
from edgedisp.evaluate.seeds_and_means import average_task, compare_tasks, mean_difference
from edgedisp.evaluate.statistics import Resampling
from edgedisp.evaluate.task_result import Results
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
    measured = {arm: {one: _measurement(results, arm, one) for one in precisions} for arm in arms}
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
        "condensation": {arm: condensation_record(measured[arm]["torch"].condensation) for arm in arms},
        "condensation_bundles": {
            arm: {one: condensation_record(measured[arm][one].condensation) for one in recipe.precisions}
            for arm in arms
        },
        "bundles": {arm: _bundles(recipe, arm, results) for arm in arms},
        "verify": {
            arm: {one: parity_record(measured[arm][one].parity) for one in recipe.precisions} for arm in arms
        },
        "accuracy": {
            arm: {precision: scores_record(scored.arm(arm, precision)) for precision in precisions}
            for arm in arms
        },
        "comparison": compare_arms(scored, precisions),
        "means": mean_differences(scored, precisions),
        "noise": {
            precision: noise_record(found.noise)
            for by_precision in measured.values()
            for precision, found in by_precision.items()
            if found.noise is not None
        },
        "divergence": {
            arm: {
                precision: {name: to_json(one) for name, one in found.divergence.items()}
                for precision, found in measured[arm].items()
                if found.divergence
            }
            for arm in arms
        },
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


def _measurement(results: dict[str, Any], arm: str, precision: str) -> Measurement:
    return from_json(Measurement, results[f"{arm}/measure-{precision}"])


def _replica(run: ArmRun, recipe: Recipe, results: dict[str, Any]) -> dict[str, Any]:
    """What is told of one training with another seed than the first."""
    measured = {one: _measurement(results, run.name, one) for one in ("torch", *recipe.precisions)}
    return {
        "arm": run.arm,
        "seed": run.seed,
        "midtrain": results[f"{run.name}/model"],
        "verify": {one: parity_record(measured[one].parity) for one in recipe.precisions},
        "accuracy": {precision: scores_record(found.scores) for precision, found in measured.items()},
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
        self._pairs: dict[tuple[str, str, str], dict[str, TaskDifference]] = {}  # thousands of resamples each

    def arm(self, arm: str, precision: str) -> dict[str, TaskScore]:
        """Task -> the arm's score over all seeds."""
        by_seed = self.items(arm, precision)
        return {task: average_task([one[task] for one in by_seed], self._resampling) for task in by_seed[0]}

    def pair(self, before: str, after: str, precision: str) -> dict[str, TaskDifference]:
        """Task -> the paired comparison of two arms over all seeds."""
        key = before, after, precision
        if key not in self._pairs:
            by_seed = list(zip(self.items(before, precision), self.items(after, precision), strict=True))
            self._pairs[key] = {
                task: compare_tasks([(left[task], right[task]) for left, right in by_seed], self._resampling)
                for task in by_seed[0][0]
            }
        return self._pairs[key]

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
        return {
            task: survival_record(
                loss_survival(
                    [(a[task], b[task], c[task], d[task]) for a, b, c, d in fours], self._resampling
                )
            )
            for task, result in fours[0][0].items()
            if is_loss(result)
        }

    def items(self, arm: str, precision: str) -> list[Results]:
        """For each seed, task -> result with its items."""
        runs = [run.name for run in self.recipe.arm_runs if run.arm == arm]
        paths = [self.records[f"{run}/measure-{precision}"].folder / "items.json" for run in runs]
        return [from_json(Results, json.loads(path.read_text(encoding="utf-8"))) for path in paths]

    @property
    def _resampling(self) -> Resampling:
        return Resampling(self.recipe.evaluate.bootstrap, self.recipe.seed)


def compare_arms(scored: _Scored, precisions: list[str]) -> dict[str, Any]:
    """arm -> precision -> task -> arm - baseline, paired by item; empty without a baseline."""
    arms = [arm.name for arm in scored.recipe.arms]
    if BASELINE not in arms:
        return {}
    return {
        arm: {
            precision: differences_record(scored.pair(BASELINE, arm, precision)) for precision in precisions
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
            mean = mean_difference(before, after, scored.pair(BASELINE, arm, precision))
            if mean is not None:
                found.setdefault(arm, {})[precision] = mean_record(mean)
    return found


# Typed results as the plain records that the report reads.


def _seeds(seeds: Seeds | None) -> dict[str, Any]:
    return {} if seeds is None else {"seeds": {"n": len(seeds.values), **to_json(seeds)}}


def _estimate(estimate: Estimate, key: str = "value") -> dict[str, Any]:
    return {key: estimate.value, "low": estimate.low, "high": estimate.high, **_seeds(estimate.seeds)}


def _score(score: Score) -> dict[str, Any]:
    estimate = score.estimate
    return {
        "metric": score.metric,
        **_estimate(estimate),
        "n": estimate.n,
        "documents": estimate.documents,
        "higher_is_better": score.higher_is_better,
        "reason": estimate.reason,
    }


def scores_record(scores: dict[str, TaskScore]) -> dict[str, Any]:
    return {
        name: {
            "task": task.task,
            **_score(task.main),
            "chance": task.chance,
            "truncated": task.truncated,
            "items_sha256": task.items_sha256,
            "metrics": {metric: _score(score) for metric, score in task.metrics.items()},
        }
        for name, task in scores.items()
    }


def _difference(one: Difference) -> dict[str, Any]:
    estimate = one.estimate
    record = {
        "metric": one.metric,
        "baseline": one.first,
        "arm": one.second,
        **_estimate(estimate, "difference"),
        "n": estimate.n,
        "documents": estimate.documents,
        "higher_is_better": one.higher_is_better,
        "reason": estimate.reason,
        "p_value": estimate.p,
        "test": one.test,
    }
    if one.only_first is not None:
        record |= {"only_baseline": one.only_first, "only_arm": one.only_second}
    if one.nats is not None:
        record["nll_difference"] = {**_estimate(one.nats, "difference"), "per": one.per}
    return record


def differences_record(tasks: dict[str, TaskDifference]) -> dict[str, Any]:
    return {
        name: {
            **_difference(task.main),
            "metrics": {metric: _difference(one) for metric, one in task.metrics.items()},
        }
        for name, task in tasks.items()
    }


def mean_record(mean: MeanDifference) -> dict[str, Any]:
    return {
        "baseline": mean.first,
        "arm": mean.second,
        **_estimate(mean.estimate, "difference"),
        "tasks": list(mean.tasks),
        "left_out": mean.left_out,
        "n": mean.estimate.n,
    }


def survival_record(survival: LossSurvival) -> dict[str, Any]:
    parts = {"full": survival.full, "quantized": survival.quantized, "change": survival.change}
    return {
        **{name: _estimate(one, "difference") for name, one in parts.items()},
        "verdict": survival.verdict,
        "n": survival.full.n,
        "documents": survival.full.documents,
        "reason": survival.full.reason,
    }


def noise_record(noise: NoiseFloor) -> dict[str, Any]:
    variants = {name: _estimate(one, "difference") for name, one in noise.variants.items()}
    documents = next((one.documents for one in noise.variants.values()), None)
    return {"floor": noise.floor, "variants": variants, "documents": documents}


def parity_record(parity: Parity | None) -> dict[str, Any]:
    if parity is None:
        return {}
    record = dict(to_json(parity))
    return {**record.pop("graph"), **record}


def condensation_record(found: Condensation | None) -> dict[str, Any]:
    if found is None:
        return {}
    record: dict[str, Any] = {
        "layers": [{"layer": row.layer, **_layer(row)} for row in found.layers],
        "final_norm": None if found.final_norm is None else _layer(found.final_norm),
        "mean_cosine": _estimate(found.mean_cosine),
        "correlations": {name: _estimate(one) for name, one in found.correlations.items()},
        "sequences": found.sequences,
        "tokens": found.tokens,
    }
    if (change := found.change) is not None:
        record["change"] = {
            "layers": [
                {"layer": row.layer, **{k: _estimate(one, "difference") for k, one in row.figures.items()}}
                for row in change.layers
            ],
            "final_norm": None
            if change.final_norm is None
            else {k: _estimate(one, "difference") for k, one in change.final_norm.figures.items()},
            "mean_cosine": _estimate(change.mean_cosine, "difference"),
            "correlations": {name: _estimate(one, "difference") for name, one in change.correlations.items()},
        }
    return record


def _layer(row: LayerProfile) -> dict[str, Any]:
    ends = {name: [one.low, one.high] for name, one in row.figures.items() if one.has_interval}
    values = {name: one.value for name, one in row.figures.items()}
    return {**values, "intervals": ends, "histogram": list(row.histogram)}


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
