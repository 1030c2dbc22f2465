"""Two models that need no build: a Hugging Face folder or a bundle, from anywhere, scored on the same items.

The folder of the comparison keeps the scores, so that an interrupted one continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgedisp import data, models
from edgedisp.bench.system import describe, physical_cores
from edgedisp.comparison.pairing import Scored, averaged, paired_with_first
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Progress
from edgedisp.core.serialization import to_json
from edgedisp.core.stage_folder import SCORES, check_files, digest, git_commit, write_json
from edgedisp.evaluate.task_suite import SuiteOptions, TaskSuite, expand, prepare
from edgedisp.graph.session import read_config
from edgedisp.report import write as write_report
from edgedisp.report.reading import DISPERSED, GIVEN, PRECISION
from edgedisp.stages.scoring import ModelSource, noise_floor, score_tasks
from edgedisp.summary import BASELINE, noise_record

BOOTSTRAP = 2000  # resamples behind each interval


def scored_pair(
    first: Path,
    second: Path,
    names: Sequence[str],
    out: Path,
    *,
    text: Path | None,
    tasks_path: Path | None,
    limit: int,
    context: int,
    progress: Progress,
) -> dict[str, Any]:
    """Score two models or bundles on the same items, write a report of it into `out`, return its summary.

    `text`: documents for the held-out tasks. Raises BadInput for what is no model, for tasks that do not
    exist or whose data cannot be had, and for models without an item in common.
    """
    folders = [_checked(first), _checked(second)]
    chosen = [*names] or (["heldout"] if text is not None else [])
    if not chosen:
        raise BadInput(
            "--tasks: say what to compare the models on, such as small; or --text FILE for held-out text"
        )
    documents = [] if text is None else data.read_documents(text)
    if text is None and (held := [name for name in expand(chosen) if name.startswith("heldout")]):
        raise BadInput(f"--tasks {held[0]}: is made from text; name a file of documents with --text")
    labels = _short(first, second)
    most = min(_context(folder) for folder in folders)
    if context > most:
        raise BadInput(f"--context {context}: the models read {most} tokens at most; give --context {most}")
    suites = []
    for folder in folders:
        tokenizer = models.load_tokenizer(folder)
        options = SuiteOptions(tuple(chosen), context, limit, tasks_path=tasks_path)
        end_of_text, bos_token = models.end_of_text_id(tokenizer), models.bos_id(tokenizer)
        suite = prepare(tokenizer, documents, options, end_of_text, bos_token)
        suites.append(suite)
    if not _something_in_common(*suites):
        raise BadInput(
            f"{first} and {second}: their tokenizers cut the held-out text into other tokens, so no item is "
            "in common; compare them on tasks of lm-evaluation-harness, such as --tasks small"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)  # from here on there are scores to keep
    except OSError as problem:
        raise BadInput(f"--out {out}: cannot be made ({problem.strerror}); name a folder") from None
    found = []
    threads = physical_cores()
    noises = []
    for folder, label, suite in zip(folders, labels, suites):
        told = _named(progress, label)
        source = ModelSource(folder, threads, out / SCORES)
        opened = source.open()
        results = score_tasks(source, opened, suite, BOOTSTRAP, told)
        if (floor := noise_floor(source, opened, suite, BOOTSTRAP, told)) is not None:
            noises.append(floor)
        found.append(Scored(label, 0, label, {GIVEN: [results]}))
    comparison, means, apart = paired_with_first(found)
    if not comparison:
        raise BadInput(f"{first} and {second}: no item in common: {'; '.join(apart)}")
    summary = {
        "name": f"{labels[1]} against {labels[0]}",
        "smoke": False,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"edgedisp compare {first} {second} --tasks {','.join(chosen)}",
        "machine": {key: value for key, value in describe().items() if key != "packages"},
        "git_commit": git_commit(),
        "arms": [BASELINE, labels[1]],
        "precisions": [GIVEN],
        "baseline_is": labels[0],
        "corpus": {"context": context},
        "accuracy": {name: averaged(one) for name, one in zip((BASELINE, labels[1]), found)},
        "comparison": comparison,
        "means": means,
        "noise": {GIVEN: noise_record(max(noises, key=lambda one: one.floor))} if len(noises) == 2 else {},
        "missing_tasks": {task: why for suite in suites for task, why in suite.missing.items()},
        "apart": apart,
    }
    write_json(out / "items.json", to_json({one.label: one.by_precision[GIVEN][0] for one in found}))
    write_report(summary, out)
    return summary


def folder_for(first: Path, second: Path, chosen: Sequence[str], text: Path | None) -> Path:
    """Where a comparison of two models is kept unless --out says so."""
    key = digest([str(first.resolve()), str(second.resolve()), [*chosen], str(text)])[:8]
    names = [label.replace("/", "-") for label in _short(first, second)]
    return Path("comparisons") / f"{'-'.join(names)}-{key}"


def _checked(folder: Path) -> Path:
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; compare takes runs, Hugging Face folders and bundles")
    if not any((folder / name).is_file() for name in ("config.json", "model.onnx")):
        raise BadInput(
            f"{folder}: is no run (no report.json), no model (no config.json) and no bundle (no model.onnx)"
        )
    check_files(folder)
    return folder


def _is_bundle(folder: Path) -> bool:
    return (folder / "model.onnx").is_file()


def _context(folder: Path) -> int:
    """Most tokens that a model reads."""
    if _is_bundle(folder):
        return int(read_config(folder)["context_length"])
    return models.context_length(models.empty_model(folder).config)


def _something_in_common(first: TaskSuite, second: TaskSuite) -> bool:
    """Whether any item may be asked of both models; those of lm-eval tasks are known only once asked."""
    if first.harness_tasks.keys() & second.harness_tasks.keys():
        return True
    asked = (
        {(task, one.fingerprint()) for task, found in suite.questions.items() for one in found}
        for suite in (first, second)
    )
    return not set.isdisjoint(*asked)


def _short(first: Path, second: Path) -> list[str]:
    """The shortest endings of both paths that differ and mean nothing else; equal ones are numbered."""
    parts = [path.resolve().parts for path in (first, second)]
    for depth in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-depth:]) for part in parts]
        if short[0] != short[1] and not any(_is_taken(name) for name in short):
            return short
    return [f"{first.name} (1)", f"{second.name} (2)"]


def _is_taken(name: str) -> bool:
    """Whether a summary means something else by the name: an arm, a precision."""
    return name in (BASELINE, DISPERSED) or PRECISION.fullmatch(name) is not None


def _named(progress: Progress, label: str) -> Progress:
    return lambda done, total, note: progress(done, total, f"{label}: {note}")
