"""`edgedisp phone`: serve bundles to phones; show, write and report what they measure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedisp import device_results
from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.page_plan import PagePlan, read_bundle
from edgedisp.bench.phone import ServeOptions, serve
from edgedisp.bench.results import label_bundles
from edgedisp.bench.system import physical_cores
from edgedisp.commands.run_report import check_runs, show_devices
from edgedisp.core.errors import BadInput
from edgedisp.core.files import check_files, data_folder, to_json, write_json
from edgedisp.core.progress import Screen
from edgedisp.core.results import DeviceResult
from edgedisp.data import cache_folder
from edgedisp.report import devices_text


@dataclass(frozen=True)
class PhoneOutput:
    """json_file: every result is written to it. report: results join the reports of the bundles' runs.

    as_json: one line of JSON at the end instead of tables. width: of the tables.
    """

    json_file: Path | None = None
    report: bool = True
    as_json: bool = False
    width: int = 100


class Results:
    """The results of phones as they arrive."""

    def __init__(self, bundles: dict[str, Path], score: dict[str, Any], output: PhoneOutput) -> None:
        self.output = output
        self.places = device_results.places(bundles) if output.report else {}
        check_runs(self.places)
        self.questions: Any = None
        if any(score.values()):  # what makes questions takes seconds to load
            from edgedisp.pipeline.device_scores import prepared, wished

            if (wish := wished(**score)) is not None:
                self.questions = prepared(wish, bundles, cache_folder())
        self.complete: dict[str, DeviceResult] = {}
        self.unreported: set[Path] = set()

    def scored(self, result: DeviceResult) -> DeviceResult:
        """The result with scores instead of the phone's answers."""
        if self.questions is None:
            return result
        from edgedisp.pipeline.device_scores import with_scores

        with Screen("scores here") as screen:
            return with_scores(self.questions, [result], physical_cores(), screen.progress)[0]

    def show(self, result: DeviceResult, echo: Callable[..., None], note: Callable[[str], None]) -> None:
        """Print a result, and add it to the reports."""
        if not self.output.as_json:
            echo(devices_text([result], self.output.width) + "\n")
        self.unreported |= set(device_results.keep(result, self.places))
        for run in sorted(self.unreported):  # with those of a call that Ctrl-C cut off
            note(show_devices(run))
            self.unreported.discard(run)

    def write(self, results: Iterable[DeviceResult]) -> None:
        if self.output.json_file is not None:
            write_json(self.output.json_file, self.document(results))

    def document(self, results: Iterable[DeviceResult]) -> dict[str, Any]:
        """As `edgedisp bench --json` prints it."""
        scored = {} if self.questions is None else {"scored": self.questions.facts()}
        return {"format": 2, "devices": [to_json(result) for result in results], **scored}


def measure_on_phones(
    bundles: list[Path],
    timing: BenchOptions,
    server: ServeOptions,
    score: dict[str, Any],
    output: PhoneOutput,
    echo: Callable[..., None],
) -> None:
    """Serve until Ctrl-C, or once. `score`: arguments of `wished`; `echo(text, err=False)` prints.

    Raises BadInput for what the user can mend, KeyboardInterrupt where nothing arrived.
    """

    def note(line: str) -> None:
        echo(line, err=True)

    file = output.json_file
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise BadInput(f"--out {file}: is a folder, or in one that is not there; name a file")
    for bundle in bundles:
        if bundle.is_dir():
            check_files(bundle)
    labels = label_bundles(bundles)
    served = tuple(read_bundle(label, folder) for label, folder in labels.items())
    arrivals = Results(labels, score, output)
    for run in sorted({place.run for place in arrivals.places.values()}):
        note(f"What phones measure joins the report of {run} (--no-report: it does not)")

    def arrived(run: str, result: DeviceResult) -> None:
        arrivals.complete[run] = result = arrivals.scored(result)
        arrivals.write(arrivals.complete.values())  # at once: later phones may come or not
        arrivals.show(result, echo, note)

    requests = {} if arrivals.questions is None else arrivals.questions.requests
    plan = PagePlan(served, replace(timing, requests=requests))
    received = serve(plan, data_folder("export") / "web", server, note=note, arrived=arrived)
    if not received:
        raise KeyboardInterrupt  # ended before anything came
    results = [arrivals.complete.get(run) or arrivals.scored(result) for run, result in received.items()]
    arrivals.write(results)
    if file is not None:
        note(f"results: {file}")
    for result in results:
        if result.lost:
            arrivals.show(result, echo, note)
    if output.as_json:
        echo(json.dumps(arrivals.document(results), ensure_ascii=False))
