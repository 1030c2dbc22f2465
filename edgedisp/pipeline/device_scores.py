"""Items of tasks for devices to score, and their answers compared with this machine's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedisp import data
from edgedisp.core.errors import BadInput
from edgedisp.core.files import file_digest
from edgedisp.core.progress import Progress, labelled
from edgedisp.core.results import DeviceResult
from edgedisp.core.stage_folder import RUN, SCORES
from edgedisp.evaluate import device_sample
from edgedisp.evaluate.heldout_tasks import SuiteOptions
from edgedisp.evaluate.loglikelihood import Fitted, ScoreCache, ScoreOptions
from edgedisp.evaluate.task_suite import TaskSuite, check_tasks, expand
from edgedisp.graph.session import scored_model, scored_size
from edgedisp.pipeline.measure import score_key
from edgedisp.pipeline.prepare import heldout_documents, make_suite

CONTEXT = 256  # tokens of a held-out window
HELDOUT = "corpus"  # where a run has the documents that no arm was trained on


@dataclass(frozen=True)
class DeviceTasks:
    """What is to be scored on devices: tasks, items of each there (`items`) and here (`limit`).

    text: documents for the held-out tasks; None: those of the run that the first bundle lies in.
    """

    tasks: tuple[str, ...]
    items: int = 200
    limit: int = 500
    text: Path | None = None
    tasks_path: Path | None = None
    seed: int = 0


def device_tasks(score: str | None, **options: Any) -> DeviceTasks | None:
    """What `--score` and its companion options say (None: left out); None without `--score`.

    Raises BadInput for an option that needs `--score`, and where that names no task.
    """
    options = {name: value for name, value in options.items() if value is not None}
    if score is None:
        for name in options:
            raise BadInput(f"--{name.replace('_', '-')}: says what is scored; give --score TASKS too")
        return None
    names = tuple(name.strip() for name in score.split(",") if name.strip())
    if not names:
        raise BadInput("--score: names no task; such as --score heldout")
    return DeviceTasks(names, **options)


class DeviceQuestions:
    """The questions for each bundle, and the items drawn of them for devices.

    A device gets `requests`, plain token ids; `score` compares its answers with the full set of items on this
    machine. One set of questions serves all bundles of one tokenizer.
    """

    def __init__(self, tasks: DeviceTasks, bundles: Mapping[str, Path], cache: Path) -> None:
        """`cache`: a folder for the scores of bundles that lie in no run. Raises BadInput for tasks that are
        not known or need generated text, held-out tasks without text, a task whose data a hub does not give.
        """
        device_sample.check_count(tasks.items)
        if tasks.limit < tasks.items:
            raise BadInput(
                f"--limit {tasks.limit}: is less than the {tasks.items} --items that are drawn from it"
            )
        check_tasks(tasks.tasks, tasks.tasks_path)
        run = _run_of(next(iter(bundles.values())))
        documents = _documents(tasks, run)
        self.tasks, self.bundles = tasks, bundles
        self.suites: dict[str, TaskSuite] = {}
        self.samples: dict[str, device_sample.Sample] = {}
        by_tokenizer: dict[tuple[str, int], TaskSuite] = {}
        for label, bundle in bundles.items():
            if not (bundle / "tokenizer.json").is_file():
                raise BadInput(f"{bundle}: no tokenizer.json, so --score cannot make its requests")
            size = scored_size(bundle)
            key = file_digest(bundle / "tokenizer.json"), min(size.context, CONTEXT)
            if key not in by_tokenizer:
                options = SuiteOptions(tasks.tasks, key[1], tasks.limit, tasks.seed, None, tasks.tasks_path)
                by_tokenizer[key] = make_suite(bundle, documents, options)
                if missing := by_tokenizer[key].missing:
                    raise BadInput(f"--score: {'; '.join(missing.values())}")
            self.suites[label] = by_tokenizer[key]
            self.samples[label] = device_sample.draw(self.suites[label], size, tasks.items, tasks.seed)
        self.store = (cache if run is None else run) / SCORES
        self.store.parent.mkdir(parents=True, exist_ok=True)

    @property
    def requests(self) -> dict[str, list[list[Fitted]]]:
        """Bundle -> items -> requests (context ids, continuation ids), for a device."""
        return {label: [item.sent for item in sample.in_turn()] for label, sample in self.samples.items()}

    def facts(self) -> dict[str, Any]:
        """What the scores of all devices have in common."""
        tasks = self.tasks
        counts = {"items": tasks.items, "limit": tasks.limit, "seed": tasks.seed}
        return {"tasks": expand(tasks.tasks), **counts}

    def with_scores(
        self, results: Sequence[DeviceResult], threads: int, progress: Progress
    ) -> list[DeviceResult]:
        """The results of devices with `scores` in the place of their answers."""
        scores = self.score([result.answers for result in results], threads, progress)
        return [replace(result, answers={}, scores=records) for result, records in zip(results, scores)]

    def score(
        self, answers: Sequence[Mapping[str, Sequence[Any]]], threads: int, progress: Progress
    ) -> list[list[dict[str, Any]]]:
        """For each device its records, by bundle and task (`device_sample.compare`).

        answers: for each device, bundle -> the items answered in the order sent (fewer where it was lost),
        each a list of (sum of log-probabilities, all greedy).
        """
        scores: list[list[dict[str, Any]]] = [[] for _ in answers]
        for label, bundle in self.bundles.items():
            suite, sample = self.suites[label], self.samples[label]
            model = scored_model(bundle, threads)
            with closing(ScoreCache(self.store, score_key(bundle, 1))) as cache:
                options = ScoreOptions(cache=cache, progress=labelled(progress, f"here, {label}"))
                results = suite.run(model, options)
                for records, by_bundle in zip(scores, answers):
                    device = by_bundle.get(label, ())
                    for record in device_sample.compare(suite, sample, device, model, cache, results):
                        records.append({"label": label, **record})
        return scores


def _documents(tasks: DeviceTasks, run: Path | None) -> list[data.Document]:
    """The documents of the held-out tasks; none where there is no such task."""
    if tasks.text is not None:
        return list(data.read_documents(tasks.text))
    heldout = [name for name in expand(tasks.tasks) if name.startswith("heldout")]
    if heldout and run is None:
        raise BadInput(
            f"--score {heldout[0]}: is made from text, and the bundle lies in no run; name documents with "
            "--text"
        )
    return heldout_documents(run / HELDOUT) if heldout and run is not None else []


def _run_of(bundle: Path) -> Path | None:
    """The run that a bundle lies in, <run>/<arm>/<bundle>."""
    run = bundle.resolve().parent.parent
    return run if (run / RUN).is_file() and (run / HELDOUT / "heldout.jsonl").is_file() else None
