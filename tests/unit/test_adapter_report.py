"""The report's merge audit: every row of every arm, which base was used and why, and what int4 left over."""

from __future__ import annotations

import copy
from typing import Any

from edgedisp.report import page
from edgedisp.report.adapters import merge_audit
from edgedisp.report.results import result_sections

AUDIT: dict[str, Any] = {
    "rows": [
        {"name": "no adapter", "loss": 3.0, "difference": 0.25, "low": 0.2, "high": 0.3},
        {"name": "adapter on", "loss": 2.75, "difference": 0.0, "low": 0.0, "high": 0.0},
        {
            "name": "merged into full precision",
            "loss": 2.7654,
            "difference": 0.0154,
            "low": 0.01,
            "high": 0.02,
        },
        {"name": "merged into dequantized nf4", "loss": 2.75, "difference": 0.0, "low": None, "high": None},
    ],
    "tokens": 4080,
    "blocks": 16,
    "grid": {"bits": 4, "group": 32, "symmetric": False, "head_bits": 8},
    "gains": {
        "fp32": {"difference": -0.25, "low": -0.3, "high": -0.2},
        "int4": {"difference": -0.11, "low": -0.12, "high": -0.10},
    },
    "decision": {"judged_by": "int4", "difference": -0.02, "low": -0.03, "high": -0.01},
    "chosen": "dequantized",
    "why": "after int4, it is better",
    "warning": None,
}


def summary() -> dict[str, Any]:
    other = copy.deepcopy(AUDIT) | {
        "why": "the audit of the arm baseline decides",
        "warning": "it speaks for full",
    }
    into = "the dequantized nf4 base"
    return {
        "arms": ["baseline", "dispersed"],
        "midtrain": {
            "baseline": {"merged_into": into, "merge_audit": AUDIT},
            "dispersed": {"merged_into": into, "merge_audit": other},
        },
    }


def test_every_row_stands_with_its_difference_for_every_arm() -> None:
    grid = merge_audit(summary()).grids[0]
    assert grid.head[1:] == (
        "baseline, loss", "baseline, from adapter on [95 %]",
        "dispersed, loss", "dispersed, from adapter on [95 %]",
    )  # fmt: skip
    rows = {row[0]: row[1:3] for row in grid.rows}
    assert rows == {
        "no adapter": ("3.0000", "+0.250 [+0.200, +0.300]"),
        "adapter on": ("2.7500", "–"),
        "merged into full precision": ("2.7654", "+0.0154 [+0.0100, +0.0200]"),
        "merged into dequantized nf4": ("2.7500", "0.0000"),
    }


def test_the_section_says_which_base_was_used_why_and_what_int4_left() -> None:
    section = merge_audit(summary())
    facts = dict(section.facts)
    assert facts["baseline"] == "merged into the dequantized nf4 base, because after int4, it is better"
    assert facts["baseline, worth of the adapter"] == (
        "-0.250 [-0.300, -0.200] nats per token from the base to the merged model, "
        "-0.110 [-0.120, -0.100] from int4 to int4"
    )
    assert section.notes[0] == "dispersed: it speaks for full."
    assert "4,080 tokens of 16 held-out blocks" in section.notes[1] and len(section.notes) == 2
    assert "asymmetric groups of 32" in section.notes[1]


def test_a_build_without_adapters_has_no_such_section() -> None:
    for part in ({}, {"midtrain": {"baseline": {"merge_audit": None}}}, {"midtrain": {"baseline": {}}}):
        assert merge_audit({"arms": ["baseline"], **part}).empty


def test_the_report_shows_it_on_the_page_and_as_markdown() -> None:
    said = summary()
    sections = result_sections(said, set())
    for text in (page.page(said, sections, {}), page.markdown(said, sections, {})):
        assert "Merge audit" in text and "merged into dequantized nf4" in text


def test_names_from_a_record_are_escaped() -> None:
    said = summary()
    said["midtrain"]["baseline"]["merge_audit"] = AUDIT | {"why": "<script>"}
    assert "<script>" not in page.page(said, [merge_audit(said)], {})
