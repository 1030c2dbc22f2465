"""The files of a report: complete, self-contained, escaped, the same bytes for the same run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_sample import PRECISIONS, sample, several_arms, timing

from edgedisp.core.errors import BadInput
from edgedisp.core.results import BASELINE, DeviceResult, Estimate, Timing
from edgedisp.core.run import Run
from edgedisp.pipeline.run_results import load
from edgedisp.report import (
    bundle_card,
    compare,
    devices_text,
    model_card,
    table_markdown,
    table_text,
    verdict,
)
from edgedisp.report.formatting import MISSING
from edgedisp.report.plots import plots, running_mean
from edgedisp.report.render import devices_page, report_json, single_page, write
from edgedisp.report.result_sections import divergence_section
from edgedisp.report.run_sections import differing_settings, fairness_section


class Links(HTMLParser):
    """Collects what a page would load, and its section ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    write(sample(), out)
    return out


def test_the_page_loads_nothing_and_has_every_section(folder: Path) -> None:
    links = Links((folder / "report.html").read_text())
    assert all(one.startswith(("#", "data:image/svg+xml;base64,")) for one in links.loaded)
    assert set(links.ids) >= {
        "fairness",
        "scores",
        "divergence",
        "condensation",
        "training",
        "survival",
        "latency",
        "verify",
        "sizes",
        "stages",
        "reproduce",
        "limits",
    }
    text = (folder / "report.md").read_text()
    pictures = re.findall(r"\]\((plots/.+?\.png)\)", text)
    assert pictures and all((folder / path).is_file() for path in pictures)
    assert set(pictures) == {f"plots/{path.name}" for path in (folder / "plots").iterdir()}


def test_the_same_run_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write(sample(), tmp_path)
    for path in sorted(folder.rglob("*.*")):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name


