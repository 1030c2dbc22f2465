"""`edgedisp bench` and `edgedisp phone`: bundles timed, and with `options.tasks` also scored, on devices.

`bench` reaches the devices itself and times bundles in turns. `phone` serves a page, and phones send results.
Both can store their results in the runs that the bundles lie in, whose reports then show them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgedisp.bench import devices
from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.page_protocol import PagePlan
from edgedisp.bench.phone import PhoneOptions, serve
from edgedisp.bench.results import label_bundles
from edgedisp.bench.system import physical_cores
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import check_files, check_options, to_json, write_json
from edgedisp.core.progress import Progress, Screen, warn
from edgedisp.core.results import DeviceResult, Json
from edgedisp.data import cache_folder
from edgedisp.pipeline import device_results
from edgedisp.pipeline.device_results import BundlesByRun
from edgedisp.pipeline.run_results import show_devices
from edgedisp.report.devices import devices_text

if TYPE_CHECKING:  # loads torch
    from edgedisp.pipeline.device_scores import DeviceQuestions


def time_bundles(
    bundles: Sequence[Path], names: Sequence[str], options: BenchOptions, progress: Progress
) -> dict[str, Any]:
    """Time bundles on every device, those of one device interleaved; with `options.tasks` score them, too.

    Returns {format, devices [DeviceResult]}; where items were scored, `scored` says what these scores have in
    common. `problems`: why a device was lost in the middle, or why scores here are missing. All devices are
    reached before anything is timed. Raises BadInput for what cannot be used or timed.
    """
    for name in names:  # before bundles are hashed and tasks read
        devices.kind_of(name)
    if len({*names}) < len(names):
        raise BadInput(f"--device {', '.join(names)}: one is named twice; once is enough")
    labels, questions, options = _prepare(bundles, options)
    with ExitStack() as stack:
        connected = [stack.enter_context(devices.connect(name, labels, options)) for name in names]
        results = [device.measure(progress) for device in connected]
    problems = [f"{result.device}: {result.lost}" for result in results if result.lost]
    timed: dict[str, Any] = {"format": 2, "devices": results, "problems": problems}
    if questions is not None:
        try:
            timed["devices"] = questions.with_scores(results, physical_cores(), progress)
            timed["scored"] = questions.facts()
        except BuildFailed as error:  # what the devices gave is shown before it ends the command
            problems.append(f"scores: {error}")
    return timed


def add_to_reports(results: Sequence[DeviceResult], bundles: BundlesByRun) -> None:
    """Store results in the runs of their bundles and write the reports again; says so on stderr."""
    for run in sorted({run for result in results for run in device_results.save(result, bundles)}):
        warn(show_devices(run))


def _prepare(
    bundles: Sequence[Path], options: BenchOptions
) -> tuple[dict[str, Path], DeviceQuestions | None, BenchOptions]:
    """Label -> folder of bundles with the right files, the questions to score, and the options with these."""
    for bundle in bundles:
        check_files(bundle)
        check_options(bundle)
    labels = label_bundles(bundles)
    if options.tasks is None:
        return labels, None, options
    from edgedisp.pipeline.device_scores import DeviceQuestions

    questions = DeviceQuestions(options.tasks, labels, cache_folder())
    requests = [item.requests for item in questions.items]
    return labels, questions, replace(options, requests=dict.fromkeys(labels, requests))


def measure_on_phones(
    bundles: Sequence[Path],
    options: BenchOptions,
    phone: PhoneOptions,
    width: int,
    echo: Callable[[str], None],
) -> None:
    """Serve until Ctrl-C, or once; echo, write and store each result as it arrives.

    Raises BadInput for what the user can mend, KeyboardInterrupt where nothing arrived.
    """
    labels, questions, options = _prepare(bundles, options)
    by_run = device_results.bundles_by_run(labels) if phone.report else {}
    for run in sorted(by_run):
        warn(f"What phones measure joins the report of {run} (--no-report: it does not)")
    devices_by_run: dict[str, Json] = {}  # by page load
    scored = {} if questions is None else {"scored": questions.facts()}

    def document() -> Json:
        return {"format": 2, "devices": [*devices_by_run.values()], **scored}

    def arrived(name: str, result: DeviceResult) -> None:
        if questions is not None:
            with Screen("scores here") as screen:
                (result,) = questions.with_scores([result], physical_cores(), screen.progress)
        devices_by_run[name] = to_json(result)
        if not phone.as_json:
            echo(devices_text([result], width) + "\n")
        if phone.out is not None:
            write_json(phone.out, document())
        add_to_reports([result], by_run)

    serve(PagePlan(labels, options), phone, warn, arrived)
    if not devices_by_run:
        raise KeyboardInterrupt  # ended before anything came
    if phone.out is not None:
        warn(f"results: {phone.out}")
    if phone.as_json:
        echo(json.dumps(document(), ensure_ascii=False))
