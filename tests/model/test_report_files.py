"""The files of a report: complete, self-contained, escaped, the same bytes for the same run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from report_sample import chat_sample, device, sample, several_arms

from edgedisp.core.errors import BadInput
from edgedisp.core.results import BASELINE, Estimate
from edgedisp.core.run import Run
from edgedisp.pipeline.run_results import load
from edgedisp.report.cards import model_card
from edgedisp.report.figure import save
from edgedisp.report.plots import pilot_plot, plots
from edgedisp.report.render import devices_page, page, write
from edgedisp.report.results_table import table
from edgedisp.report.verdict import verdict

SECTIONS = "fairness scores divergence condensation training survival latency verify sizes stages reproduce"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    write(sample(), out)
    return out


def test_the_page_loads_nothing_and_has_every_section(folder: Path) -> None:
    html, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in links)
    assert not re.search("<(script|link|iframe)", html)
    assert set(re.findall(r'<section id="(\w+)"', html)) >= {*SECTIONS.split(), "limits"}
    pictures = re.findall(r"\]\((plots/.+?\.png)\)", text)
    assert pictures and all((folder / path).is_file() for path in pictures)
    assert set(pictures) == {f"plots/{path.name}" for path in (folder / "plots").iterdir()}


def test_the_first_screen_answers_three_questions_and_the_rest_is_folded() -> None:
    for run in (chat_sample(), sample()):
        first, rest = page(run).split('<section id="cost">')
        titles = re.findall("<h2>(.+?)</h2>", first)
        assert titles[:3] == ["Does it work?", "What do four bits cost?", "Did dispersion help?"]
        assert first.count("<svg") == first.count('class="value"') == 3 * len(table(run).arms)
        assert rest.count("<details><summary><h2>") == rest.count("<h2>") - 1
    assert "in the &lt;cellar&gt;" in page(chat_sample()) and "<mark>hall</mark>" in page(chat_sample())


def test_the_same_run_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert page(sample()) == (folder / "report.html").read_text()
    save(plots(sample())["training"], tmp_path)
    name = "training.png"
    assert (tmp_path / name).read_bytes() == (folder / "plots" / name).read_bytes()


def test_a_report_is_read_back_as_it_was_written(folder: Path, tmp_path: Path) -> None:
    assert load(folder) == load(folder / "report.json")
    write(load(folder), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(
        (folder / "report.json").read_text()
    )
    assert verdict(load(folder)) == verdict(sample())


def test_a_damaged_report_is_refused_with_its_fault(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(BadInput, match=r"holds no report\.json"):
        load(tmp_path)
    faults = {"{": "cannot be read", '{"format": 2}': "format 3", '{"format": 3, "run": {"name": 1}}': "name"}
    write(sample(), tmp_path)
    faults[path.read_text().replace(" 1", " 2", 1)] = "is damaged or was edited"
    for text, match in faults.items():
        path.write_text(text)
        with pytest.raises(BadInput, match=match):
            load(tmp_path)


def test_a_report_whose_writing_broke_off_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    write(sample(), tmp_path)
    (tmp_path / "report.md").unlink()
    (tmp_path / "report.md").mkdir()
    with pytest.raises(OSError, match=r"report\.md"):
        write(sample(), tmp_path)
    with pytest.raises(BadInput, match=r"holds no report\.json"):
        load(tmp_path)


def test_names_are_escaped_in_page_and_card() -> None:
    evil = "<script>alert(1)</script>|`x`"
    run = replace(sample(), name=evil, recipe_yaml=evil, model={"base": evil}, missing_tasks={"t": evil})
    assert "<script>" not in page(run)
    assert "<script>" not in model_card(run, "dispersed")


def test_every_plot_is_drawn_and_parts_may_be_absent(tmp_path: Path) -> None:
    condensation = {f"condensation_{name}" for name in ("heatmap", "layers")}
    assert set(plots(sample())) == {*condensation, "training", "scores", "differences", "tradeoff"}
    bare = Run(name="bare", arms=[BASELINE], precisions=["int4"])
    write(bare, tmp_path)
    assert plots(bare) == {} and not any((tmp_path / "plots").iterdir())
    assert "Luck of training" in page(several_arms(seeds=2))
    pair = (Estimate(0.01, 0.0, 0.02), Estimate(-0.1))
    save(pilot_plot({"angular-all-0_1": pair}, (0.01, 0.002)), tmp_path)
    assert (tmp_path / "pilot.png").is_file()


def test_a_page_of_devices_escapes_their_names() -> None:
    html = devices_page([device("adb", 90.0), device("local", 150.0)])
    assert "<b>Pixel" not in html and "<script" not in html and "1,800 to 2,400 MHz" in html


def test_a_table_is_printed_without_matplotlib() -> None:
    script = (
        "import sys; from report_sample import sample; run = sample();"
        "from edgedisp.report import cards, results_table, verdict; verdict.verdict(run);"
        "results_table.table_text(results_table.table(run)); cards.model_card(run, 'dispersed');"
        "assert not {'matplotlib', 'torch', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1] / "helpers")
