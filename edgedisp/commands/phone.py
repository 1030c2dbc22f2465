"""`edgedisp phone`: serve bundles to phones; show, write and report what they measure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedisp.bench.bundles import read_bundle
from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.page_protocol import PagePlan
from edgedisp.bench.phone import ServeOptions, serve
from edgedisp.bench.results import label_bundles
from edgedisp.bench.system import physical_cores
from edgedisp.commands.run_report import check_runs, show_devices
from edgedisp.core.files import check_files, data_folder, to_json, write_json
from edgedisp.core.progress import Screen
from edgedisp.core.results import DeviceResult
from edgedisp.data import cache_folder
from edgedisp.pipeline import device_results
from edgedisp.report import devices_text


@dataclass(frozen=True)
class PhoneOutput:
    """json_file: every result is written to it. report: results join the reports of the bundles' runs.

    as_json: one line of JSON at the end instead of tables, of `width` columns. echo(text, err=False) prints.
    """

    json_file: Path | None
    report: bool
    as_json: bool
    width: int
    echo: Callable[..., None]

    def note(self, line: str) -> None:
        self.echo(line, err=True)


class Arrivals:
    """The results of phones as they arrive."""

    def __init__(self, bundles: dict[str, Path], score: dict[str, Any], output: PhoneOutput) -> None:
        self.output = output
        self.in_runs = device_results.bundles_by_run(bundles) if output.report else {}
        check_runs(self.in_runs)
        for run in sorted(self.in_runs):
            output.note(f"What phones measure joins the report of {run} (--no-report: it does not)")
        self.questions: Any = None
        if any(score.values()):  # what makes questions takes seconds to load
            from edgedisp.pipeline.device_scores import DeviceQuestions, device_tasks

            if (tasks := device_tasks(**score)) is not None:
                self.questions = DeviceQuestions(tasks, bundles, cache_folder())
        self.complete: dict[str, DeviceResult] = {}
        self.unreported: set[Path] = set()

    def complete_result(self, run: str, result: DeviceResult) -> None:
        self.complete[run] = result = self.scored(result)
        self.write(self.complete.values())  # at once: later phones may come or not
        self.show(result)

    def scored(self, result: DeviceResult) -> DeviceResult:
        """The result with scores instead of the phone's answers."""
        if self.questions is None:
            return result
        with Screen("scores here") as screen:
            scored: list[DeviceResult] = self.questions.with_scores(
                [result], physical_cores(), screen.progress
            )
        return scored[0]

    def show(self, result: DeviceResult) -> None:
        """Print a result, and add it to the reports."""
        if not self.output.as_json:
            self.output.echo(devices_text([result], self.output.width) + "\n")
        self.unreported |= set(device_results.save(result, self.in_runs))
        for run in sorted(self.unreported):  # with those of a call that Ctrl-C cut off
            self.output.note(show_devices(run))
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
) -> None:
    """Serve until Ctrl-C, or once. `score`: arguments of `device_tasks`.

    Raises BadInput for what the user can mend, KeyboardInterrupt where nothing arrived.
    """
    for bundle in bundles:
        check_files(bundle)
    labels = label_bundles(bundles)
    served = tuple(read_bundle(label, folder) for label, folder in labels.items())
    arrivals = Arrivals(labels, score, output)
    requests = {} if arrivals.questions is None else arrivals.questions.requests
    plan, web = PagePlan(served, replace(timing, requests=requests)), data_folder("export") / "web"
    received = serve(plan, web, server, note=output.note, arrived=arrivals.complete_result)
    if not received:
        raise KeyboardInterrupt  # ended before anything came
    results = [arrivals.complete.get(run) or arrivals.scored(result) for run, result in received.items()]
    arrivals.write(results)
    if output.json_file is not None:
        output.note(f"results: {output.json_file}")
    for result in results:
        if result.lost:
            arrivals.show(result)
    if output.as_json:
        output.echo(json.dumps(arrivals.document(results), ensure_ascii=False))
