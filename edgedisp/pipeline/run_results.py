"""A finished build as one typed `Run`, the input of `compare` and of the report, which is written here.

A run is read from the records of the stages alone. The paired comparisons with the baseline are made from the
per-item results that the measure stages stored; nothing is scored again. With several seeds an arm's scores
and comparisons are over all of them. `report/made_from.json` says what a report was made from, with a hash of
each of its files: `edgedisp build` writes a report again that was cut off, edited or deleted, and no command
reads one that is older than a stage.
"""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from edgedisp.bench.system import runner
from edgedisp.core import files
from edgedisp.core.errors import BadInput
from edgedisp.core.results import (
    BASE,
    BASELINE,
    DISPERSED,
    REPORT_FORMAT,
    Bundle,
    DeviceResult,
    LossSurvival,
    Measurement,
    Training,
)
from edgedisp.core.run import Replica, Run, Stage
from edgedisp.core.stage_folder import RUN, read
from edgedisp.evaluate import comparison
from edgedisp.evaluate.answers import short_prompt, wrong_answers
from edgedisp.evaluate.comparison import Results
from edgedisp.evaluate.statistics import DEFAULT, Resampling
from edgedisp.pipeline import device_results
from edgedisp.pipeline.build_plan import UNTRAINED
from edgedisp.pipeline.options import ITEMS
from edgedisp.pipeline.stage import Passed
from edgedisp.recipe import Recipe
from edgedisp.report.cards import bundle_card, model_card

PACKAGES = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "peft", "bitsandbytes", "lm-eval")
REPORT = "report.json"
STAMP = "report/made_from.json"  # in the run folder
FILES = ("report.html", "report.md", REPORT, "recipe.lock.yaml", "plots/*.png")  # that a report writes

Scored = dict[str, list[Results]]
"""Results of one arm: precision -> one for each seed."""


def run_results(recipe: Recipe, passed: list[Passed]) -> Run:
    """The results of a build that has passed all its stages."""
    records = {step.name: step.record.results for step in passed}
    arms = sorted((arm.name for arm in recipe.arms), key=lambda arm: (arm != BASELINE, arm != DISPERSED))
    precisions = ["torch", *sorted(recipe.precisions, key=lambda name: -int(name.strip("fpint")))]
    quantized = [name for name in precisions if name not in ("torch", "fp32")]
    training = {run.name: files.from_json(Training, records[f"{run.name}/model"]) for run in recipe.arm_runs}
    untouched = {BASE: UNTRAINED} if recipe.evaluate.measures_base else {}
    folders = {run.name: run.name for run in recipe.arm_runs} | untouched
    measured = {
        name: {at: files.from_json(Measurement, records[f"{folder}/measure-{at}"]) for at in precisions}
        for name, folder in folders.items()
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
        bundles={
            name: {
                at: files.from_json(
                    Bundle, {**records[f"{folders[name]}/{at}"], "path": f"{folders[name]}/{at}"}
                )
                for at in recipe.precisions
            }
            for name in (*arms, *untouched)
        },
        measurements={name: measured[name] for name in (*arms, *untouched)},
        delta_survival={arm: {name: records[f"{arm}/survival-{name}"] for name in quantized} for arm in arms},
        replicas={
            run.name: Replica(run.arm, run.seed, training[run.name], measured[run.name])
            for run in recipe.arm_runs
            if run.replica
        },
        missing_tasks=records["items"]["missing"],
        latency=files.from_json(DeviceResult, records["latency"]),
        stages=[Stage(step.name, step.record.seconds, step.cached) for step in passed],
        **surroundings(),
    )
    resampling = Resampling(recipe.evaluate.bootstrap, recipe.seed)
    return _compared(run, passed[0].record.folder.parent, resampling)


