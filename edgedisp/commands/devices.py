"""`edgedisp bench` and `edgedisp phone`: bundles timed, and with `DeviceTasks` also scored, on devices.

`bench` reaches the devices itself and times bundles in turns. `phone` serves a page, and phones send results.
Both can keep their results in the runs that the bundles lie in, whose reports then show them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedisp.bench import devices
from edgedisp.bench.bundles import read_bundle
from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.page_protocol import PagePlan
from edgedisp.bench.phone import ServeOptions, serve
from edgedisp.bench.results import label_bundles, twin_pairs
from edgedisp.bench.system import physical_cores
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import (
    MANIFEST,
    check_files,
    data_folder,
    read_json,
    to_json,
    update_listing,
    write_json,
)
from edgedisp.core.progress import Progress, Screen
from edgedisp.core.results import DeviceResult
from edgedisp.data import cache_folder
from edgedisp.graph import genai_config
from edgedisp.pipeline import device_results
from edgedisp.pipeline.device_results import BundlesByRun
from edgedisp.pipeline.run_results import check_runs, show_devices
from edgedisp.report import devices_text

if TYPE_CHECKING:  # loads torch
    from edgedisp.pipeline.device_scores import DeviceQuestions, DeviceTasks


def time_bundles(
    bundles: list[Path],
    device_names: list[str],
    options: BenchOptions,
    progress: Progress,
    tasks: DeviceTasks | None = None,
    *,
    write_threads: bool = False,
) -> dict[str, Any]:
    """Time bundles on every device, those of one device interleaved.

    Returns {format, devices [DeviceResult]}. `tasks`: what to score there too; devices then have `scores`,
    and `scored` says what these have in common, or `unscored` why there are none. `write_threads`: write the
    best counts of a sweep into the bundles, and return them as `written` {label: threads}. All devices are
    reached before anything is timed; a device that went away in the middle has `lost`.

    Raises BadInput for a device that is not known or cannot be used, or a bundle that cannot be timed.
    """
    addresses = devices.parse_all(device_names)
    if write_threads and options.threads != "sweep":
        raise BadInput("--write-threads: writes what a sweep has found; give --threads sweep too")
    if write_threads and len(addresses) > 1:
        raise BadInput("--write-threads: a bundle holds the threads of one device; name one --device")
    for bundle in bundles:
        if not (bundle / "model.onnx").is_file() and not any(bundle.glob("onnx/*.onnx")):
            raise BadInput(f"{bundle}: holds no model.onnx; a bundle is a folder such as <run>/<arm>/int4")
        check_files(bundle)
    labels = label_bundles(bundles)
    questions = _questions(tasks, labels)
    requests = {} if questions is None else questions.requests
    options = replace(options, pairs=twin_pairs(list(labels)), requests=requests)
    results = []
    with ExitStack() as stack:
        connected = [stack.enter_context(devices.connect(address, labels, options)) for address in addresses]
        for address, device in zip(addresses, connected):
            results.append(replace(device.measure(progress), device=address.name))
    timed: dict[str, Any] = {"format": 2, "devices": results}
    if questions is not None:
        try:
            timed["devices"] = questions.with_scores(results, physical_cores(), progress)
            timed["scored"] = questions.facts()
        except BuildFailed as error:  # what the devices gave is shown before it ends the command
            timed["unscored"] = str(error)
    if write_threads and results[0].lost is None:
        timed["written"] = {row.label: row.threads for row in results[0].rows}
        for label, threads in timed["written"].items():
            write_bundle_threads(labels[label], threads)
    return timed


def problems(timed: Mapping[str, Any]) -> list[str]:
    """`device: why` for each device that was lost in the middle, and why scores here are missing."""
    lost = [f"{result.device}: {result.lost}" for result in timed["devices"] if result.lost]
    return lost + ([f"scores: {timed['unscored']}"] if "unscored" in timed else [])


def write_bundle_threads(bundle: Path, threads: int) -> None:
    """Write the thread count into a bundle for a device, its manifest and the record of its stage.

    Raises BadInput for a bundle without a manifest: inside a run, later stages were made from it as it is.
    """
    if not (bundle / MANIFEST).is_file():
        raise BadInput(
            f"{bundle}: --write-threads needs a bundle for a device (with {MANIFEST}); `edgedisp export` and "
            "the `targets` of a build make them"
        )
    genai_config.set_threads(bundle, threads)
    write_json(bundle / MANIFEST, {**read_json(bundle / MANIFEST), "threads": threads})
    update_listing(bundle, ("genai_config.json",))


def bundles_in_runs(bundles: list[Path]) -> BundlesByRun:
    """The bundles by the run that they lie in. BadInput if none lies in one, or a run is damaged."""
    by_run = device_results.bundles_by_run(label_bundles(bundles))
    if not by_run:
        raise BadInput(
            f"--report: {bundles[0]} lies in no run folder (RUN/ARM/NAME); leave --report away, and take "
            "--html or --json"
        )
    check_runs(by_run)
    return by_run


def add_to_reports(timed: Mapping[str, Any], bundles: BundlesByRun) -> list[str]:
    """Store results in the runs of their bundles and write the reports again; a line for each change."""
    lines = [f"{label}: {count} threads written into it" for label, count in timed.get("written", {}).items()]
    runs = {run for result in timed["devices"] for run in device_results.save(result, bundles)}
    return lines + [show_devices(run) for run in sorted(runs)]


def _questions(tasks: DeviceTasks | None, bundles: dict[str, Path]) -> DeviceQuestions | None:
    if tasks is None:
        return None
    from edgedisp.pipeline.device_scores import DeviceQuestions

    return DeviceQuestions(tasks, bundles, cache_folder())


# Phones


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

    def __init__(self, bundles: dict[str, Path], tasks: DeviceTasks | None, output: PhoneOutput) -> None:
        self.output = output
        self.in_runs = device_results.bundles_by_run(bundles) if output.report else {}
        check_runs(self.in_runs)
        for run in sorted(self.in_runs):
            output.note(f"What phones measure joins the report of {run} (--no-report: it does not)")
        self.questions = _questions(tasks, bundles)
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
            return self.questions.with_scores([result], physical_cores(), screen.progress)[0]

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
    tasks: DeviceTasks | None,
    output: PhoneOutput,
) -> None:
    """Serve until Ctrl-C, or once. `tasks`: what phones score, too.

    Raises BadInput for what the user can mend, KeyboardInterrupt where nothing arrived.
    """
    for bundle in bundles:
        check_files(bundle)
    labels = label_bundles(bundles)
    served = tuple(read_bundle(label, folder) for label, folder in labels.items())
    arrivals = Arrivals(labels, tasks, output)
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
