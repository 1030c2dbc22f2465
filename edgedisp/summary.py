"""What a finished build says of itself, as one dict: the input of the report and of `edgedisp compare`.

It is read from the records of the stages alone. The paired comparison of the arms is made here, from the
per-item results that the accuracy stages kept; nothing is scored again.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgedisp import BadInput
from edgedisp.bench.machine import describe, installed_version
from edgedisp.evaluate.result import compare_task
from edgedisp.folder import git_commit, write_json
from edgedisp.pipeline import Walked
from edgedisp.recipe import Recipe
from edgedisp.report import model_card
from edgedisp.report import write as write_report

PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "peft", "bitsandbytes", "lm-eval")


def summarise(recipe: Recipe, walked: list[Walked]) -> dict[str, Any]:
    """The summary of a build; see `edgedisp.report` for its schema."""
    results = {step.name: step.record.results for step in walked}
    precisions = ["torch", *recipe.precisions]
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
        "arms": list(recipe.arms),
        "precisions": precisions,
        "model": {"base": _base_name(recipe), **results["base"]},
        "corpus": results["corpus"],
        "midtrain": {arm: results[f"{arm}/model"] for arm in recipe.arms},
        "condensation": {arm: results[f"{arm}/condensation"] for arm in recipe.arms},
        "bundles": {arm: _bundles(recipe, arm, results) for arm in recipe.arms},
        "verify": _by_precision(recipe, recipe.precisions, "verify", results),
        "accuracy": _by_precision(recipe, precisions, "accuracy", results),
        "comparison": compare_arms(recipe, walked, precisions),
        "latency": _latency(results["latency"]),
        "packed": {arm: [f"{arm}/{target}" for target in recipe.targets] for arm in recipe.arms},
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
    recipe: Recipe, precisions: Sequence[str], stage: str, results: dict[str, Any]
) -> dict[str, Any]:
    return {
        arm: {precision: results[f"{arm}/{stage}-{precision}"] for precision in precisions}
        for arm in recipe.arms
    }


def compare_arms(recipe: Recipe, walked: list[Walked], precisions: list[str]) -> dict[str, Any]:
    """dispersed - baseline for each precision and task, paired by item; empty with a single arm."""
    if set(recipe.arms) != {"baseline", "dispersed"}:
        return {}
    folders = {step.name: step.record.folder for step in walked}

    def items(arm: str, precision: str) -> dict[str, Any]:
        path = folders[f"{arm}/accuracy-{precision}"] / "items.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    compared: dict[str, Any] = {}
    for precision in precisions:
        left, right = items("baseline", precision), items("dispersed", precision)
        compared[precision] = {
            task: compare_task(left[task], right[task], bootstrap=recipe.evaluate.bootstrap, seed=recipe.seed)
            for task in left
        }
    return compared


def _latency(results: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for row in results["rows"]:
        arm, precision = row["label"].split("/")
        rows.append({**row, "arm": arm, "precision": precision})
    return {**results, "device": "local", "rows": rows}


def publish(recipe: Recipe, walked: list[Walked], run: Path) -> dict[str, Any]:
    """Write the report into the run folder unless it stands there already, and return the summary."""
    made_from = {step.name: [step.record.content, step.record.seconds] for step in walked}
    stamp = run / "report" / "made_from.json"
    known = {"stages": made_from, "recipe": recipe.to_yaml()}
    if stamp.is_file() and json.loads(stamp.read_text()) == known and (run / "report.html").is_file():
        found: dict[str, Any] = load(run)
        return found
    summary = summarise(recipe, walked)
    write_report(summary, run)
    for arm in recipe.arms:  # a Hugging Face folder explains itself in its README
        (run / arm / "model" / "README.md").write_text(model_card(summary, arm), encoding="utf-8")
    (run / "recipe.lock.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    stamp.parent.mkdir(exist_ok=True)
    write_json(stamp, known)
    return summary


def load(run: Path) -> dict[str, Any]:
    """The summary of a finished run folder, or of a report.json file.

    Raises BadInput if there is none, or if the file is damaged.
    """
    path = run / "report.json" if run.is_dir() else run
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return report.get("summary", report)
    except OSError:
        raise BadInput(f"{run}: holds no report.json; `edgedisp build` writes one when it ends") from None
    except ValueError as error:
        raise BadInput(f"{path}: is damaged ({error}); delete it and run `edgedisp build` again") from None
