"""`edgedisp compare`: several finished builds, or two models from anywhere, as one run for the report.

What is compared is items, not means: only those that both were asked in the very same words are paired,
whatever the recipes. Of builds, the first one's baseline stays the baseline and all else is an arm. Two
models are scored here; the folder of the comparison keeps their scores, so an interrupted one continues.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgedisp import data, models
from edgedisp.bench.system import physical_cores
from edgedisp.core.errors import BadInput
from edgedisp.core.files import check_files, digest, from_json, to_json, write_json
from edgedisp.core.progress import Progress
from edgedisp.core.results import (
    AS_GIVEN,
    BASELINE,
    DISPERSED,
    DeviceResult,
    Json,
    MeanDifference,
    Measurement,
    TaskDifference,
    TaskScore,
)
from edgedisp.core.run import Run
from edgedisp.core.stage_folder import SCORES
from edgedisp.evaluate.comparison import (
    Pair,
    Results,
    average_task,
    common_items,
    compare_task,
    mean_difference,
)
from edgedisp.evaluate.task_suite import SuiteOptions, TaskSuite, expand, prepare
from edgedisp.graph.genai_config import read_config
from edgedisp.pipeline.run_results import load, surroundings
from edgedisp.pipeline.scoring import ModelSource, noise_floor, score_tasks
from edgedisp.report.results_table import numbered

BOOTSTRAP = 2000  # resamples behind each interval


# Pairing


@dataclass(frozen=True)
class ScoredArm:
    """One arm of one run: its name in the joined run, and its results by precision and seed."""

    label: str
    run: int
    arm: str
    by_precision: dict[str, list[Results]]

    def scores(self, precision: str) -> dict[str, TaskScore]:
        by_seed = self.by_precision[precision]
        return {task: average_task([results[task] for results in by_seed]) for task in by_seed[0]}


@dataclass
class Paired:
    """All arms compared with the first, the means over their tasks, and what could not be paired."""

    comparisons: dict[str, dict[str, dict[str, TaskDifference]]]
    means: dict[str, dict[str, MeanDifference]]
    unpaired: list[str]


def pair_with_first(arms: Sequence[ScoredArm]) -> Paired:
    """Pair every arm with the first on the items that both were asked."""
    first, *others = arms
    paired = Paired({}, {}, [])
    for other in others:
        for precision in (name for name in first.by_precision if name in other.by_precision):
            before_all, after_all = first.by_precision[precision], other.by_precision[precision]
            seeds = list(zip(before_all, after_all))
            pairs, reasons = _common(seeds)
            if len(before_all) != len(after_all):
                most = max(len(before_all), len(after_all))
                reasons.append(f"{len(seeds)} of {most} trainings have one to be paired with")
            texts = [f"{other.label}, {reason}" for reason in reasons]
            paired.unpaired += [text for text in dict.fromkeys(texts) if text not in paired.unpaired]
            if not pairs:
                continue
            differences = {task: compare_task(pair) for task, pair in pairs.items()}
            before, after = (
                {task: average_task([one[side] for one in pair]) for task, pair in pairs.items()}
                for side in (0, 1)
            )
            paired.comparisons.setdefault(other.label, {})[precision] = differences
            if (mean := mean_difference(before, after, differences)) is not None:
                paired.means.setdefault(other.label, {})[precision] = mean
    return paired


def _common(seeds: Sequence[tuple[Results, Results]]) -> tuple[dict[str, list[Pair]], list[str]]:
    """task -> for each seed both results, cut to the items that all were asked; and why tasks are missing."""
    pairs: dict[str, list[Pair]] = {}
    first, second = seeds[0]
    reasons = [f"{task}: scored in one of the two alone" for task in sorted(first.keys() ^ second.keys())]
    for task in (name for name in first if name in second):
        results = [result[task] for pair in seeds for result in pair]
        try:
            cut = common_items(results)
        except ValueError as problem:
            reasons.append(f"{problem} (other text, tokenizer, context or seed)")
            continue
        most = max(len(one.items) for one in results)
        if len(cut[0].items) < most:
            reasons.append(f"{task}: {len(cut[0].items)} items in common of {most}")
        pairs[task] = list(zip(cut[::2], cut[1::2]))
    return pairs, reasons


# Finished builds


def join_runs(paths: Sequence[Path]) -> Run:
    """Finished builds as one run; `unpaired` says what could not be paired with the first baseline, and why.

    Raises BadInput for a report without its run folder, which alone holds the items; for a first run
    without a baseline; and when no item is common to any two.
    """
    runs = [load(path) for path in paths]
    if BASELINE not in runs[0].arms:
        raise BadInput(
            f"{paths[0]}: has no arm `{BASELINE}` to compare the others with; name a run that has one first"
        )
    arms = [
        ScoredArm(label, place, arm, _items(path, run, arm))
        for place, (path, run) in enumerate(zip(paths, runs))
        for arm, label in _labels(place, runs)
    ]
    paired = pair_with_first(arms)
    for place, path in enumerate(paths[1:], start=1):
        if not any(one.label in paired.comparisons for one in arms if one.run == place):
            reasons = "; ".join(paired.unpaired) or "no task in common"
            raise BadInput(
                f"{paths[0]} and {path}: no item in common: {reasons}. "
                "Score both on the same text with the same tokenizer, context and seed"
            )
    sources = {one.label: (runs[one.run], one.arm) for one in arms}
    measurements = {
        one.label: {
            precision: replace(
                runs[one.run].measured(one.arm, precision), scores=one.scores(precision), noise=None
            )
            for precision in one.by_precision
        }
        for one in arms
    }
    for precision, measured in measurements[BASELINE].items():
        noise = next((m.noise for m in _measured(runs[0], precision) if m.noise is not None), None)
        measurements[BASELINE][precision] = replace(measured, noise=noise)
    return Run(
        name=" and ".join(dict.fromkeys(run.name for run in runs)),
        arms=[one.label for one in arms],
        precisions=list(dict.fromkeys(name for run in runs for name in run.precisions)),
        smoke=any(run.smoke for run in runs),
        seeds=runs[0].seeds,
        techniques={name: run.techniques.get(arm, {}) for name, (run, arm) in sources.items()},
        training={name: run.training[arm] for name, (run, arm) in sources.items() if arm in run.training},
        bundles={name: run.bundles.get(arm, {}) for name, (run, arm) in sources.items()},
        measurements=measurements,
        comparisons=paired.comparisons,
        means=paired.means,
        unpaired=paired.unpaired,
        latency=_joined_latency(sources),
        runs=[_about(run) for run in runs],
        **surroundings(),
    )


def _measured(run: Run, precision: str) -> list[Measurement]:
    return [run.measured(arm, precision) for arm in run.arms]


def _labels(place: int, runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(arm, its name in the joined run); arms of later runs carry their run's name."""
    if place == 0:
        return [(arm, arm) for arm in runs[0].arms]
    names = [run.name for run in runs]
    distinct = names if names.count(names[place]) == 1 else numbered([run.title for run in runs])
    return [(arm, f"{arm} of {distinct[place]}") for arm in runs[place].arms]


