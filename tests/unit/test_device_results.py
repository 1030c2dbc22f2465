"""Device results kept in a run: what replaces what, what is outdated, and that nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgedisp.core.errors import BadInput
from edgedisp.core.files import file_digest, write_json
from edgedisp.device_results import keep, places, shown


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two bundles, as far as measurements look at it."""
    folder = tmp_path / "runs" / "q-01234567"
    for arm in ("baseline", "dispersed"):
        bundle(folder / arm / "int4", arm)
    write_json(folder / "run.json", {"name": "q"})
    return folder


def row(label: str, decode: float, **changes: Any) -> dict[str, Any]:
    return {
        "label": label,
        "threads": 2,
        "ttft_ms": 200.0,
        "prefill_tokens_per_s": 640.0,
        "decode_tokens_per_s": decode,
        "token_ms_p50": 8.0,
        "token_ms_p90": 9.5,
        "load_s": 0.41,
        "peak_memory_bytes": 251_000_000,
        "weights_bytes": 87_000_000,
        "implied_bandwidth_gb_per_s": 10.5,
        "spread": {"decode_tokens_per_s": {"low": decode - 5, "high": decode + 5}},
        "warnings": [],
        **changes,
    }


def bundle(folder: Path, weights: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_text(weights)
    (folder / "genai_config.json").write_text("{}")
    names = ("model.onnx", "genai_config.json")
    write_json(folder / "record.json", {"files": {n: {"sha256": file_digest(folder / n)} for n in names}})


def result(*labels: str, device: str = "local", decode: float = 100.0, **changes: Any) -> dict[str, Any]:
    rows = [row(label, decode, prompt=128, generate=128) for label in labels]
    repetitions = [{"label": label, "token_ms": [1.0, 2.0], "clock_mhz": 2400.0} for label in labels]
    found = {"device": device, "kind": device, "machine": {"cpu": "A"}, "rows": rows, "warnings": []}
    return {**found, "repetitions": repetitions, **changes}


def table(run: Path) -> list[tuple[str, str, float, bool]]:
    return [
        (device["device"], line["label"], line["decode_tokens_per_s"], line["partial"])
        for device in shown(run)["devices"]
        for line in device["rows"]
    ]


def test_a_result_is_read_back_under_its_bundles_folders(run: Path) -> None:
    found = places({"int4": run / "baseline" / "int4", "elsewhere": run.parent})
    assert {label: place.path for label, place in found.items()} == {"int4": "baseline/int4"}
    told = result(
        "int4", "elsewhere", client="192.0.2.7", pairs=[{"baseline": "int4", "candidate": "elsewhere"}]
    )
    assert keep(told, found) == [run]
    assert table(run) == [("local", "baseline/int4", 100.0, False)]  # the row of another place is left out
    (device,) = shown(run)["devices"]
    assert "pairs" not in device and device["repetitions"] == [
        {"label": "baseline/int4", "clock_mhz": 2400.0}
    ]
    (file,) = (run / "devices").iterdir()
    assert "192.0.2.7" not in file.read_text() and json.loads(file.read_text())["result"]["repetitions"]


def test_the_latest_measurement_of_a_device_and_bundle_stands(run: Path) -> None:
    both = places({arm: run / arm / "int4" for arm in ("baseline", "dispersed")})
    keep(result("baseline", "dispersed", decode=1.0), both)
    keep(result("dispersed", decode=2.0), {"dispersed": both["dispersed"]})
    assert table(run) == [("local", "baseline/int4", 1.0, False), ("local", "dispersed/int4", 2.0, False)]
    assert len(list((run / "devices").iterdir())) == 2  # the first still tells of the baseline
    keep(result("baseline", "dispersed", decode=3.0), both)
    assert [line[2] for line in table(run)] == [3.0, 3.0]
    assert len(list((run / "devices").iterdir())) == 1
    faster = result("baseline", decode=4.0)
    faster["rows"][0]["threads"] = 4  # other threads are another measurement
    keep(faster, both)
    assert sorted(line[2] for line in table(run)) == [3.0, 3.0, 4.0]


def test_a_partial_result_is_marked_and_hides_no_complete_one(run: Path) -> None:
    found = places({"int4": run / "baseline" / "int4"})
    keep(result("int4", decode=1.0, lost="gone"), found)
    assert table(run) == [("local", "baseline/int4", 1.0, True)]
    keep(result("int4", decode=2.0), found)
    keep(result("int4", decode=3.0, lost="gone again"), found)
    assert table(run) == [("local", "baseline/int4", 2.0, False)]
    keep({"device": "local", "lost": "before its first turn", "rows": []}, found)
    assert len(list((run / "devices").iterdir())) == 2


def test_a_bundle_made_anew_is_not_shown_with_old_figures(run: Path) -> None:
    keep(result("int4"), places({"int4": run / "baseline" / "int4"}))
    (run / "baseline" / "int4" / "genai_config.json").write_text('{"threads": 2}')  # changes no weights
    bundle(run / "baseline" / "int4", "baseline")
    assert table(run)
    bundle(run / "baseline" / "int4", "other weights")
    assert table(run) == [] and "baseline/int4 on local" in shown(run)["devices_outdated"][0]
    keep(result("int4", decode=5.0), places({"int4": run / "baseline" / "int4"}))
    assert table(run) == [("local", "baseline/int4", 5.0, False)] and not shown(run)["devices_outdated"]


def test_timing_again_leaves_what_was_scored_and_a_label_is_no_key_of_the_machine(run: Path) -> None:
    found = places({"cpu": run / "baseline" / "int4"})
    scores = [{"label": "cpu", "task": task, "value": 1.0} for task in ("cloze", "perplexity")]
    keep(result("cpu", decode=1.0, scores=scores), found)
    keep(result("cpu", decode=2.0, scores=[{"label": "cpu", "task": "cloze", "value": 2.0}]), found)
    (device,) = shown(run)["devices"]
    assert [row["decode_tokens_per_s"] for row in device["rows"]] == [2.0]
    assert {(one["label"], one["task"], one["value"]) for one in device["scores"]} == {
        ("baseline/int4", "cloze", 2.0),
        ("baseline/int4", "perplexity", 1.0),
    }
    assert device["machine"] == {"cpu": "A"}


def test_phones_that_do_not_tell_their_name_are_told_apart_but_not_by_their_browsers_version(
    run: Path,
) -> None:
    found = places({"int4": run / "baseline" / "int4"})
    for agent, decode in (("Chrome/156.0 Mobile", 1.0), ("Firefox/145.0", 2.0), ("Chrome/157.1 Mobile", 3.0)):
        machine = {"cpu": None, "browser": {"user_agent": agent, "cores": 8}}
        keep(result("int4", device="phone", decode=decode, machine=machine), found)
    assert [line[::2] for line in table(run)] == [("phone", 2.0), ("phone 2", 3.0)]


def test_a_devices_name_leads_out_of_no_folder_and_a_damaged_file_is_named(run: Path) -> None:
    keep(result("int4", device="phone ../../<x>\n"), places({"int4": run / "baseline" / "int4"}))
    (file,) = (run / "devices").iterdir()
    assert file.name.startswith("phone-x-20") and table(run)
    file.write_text("{")
    with pytest.raises(BadInput, match="is damaged"):
        shown(run)
