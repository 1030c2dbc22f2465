"""`edgedisp compare`: finished builds, or two models from anywhere, joined item by item into one run.

Items are paired where both models were asked the very same words, whatever the recipes. The baseline of the
first run, or the first model, is the baseline; all else is an arm. Two models are scored here; the output
folder keeps their scores, so an interrupted comparison continues.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgedisp import data, models
from edgedisp.bench.results import label_bundles
from edgedisp.bench.system import physical_cores
from edgedisp.core.errors import BadInput
from edgedisp.core.files import check_files, digest, to_json, write_json
from edgedisp.core.progress import Progress, labelled
from edgedisp.core.results import AS_GIVEN, BASELINE, DISPERSED, DeviceResult, Measurement
from edgedisp.core.run import Run
from edgedisp.core.stage_folder import SCORES
from edgedisp.evaluate.heldout_tasks import SuiteOptions
from edgedisp.evaluate.task_suite import TaskSuite, expand
from edgedisp.graph.genai_config import context_length
from edgedisp.pipeline.measure import Scorer
from edgedisp.pipeline.prepare import make_suite
from edgedisp.pipeline.run_results import Scored, join, load, read_scored, surroundings
from edgedisp.report.results_table import numbered

BOOTSTRAP = 2000  # resamples behind each interval
RESERVED = (BASELINE, DISPERSED, "torch", "bf16", "fp16", "fp32", "int8", "int4")  # no names of models


# Finished builds


def join_runs(paths: Sequence[Path]) -> Run:
    """Finished builds as one run; arms of later runs carry their run's name.

    Raises BadInput for a report without its run folder, which alone holds the items; for a first run without
    a baseline; and when a run has no item in common with the first.
    """
    runs = [load(path) for path in paths]
    if BASELINE not in runs[0].arms:
        raise BadInput(
            f"{paths[0]}: has no arm `{BASELINE}` to compare the others with; name a run that has one first"
        )
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = numbered([run.title for run in runs])
    sources: dict[str, tuple[Run, str]] = {}
    arms: dict[str, Scored] = {}
    for path, run, name in zip(paths, runs, names):
        for arm in run.arms:
            label = arm if run is runs[0] else f"{arm} of {name}"
            sources[label], arms[label] = (run, arm), read_scored(path, run, arm)
    joined = Run(
        name=" and ".join(dict.fromkeys(run.name for run in runs)),
        arms=[*arms],
        precisions=list(dict.fromkeys(precision for run in runs for precision in run.precisions)),
        smoke=any(run.smoke for run in runs),
        seeds=runs[0].seeds,
        techniques={label: run.techniques.get(arm, {}) for label, (run, arm) in sources.items()},
        training={label: run.training[arm] for label, (run, arm) in sources.items() if arm in run.training},
        bundles={label: run.bundles.get(arm, {}) for label, (run, arm) in sources.items()},
        measurements={label: {**run.measurements.get(arm, {})} for label, (run, arm) in sources.items()},
        latency=_latency(sources),
        runs=[
            {"title": run.title}
            | {key: run.model.get(key) for key in ("base", "weights_sha256")}
            | {key: run.corpus.get(key) for key in ("tokens_sha256", "context", "heldout_documents")}
            for run in runs
        ],
        **surroundings(),
    )
    join(joined, arms)
    for path, run in zip(paths[1:], runs[1:]):
        if not any(sources[label][0] is run for label in joined.comparisons):
            reasons = "; ".join(joined.unpaired) or "no task in common"
            raise BadInput(
                f"{paths[0]} and {path}: no item in common: {reasons}. "
                "Score both on the same text with the same tokenizer, context and seed"
            )
    return joined


def _latency(sources: Mapping[str, tuple[Run, str]]) -> DeviceResult:
    rows = [
        replace(timing, label=f"{label}/{precision}")
        for label, (run, arm) in sources.items()
        for precision in run.precisions
        if run.latency and (timing := run.latency.timing(f"{arm}/{precision}"))
    ]
    return DeviceResult("local", rows=rows)


# Two models


@dataclass(frozen=True)
class CompareOptions:
    """What two models are scored on. text: documents for the held-out tasks. out: the report's folder."""

    tasks: tuple[str, ...] = ()
    text: Path | None = None
    tasks_path: Path | None = None
    limit: int = 200
    context: int = 256
    out: Path | None = None


