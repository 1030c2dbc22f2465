"""Reports of more than two arms and of several seeds: what is told, and what the verdict rests on."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from report_sample import sample, several

from edgedisp.report import model_card, render_arms, render_text, table, verdict
from edgedisp.report.before_after import DIFFERENCE, compare, difference_to
from edgedisp.report.comparisons import comparisons
from edgedisp.report.every_arm import added, every_arm, wanted
from edgedisp.report.page import _sections, page, write
from edgedisp.report.picture import arm_class, arm_color
from edgedisp.report.plot_scores import FAR, scale_of
from edgedisp.report.plots import plots
from edgedisp.report.provenance import differing_settings, fairness, limits
from edgedisp.report.reading import compared, focus
from edgedisp.report.section import Grid
from edgedisp.summary import load

ARMS = ("baseline", "dispersed", "strong", "neftune", "active_forgetting")


def grid(grids: tuple[Grid, ...], start: str) -> dict[str, tuple[str, ...]]:
    """First cell -> the others, of the grid whose caption begins so."""
    (found,) = [one for one in grids if one.caption.startswith(start)]
    return {row[0]: row[1:] for row in found.rows}


def of_format_1(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary as reports had it before there were more arms."""
    old = copy.deepcopy(summary)
    old["comparison"] = old["comparison"]["dispersed"]
    for by_task in old["comparison"].values():
        for entry in by_task.values():
            if "arm" in entry:
                entry["dispersed"] = entry.pop("arm")
    for part in ("seeds", "techniques"):
        del old[part]
    return old


# ---------------------------------------------------------------- which arm the verdict is about


@pytest.mark.parametrize(
    ("arms", "about"),
    [
        (["baseline", "neftune", "dispersed"], "dispersed"),
        (["baseline", "neftune", "strong"], "strong"),
        (["baseline", "neftune"], "neftune"),
        (["baseline"], None),
        (["dispersed", "strong"], None),
    ],
)
def test_the_verdict_is_about_dispersed_else_the_first_with_dispersion(
    arms: list[str], about: str | None
) -> None:
    summary = several(1)
    summary["arms"] = arms
    for part in ("midtrain", "accuracy", "bundles", "comparison", "techniques"):
        summary[part] = {arm: value for arm, value in summary[part].items() if arm in arms}
    assert focus(summary) == about
    said = verdict(summary)
    assert said["arm"] == about and (said["label"] == "single arm") == (about is None)
    if about not in (None, "dispersed"):
        assert f"with the arm {about}" in said["sentence"]
    if arms == ["dispersed", "strong"]:
        assert said["parts"][0] == (
            "No baseline was built beside dispersed and strong, so there is nothing to compare with."
        )


def test_other_arms_leave_the_verdict_and_the_main_table_alone() -> None:
    two, five = sample(), several(1)
    assert {**verdict(two), "per_precision": 0} == {**verdict(five), "per_precision": 0}
    assert table(two).arms == table(five).arms == ("baseline", "dispersed")
    assert render_text(table(two), 100) == render_text(table(five), 100)
    assert table(five, every_arm=True).arms == ARMS


def test_a_report_of_format_1_says_the_same(tmp_path: Path) -> None:
    new = sample(-0.0081, 0.0028)
    old = of_format_1(new)
    (tmp_path / "report.json").write_text(json.dumps({"format": 1, "summary": old}))
    read = load(tmp_path)
    assert compared(read).keys() == {"dispersed"}
    assert verdict(read) == verdict(new)
    assert table(read).as_json() == table(new).as_json()
    assert render_arms(read) == ""
    both = compare([read, several(3)])
    assert both.minuend == "dispersed" and len(both.rows) == 8


def test_runs_with_different_arms_stand_in_one_table() -> None:
    other = several(1)
    other["arms"] = ["baseline", "strong"]
    for part in ("midtrain", "accuracy", "bundles", "comparison", "techniques", "condensation", "verify"):
        other[part] = {arm: value for arm, value in other[part].items() if arm in other["arms"]}
    both = compare([sample(), other])
    assert both.arms == ("baseline", "dispersed", "strong") and both.minuend == "dispersed or strong"
    assert both.rows[0].cell("heldout_cloze", "strong").value is None
    assert both.rows[4].cell("heldout_perplexity", DIFFERENCE) == both.rows[4].cell(
        "heldout_perplexity", difference_to("strong")
    )
    assert "Difference: dispersed or strong - baseline" in render_text(both, 120)


# ---------------------------------------------------------------- seeds


def test_with_one_seed_luck_is_said_to_be_unknown() -> None:
    said = verdict(sample())
    assert said["seeds"] == 1
    assert "how much the luck of training matters is unknown" in said["sentence"]
    assert any("how much luck matters is unknown" in rule for rule in said["rules"])