def _items(path: Path, run: Run, arm: str) -> dict[str, list[Results]]:
    """precision -> for each seed, task -> its result with items."""
    folder = path if path.is_dir() else path.parent
    found: dict[str, list[Results]] = {}
    for precision in run.precisions:
        for training in [arm, *(name for name, one in run.replicas.items() if one.arm == arm)]:
            file = folder / training / f"measure-{precision}" / "items.json"
            if not file.is_file():
                raise BadInput(
                    f"{path}: {file.relative_to(folder)} is not there; "
                    "comparing runs needs the run folder with its items, a report alone holds means"
                )
            try:
                results = from_json(Results, json.loads(file.read_text(encoding="utf-8")))
            except ValueError as problem:
                raise BadInput(
                    f"{file}: is damaged ({problem}); delete its folder and run `edgedisp build` again"
                ) from None
            found.setdefault(precision, []).append(results)
    return found


def _joined_latency(sources: dict[str, tuple[Run, str]]) -> DeviceResult:
    rows = []
    for name, (run, arm) in sources.items():
        for precision in run.precisions:
            timing = run.latency.timing(f"{arm}/{precision}") if run.latency else None
            rows += [replace(timing, label=f"{name}/{precision}")] if timing else []
    return DeviceResult("local", rows=rows)


def _about(run: Run) -> Json:
    """What a run was made from."""
    model = {key: run.model.get(key) for key in ("base", "weights_sha256")}
    return {"title": run.title, **model} | {
        key: run.corpus.get(key) for key in ("tokens_sha256", "context", "heldout_documents")
    }


# Two models


@dataclass(frozen=True)
class CompareOptions:
    """What two models are scored on. text: documents for the held-out tasks."""

    tasks: tuple[str, ...] = ()
    text: Path | None = None
    tasks_path: Path | None = None
    limit: int = 200
    context: int = 256


