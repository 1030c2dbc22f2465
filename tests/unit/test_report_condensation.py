"""The report's section on condensation: pictures, the table of models, and parts that are absent."""

from __future__ import annotations

from typing import Any

from report_sample import _around, sample

from edgedisp.report.condensation import condensation, layer_grid, model_grid, with_interval
from edgedisp.report.picture import inline_svgs
from edgedisp.report.plot_condensation import changes, measured_precisions
from edgedisp.report.plots import plots


def unmeasured() -> dict[str, Any]:
    """A summary from before bundles were measured and intervals were taken."""
    summary = sample()
    del summary["condensation_bundles"]
    for found in summary["condensation"].values():
        for name in ("mean_cosine", "correlations", "change", "final_norm"):
            found.pop(name, None)
        for row in found["layers"]:
            for name in ("kurtosis", "max_over_median", "max_over_median_sink_excluded", "intervals"):
                del row[name]
    return summary


def test_every_model_has_a_row_with_intervals_and_its_change() -> None:
    rows = {row[0]: row[1:] for row in model_grid(sample()).rows}
    assert list(rows) == [
        f"{arm}, {precision}"
        for arm in ("baseline", "dispersed")
        for precision in ("torch fp32", "onnx fp32", "int8", "int4")
    ]
    mean, spearman, kendall, change = rows["dispersed, int4"]
    assert (spearman, kendall) == ("0.7000 [0.6960, 0.7040]", "0.5000 [0.4960, 0.5040]")
    assert change == "+0.0100 [+0.0060, +0.0140]" and "[" in mean
    assert rows["baseline, torch fp32"][-1] == "–"


def test_precisions_are_drawn_beside_torch_and_their_changes_with_bands() -> None:
    plot = plots(sample())["condensation_precisions"]
    assert [panel.title for panel in plot.panels] == [
        "mean cosine, baseline",
        "mean cosine, dispersed",
        "change of mean cosine, int8 - torch",
        "change of mean cosine, int4 - torch",
    ]
    assert "int4 0.11 at layer 0" in plot.panels[0].description
    assert "at most +0.0100 (95 % interval +0.0060, +0.0140)" in plot.panels[3].description
    assert all("PolyCollection" in svg or "<path" in svg for svg in inline_svgs(plot))


def test_the_arms_change_against_the_baseline_has_a_panel() -> None:
    pictures = plots(sample())
    assert pictures["condensation_layers"].panels[-1].title == "raw: dispersed - baseline"
    assert [panel.name for panel in pictures["condensation_outliers"].panels] == [
        "kurtosis",
        "max-over-median",
        "max-over-median-sink-excluded",
    ]


def test_changes_without_intervals_repeat_the_value() -> None:
    summary = sample()
    row = summary["condensation_bundles"]["baseline"]["int8"]["change"]["layers"][0]["cosine_raw"]
    row |= {"low": None, "high": None}
    values, low, high = changes(summary, "condensation_bundles", "baseline", "int8")
    assert values[0] == low[0] == high[0] == 0.001 and low[1] < values[1] < high[1]
    assert changes(summary, "condensation", "baseline") == ([], [], [])


def test_a_run_whose_bundles_were_not_measured_has_the_section_all_the_same() -> None:
    summary = unmeasured()
    section = condensation(summary, set(plots(summary)))
    assert section.plots == ("condensation_heatmap", "condensation_layers")
    assert [grid.folded for grid in section.grids] == [True] and measured_precisions(summary) == []
    assert condensation({}, set()).empty


def test_a_bundle_that_was_measured_in_one_arm_alone_is_shown_there() -> None:
    summary = sample()
    del summary["condensation_bundles"]["dispersed"]
    plot = plots(summary)["condensation_precisions"]
    assert plot.panels[0].title == "mean cosine, baseline" and len(plot.panels) == 3


def test_digits_follow_the_interval() -> None:
    assert with_interval(_around("value", 0.52345, 0.0123), "value", 3) == "0.523 [0.511, 0.536]"
    assert with_interval(_around("value", 0.52345, 0.000123), "value", 3) == "0.5234 [0.5233, 0.5236]"
    assert with_interval({"value": 0.52345}, "value", 3) == "0.523"
    assert (
        with_interval({"difference": 0.01, "low": None, "high": 1.0}, "difference", 2, signs=True) == "+0.01"
    )
    assert with_interval({}, "value", 3) == "–"


def test_the_layer_table_has_the_figures_that_were_measured_and_no_others() -> None:
    summary = sample()
    rows = {arm: summary["condensation"][arm]["layers"] for arm in ("baseline", "dispersed")}
    older = {"baseline": unmeasured()["condensation"]["baseline"]["layers"]}
    head = layer_grid(rows).head
    assert head[:3] == ("layer", "mean cosine, baseline", "mean cosine, dispersed")
    assert "kurtosis, dispersed" in head
    assert not any(name.startswith("kurtosis") for name in layer_grid(older).head)
    assert len(layer_grid(rows).rows) == 31