def _compared(run: Run, folder: Path, resampling: Resampling) -> Run:
    """A run with its scores over all seeds and all that is compared, from the items in its folder."""
    arms, bundles = run.arms, run.precisions[1:]
    scored = {arm: read_scored(folder, run, arm) for arm in arms}
    for group in [arms] if BASELINE in arms else [[arm] for arm in arms]:
        join(run, {arm: scored[arm] for arm in group}, resampling)
    for arm in run.compared_arms:
        run.loss_survival[arm] = {
            name: _loss_survival(scored[BASELINE], scored[arm], name, resampling)
            for name in bundles
            if name != "fp32"
        }
    if run.has_base:
        scored[BASE] = read_scored(folder, run, BASE)
        for arm, at, task in itertools.product(arms, run.precisions, scored[BASE]["torch"][0]):
            pairs = [(scored[BASE][at][0][task], training[task]) for training in scored[arm][at]]
            gained = comparison.compare_task(pairs, resampling)
            run.gains.setdefault(arm, {}).setdefault(at, {})[task] = gained
    models = [name for name in (BASE, *arms) if name in scored]
    results = {f"{name}/{at}": scored[name][at][0] for name in models for at in bundles}
    shipped = f"{run.main_arm or arms[-1]}/{bundles[-1]}"
    return replace(run, answers=wrong_answers(results, shipped), prompt=short_prompt(results[shipped]))


def read_scored(path: Path, run: Run, arm: str) -> Scored:
    """The results of an arm, or of the untouched base, with their items, as the measure stages of the run
    stored them. Raises BadInput where one cannot be read."""
    folder = path if path.is_dir() else path.parent
    scored: Scored = {precision: [] for precision in run.precisions}
    folders = [UNTRAINED] if arm == BASE else run.trainings(arm)
    for precision, training in itertools.product(run.precisions, folders):
        file = folder / training / f"measure-{precision}" / ITEMS
        try:
            scored[precision].append(read_items(file.parent))
        except (OSError, ValueError) as problem:
            raise BadInput(
                f"{path}: comparing runs needs the run folder with its items, not a report alone, and "
                f"{file.relative_to(folder)} cannot be read ({problem}); `edgedisp build` makes it again"
            ) from None
    return scored


def read_items(measured: Path) -> Results:
    """The items that a measure stage stored; OSError or ValueError where they are not as they were."""
    files.check_files(measured, ITEMS)
    return files.from_json(Results, json.loads((measured / ITEMS).read_text(encoding="utf-8")))


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
    for arm, scored in arms.items():
        for precision, by_seed in scored.items():
            scores = {task: average([results[task] for results in by_seed]) for task in by_seed[0]}
            measured = replace(run.measured(arm, precision), scores=scores)
            run.measurements.setdefault(arm, {})[precision] = measured
    (_, first), *others = arms.items()
    for arm, other in others:
        for precision in (name for name in first if name in other):
            pairs, reasons = comparison.common_pairs(first[precision], other[precision])
            texts = dict.fromkeys(f"{arm}, {reason}" for reason in reasons)
            run.unpaired.extend(text for text in texts if text not in run.unpaired)
            if not pairs:
                continue
            differences = {task: comparison.compare_task(seeds, resampling) for task, seeds in pairs.items()}
            run.comparisons.setdefault(arm, {})[precision] = differences
            before, after = (
                {task: average([pair[side] for pair in seeds]) for task, seeds in pairs.items()}
                for side in (0, 1)
            )
            if (mean := comparison.mean_difference(before, after, differences)) is not None:
                run.means.setdefault(arm, {})[precision] = mean


def surroundings() -> dict[str, Any]:
    """When, by which command, on which machine and with which versions a report is made."""
    machine = runner().describe(PACKAGES)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["edgedisp", *sys.argv[1:]]),
        "versions": {name: version for name, version in machine.pop("packages").items() if version},
        "machine": machine,
        "git_commit": files.git_commit(),
    }


def is_run(path: Path) -> bool:
    """Whether a path names a run, or a report.json."""
    return any((path / name).is_file() for name in (RUN, REPORT)) or path.suffix == ".json"