def test_with_seeds_the_verdict_uses_the_interval_that_holds_their_spread() -> None:
    """Items alone would claim a gain; the three seeds disagree."""
    summary = several(3, loss=-0.004, item_half=0.003, spread=(-0.009, -0.004, 0.001))
    said = verdict(summary)
    assert said["seeds"] == 3 and said["label"] == "no measurable difference"
    first = said["headline"]
    assert first["item_high"] < 0 < first["high"]
    assert "The 3 seeds differ by 0.005 (standard deviation; -0.009, -0.004, +0.001)" in said["sentence"]
    agreed = verdict(several(3, loss=-0.004, item_half=0.003, spread=(-0.0041, -0.004, -0.0039)))
    assert agreed["label"] == "helps" and "3 seeds" in agreed["sentence"]


def test_a_width_that_comes_from_luck_asks_for_seeds_not_for_documents() -> None:
    lucky = verdict(several(3, loss=0.0, item_half=0.003, spread=(-0.02, 0.0, 0.02)))
    assert lucky["label"] == "cannot tell at this size" and "more seeds would tell" in lucky["parts"][0]
    wide = verdict(several(3, loss=0.0, item_half=0.04, spread=(-0.001, 0.0, 0.001)))
    assert "held-out documents are needed" in wide["parts"][0]


def test_the_limits_tell_how_many_seeds_there_were() -> None:
    one, three = (" ".join(limits(summary, []).notes) for summary in (sample(), several(3)))
    assert "One training seed per arm." in one and "3 training seeds" not in one
    assert "3 training seeds per arm" in three and "One training seed" not in three


# ---------------------------------------------------------------- all arms against the baseline


def test_two_arms_and_one_seed_have_no_such_section() -> None:
    assert not wanted(sample()) and every_arm(sample(), ()).empty and render_arms(sample()) == ""
    assert wanted(several(1)) and wanted({**sample(), "seeds": [0, 1]})


def test_every_arm_has_its_row_with_what_it_adds_and_its_differences() -> None:
    summary = several(3)
    section = every_arm(summary, ())
    rows = grid(section.grids, "heldout_perplexity, nats per token")
    assert list(rows) == list(ARMS[1:])
    assert [texts[0] for texts in rows.values()] == [
        "angular dispersion, weight 0.1, layers all",
        "angular dispersion, weight 1, layers last",
        "NEFTune noise, alpha 5",
        "embedding drawn anew every 26 steps",
    ]
    for arm, texts in rows.items():
        (one,) = [one for one in comparisons(summary, arm) if (one.precision, one.unit) == ("int4", "nats")]
        value, half = (float(text.rstrip("*")) for text in texts[-1].replace("±", "").split(" "))
        decimals = len(texts[-1].split(" ")[0].partition(".")[2])
        assert value == pytest.approx(one.difference, abs=0.51 * 10**-decimals)
        assert half == pytest.approx(one.half_width, abs=0.51 * 10**-decimals)
        assert texts[-1].endswith("*") == one.excludes_zero
    assert added(summary, "baseline") == "nothing"
    for arm, tokens in (("dispersed", 256), ("strong", 64)):
        summary["techniques"][arm]["dispersion"] |= {"tokens": tokens, "clamp": 0.1}
    assert added(summary, "strong") == "angular dispersion, weight 1, layers last, tokens 64"


def test_seed_variance_stands_beside_item_variance() -> None:
    summary = several(3, loss=-0.004, item_half=0.003, spread=(-0.009, -0.004, 0.001))
    rows = grid(every_arm(summary, ()).grids, "How much is luck")
    difference, error, sd, each, alone, both = rows["dispersed, int4"]
    assert (difference, sd) == ("-0.004", "0.005")
    assert each == "-0.009, -0.004, +0.001"
    assert float(error) == pytest.approx(0.003 / 1.96, abs=6e-4)
    assert alone == "-0.007, -0.001" and both.startswith("-0.0") and both.endswith("+0.009")
    assert not any(one.caption.startswith("How much") for one in every_arm(several(1), ()).grids)


def test_p_is_corrected_over_the_comparisons_of_all_arms() -> None:
    summary = several(1)
    (listed,) = [one for one in every_arm(summary, ()).grids if one.caption.startswith("All ")]
    assert len(listed.rows) == 4 * 4 * 3
    for arm in ARMS[1:]:
        for by_task in summary["comparison"][arm].values():
            for entry in by_task.values():
                entry["p_value"] = 0.5
    summary["comparison"]["neftune"]["int8"]["heldout_cloze"]["p_value"] = 0.004
    found = {row[:3]: row[8] for row in [g for g in every_arm(summary, ()).grids if g.folded][-1].rows}
    assert found["neftune", "heldout_cloze", "int8"] == f"{0.004 * 48:.3f}"


def test_the_terminal_table_fits_and_names_every_arm() -> None:
    for width in (60, 80, 120):
        text = render_arms(several(3), width)
        assert max(map(len, text.splitlines())) <= width
    assert all(arm in text for arm in ARMS[1:]) and "3 seeds" in text and "seeds' sd, int4" in text
    assert "[" in render_arms(several(3), 120) and "±" in render_arms(several(3), 80)


# ---------------------------------------------------------------- fairness over arms and seeds


