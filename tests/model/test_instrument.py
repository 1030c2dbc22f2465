"""`edgedisp condensation` through its command: models, bundles, comparisons, files, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgedisp import instrument
from edgedisp.cli import app
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import silent
from edgedisp.dispersion.condensation import FIGURES
from edgedisp.graph.export import export
from edgedisp.quantize.onnx_rewrite import quantize_bundle

SMALL = ["--sequences", "3", "--context", "24"]


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, ["condensation", *map(str, arguments), *SMALL], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def refused(*arguments: str | Path, match: str) -> None:
    with pytest.raises(BadInput, match=match):
        CliRunner().invoke(app, ["condensation", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def bundles(tiny_folder: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bundles")
    folders = {name: root / name for name in ("fp32", "int4")}
    for folder in folders.values():
        folder.mkdir()
    export(tiny_folder["llama"], folders["fp32"], threads=1)
    quantize_bundle(folders["fp32"], folders["int4"], bits=4)
    return folders


# ---------------------------------------------------------------- measuring


def test_a_model_folder_gives_a_table_with_every_layer(tiny_folder: dict[str, Path]) -> None:
    said = run(tiny_folder["qwen3"])
    assert f"{tiny_folder['qwen3']} (torch): 3 sequences, 72 tokens" in said
    rows = [line.split()[0] for line in said.splitlines() if re.match(r" +(\d+|norm)  ", line)]
    assert rows == ["0", "1", "2", "norm"]
    assert re.search(r"Spearman -?\d\.\d{3} \[-?\d\.\d{3}, \d\.\d{3}\], Kendall", said)
    assert max(map(len, said.splitlines())) <= 110


def test_json_is_one_line_with_every_figure_and_its_interval(tiny_folder: dict[str, Path]) -> None:
    said = run(tiny_folder["gpt2"], "--json")
    found = json.loads(said)
    assert said.count("\n") == 1 and "by_sequence" not in found
    assert (found["model"], found["runs_on"]) == (str(tiny_folder["gpt2"]), "torch")
    for row in [*found["layers"], found["final_norm"]]:
        assert set(row["intervals"]) == set(FIGURES) <= set(row)
    assert set(found["correlations"]) == {"spearman", "kendall"}


def test_a_bundle_is_measured_in_its_own_graph(
    bundles: dict[str, Path], tiny_folder: dict[str, Path]
) -> None:
    found = json.loads(run(tiny_folder["llama"], "--compare", bundles["fp32"], "--json"))
    assert found["compared"]["runs_on"] == "onnxruntime"
    for row in [*found["change"]["layers"], found["change"]["final_norm"]]:
        assert abs(row["cosine_raw"]["difference"]) < 1e-5
        assert abs(row["effective_rank"]["difference"]) < 1e-3


def test_two_models_are_compared_pair_by_pair(bundles: dict[str, Path]) -> None:
    said = run(bundles["fp32"], "--compare", bundles["int4"])
    assert f"{bundles['int4']} - {bundles['fp32']}, paired over sequences" in said
    found = json.loads(run(bundles["fp32"], "--compare", bundles["int4"], "--json"))
    before, after = found["layers"][2]["cosine_raw"], found["compared"]["layers"][2]["cosine_raw"]
    assert found["change"]["layers"][2]["cosine_raw"]["difference"] == pytest.approx(after - before)
    assert before != after
    assert "kendall: " in said and "by_sequence" not in found["compared"]


def test_a_text_of_ones_own_is_measured(tiny_folder: dict[str, Path], text_file: Path) -> None:
    made, own = (
        instrument.condensation(
            str(tiny_folder["llama"]), text=text, sequences=2, context=16, progress=silent
        )
        for text in (None, text_file)
    )
    assert made["tokens"] == own["tokens"] == 32
    assert made["layers"][0]["cosine_raw"] != own["layers"][0]["cosine_raw"]


def test_models_of_different_depth_are_compared_as_a_whole(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(tiny_folder["llama"], tmp_path / "deep")
    config = AutoConfig.from_pretrained(tmp_path / "deep", num_hidden_layers=3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deep")
    said = run(tiny_folder["llama"], "--compare", tmp_path / "deep", "--out", tmp_path / "out")
    assert "layers are not compared one by one" in said and "mean cosine: " in said
    assert (tmp_path / "out" / "condensation.html").is_file()


# ---------------------------------------------------------------- files


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append(tag)


def test_out_holds_a_page_the_data_and_the_pictures(bundles: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "some" / "where"
    said = run(bundles["fp32"], "--compare", bundles["int4"], "--out", out)
    assert said.splitlines()[-1] == f"page: {out / 'condensation.html'}"
    pictures = {
        f"condensation_{name}.{kind}" for name in ("heatmap", "layers", "outliers") for kind in ("svg", "png")
    }
    assert {path.name for path in out.iterdir()} == {"condensation.html", "condensation.json", *pictures}
    found = json.loads((out / "condensation.json").read_text())
    assert (
        len(found["by_sequence"]["cosine_raw"]) == 3 and len(found["compared"]["by_sequence"]["sinks"]) == 3
    )
    text = (out / "condensation.html").read_text()
    tags = Tags(text).found
    assert tags.count("svg") == 3 + 6 + 3 and not {"script", "link", "img", "iframe"} & set(tags)
    assert "raw: int4 - fp32" in text and "://" not in re.sub(r'xmlns\S*="http[^"]*"', "", text)


def test_one_model_and_one_sequence_are_drawn_without_differences_and_intervals(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    found = instrument.condensation(str(tiny_folder["llama"]), sequences=1, context=16, progress=silent)
    assert instrument.write(found, tmp_path)[0].is_file()
    assert Tags((tmp_path / "condensation.html").read_text()).found.count("svg") == 1 + 5 + 3
    assert "[" not in instrument.render(found).splitlines()[3]


def test_a_hostile_name_stays_text(tiny_folder: dict[str, Path]) -> None:
    from edgedisp.report.condensation_page import page

    found = instrument.condensation(str(tiny_folder["llama"]), sequences=2, context=16, progress=silent)
    text = page({"<script>alert(1)</script>": found}, [])
    assert "script" not in Tags(text).found and "&lt;script&gt;alert(1)" in text


def test_names_are_the_shortest_endings_that_differ() -> None:
    assert instrument._short(["/a/b/int4"]) == ["int4"]
    assert instrument._short(["/run/baseline/int4", "/run/dispersed/int4"]) == [
        "baseline/int4",
        "dispersed/int4",
    ]
    assert instrument._short(["org/model", "/x/model"]) == ["org/model", "x/model"]
    assert instrument._short(["same", "same"]) == ["same (1)", "same (2)"]


# ---------------------------------------------------------------- what is refused


def test_what_is_no_model_is_refused(tmp_path: Path, bundles: dict[str, Path]) -> None:
    (tmp_path / "notes.txt").write_text("not a model")
    refused(tmp_path / "notes.txt", match=r"not a \.gguf file")
    refused(tmp_path, match=r"no config\.json")
    shutil.copyfile(bundles["fp32"] / "model.onnx", tmp_path / "model.onnx")
    refused(tmp_path, match=r"genai_config\.json is missing")
    refused(tmp_path / "nowhere", match="no such file or folder")


def test_a_bundle_whose_hidden_states_cannot_be_found_is_refused(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    import onnx

    shutil.copytree(bundles["fp32"], tmp_path / "bundle")
    path = tmp_path / "bundle" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        node.op_type = node.op_type.replace("GroupQueryAttention", "Attention")
    path.write_bytes(model.SerializeToString())
    refused(tmp_path / "bundle", *SMALL, match="hidden states of 0 layers are found")


def test_too_little_text_is_refused(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words are no corpus, and will not make eight blocks. " * 3)
    refused(
        tiny_folder["llama"], "--text", tmp_path / "short.txt", "--sequences", "8", "--context", "16",
        match=r"short\.txt: holds \d+ blocks of 16 tokens, not 8",
    )  # fmt: skip
    refused(
        tiny_folder["llama"], "--text", tmp_path / "short.txt", "--context", "250",
        match=r"short\.txt is too short for one block",
    )  # fmt: skip


def test_more_tokens_than_the_model_takes_are_refused(
    tiny_folder: dict[str, Path], bundles: dict[str, Path]
) -> None:
    for model in (tiny_folder["gpt2"], bundles["int4"]):
        refused(model, "--context", "257", match="takes 256 tokens at most, --context is 257")


def test_models_with_other_tokens_are_not_compared(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    import graph_twins as twins

    twins.make(tmp_path / "other", "llama")
    refused(
        tiny_folder["llama"], "--compare", tmp_path / "other", *SMALL,
        match="its tokenizer makes other tokens of the text",
    )  # fmt: skip
    run(tiny_folder["llama"], "--compare", tiny_folder["qwen3"])  # other models, the same tokens


def test_a_file_in_the_place_of_out_is_refused_before_anything_is_measured(
    tiny_folder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").write_text("")
    monkeypatch.setattr(instrument, "condensation", None)  # would fail if it were called
    refused(tiny_folder["llama"], "--out", tmp_path / "out", match="is a file")
