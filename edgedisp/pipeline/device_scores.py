"""Items of tasks for devices to score, and what they answered, held against this machine's scores.

Three steps, since a device lies between them: `prepared` makes the questions and draws from them; a device
gets `Prepared.requests`, plain token ids by bundle; `scored` asks this machine the full set (what was scored
before is read back) and compares. One set of questions serves all bundles of one tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedisp import data, models
from edgedisp.core.errors import BadInput
from edgedisp.core.files import file_digest
from edgedisp.core.progress import Progress, labelled
from edgedisp.core.results import DeviceResult
from edgedisp.core.stage_folder import RUN, SCORES
from edgedisp.evaluate import device_sample
from edgedisp.evaluate.loglikelihood import ScoreOptions
from edgedisp.evaluate.score_cache import ScoreCache
from edgedisp.evaluate.task_suite import SuiteOptions, TaskSuite, check_tasks, expand, prepare
from edgedisp.graph.session import scored_model, scored_size
from edgedisp.pipeline.prepare import heldout_documents
from edgedisp.pipeline.scoring import score_key

CONTEXT = 256  # tokens of a held-out window
HELDOUT = "corpus"  # where a run keeps the documents that no arm was trained on


@dataclass(frozen=True)
class Wish:
    """What is to be scored on devices: tasks, items of each there (`items`) and here (`limit`).

    text: documents for the held-out tasks; None: those of the run that the first bundle lies in.
    """

    tasks: tuple[str, ...]
    items: int = 200
    limit: int = 500
    text: Path | None = None
    tasks_path: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class Prepared:
    """Questions and draw for each bundle."""

    wish: Wish
    bundles: Mapping[str, Path]
    suites: Mapping[str, TaskSuite]
    samples: Mapping[str, device_sample.Sample]
    store: Path

    @property
    def requests(self) -> dict[str, list[list[device_sample.Pair]]]:
        """Bundle -> items -> requests (context ids, continuation ids), for a device."""
        return {
            label: [[pair for pair in item.sent if pair[1]] for item in sample.in_turn()]
            for label, sample in self.samples.items()
        }

    def facts(self) -> dict[str, Any]:
        """What the scores of all devices have in common."""
        wish = self.wish
        return {"tasks": expand(wish.tasks), "items": wish.items, "limit": wish.limit, "seed": wish.seed}


def prepared(wish: Wish, bundles: Mapping[str, Path], cache: Path) -> Prepared:
    """Make the questions and draw from them; nothing is scored.

    `cache`: a folder for the scores of bundles that lie in no run. Raises BadInput for tasks that are not
    known or need generated text, held-out tasks without text, a task whose data a hub does not give.
    """
    device_sample.check_count(wish.items)
    if wish.limit < wish.items:
        raise BadInput(f"--limit {wish.limit}: is less than the {wish.items} --items that are drawn from it")
    check_tasks(wish.tasks, wish.tasks_path)
    run = _run_of(next(iter(bundles.values())))
    documents = _documents(wish, run)
    suites: dict[str, TaskSuite] = {}
    samples: dict[str, device_sample.Sample] = {}
    made: dict[tuple[str, int], TaskSuite] = {}
    for label, bundle in bundles.items():
        if not (bundle / "tokenizer.json").is_file():
            raise BadInput(f"{bundle}: no tokenizer.json, so --score cannot make its requests")
        size = scored_size(bundle)
        key = file_digest(bundle / "tokenizer.json"), min(size.context, CONTEXT)
        if key not in made:
            made[key] = _suite(wish, bundle, documents, key[1])
        suites[label] = made[key]
        samples[label] = device_sample.draw(made[key], size, wish.items, wish.seed)
    store = cache / SCORES if run is None else run / SCORES
    store.parent.mkdir(parents=True, exist_ok=True)
    return Prepared(wish, bundles, suites, samples, store)


def scored(
    asked: Prepared, answers: Sequence[Mapping[str, Sequence[Any]]], threads: int, progress: Progress
) -> list[list[dict[str, Any]]]:
    """For each device its records, by bundle and task (`device_sample.compare`), in the order of `answers`.

    answers: for each device, bundle -> the items answered in the order asked (fewer where it was lost), each
    a list of (sum of log-probabilities, all greedy).
    """
    found: list[list[dict[str, Any]]] = [[] for _ in answers]
    for label, bundle in asked.bundles.items():
        suite, sample = asked.suites[label], asked.samples[label]
        opened, size = scored_model(bundle, threads), scored_size(bundle)
        name = score_key(bundle, 1)
        if sample.cut and not size.whole:  # other scores than those of the model's own context
            name = f"{name} context {size.context}"
        with closing(ScoreCache(asked.store, name)) as cache:
            options = ScoreOptions(cache=cache, progress=labelled(progress, f"here, {label}"))
            here = device_sample.Here(opened, cache, suite.run(opened, options))
            for records, told in zip(found, answers):
                by_task = _by_task(sample, told.get(label, ()))
                for record in device_sample.compare(suite, sample, by_task, here):
                    records.append({"label": label, **record})
    return found


def wished(score: str | None, **options: Any) -> Wish | None:
    """What `--score` and the options beside it ask for (None: not given); None without it.

    Raises BadInput for an option that needs `--score`, and where that names no task.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if score is None:
        for name in given:
            raise BadInput(f"--{name.replace('_', '-')}: says what is scored; give --score TASKS too")
        return None
    names = tuple(name.strip() for name in score.split(",") if name.strip())
    if not names:
        raise BadInput("--score: names no task; such as --score heldout")
    return Wish(names, **given)