def compare_models(first: Path, second: Path, options: CompareOptions, out: Path, progress: Progress) -> Run:
    """Score two models or bundles on the same items and write a report of it into `out`.

    Raises BadInput for what is no model, for tasks that do not exist or whose data cannot be had, and for
    models without an item in common.
    """
    from edgedisp.report import render  # brings matplotlib

    folders = [_checked(first), _checked(second)]
    labels = short_names(first, second)
    suites = _suites(folders, options)
    if not _has_common_items(*suites):
        raise BadInput(
            f"{first} and {second}: their tokenizers cut the held-out text into other tokens, "
            "so no item is in common; compare them on tasks of lm-evaluation-harness, such as --tasks small"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise BadInput(f"--out {out}: cannot be made ({problem.strerror}); name a folder") from None
    arms, noises, threads = [], [], physical_cores()
    for folder, label, suite in zip(folders, labels, suites):
        named = _named(progress, label)
        source = ModelSource(folder, threads, out / SCORES)
        model = source.open()
        results = score_tasks(source, model, suite, BOOTSTRAP, named)
        if (floor := noise_floor(source, model, suite, BOOTSTRAP, named)) is not None:
            noises.append(floor)
        arms.append(ScoredArm(label, 0, label, {AS_GIVEN: [results]}))
    paired = pair_with_first(arms)
    if not paired.comparisons:
        raise BadInput(f"{first} and {second}: no item in common: {'; '.join(paired.unpaired)}")
    noise = max(noises, key=lambda one: one.floor) if len(noises) == 2 else None
    names = [BASELINE, labels[1]]
    run = Run(
        name=f"{labels[1]} against {labels[0]}",
        arms=names,
        precisions=[AS_GIVEN],
        baseline_is=labels[0],
        corpus={"context": options.context},
        measurements={
            name: {AS_GIVEN: Measurement(arm.scores(AS_GIVEN), noise=noise if name == BASELINE else None)}
            for name, arm in zip(names, arms)
        },
        comparisons=paired.comparisons,
        means=paired.means,
        missing_tasks={task: why for suite in suites for task, why in suite.missing.items()},
        unpaired=paired.unpaired,
        **surroundings(),
    )
    write_json(out / "items.json", to_json({arm.label: arm.by_precision[AS_GIVEN][0] for arm in arms}))
    render.write(run, out)
    return run


def default_folder(first: Path, second: Path, options: CompareOptions) -> Path:
    """Where a comparison of two models is kept unless --out says so."""
    key = digest([str(first.resolve()), str(second.resolve()), [*options.tasks], str(options.text)])[:8]
    names = [label.replace("/", "-") for label in short_names(first, second)]
    return Path("comparisons") / f"{'-'.join(names)}-{key}"


def _suites(folders: Sequence[Path], options: CompareOptions) -> list[TaskSuite]:
    tasks = options.tasks or (("heldout",) if options.text is not None else ())
    if not tasks:
        raise BadInput(
            "--tasks: say what to compare the models on, such as small; or --text FILE for held-out text"
        )
    if options.text is None and (held := [name for name in expand(tasks) if name.startswith("heldout")]):
        raise BadInput(f"--tasks {held[0]}: is made from text; name a file of documents with --text")
    documents = [] if options.text is None else data.read_documents(options.text)
    most = min(_context(folder) for folder in folders)
    if options.context > most:
        raise BadInput(
            f"--context {options.context}: the models read {most} tokens at most; give --context {most}"
        )
    suite_options = SuiteOptions(tuple(tasks), options.context, options.limit, tasks_path=options.tasks_path)
    tokenizers = [models.load_tokenizer(folder) for folder in folders]
    return [
        prepare(one, documents, suite_options, models.end_of_text_id(one), models.bos_id(one))
        for one in tokenizers
    ]


def _checked(folder: Path) -> Path:
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; compare takes runs, Hugging Face folders and bundles")
    if not any((folder / name).is_file() for name in ("config.json", "model.onnx")):
        raise BadInput(
            f"{folder}: is no run (no report.json), no model (no config.json) and no bundle (no model.onnx)"
        )
    check_files(folder)
    return folder


def _context(folder: Path) -> int:
    """Most tokens that a model reads."""
    if (folder / "model.onnx").is_file():
        return int(read_config(folder)["context_length"])
    return models.context_length(models.empty_model(folder).config)


def _has_common_items(first: TaskSuite, second: TaskSuite) -> bool:
    """Whether any item may be asked of both; those of lm-eval tasks are known only once asked."""
    if first.harness_tasks.keys() & second.harness_tasks.keys():
        return True
    prints = (
        {(task, one.fingerprint()) for task, questions in suite.questions.items() for one in questions}
        for suite in (first, second)
    )
    return not set.isdisjoint(*prints)


def short_names(first: Path, second: Path) -> list[str]:
    """The shortest endings of both paths that differ and name neither an arm nor a precision."""
    parts = [path.resolve().parts for path in (first, second)]
    taken = {BASELINE, DISPERSED, "torch", "bf16", "fp16", "fp32", "int8", "int4"}
    for depth in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-depth:]) for part in parts]
        if short[0] != short[1] and taken.isdisjoint(short):
            return short
    return [f"{first.name} (1)", f"{second.name} (2)"]


def _named(progress: Progress, label: str) -> Progress:
    return lambda done, total, note: progress(done, total, f"{label}: {note}")
