"""The tables, devices and cards of a report, without a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from report_sample import PRECISIONS, device, sample, searched, several_arms

from edgedisp.core.results import ANSWERS_TASK, DeviceResult, Estimate, Score, TaskScore, Timing
from edgedisp.core.run import Run
from edgedisp.report.cards import bundle_card, model_card
from edgedisp.report.devices import devices_section, devices_text
from edgedisp.report.results_table import answers_text, chat_command, table, table_markdown, table_text
from edgedisp.report.sections import fairness_section, merge_section, mixed_section
from edgedisp.report.verdict import verdict


def test_fairness_shows_what_differs_and_folds_what_is_the_same() -> None:
    run = sample()
    differs, same = fairness_section(run).grids
    keys = {f"dispersion.{key}" for key in ("layers", "variant", "weight")}
    assert {row[0] for row in differs.rows} == {"trained weights", *keys}
    assert same.folded and ("tokens", "40960", "40960") in same.rows
    assert "angular dispersion, weight 0.1, layers all" in dict(fairness_section(run).facts)["dispersed"]
    other = replace(run.training["dispersed"], steps=41, settings={"lr": 2.0})
    differs = fairness_section(replace(run, training={**run.training, "dispersed": other})).grids[0]
    assert ("steps", "40", "41") in differs.rows and ("lr", "0.0001", "2.0") in differs.rows


def test_the_table_keeps_to_its_width_and_names_what_says_nothing() -> None:
    run = sample()
    assert len(table(run).rows) == len(PRECISIONS)
    for width in (60, 80, 200):
        assert max(map(len, table_text(table(run), width).splitlines())) <= width
    assert "No figures." in table_text(table(Run("empty", [], [])))
    model = run.measured("baseline", "int4")
    at_chance = {"heldout_cloze": replace(model.scores["heldout_cloze"], chance=0.9)}
    run = replace(run, measurements={"baseline": {"int4": replace(model, scores=at_chance)}})
    assert any("is at chance in every model" in note for note in table(run).notes)


def test_a_name_cannot_leave_its_cell_in_markdown() -> None:
    run = replace(sample(), missing_tasks={"t": "<script>|`x`"})
    assert "<script>" not in table_markdown(table(run))


def test_devices_are_shown_side_by_side_with_their_warnings() -> None:
    text = devices_text([device("adb", 90.0), device("local", 150.0)], 100)
    assert "90.0 [88.0, 92.0]" in text and "150.0 [148.0, 152.0]" in text
    assert "90 of 100 items answered" in text and "drifted" in text
    assert max(map(len, (line for line in text.splitlines() if not line.startswith("note:")))) <= 100


def test_a_report_shows_what_was_measured_later() -> None:
    run = replace(sample(), devices=[device("adb", 90.0)], devices_outdated=["dispersed/int8 on x"])
    section = devices_section(run.devices, run.devices_outdated)
    assert "128+64" in section.grids[0].rows[0] and "1,800 to 2,400 MHz" in section.facts[0][1]
    assert any("Not shown, as the bundles were made anew" in note for note in section.notes)


def test_a_device_without_figures_gives_no_table() -> None:
    assert devices_text([DeviceResult("local")], 80) == "No figures."
    lost = DeviceResult("adb", rows=[Timing("a", None, 1, 1, 1)], lost="unplugged")
    assert "partial: unplugged" in devices_text([lost], 80)


def test_a_search_for_bits_shows_its_goal_and_every_weight() -> None:
    section = mixed_section(searched())
    assert "at most 100 MB asked" in section.facts[0][1]
    assert section.grids[1].rows == (("lm_head", "8 bits g32 symmetric rtn", "0.004"),)


def test_a_merged_adapter_is_audited() -> None:
    merged = {"name": "merged", "loss": 2.51, "difference": 0.01, "low": 0.0, "high": 0.02}
    audit = {
        "rows": [merged], "gains": {"fp32": merged, "int4": merged},
        "chosen": "full", "why": "it is the original", "tokens": 512, "grid": {"method": "gptq", "group": 32},
    }  # fmt: skip
    run = sample()
    trained = replace(run.training["dispersed"], merge_audit=audit)
    section = merge_section(replace(run, training={**run.training, "dispersed": trained}))
    assert section.grids[0].rows == (("dispersed: merged", "2.5100", "+0.010 [0.000, +0.020]"),)
    assert section.notes[0].startswith("dispersed: merged into the full base, because it is the original.")
    assert "by gptq in asymmetric groups of 32" in section.notes[1]


def test_a_model_card_is_tagged_by_what_the_folder_holds() -> None:
    run = sample()
    card, baseline = model_card(run, "dispersed"), model_card(run, "baseline")
    front = card.split("---")[1]
    assert "library_name: transformers" in front and '"dispersion-loss"' in front and "onnx" not in front
    assert 'base_model: "HuggingFaceTB/SmolLM2-135M"' in front and "license" not in front
    assert '"dispersion-loss"' not in baseline.split("---")[1]
    assert "control of a paired experiment" in baseline
    assert verdict(run).parts[0] in card and "edgedisp build wikipedia" in card
    assert "seed 1" in model_card(several_arms(seeds=2), "dispersed-seed1")


GRID = {"bits": 4, "group": 32, "symmetric": False, "method": "gptq", "head_bits": 8, "accuracy_level": 4}
FILES = {"graph": "model.onnx", "weights": "model.onnx.data", "load": "import x"}
MANIFEST: dict[str, Any] = {
    "target": "laptop-x64", "precision": "int4", "size_bytes": 98_400_000, "context": 2048, "threads": 2,
    "base": {"base": "HuggingFaceTB/SmolLM2-135M", "license": "apache-2.0", "found_in": "README.md"},
    "provenance": {"arm": "dispersed", "seed": 0, "edgedisp": "0.1.0", "versions": {"onnx": "1"}},
    "grid": GRID, "layouts": {"onnxruntime-genai": FILES},
}  # fmt: skip


def test_a_bundle_card_loads_and_shows_its_precision_alone() -> None:
    card = bundle_card(MANIFEST, "dispersed/laptop-x64", sample())
    assert '"onnx"' in card.split("---")[1] and "```python\nimport x\n```" in card
    assert "Weights at 4 bits (asymmetric, groups of 32, method gptq)" in card and "apache-2.0" in card
    assert "| int4 |" in card and "| int8 |" not in card
    alone = bundle_card({**MANIFEST, "provenance": {}, "base": {}, "grid": None}, "mine")
    assert "Nothing was measured" in alone and "look it up before you distribute" in alone
    assert "\n\n\n" not in card


def test_a_build_ends_with_exact_answers_of_base_and_arms_with_size_and_speed() -> None:
    run = sample()
    for arm, precision in [(arm, precision) for arm in ("base", *run.arms) for precision in PRECISIONS]:
        share = 0.01 if arm == "base" else 0.6
        exact = Score("exact", Estimate(share, share - 0.01, share + 0.01), True, True)
        model = replace(
            run.measured(arm, precision), scores={ANSWERS_TASK: TaskScore(ANSWERS_TASK, {"exact": exact})}
        )
        run.measurements.setdefault(arm, {})[precision] = model
    lines = answers_text(run, 120).splitlines()
    assert lines[0].split("  ")[0] == "exact answers, %"
    assert lines[0].split()[-5:] == ["base", "baseline", "dispersed", "MB", "tokens/s"]
    assert [line.split()[0] for line in lines if "[" in line] == ["onnx", "int8", "int4"]
    assert lines[-1].split()[1:4] == ["1.0", "[0.0,", "2.0]"] and lines[-1].split()[-2:] == ["98.4", "150"]
    assert answers_text(sample()) == ""
    command = chat_command(replace(run, prompt="it's late"), Path("runs/a"))
    assert command == """edgedisp chat runs/a/dispersed/int4 --prompt 'it'"'"'s late'"""