def test_a_report_is_read_back_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    assert load(folder) == load(folder / "report.json")
    assert json.loads(report_json(load(folder))) == json.loads((folder / "report.json").read_text())
    assert verdict(load(folder)) == verdict(sample())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", r"report\.json: cannot be read"),
        ('{"format": 2}', "format 3"),
        ('{"format": 3, "run": {"name": 1}}', "name"),
    ],
)
def test_a_damaged_report_is_refused_with_its_fault(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(BadInput, match=match):
        load(tmp_path)
    with pytest.raises(BadInput, match=r"holds no report\.json"):
        load(tmp_path / "none")


def test_names_are_escaped_everywhere() -> None:
    evil = "<script>alert(1)</script>|`x`"
    run = replace(sample(), name=evil, recipe_yaml=evil, model={"base": evil}, missing_tasks={"t": evil})
    assert "<script>" not in single_page(run)
    assert "<script>" not in model_card(run, "dispersed")
    write_markdown = table_markdown(compare([run, run]))
    assert "<script>" not in write_markdown


def test_every_plot_is_drawn_and_parts_may_be_absent(tmp_path: Path) -> None:
    assert set(plots(sample())) == {
        "condensation_heatmap",
        "condensation_layers",
        "condensation_outliers",
        "condensation_precisions",
        "training",
        "survival",
        "scores",
        "differences",
        "tradeoff",
    }
    bare = Run(name="bare", arms=[BASELINE], precisions=["int4"])
    assert plots(bare) == {} and "No figures." in table_text(compare([Run("empty", [], [])]))
    assert len(write(bare, tmp_path)) == 3
    assert single_page(several_arms(seeds=2)).count('id="arms"') == 1


def test_every_way_of_scoring_again_has_its_figures_in_the_noise_table() -> None:
    *_, noise = divergence_section(sample()).grids
    ways = ("other number of threads", "other attention kernel", "token by token")
    assert noise.head == ("model", *ways, "noise floor")
    assert all(any(cell not in ("", MISSING) for cell in row[1:-1]) for row in noise.rows)


def test_running_mean_is_centred_and_shorter_at_the_ends() -> None:
    assert running_mean([1.0, 2.0, 6.0, 7.0], 3) == [1.5, 3.0, 5.0, 6.5]


def test_fairness_names_what_differs() -> None:
    run = sample()
    assert differing_settings(run, "dispersed") == [
        "dispersion.layers",
        "dispersion.variant",
        "dispersion.weight",
    ]
    rows = {row[0]: row[1] for row in fairness_section(run).grids[0].rows}
    assert set(rows.values()) == {"yes"} and len(rows) == 4
    other = replace(run.training["dispersed"], steps=41, settings={"lr": 2.0}, weights_sha256="a0" * 32)
    broken = replace(run, training={**run.training, "dispersed": other})
    rows = {row[0]: row[1] for row in fairness_section(broken).grids[0].rows}
    assert (
        rows["steps and tokens"]
        == rows["optimizer, schedule, seed"]
        == rows["trained weights differ"]
        == "NO"
    )


def test_the_table_names_runs_apart_and_warns_of_unlike_text() -> None:
    first = sample()
    second = replace(first, corpus={**first.corpus, "tokens_sha256": "other"})
    built = compare([first, second])
    assert built.runs == ("quickstart-3fa9c1d2", "quickstart-3fa9c1d2 (2)") and len(built.rows) == 2 * len(
        PRECISIONS
    )
    assert "different training texts" in built.notes[0]
    for width in (60, 80, 200):
        assert max(map(len, table_text(built, width).splitlines())) <= width
    scores = first.measurements["baseline"]["int4"].scores
    at_chance = replace(scores["heldout_cloze"], chance=0.9)
    run = replace(
        first,
        measurements={
            "baseline": {
                "int4": replace(first.measured("baseline", "int4"), scores={"heldout_cloze": at_chance})
            }
        },
    )
    assert any("is at chance (90 %)" in note for note in compare([run]).notes)


# Devices


def measured(device: str, speed: float) -> DeviceResult:
    decode = Estimate(speed, speed - 2, speed + 2)
    row = Timing("dispersed/int4", 4, 128, 64, 5, decode, ttft_ms=Estimate(90.0), warnings=("drifted",))
    machine = {"cpu": "Cortex", "memory_bytes": 1 << 33, "phone": {"model": "<b>Pixel</b>"}}
    difference = {
        "metric": "accuracy",
        "first": 0.5,
        "second": 0.4,
        "higher_is_better": True,
        "estimate": {"value": -0.1, "low": -0.15, "high": -0.05, "p": 0.01},
    }
    ends = {"value": 0.4, "low": 0.35, "high": 0.45}
    score = {
        "label": "dispersed/int4",
        "task": "heldout_cloze",
        "metric": "accuracy",
        "higher_is_better": True,
        "drawn": 100,
        "answered": 90,
        "of": 500,
        "truncated": 1,
        "full": ends,
        "device": ends,
        "here": ends,
        "difference": difference,
        "agreement": {"share": 0.9, "low": 0.8, "high": 0.95},
        "logprob": {"mean": 0.1, "max": 2.0},
        "reason": None,
    }
    return DeviceResult(
        device,
        machine,
        [row],
        scores=[score],
        clock_mhz=(1800.0, 2400.0),
        measured=("2026-11-27T15:44:12",),
    )


def test_devices_are_shown_side_by_side_with_their_warnings() -> None:
    devices = [measured("adb", 90.0), measured("local", 150.0)]
    text = devices_text(devices, 100)
    assert "90.0 [88.0, 92.0]" in text and "150.0 [148.0, 152.0]" in text
    assert "worse on the device" in text and "90 of 100 items answered" in text and "drifted" in text
    assert max(map(len, (line for line in text.splitlines() if not line.startswith("note:")))) <= 100
    html = devices_page(devices)
    assert "<b>Pixel" not in html and "1,800 MHz to 2,400 MHz" not in html and "1,800 to 2,400 MHz" in html
    assert "<script" not in html


def test_a_run_shows_what_was_measured_later() -> None:
    run = replace(sample(), devices=[measured("adb", 90.0)], devices_outdated=["dispersed/int8 on x"])
    page = single_page(run)
    assert 'id="devices"' in page and "128+64" in page and "Not shown, as the bundles were made anew" in page
    other = replace(run.devices[0], rows=[*run.devices[0].rows, timing("dispersed/int4", 80.0)])
    assert ">128+128<" in single_page(replace(run, devices=[other]))


def test_a_device_without_figures_gives_no_table() -> None:
    assert devices_text([DeviceResult("local")], 80) == "No figures."
    lost = DeviceResult("adb", rows=[Timing("a", None, 1, 1, 1)], lost="unplugged")
    assert "partial: unplugged" in devices_text([lost], 80)


# Cards


def test_a_model_card_is_tagged_by_what_the_folder_holds() -> None:
    run = sample()
    card, baseline = model_card(run, "dispersed"), model_card(run, "baseline")
    front = card.split("---")[1]
    assert "library_name: transformers" in front and '"dispersion-loss"' in front and "onnx" not in front
    assert 'base_model: "HuggingFaceTB/SmolLM2-135M"' in front and "license" not in front
    assert (
        '"dispersion-loss"' not in baseline.split("---")[1] and "control of a paired experiment" in baseline
    )
    assert verdict(run).parts[0] in card and "edgedisp build quickstart" in card
    assert "seed 1" in model_card(several_arms(seeds=2), "dispersed-seed1")


MANIFEST = {
    "target": "laptop-x64",
    "precision": "int4",
    "size_bytes": 98_400_000,
    "context": 2048,
    "threads": 2,
    "grid": {
        "bits": 4,
        "group": 32,
        "symmetric": False,
        "method": "gptq",
        "head_bits": 8,
        "accuracy_level": 4,
    },
    "base": {
        "base": "HuggingFaceTB/SmolLM2-135M",
        "license": "apache-2.0",
        "found_in": "README.md",
        "files": [],
    },
    "provenance": {
        "arm": "dispersed",
        "seed": 0,
        "edgedisp": "0.1.0",
        "git_commit": None,
        "versions": {"onnx": "1"},
    },
    "layouts": {
        "onnxruntime-genai": {"graph": "model.onnx", "weights": "model.onnx.data", "load": "import x"}
    },
}


def test_a_bundle_card_loads_and_shows_its_own_precision() -> None:
    card = bundle_card(MANIFEST, "dispersed/laptop-x64", sample())
    assert '"onnx"' in card.split("---")[1] and "```python\nimport x\n```" in card
    assert "Weights at 4 bits (asymmetric, groups of 32, method gptq)" in card and "apache-2.0" in card
    assert "| int4 |" in card and "| int8 |" not in card
    alone = bundle_card({**MANIFEST, "provenance": {}, "base": {}, "grid": None}, "mine")
    assert "Nothing was measured" in alone and "look it up before you distribute" in alone
    assert "\n\n\n" not in card


def test_a_table_is_printed_without_matplotlib() -> None:
    script = (
        "import sys; from report_sample import sample; from edgedisp import report; run = sample();"
        "report.table_text(report.table(run)); report.verdict(run); report.model_card(run, 'dispersed');"
        "assert not {'matplotlib', 'torch', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1] / "helpers")
