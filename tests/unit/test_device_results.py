"""Device results kept in a run: what replaces what, and what is outdated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgedisp.core.errors import BadInput
from edgedisp.core.files import list_files, write_json
from edgedisp.core.results import DeviceResult, Estimate, Timing
from edgedisp.pipeline.device_results import bundles_by_run, load, save


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two bundles, as far as measurements look at it."""
    folder = tmp_path / "runs" / "q-01234567"
    for arm in ("baseline", "dispersed"):
        bundle(folder / arm / "int4", arm)
    write_json(folder / "run.json", {"name": "q"})
    return folder


def bundle(folder: Path, weights: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_text(weights)
    (folder / "genai_config.json").write_text("{}")
    write_json(folder / "record.json", {"files": list_files(folder, without=["record.json"])})


def result(*labels: str, device: str = "local", decode: float = 100.0, **changes: Any) -> DeviceResult:
    rows = [Timing(label, 2, 128, 128, 5, Estimate(decode, decode - 5, decode + 5)) for label in labels]
    repetitions = [{"label": label, "token_ms": [1.0, 2.0]} for label in labels]
    measured = DeviceResult(device, {"cpu": "A"}, rows, repetitions=repetitions, clock_mhz=(9.0, 9.0))
    return replace(measured, **changes)


def table(run: Path) -> list[tuple[str, str, float | None, bool]]:
    return [
        (device.device, row.label, row.decode_tokens_per_s and row.decode_tokens_per_s.value, row.partial)
        for device in load(run)[0]
        for row in device.rows
    ]


def test_a_result_is_read_back_under_its_bundles_folders(run: Path) -> None:
    in_runs = bundles_by_run({"int4": run / "baseline" / "int4", "elsewhere": run.parent})
    assert in_runs == {run: {"int4": "baseline/int4"}}
    pairs = [{"baseline": "int4", "candidate": "elsewhere", "fault": "no twins"}]
    assert save(result("int4", "elsewhere", pairs=pairs, answers={"int4": [1]}), in_runs) == [run]
    assert table(run) == [("local", "baseline/int4", 100.0, False)]  # the row of another place is left out
    (device,) = load(run)[0]
    assert device.warnings == ("no twins",) and device.clock_mhz == (9.0, 9.0) and device.measured


def test_the_latest_measurement_of_a_device_bundle_and_threads_stands(run: Path) -> None:
    both = bundles_by_run({arm: run / arm / "int4" for arm in ("baseline", "dispersed")})
    save(result("baseline", "dispersed", decode=1.0), both)
    save(result("dispersed", decode=2.0), both)
    assert table(run) == [("local", "baseline/int4", 1.0, False), ("local", "dispersed/int4", 2.0, False)]
    faster = result("baseline", decode=4.0)
    save(replace(faster, rows=[replace(row, threads=4) for row in faster.rows]), both)
    assert sorted(line[2] for line in table(run)) == [1.0, 2.0, 4.0]
    assert len(list((run / "devices").iterdir())) == 3


def test_a_partial_result_is_marked_and_replaces_no_complete_one(run: Path) -> None:
    in_runs = bundles_by_run({"int4": run / "baseline" / "int4"})
    save(result("int4", decode=1.0, lost="gone"), in_runs)
    assert table(run) == [("local", "baseline/int4", 1.0, True)]
    save(result("int4", decode=2.0), in_runs)
    save(result("int4", decode=3.0, lost="gone again"), in_runs)
    assert table(run) == [("local", "baseline/int4", 2.0, False)]
    assert save(DeviceResult("local", lost="before its first turn"), in_runs) == []


def test_a_bundle_made_anew_is_not_shown_with_old_figures(run: Path) -> None:
    save(result("int4"), bundles_by_run({"int4": run / "baseline" / "int4"}))
    (run / "baseline" / "int4" / "genai_config.json").write_text('{"threads": 2}')  # changes no weights
    bundle(run / "baseline" / "int4", "baseline")
    assert table(run)
    bundle(run / "baseline" / "int4", "other weights")
    assert table(run) == [] and "baseline/int4 on local" in load(run)[1][0]
    save(result("int4", decode=5.0), bundles_by_run({"int4": run / "baseline" / "int4"}))
    assert table(run) == [("local", "baseline/int4", 5.0, False)] and not load(run)[1]


def test_timing_again_leaves_what_was_scored(run: Path) -> None:
    in_runs = bundles_by_run({"cpu": run / "baseline" / "int4"})
    for value, tasks in ((1.0, ("cloze", "perplexity")), (2.0, ())):
        scores = [{"label": "cpu", "task": task, "value": value} for task in tasks]
        save(result("cpu", decode=value, scores=scores), in_runs)
    (device,) = load(run)[0]
    assert [line[2] for line in table(run)] == [2.0] and device.machine == {"cpu": "A"}
    rows = {(score["label"], score["task"], score["value"]) for score in device.scores}
    assert rows == {("baseline/int4", "cloze", 1.0), ("baseline/int4", "perplexity", 1.0)}


def test_phones_without_a_name_differ_by_browser_but_not_by_its_version(run: Path) -> None:
    in_runs = bundles_by_run({"int4": run / "baseline" / "int4"})
    for agent, decode in (("Chrome/156.0 Mobile", 1.0), ("Firefox/145.0", 2.0), ("Chrome/157.1 Mobile", 3.0)):
        machine = {"cpu": None, "browser": {"user_agent": agent, "cores": 8}}
        save(result("int4", device="phone", decode=decode, machine=machine), in_runs)
    assert [line[::2] for line in table(run)] == [("phone", 2.0), ("phone 2", 3.0)]


def test_the_name_of_a_device_leads_out_of_no_folder_and_a_damaged_file_is_an_error(run: Path) -> None:
    save(result("int4", device="phone ../../<x>\n"), bundles_by_run({"int4": run / "baseline" / "int4"}))
    (file,) = (run / "devices").iterdir()
    assert file.name.startswith("phone-x-") and table(run)
    file.write_text("{")
    with pytest.raises(BadInput, match="is damaged"):
        load(run)
