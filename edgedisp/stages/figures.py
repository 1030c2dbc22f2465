"""What is measured of a finished model: its scores on the recipe's tasks, and its speed on this machine."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

from edgedisp import models
from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.interleaved_timing import measure
from edgedisp.bench.local import Local
from edgedisp.bench.results import twin_pairs
from edgedisp.bench.system import installed_version
from edgedisp.core.errors import BuildFailed
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import digest, file_digest, read, write_json
from edgedisp.evaluate import tasks
from edgedisp.evaluate.kept import Kept
from edgedisp.graph.device_graph import for_device
from edgedisp.graph.session import OnnxModel
from edgedisp.recipe import Evaluate, Latency
from edgedisp.stages.start import heldout_documents

ITEMS = "items.json"


def items(
    section: Evaluate,
    seed: int,
    tasks_path: Path | None,
    tokenizer_folder: Path,
    corpus_folder: Path,
    context: int,
) -> tasks.Suite:
    """The questions of the recipe's tasks: the same for every arm and precision."""
    tokenizer = models.load_tokenizer(tokenizer_folder)
    return tasks.prepare(
        tokenizer,
        section.tasks,
        heldout_documents(corpus_folder),
        end_of_text=models.end_of_text_id(tokenizer),
        lead=models.bos_id(tokenizer),
        context=context,
        limit=section.limit,
        seed=seed,
        perplexity_tokens=section.perplexity_tokens,
        tasks_path=tasks_path,
    )


def count_items(suite: tasks.Suite, own: Path) -> dict[str, Any]:
    """Make the questions before anything is trained, so that too little text or missing data is found now."""
    counts = {name: len(questions) for name, questions in suite.questions.items()}
    results = {
        "heldout_items": counts,
        "harness_tasks": sorted(suite.harness_tasks),
        "missing": suite.missing,
    }
    write_json(own / ITEMS, results)
    return results


def accuracy(
    suite: tasks.Suite,
    section: Evaluate,
    model_folder: Path,
    bundle: Path | None,
    threads: int,
    store: Path,
    items_folder: Path,
    own: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Score the torch model (bundle None) or a bundle on the recipe's tasks, per-item results kept.

    Raises BuildFailed where the data of a task that was there for `items_folder` cannot be read now: every
    arm answers the same tasks.

    `store`: the file that holds what was scored in this run before, so that an interrupted scoring goes on
    and a task that is added costs no more than itself.
    """
    before = json.loads((items_folder / ITEMS).read_text(encoding="utf-8"))["missing"]
    if lost := [why for task, why in suite.missing.items() if task not in before]:
        raise BuildFailed(f"{'; '.join(lost)}. It could be read before; the same command continues")
    scored: Any = (
        models.TorchModel(models.load(model_folder), threads)
        if bundle is None
        else OnnxModel(bundle, threads)
    )
    with closing(Kept(store, scored_name(bundle or model_folder, threads))) as kept:
        results = suite.run(
            scored,
            batch_tokens=section.batch_tokens,
            bootstrap=section.bootstrap,
            kept=kept,
            progress=progress,
        )
    write_json(own / ITEMS, results)
    return {
        task: {name: value for name, value in result.items() if name != "items"}
        for task, result in results.items()
    }


def scored_name(folder: Path, threads: int) -> str:
    """All that a score depends on beside the question: the files, the runtimes, and how sums are split."""
    record = read(folder)
    if record is None:  # a folder from elsewhere
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        content = digest({path.relative_to(folder).as_posix(): file_digest(path) for path in files})
    else:
        content = record.content
    versions = {name: installed_version(name) for name in ("torch", "transformers", "onnxruntime")}
    return digest({"content": content, "threads": threads, **versions})


def latency(
    section: Latency, seed: int, threads: int, bundles: dict[str, Path], own: Path, progress: Progress
) -> dict[str, Any]:
    """Time every bundle on this machine, the arms interleaved; each must have the baseline's graph.

    What is timed is what a device gets: the same weights under a graph for the last token's logits.
    """
    scratch = own / "timed"
    shipped = {}
    for label, bundle in bundles.items():
        shipped[label] = scratch / label.replace("/", "-")
        shipped[label].mkdir(parents=True)
        for_device(bundle, shipped[label], threads=threads)
    options = BenchOptions(
        prompt=section.prompt,
        generate=section.generate,
        repetitions=section.repetitions,
        threads=threads,
        seed=seed,
        pause_s=section.pause_s,
        pairs=twin_pairs(list(bundles)),
    )
    results = measure(shipped, Local(), options, progress)
    shutil.rmtree(scratch)
    write_json(own / "latency.json", results)
    return results