def with_scores(
    questions: Prepared, results: Sequence[DeviceResult], threads: int, progress: Progress
) -> list[DeviceResult]:
    """The results of devices with `scores` in the place of their answers."""
    scores = scored(questions, [result.answers for result in results], threads, progress)
    return [replace(result, answers={}, scores=records) for result, records in zip(results, scores)]


def _suite(wish: Wish, bundle: Path, documents: list[data.Document], context: int) -> TaskSuite:
    tokenizer = models.load_tokenizer(bundle)
    options = SuiteOptions(wish.tasks, context, wish.limit, wish.seed, None, wish.tasks_path)
    end_of_text, bos_token = models.end_of_text_id(tokenizer), models.bos_id(tokenizer)
    suite = prepare(tokenizer, documents, options, end_of_text, bos_token)
    if suite.missing:
        raise BadInput(f"--score: {'; '.join(suite.missing.values())}")
    return suite


def _documents(wish: Wish, run: Path | None) -> list[data.Document]:
    """The documents of the held-out tasks; none where no such task is asked for."""
    if wish.text is not None:
        return list(data.read_documents(wish.text))
    held = [name for name in expand(wish.tasks) if name.startswith("heldout")]
    if not held:
        return []
    if run is None:
        raise BadInput(
            f"--score {held[0]}: is made from text, and the bundle lies in no run; name documents with --text"
        )
    return heldout_documents(run / HELDOUT)


def _run_of(bundle: Path) -> Path | None:
    """The run that a bundle lies in, <run>/<arm>/<bundle>."""
    run = bundle.resolve().parent.parent
    return run if (run / RUN).is_file() and (run / HELDOUT / "heldout.jsonl").is_file() else None


def _by_task(
    sample: device_sample.Sample, told: Sequence[Any]
) -> dict[str, dict[str, list[device_sample.Answer]]]:
    """Task -> item -> answers; an empty continuation, of which no device was asked, is certain."""
    found: dict[str, dict[str, list[device_sample.Answer]]] = {}
    for item, answers in zip(sample.in_turn(), told):
        given = iter(answers)
        complete = [next(given) if target else (0.0, True) for _, target in item.sent]
        found.setdefault(item.task, {})[item.id] = [(float(total), bool(sure)) for total, sure in complete]
    return found
