"""`edgedisp compare`: finished builds, or two models from anywhere, joined item by item into one run.

Items are paired where both models were asked the very same words, whatever the recipes. The baseline of the
first run, or the first model, is the baseline; all else is an arm. Two models are scored here; the output
folder keeps their scores, so an interrupted comparison continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgedisp import data, models
from edgedisp.bench.results import label_bundles
from edgedisp.bench.system import physical_cores
from edgedisp.core.errors import BadInput
from edgedisp.core.files import check_files, check_writable, digest, to_json, write_json
from edgedisp.core.progress import Progress, labelled
from edgedisp.core.results import ANSWERS_TASK, AS_GIVEN, BASE, BASELINE, DISPERSED, DeviceResult, Measurement
from edgedisp.core.run import Run
from edgedisp.core.stage_folder import SCORES
from edgedisp.evaluate.heldout_tasks import SuiteOptions
from edgedisp.evaluate.statistics import DEFAULT
from edgedisp.evaluate.task_suite import TaskSuite, expand, prepare
from edgedisp.graph.genai_config import context_length
from edgedisp.pipeline.measure import Scorer
from edgedisp.pipeline.run_results import Scored, join, load, read_scored, surroundings
from edgedisp.recipe import Source

RESERVED = (BASELINE, DISPERSED, "torch", "bf16", "fp16", "fp32", "int8", "int4")  # no names of models


def join_runs(paths: Sequence[Path]) -> Run:
    """Finished builds as one run; arms of later runs carry their run's name. A single run stays as it is.

    Raises BadInput for a report without its run folder, which alone holds the items; for a first run without
    a baseline; and when a run has no item in common with the first.
    """
    runs = [load(path) for path in paths]
    if len(runs) == 1:
        return runs[0]
    if BASELINE not in runs[0].arms:
        raise BadInput(
            f"{paths[0]}: has no arm `{BASELINE}` to compare the others with; name a run that has one first"
        )
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.title} ({number})" for number, run in enumerate(runs, 1)]
    timings = DeviceResult("local")
    joined = Run(
        name=" and ".join(dict.fromkeys(run.name for run in runs)),
        arms=[],
        precisions=list(dict.fromkeys(precision for run in runs for precision in run.precisions)),
        smoke=any(run.smoke for run in runs),
        seeds=runs[0].seeds,
        latency=timings,
        runs=[
            {"title": run.title}
            | {key: run.model.get(key) for key in ("base", "weights_sha256")}
            | {key: run.corpus.get(key) for key in ("tokens_sha256", "context", "heldout_documents")}
            for run in runs
        ],
        **surroundings(),
    )
    scored: dict[str, Scored] = {}
    for path, run, name in zip(paths, runs, names):
        labels = {arm: arm if run is runs[0] else f"{arm} of {name}" for arm in run.arms}
        joined.arms.extend(labels.values())
        scored |= {label: read_scored(path, run, arm) for arm, label in labels.items()}
        for arm, label in (labels | ({BASE: BASE} if run is runs[0] else {})).items():
            for part in ("techniques", "training", "bundles", "measurements", "gains"):
                if arm in getattr(run, part):
                    getattr(joined, part)[label] = getattr(run, part)[arm]
            for precision in run.precisions:
                if run.latency and (timing := run.latency.timing(f"{arm}/{precision}")):
                    timings.rows.append(replace(timing, label=f"{label}/{precision}"))
    join(joined, scored)
    for path, name in zip(paths[1:], names[1:]):
        if not any(arm.endswith(f" of {name}") for arm in joined.comparisons):
            reasons = "; ".join(joined.unpaired) or "no task in common"
            raise BadInput(
                f"{paths[0]} and {path}: no item in common: {reasons}. "
                "Score both on the same text with the same tokenizer, context and seed"
            )
    return joined


# Two models


def compare_models(
    folders: Sequence[Path], options: SuiteOptions, text: Path | None, out: Path | None, progress: Progress
) -> tuple[Run, Path]:
    """Score two models or bundles on the same items and write a report; returns the run and its folder.

    text: documents for the held-out tasks. out: the report's folder, else one under `comparisons`. Raises
    BadInput for what is no model, for tasks that do not exist or whose data cannot be had, and for models
    without an item in common.
    """
    from edgedisp.report import render  # brings matplotlib

    for folder in folders:
        if not any((folder / name).is_file() for name in ("config.json", "model.onnx")):
            raise BadInput(
                f"{folder}: is no run (report.json), no model (config.json) and no bundle (model.onnx)"
            )
        check_files(folder)
    labels = list(label_bundles(folders, RESERVED))
    key = digest([*(str(folder.resolve()) for folder in folders), [*options.tasks], str(text)])[:8]
    out = out or Path("comparisons") / f"{'-'.join(labels).replace('/', '-')}-{key}"
    check_writable("--out", out)
    suites = _suites(folders, options, text)
    out.mkdir(parents=True, exist_ok=True)
    run = Run(
        name=f"{labels[1]} against {labels[0]}",
        arms=[BASELINE, labels[1]],
        precisions=[AS_GIVEN],
        baseline_is=labels[0],
        corpus={"context": options.context},
        missing_tasks={task: why for suite in suites for task, why in suite.missing.items()},
        **surroundings(),
    )
    scored: dict[str, Scored] = {}
    for arm, folder, label, suite in zip(run.arms, folders, labels, suites):
        scorer, arm_progress = Scorer(folder, physical_cores(), out / SCORES), labelled(progress, label)
        scored[arm] = {AS_GIVEN: [scorer.score(suite, DEFAULT.bootstrap, arm_progress)]}
        noise = scorer.noise_floor(suite, DEFAULT.bootstrap, arm_progress)
        run.measurements[arm] = {AS_GIVEN: Measurement(noise=noise)}
    join(run, scored)
    if not run.comparisons:
        raise BadInput(f"{folders[0]} and {folders[1]}: no item in common: {'; '.join(run.unpaired)}")
    items = {label: scored[arm][AS_GIVEN][0] for label, arm in zip(labels, run.arms)}
    write_json(out / "items.json", to_json(items))
    render.write(run, out)
    return run, out


def _suites(folders: Sequence[Path], options: SuiteOptions, text: Path | None) -> list[TaskSuite]:
    """The tasks in the tokens of each model. BadInput where no item can be the same for both."""
    tasks = options.tasks or (("heldout",) if text is not None else ())
    if not tasks:
        raise BadInput(
            "--tasks: say what to compare the models on, such as small; or --text FILE for held-out text"
        )
    heldout = [name for name in expand(tasks) if name.startswith("heldout")]
    if text is None and heldout:
        raise BadInput(f"--tasks {heldout[0]}: is made from text; name a file of documents with --text")
    source = None if ANSWERS_TASK not in tasks else Source(source=str(text), messages="messages")
    documents = [] if text is None else data.read_documents(text, source)
    most = min(_context(folder) for folder in folders)
    if options.context > most:
        raise BadInput(
            f"--context {options.context}: the models read {most} tokens at most; give --context {most}"
        )
    tokenizers, options = map(models.load_tokenizer, folders), replace(options, tasks=tasks)
    suites = [prepare(tokenizer, documents, options) for tokenizer in tokenizers]
    first, second = (
        {(task, question.fingerprint()) for task, group in suite.questions.items() for question in group}
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
