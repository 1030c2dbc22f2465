"""The before/after table, as data, as terminal text and as Markdown."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_sample import ARMS, SIZE, comparison, sample, single_arm

from edgedisp.report.before_after import (
    DIFFERENCE,
    Cell,
    Metric,
    compare,
    difference_texts,
    table,
    value_text,
)
from edgedisp.report.rendering import cell_text, escape_markdown, fenced, render_markdown, render_text
from edgedisp.report.wording import decimals_for, fixed, megabytes, p_value, seconds, signed, typographic


def parse_markdown(text: str) -> list[list[str]]:
    """The cells of the first Markdown table, rule line left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [rows[0], *rows[2:]]


def test_rows_are_precisions_from_most_to_fewest_bits() -> None:
    shuffled = {**sample(), "precisions": ["int4", "fp32", "torch", "int8"]}
    assert [row.label for row in table(shuffled).rows] == ["torch fp32", "onnx fp32", "int8", "int4"]


def test_columns_are_perplexity_then_tasks_then_costs() -> None:
    built = table(sample())
    assert [metric.title for metric in built.metrics] == [
        "perplexity",
        "heldout_cloze",
        "heldout_continuation",
        "size",
        "decode",
        "first token",
    ]
    assert built.columns(built.metrics[0]) == ("baseline", "dispersed", "difference")
    assert built.columns(built.metrics[-1]) == ("baseline", "dispersed")


def test_cells_hold_the_summarys_values_and_intervals() -> None:
    summary = sample()
    for row in table(summary).rows:
        for arm in ARMS:
            given_ = summary["accuracy"][arm][row.precision]["heldout_cloze"]
            assert row.cell("heldout_cloze", arm) == Cell(
                given_["value"], given_["low"], given_["high"], given_["n"], given_["documents"]
            )
        paired = summary["comparison"]["dispersed"][row.precision]["heldout_perplexity"]
        assert row.cell("heldout_perplexity", DIFFERENCE).low == paired["low"]


def test_torch_has_no_size_and_no_speed() -> None:
    torch_row = table(sample()).rows[0]
    assert torch_row.cell("size_bytes", "baseline").value is None
    assert cell_text(table(sample()).metrics[-1], "baseline", torch_row.cell("ttft_ms", "baseline")) == "–"


def test_markdown_parses_back_to_the_same_values() -> None:
    built = table(sample(-0.0081, 0.0028))
    head, *rows = parse_markdown(render_markdown(built))
    columns = [(metric, column) for metric in built.metrics for column in built.columns(metric)]
    assert len(head) == len(columns) + 1
    for row, texts in zip(built.rows, rows, strict=True):
        assert texts[0] == row.label
        for (metric, column), text in zip(columns, texts[1:], strict=True):
            cell = row.cell(metric.key, column)
            if cell.value is None:
                assert text == "–"
                continue
            numbers = [
                float(found.replace(",", ""))
                for found in re.findall(r"[+-]?\d[\d,]*\.?\d*(?=[\],* ]|$)", text)
            ]
            wanted = [value for value in (cell.value, cell.low, cell.high) if value is not None]
            decimals = len(text.split(" ")[0].rstrip("*").partition(".")[2])
            assert len(numbers) == len(wanted)
            for number, value in zip(numbers, wanted, strict=True):
                assert number == pytest.approx(value * metric.scale, abs=0.51 * 10**-decimals)
            assert text.endswith("*") == (column == DIFFERENCE and cell.excludes_zero)


def test_terminal_table_fits_80_columns_and_keeps_every_figure() -> None:
    text = render_text(table(sample()), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "11.93 [11.09, 12.82]" in text
    assert "143.2" in text
    assert text.count("int4") == 4  # one band each for perplexity and two tasks, one for all costs


def test_a_wide_terminal_gets_one_band_and_a_narrow_one_shorter_cells() -> None:
    built = table(sample())
    assert render_text(built, 300).count("torch fp32") == 1
    narrow = render_text(built, 58)
    assert "±" in narrow
    assert "[11.09" not in narrow


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(40, 220), task=st.text(min_size=1, max_size=60), arm=st.text(min_size=1, max_size=40)
)
def test_no_line_is_longer_than_the_terminal_whatever_the_names(width: int, task: str, arm: str) -> None:
    summary = {
        "arms": ["baseline", arm],
        "accuracy": {
            name: {
                "int4": {task: {"metric": "accuracy", "value": 0.25, "low": 0.2, "high": 0.3, "chance": 0.25}}
            }
            for name in ("baseline", arm)
        },
    }
    lines = render_text(compare([summary, {**summary, "name": task * 3}]), width).split("\n")
    assert max(map(len, lines)) <= width
    assert all(char.isprintable() for line in lines for char in line)


