"""What a report says of bits by weight, and nothing where none were searched for."""

from __future__ import annotations

from typing import Any

from report_sample import sample

from edgedisp.report import assignment_text, wording
from edgedisp.report.mixed import PARETO, mixed
from edgedisp.report.page import markdown, page, report_json
from edgedisp.report.picture import inline_svgs
from edgedisp.report.plot_mixed import pareto
from edgedisp.report.plots import plots
from edgedisp.report.results import result_sections


def point(name: str, size: float, kl: float) -> dict[str, Any]:
    found = {"name": name, "size_bytes": size, "predicted_kl": kl, "measured_kl": kl * 1.1}
    return {**found, "decode_ratio": 104e6 / size}


def searched() -> dict[str, Any]:
    """The sample with a search in the baseline's int4 bundle."""
    summary = sample()
    row = {"name": "layers.0.<b>", "component": "mlp", "bits": 4, "group": 64, "symmetric": False}
    row |= {"method": "k_quant", "size_bytes": 500_000}
    other = {**row, "name": "layers.1", "bits": 8, "symmetric": True, "method": "rtn"}
    summary["bundles"]["baseline"]["int4"] |= {
        "by_tensor": [row, other],
        "search": {
            "goal": {"budget": 100_000_000, "max_perplexity_increase": None},
            "size_bytes": 99_900_000,
            "tokens": 512,
            "perplexity_tokens": 4096,
            "predicted_kl": 0.1,
            "measured_kl": 0.11,
            "perplexity_increase": 0.081,
            "curve": [point("", 80e6, 0.4), point("", 100e6, 0.1), point("", 150e6, 0.001)],
            "points": [point("chosen", 99.9e6, 0.1), point("uniform int4", 104e6, 0.2)],
            "sensitivity": {"layers.0.<b>": 0.0021},
        },
    }
    return summary


def test_without_a_search_there_is_nothing() -> None:
    assert mixed(sample(), ()).empty and pareto(sample()) is None and assignment_text(sample()) == ""
    assert "mixed" not in {section.key for section in result_sections(sample(), ())}


def test_the_choice_and_the_curve_are_told() -> None:
    summary = searched()
    section = mixed(summary, (PARETO,))
    said = " ".join(text for _, text in section.facts)
    assert "at most 100 MB asked; 99.9 MB, KL 0.11 nats (predicted 0.1)" in said
    assert "8.1 % higher" in said
    points, weights = section.grids
    assert points.rows[0] == ("chosen", "99.9", "0.1", "0.11", "1.04") and not points.folded
    assert weights.folded and weights.rows[0][1] == "4 bits g64 asymmetric k_quant"
    assert weights.rows[0][3] == "0.0021"
    printed = assignment_text(summary)
    assert "1 x 4 bits g64 asymmetric k_quant" in printed and "1 x 8 bits g64 symmetric rtn" in printed
    plot = pareto(summary)
    assert plot is not None and "uniform int4 104.0 MB at KL 0.22" in plot.description
    assert "mathdefault" not in "".join(inline_svgs(plot))


def test_the_page_holds_it_escaped_and_the_same_each_time() -> None:
    summary = searched()
    pictures = plots(summary)
    assert PARETO in pictures
    sections = result_sections(summary, set(pictures))
    first, again = (page(summary, sections, plots(summary)) for _ in range(2))
    assert first == again and "layers.0.&lt;b&gt;" in first and "layers.0.<b>" not in first
    assert "plots/pareto.png" in markdown(summary, sections, pictures)
    assert '"budget": 100000000' in report_json(summary)


def test_a_perplexity_that_fell_is_said_to_be_lower() -> None:
    assert [wording.raised(change) for change in (0.081, -0.04, 0.0, None)] == [
        "8.1 % higher",
        "4.0 % lower",
        "0.0 % higher",
        wording.MISSING,
    ]