def holds(summary: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return grid(fairness(summary).grids, "Is the comparison fair")


def test_fairness_holds_for_every_pair_of_one_seed() -> None:
    rows = holds(several(3))
    assert {row[0] for row in rows.values()} == {"yes"}
    assert "not looked at for neftune" in rows["same loss before the first update"][1]
    assert rows["same optimizer, schedule, seed"][1] == "only what an arm adds differs; seeds 0, 1, 2"
    assert "trainings of one seed in the same order" in rows["same tokens, same order"][1]


def test_one_unfair_pair_is_told_with_its_arm() -> None:
    summary = several(3)
    summary["replicas"]["strong-seed2"]["midtrain"]["settings"]["lr"] = 9.0
    summary["replicas"]["active_forgetting-seed1"]["midtrain"]["log"][0]["loss"] += 0.5
    rows = holds(summary)
    assert rows["same optimizer, schedule, seed"] == ("NO", "strong: they differ in lr")
    assert rows["same loss before the first update"][0] == "NO"
    assert rows["same loss before the first update"][1].startswith("active_forgetting: ")
    assert differing_settings(summary, "active_forgetting") == []
    # The verdict looks at its own arm's pairs alone.
    assert "before the first update differ" not in verdict(summary)["sentence"]
    summary["replicas"]["dispersed-seed1"]["midtrain"]["log"][0]["loss"] += 0.5
    assert "before the first update differ" in verdict(summary)["sentence"]


def test_an_arm_whose_technique_changes_the_first_loss_is_exempt() -> None:
    summary = several(1)
    for part in ("midtrain", "accuracy", "bundles", "comparison", "techniques", "verify", "condensation"):
        summary[part] = {arm: value for arm, value in summary[part].items() if arm in ("baseline", "neftune")}
    summary["arms"] = ["baseline", "neftune"]
    summary["midtrain"]["neftune"]["log"][0]["loss"] += 0.01
    assert "before the first update differ" not in verdict(summary)["sentence"]
    assert holds(summary)["same loss before the first update"][0] == "not checked"


# ---------------------------------------------------------------- pictures and pages


def test_every_arm_has_a_colour_and_a_class_of_its_own() -> None:
    assert len({arm_color(arm, ARMS) for arm in ARMS}) == len({arm_class(arm, ARMS) for arm in ARMS}) == 5
    assert arm_class("strong", ARMS) == "other0"


def test_the_page_of_many_arms_is_whole(tmp_path: Path) -> None:
    summary = several(3)
    files = {path.name for path in write(summary, tmp_path)}
    assert "differences.png" in files
    text = (tmp_path / "report.html").read_text()
    assert text.count('id="arms"') == 1 and '<a href="#arms">' in text
    assert re.findall(r'<span class="arm (other\d)">strong', text) == ["other0"] * len(
        re.findall(r'<span class="arm other0">', text)
    )
    assert len(re.findall(r"<strong>Paired differences</strong>", text)) == 1  # in that section alone
    legend = plots(summary)["differences"].arms
    assert legend == ARMS[1:] and plots(sample())["differences"].arms == ()
    said = plots(summary)["differences"].panels[0].description
    assert all(f"{arm} " in said for arm in ARMS[1:])
    assert "small dots: the single seeds" in plots(summary)["differences"].caption
    assert "small dots" not in plots(several(1))["differences"].caption


def test_a_page_without_the_section_has_no_link_to_it() -> None:
    assert "#arms" not in page(sample(), _sections(sample(), [], set()), {})


def test_an_arm_far_from_the_others_does_not_set_the_scale() -> None:
    summary = several(1)
    built = table(summary, every_arm=True)

    def groups(shift: float) -> list[list[Any]]:
        found = []
        for arm in ARMS[1:]:
            entries = [row.cell("heldout_perplexity", difference_to(arm)) for row in built.rows]
            move = shift if arm == "active_forgetting" else 0.0
            found.append(
                [type(e)((e.value or 0) + move, (e.low or 0) + move, (e.high or 0) + move) for e in entries]
            )
        return found

    assert scale_of(groups(0.0), 1.0) is None
    ends = scale_of(groups(500.0), 1.0)
    assert ends is not None and ends[1] < 10
    near = [x for group in groups(500.0)[:3] for cell in group for x in (cell.low, cell.high)]
    assert ends[0] < min(near) and ends[1] > max(near)
    assert scale_of(groups(500.0)[-2:], 1.0) is None  # of two arms neither is the odd one
    assert scale_of([[], [], []], 1.0) is None and math.isfinite(FAR)


def test_cards_tell_what_was_added_and_which_seed() -> None:
    summary = several(3)
    baseline, neftune, strong = (
        model_card(summary, name) for name in ("baseline", "neftune", "strong-seed2")
    )
    assert "its 4 twins had the same data" in baseline and "NEFTune noise, alpha 5" in baseline
    assert "mid-trained with cross-entropy and NEFTune noise, alpha 5." in neftune
    assert "dispersion-loss" not in neftune and "dispersion-loss" in strong
    assert "strong arm, seed 2" in strong and "2602.00217" in strong
    assert summary["replicas"]["strong-seed2"]["midtrain"]["weights_sha256"][:12] in strong
    assert "over 3 training seeds, of which this model is one" in strong