def compare_models(folders: Sequence[Path], options: CompareOptions, progress: Progress) -> tuple[Run, Path]:
    """Score two models or bundles on the same items and write a report; returns the run and its folder.

    Raises BadInput for what is no model, for tasks that do not exist or whose data cannot be had, and for
    models without an item in common.
    """
    from edgedisp.report import render  # brings matplotlib

    for folder in folders:
        if not any((folder / name).is_file() for name in ("config.json", "model.onnx")):
            raise BadInput(
                f"{folder}: is no run (report.json), no model (config.json) and no bundle (model.onnx)"
            )
        check_files(folder)
    labels = list(label_bundles(folders, RESERVED))
    suites = _suites(folders, options)
    out = options.out or _default_folder(folders, labels, options)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise BadInput(f"--out {out}: cannot be made ({problem.strerror}); name a folder") from None
    results, floors = [], []
    for folder, label, suite in zip(folders, labels, suites):
        scorer, arm_progress = Scorer(folder, physical_cores(), out / SCORES), labelled(progress, label)
        results.append(scorer.score(suite, BOOTSTRAP, arm_progress))
        if (floor := scorer.noise_floor(suite, BOOTSTRAP, arm_progress)) is not None:
            floors.append(floor)
    noise = max(floors, key=lambda floor: floor.floor, default=None)
    run = Run(
        name=f"{labels[1]} against {labels[0]}",
        arms=[BASELINE, labels[1]],
        precisions=[AS_GIVEN],
        baseline_is=labels[0],
        corpus={"context": options.context},
        measurements={BASELINE: {AS_GIVEN: Measurement(noise=noise)}},
        missing_tasks={task: why for suite in suites for task, why in suite.missing.items()},
        **surroundings(),
    )
    join(run, {name: {AS_GIVEN: [by_task]} for name, by_task in zip(run.arms, results)})
    if not run.comparisons:
        raise BadInput(f"{folders[0]} and {folders[1]}: no item in common: {'; '.join(run.unpaired)}")
    write_json(out / "items.json", to_json(dict(zip(labels, results))))
    render.write(run, out)
    return run, out


def _default_folder(folders: Sequence[Path], labels: Sequence[str], options: CompareOptions) -> Path:
    key = digest([*(str(folder.resolve()) for folder in folders), [*options.tasks], str(options.text)])[:8]
    return Path("comparisons") / f"{'-'.join(label.replace('/', '-') for label in labels)}-{key}"


def _suites(folders: Sequence[Path], options: CompareOptions) -> list[TaskSuite]:
    """The tasks in the tokens of each model. BadInput where no item can be the same for both."""
    tasks = options.tasks or (("heldout",) if options.text is not None else ())
    if not tasks:
        raise BadInput(
            "--tasks: say what to compare the models on, such as small; or --text FILE for held-out text"
        )
    heldout = [name for name in expand(tasks) if name.startswith("heldout")]
    if options.text is None and heldout:
        raise BadInput(f"--tasks {heldout[0]}: is made from text; name a file of documents with --text")
    documents = [] if options.text is None else data.read_documents(options.text)
    most = min(_context(folder) for folder in folders)
    if options.context > most:
        raise BadInput(
            f"--context {options.context}: the models read {most} tokens at most; give --context {most}"
        )
    suite_options = SuiteOptions(tasks, options.context, options.limit, tasks_path=options.tasks_path)
    suites = [make_suite(folder, documents, suite_options) for folder in folders]
    first, second = (
        {
            (task, question.fingerprint())
            for task, questions in suite.questions.items()
            for question in questions
        }
        for suite in suites
    )
    if first.isdisjoint(second) and not suites[0].harness_tasks:  # items of the latter show when scored
        raise BadInput(
            f"{folders[0]} and {folders[1]}: their tokenizers cut the held-out text into other tokens, "
            "so no item is in common; compare them on tasks of lm-evaluation-harness, such as --tasks small"
        )
    return suites


def _context(folder: Path) -> int:
    """Most tokens that a model reads."""
    if (folder / "model.onnx").is_file():
        return context_length(folder)
    return models.context_length(models.empty_model(folder).config)