def test_several_runs_align_and_missing_cells_are_marked() -> None:
    other = single_arm()
    other["hash8"], other["precisions"] = "ffff0000", ["fp32"]
    other["accuracy"]["baseline"] = {"fp32": {"arc_easy": {"metric": "acc", "value": 0.5}}}
    other["bundles"]["baseline"] = {"fp32": {"size_bytes": 5_000_000}}
    other["latency"] = None
    built = compare([sample(), other])
    assert built.runs == ("smollm2-135m-quickstart-3fa9c1d2", "smollm2-135m-quickstart-ffff0000")
    assert [row.run == built.runs[1] for row in built.rows] == [False] * 4 + [True]
    head, *rows = parse_markdown(render_markdown(built))
    assert {len(row) for row in rows} == {len(head)}
    last = dict(zip(head, rows[-1], strict=True))
    assert last["arc_easy, % ↑: baseline"] == "50.0"
    assert last["perplexity ↓: baseline"] == "–"
    assert last["size, MB ↓: dispersed"] == "–"
    assert dict(zip(head, rows[0], strict=True))["arc_easy, % ↑: baseline"] == "–"
    assert built.runs[1] in render_text(built, 80)


def test_the_same_run_twice_gets_two_names() -> None:
    assert compare([sample(), sample()]).runs[1].endswith("(2)")


def test_runs_on_other_text_carry_a_warning() -> None:
    other = sample()
    assert not compare([sample(), other]).notes
    other["corpus"]["tokens_sha256"] = "00" * 32
    other["corpus"]["context"] = 1024
    (note,) = compare([sample(), other]).notes
    assert "training texts" in note
    assert "context lengths" in note


def test_a_task_at_chance_in_both_arms_is_told() -> None:
    summary = sample()
    for arm in ARMS:
        summary["accuracy"][arm]["int4"]["heldout_continuation"].update(value=0.26, low=0.22, high=0.30)
    (note,) = table(summary).notes
    assert "heldout_continuation is at chance (25 %) in every arm at int4" in note


def test_a_single_arm_has_no_difference_column() -> None:
    built = table(single_arm())
    assert all(built.columns(metric) == ("baseline",) for metric in built.metrics)
    assert "difference" not in render_text(built).lower()


def test_without_a_recorded_pairing_the_difference_has_no_interval_and_no_star() -> None:
    cell = table({**sample(), "comparison": {}}).rows[0].cell("heldout_cloze", DIFFERENCE)
    assert cell.value == pytest.approx(0.004)
    assert cell.low is None
    assert not cell.excludes_zero


def test_better_follows_the_metrics_direction() -> None:
    loss, share = Metric("p", "p", higher_is_better=False), Metric("a", "a", "%", 100.0, True)
    fall, rise = Cell(-1.0, -2.0, -0.5), Cell(1.0, 0.5, 2.0)
    assert (loss.better(fall), loss.better(rise), share.better(fall), share.better(rise)) == (
        True,
        False,
        False,
        True,
    )
    assert share.better(Cell(1.0, -0.5, 2.0)) is None


def test_an_empty_summary_gives_no_figures() -> None:
    assert render_text(table({})) == "No figures."


def test_the_table_is_json() -> None:
    found = json.loads(json.dumps(table(sample()).as_json(), allow_nan=False))
    assert found["rows"][3]["cells"]["size_bytes"]["baseline"]["value"] == SIZE["int4"]


def test_comparisons_alone_make_a_table() -> None:
    built = table({"arms": list(ARMS), "comparison": {"int4": comparison(-0.01, 0.005)}})
    assert built.rows[0].cell("heldout_perplexity", DIFFERENCE).excludes_zero


# How figures are written


@given(st.floats(-1e5, 1e5), st.floats(1e-5, 1e3))
def test_a_difference_shows_two_digits_of_its_half_width(value: float, half: float) -> None:
    cell = Cell(value, value - half, value + half)
    shown, ends, _ = difference_texts(Metric("m", "m"), cell)
    decimals = len(shown.partition(".")[2])
    assert all(len(end.partition(".")[2]) == decimals for end in ends.split(", ") if "," not in end)
    assert abs(float(shown.replace(",", "")) - value) <= 0.5001 * 10**-decimals
    assert 10**-decimals <= max(half, 1.0)


def test_figures_are_written_as_promised() -> None:
    assert [decimals_for(half, 3) for half in (0.0267, 1.9, 25.0, None, 0.0)] == [3, 1, 0, 3, 3]
    assert (fixed(-0.001, 2), signed(0.0, 1), signed(0.04, 1), signed(0.06, 1)) == (
        "0.00",
        "0.0",
        "0.0",
        "+0.1",
    )
    assert (megabytes(98_700_000), megabytes(540_100_000)) == ("98.7", "540")
    assert [seconds(x) for x in (0.44, 42.0, 59.7, 365.0, 7800.0)] == [
        "0.4 s",
        "42 s",
        "1 min 00 s",
        "6 min 05 s",
        "2 h 10 min",
    ]
    assert (p_value(0.0001), p_value(0.0312)) == ("<0.001", "0.031")
    assert typographic("-0.5, a-1, 2026-01-02, 95 %") == "−0.5, a-1, 2026-01-02, 95\u00a0%"
    assert value_text(Metric("m", "m"), 12_345_678.0) == "1.23e+07"


@given(st.text(max_size=80))
def test_escaped_text_cannot_leave_its_markdown_cell(text: str) -> None:
    shown = escape_markdown(text)
    assert "\n" not in shown
    assert "<" not in shown
    assert not re.search(r"(?<!\\)(?:\\\\)*\|", shown)
    assert not re.search(r"(?<!\\)(?:\\\\)*`", shown)


def test_a_code_block_cannot_be_closed_from_inside() -> None:
    text = fenced("a\n```\n# title\n````\nb")
    assert text.splitlines()[0] == text.splitlines()[-1] == "`````"
