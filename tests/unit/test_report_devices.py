"""Several devices on one page and in one table: figures, gaps, partial results, escaping."""

from __future__ import annotations

import re
from typing import Any

import pytest

from edgedisp.report.devices import render_devices, sections
from edgedisp.report.devices_page import devices_page
from edgedisp.report.on_devices import on_devices


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


def sample() -> dict[str, Any]:
    machine = {
        "cpu": "An <EPYC>",
        "features": ["avx2"],
        "physical_cores": 2,
        "memory_bytes": 16 << 30,
        "system": "Linux",
        "packages": {"onnxruntime": "1.31.1"},
    }
    local = {
        "device": "local",
        "kind": "local",
        "machine": machine,
        "rows": [row("baseline/int4", 120.0), row("baseline/fp32", 60.0, warnings=["drifted"])],
        "load_average": {"before": 0.5, "after": 1.0},
        "repetitions": [{"clock_mhz": 2400.0, "temperature_c": None}, {"clock_mhz": 2500.0}],
        "pairs": [{"fault": None}, {"fault": "two graphs"}],
        "threads": {
            "baseline/int4": {
                "best": 2,
                "rows": [
                    {"threads": n, "decode_tokens_per_s": 60.0 * n, "low": 1.0, "high": 200.0,
                     "prefill_tokens_per_s": 300.0} for n in (1, 2)
                ],
            }
        },
    }  # fmt: skip
    far = {
        "device": "ssh://pi",
        "kind": "ssh",
        "machine": {},
        "rows": [{"label": "baseline/int4", "decode_tokens_per_s": 9.0, "spread": {}, "warnings": []}],
        "lost": "the connection broke",
    }
    return {"format": 1, "devices": [local, far]}


def test_devices_stand_side_by_side_and_a_missing_figure_is_a_dash() -> None:
    side = sections(sample())[0].grids[0]
    assert side.head == ("bundle", "local", "ssh://pi")
    assert side.rows == (
        ("baseline/int4", "120.0 [115.0, 125.0]", "9.00"),
        ("baseline/fp32", "60.00 [55.00, 65.00]", "–"),
    )


def test_every_row_names_its_device() -> None:
    grid = sections(sample())[1].grids[0]
    assert [line[:2] for line in grid.rows] == [
        ("local", "baseline/int4"),
        ("local", "baseline/fp32"),
        ("ssh://pi (partial)", "baseline/int4"),
    ]
    line = dict(zip(grid.head, grid.rows[0]))
    assert (line["load s"], line["download MB"], line["disk MB"]) == ("0.41", "–", "87.0")


def test_a_lost_device_a_fault_and_warnings_are_told() -> None:
    text = render_devices(sample(), 100)
    assert "note: ssh://pi: lost in the middle, what follows is partial: the connection broke" in text
    assert "note: local: two graphs" in text and "note: local: baseline/fp32: drifted" in text
    page = devices_page(sample())
    assert "lost in the middle" in page and "two graphs" in page


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_terminal_table_keeps_its_width_where_one_column_fits(width: int) -> None:
    table = render_devices(sample(), width).split("note:")[0]
    assert max(len(line) for line in table.splitlines()) <= max(width, 80)
    assert "decode t/s" in table and "120.0 [115.0, 125.0]" in table


def test_the_page_escapes_names_and_has_neither_script_nor_link() -> None:
    page = devices_page(sample())
    assert "An &lt;EPYC&gt;" in page and "<EPYC>" not in page
    assert not re.search(r"<script|<link|src=|href=|https?://", page)
    assert "2 (best)" in page and "prefers-color-scheme: dark" in page and "@media print" in page


def test_one_device_alone_needs_no_column_for_it() -> None:
    alone = {"devices": [sample()["devices"][0]]}
    assert [section.key for section in sections(alone)] == ["figures", "device0"]
    assert sections(alone)[0].grids[0].head[0] == "bundle"


def test_a_runs_report_has_all_devices_in_one_table_of_what_was_measured() -> None:
    local, far = sample()["devices"]
    lost = {**far, "rows": [{**far["rows"][0], "partial": True}], "measured": ["2026-11-27T15:44:12+00:00"]}
    section = on_devices({"devices": [local, lost], "devices_outdated": ["dispersed/int4 on phone"]})
    figures, threads = section.grids
    assert [line[0] for line in figures.rows] == [
        "local, baseline/int4",
        "local, baseline/fp32",
        "ssh://pi (partial), baseline/int4",
    ]
    assert "download MB" not in figures.head and len({len(figures.head), *map(len, figures.rows)}) == 1
    assert threads.folded
    assert dict(section.facts)["ssh://pi"] == "measured 2026-11-27 15:44 UTC"
    assert "local: two graphs" in section.notes and any(
        "dispersed/int4 on phone" in note for note in section.notes
    )
    assert on_devices({}).empty and on_devices({"devices": [], "devices_outdated": []}).empty
    alone = on_devices({"devices": [local]}).grids[0]
    assert alone.head[0] == "device, bundle" and alone.rows[0][0] == "local, baseline/int4"


def test_other_lengths_of_prompt_are_named_in_the_row() -> None:
    rows = [row("int4", 10.0, prompt=prompt, generate=64) for prompt in (128, 512)]
    section = on_devices({"devices": [{"device": "local", "machine": {}, "rows": rows}]})
    assert [line[0] for line in section.grids[0].rows] == ["local, int4, 128+64", "local, int4, 512+64"]
    assert "Prompt and new tokens: 128+64, 512+64." in section.lead
