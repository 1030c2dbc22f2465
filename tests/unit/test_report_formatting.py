"""Digits and units: an interval decides how many digits its estimate has."""

from __future__ import annotations

from edgedisp.core.results import Estimate
from edgedisp.report.formatting import (
    duration,
    fixed,
    format_estimate,
    megabytes,
    p_value,
    significant,
    typographic,
)
from edgedisp.report.layout import Grid, escape_markdown, fenced, grid_markdown, grid_text
from edgedisp.report.sections import marked, plain


def test_an_estimate_has_two_digits_of_its_half_width() -> None:
    assert format_estimate(Estimate(11.934, 11.1, 12.8)) == "11.93 [11.10, 12.80]"
    assert format_estimate(Estimate(-0.00083, -0.0039, 0.0023), signs=True) == "-0.0008 [-0.0039, +0.0023]"
    assert format_estimate(Estimate(0.05, 0.02, 0.08), 100, signs=True) == "+5.0 [+2.0, +8.0]"
    assert format_estimate(Estimate(0.5, 0.49, 0.51), short=True) == "0.500 ±0.010"
    assert format_estimate(Estimate(None)) == format_estimate(None) == "–"
    assert format_estimate(Estimate(0.0, 0.0, 0.0), signs=True) == "0.0000 [0.0000, 0.0000]"


def test_figures_without_an_interval_have_digits_by_their_unit() -> None:
    figures = (None, 0.0123, 0.00042, 14.2, 18201.4, 0.0, 3e7)
    texts = ["–", "0.01230", "0.0004200", "14.20", "18,201", "0.00", "3.00e+07"]
    assert [significant(value) for value in figures] == texts
    assert (fixed(-0.001, 2), fixed(0.001, 2, "+"), fixed(0.1, 1, "+")) == ("0.00", "0.00", "+0.1")
    assert [p_value(p) for p in (0.0001, 0.0449)] == ["<0.001", "0.045"]
    times = [duration(seconds) for seconds in (0.44, 42.0, 365.0, 7800.0)]
    assert times == ["0.4 s", "42 s", "6 min 05 s", "2 h 10 min"]
    assert [megabytes(size) for size in (98_400_000, 540_000_000)] == ["98.4", "540"]
    assert typographic("-0.8 %, int4-x") == "−0.8\u00a0%, int4-x"


def test_untrusted_text_cannot_leave_its_cell() -> None:
    text = escape_markdown("a|b <script>\n[x](y) `c` *d* _e_")
    assert "<" not in text and "\n" not in text and r"\|" in text and r"\[x\]" in text
    assert escape_markdown("heldout_cloze") == "heldout_cloze"
    assert fenced("```\nx").startswith("````\n")
    grid = Grid(("name", "value"), (("a|b", "-1.0"),))
    assert grid_markdown(grid).splitlines() == ["| name | value |", "| :-- | --: |", r"| a\|b | -1.0 |"]


def test_a_terminal_table_keeps_to_its_width_and_obeys_no_control_character() -> None:
    head = ("name", *(f"column {place}" for place in range(9)))
    text = grid_text(Grid(head, (("a\x1b[31mb", *["1.234"] * 8, "–"),)), 60)
    assert max(map(len, text.splitlines())) <= 60 and "\x1b" not in text
    assert "column 8" not in text  # it holds no figure
    assert text.count("name") > 1  # the columns that do not fit stand below, with the names again


def test_the_differences_of_an_answer_are_marked() -> None:
    call = plain('{"name": "turn_on", "arguments": {"area": "hall", "level": 3}}')
    assert call == 'turn_on(area: "hall", level: 3)'
    marks = [piece for piece in marked(call, 'turn_on(area: "bath")') if piece[1] != "same"]
    assert marks == [("bath", "other"), (", level: 3", "missing")]
    assert marked(call, "Sure, I can help!") == [("Sure, I can help!", "unlike")]
