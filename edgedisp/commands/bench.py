"""`edgedisp bench`: bundles timed on devices, interleaved; with `DeviceTasks` also scored there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedisp.bench import devices
from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.results import label_bundles, twin_pairs
from edgedisp.bench.system import physical_cores
from edgedisp.commands.run_report import check_runs, show_devices
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import MANIFEST, check_files, update_listing, write_json
from edgedisp.core.progress import Progress
from edgedisp.data import cache_folder
from edgedisp.graph import genai_config
from edgedisp.pipeline import device_results
from edgedisp.pipeline.device_results import BundlesByRun
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
    questions = None if tasks is None else DeviceQuestions(tasks, labels, cache_folder())
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
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    write_json(bundle / MANIFEST, {**manifest, "threads": threads})
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