def load(run: Path) -> Run:
    """The results of a finished run folder, or of a report.json.

    Raises BadInput if there is none, if it is damaged or of another shape, or older than a stage of its run.
    """
    path = run / REPORT if run.is_dir() else run
    if not path.is_file():
        raise BadInput(f"{run}: holds no {REPORT}; `edgedisp build` writes one when it ends")
    results = _read_report(path)
    if (path.parent / RUN).is_file() and (reason := _outdated(path.parent)):
        raise BadInput(f"{path}: {reason}; `edgedisp build` writes it again")
    return results


def _read_report(path: Path) -> Run:
    try:
        document = files.read_json(path)
        if document.get("format") != REPORT_FORMAT:
            raise ValueError(f"it is no report of format {REPORT_FORMAT}")
        return files.from_json(Run, document["run"])
    except (ValueError, KeyError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); `edgedisp build` writes it again") from None


def _outdated(run: Path) -> str | None:
    """Why the report of a run is not that of the stages there; None if it is."""
    stamp = files.read_object(run / STAMP)
    try:
        stages = dict(stamp["key"]["stages"])
        if damage := files.damaged_file(run, {REPORT: files.listed_files(stamp)[REPORT]}):
            return damage
    except files.WRONG_SHAPE:
        return "the writing of the report was cut off"
    for name in stages:
        if not (run / name / files.RECORD).is_file():
            continue  # removed, to save space
        if (record := read(run / name)) is None:
            return f"the stage {name} is damaged"
        if stages[name] != [record.content, record.seconds]:
            return f"it is older than the stage {name}"
    return None


# The report in the run folder


def publish(recipe: Recipe, passed: list[Passed], run: Path) -> Run:
    """Write the report into the run folder unless it is there already, and return the results."""
    stages = {step.name: [step.record.content, step.record.seconds] for step in passed}
    with _lock(run):
        devices, outdated = device_results.load(run)
        digest = files.digest([files.to_json(devices), outdated])
        key = {"stages": stages, "recipe": recipe.to_yaml(), "devices": digest}
        if files.read_object(run / STAMP) == {"key": key, "files": files.list_files(run, patterns=FILES)}:
            return _read_report(run / REPORT)
        results = replace(run_results(recipe, passed), devices=devices, devices_outdated=outdated)
        for arm_run in recipe.arm_runs:  # a Hugging Face folder explains itself in its README
            card = model_card(results, arm_run.name)
            (run / arm_run.name / "model" / "README.md").write_text(card, encoding="utf-8")
        for path in (f"{arm}/{target}" for arm in results.arms for target in recipe.targets):
            card = bundle_card(files.read_json(run / path / files.MANIFEST), path, results)
            (run / path / "README.md").write_text(card, encoding="utf-8")
        _write(results, run, key)
    return results


def show_devices(run: Path) -> str:
    """Write a run's report again with its devices, unless a build has yet to write it; says what it did.

    Raises OSError where it cannot be written.
    """
    with _lock(run):
        if not (run / REPORT).is_file() or _outdated(run):
            folder = run / device_results.FOLDER
            return f"{folder}: the report will show it once `edgedisp build` has ended"
        devices, outdated = device_results.load(run)
        digest = files.digest([files.to_json(devices), outdated])
        key = {**files.read_json(run / STAMP)["key"], "devices": digest}
        _write(replace(_read_report(run / REPORT), devices=devices, devices_outdated=outdated), run, key)
    return f"report: {run / 'report.html'} shows it under On devices"


def _write(results: Run, run: Path, key: dict[str, Any]) -> None:
    from edgedisp.report import render  # brings matplotlib

    (run / STAMP).unlink(missing_ok=True)
    (run / "recipe.lock.yaml").write_text(results.recipe_yaml, encoding="utf-8")
    render.write(results, run)
    files.write_json(run / STAMP, files.sealed({"key": key, "files": files.list_files(run, patterns=FILES)}))


@contextmanager
def _lock(run: Path) -> Iterator[None]:
    """Hold a run's report for the seconds that writing takes."""
    (run / STAMP).parent.mkdir(exist_ok=True)
    with FileLock((run / STAMP).with_name(".lock")):
        yield
