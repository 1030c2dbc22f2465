"""`edgedisp condensation` through its command: models, bundles, comparisons, files, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgedisp.cli import app
from edgedisp.commands import condensation as command
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import silent
from edgedisp.dispersion.condensation import FIGURES
from edgedisp.graph.export import export
from edgedisp.quantize.onnx_rewrite import quantize_bundle
from edgedisp.report.layout import grid_text
from edgedisp.report.render import write_condensation
from edgedisp.report.sections import profile_grids

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


def test_a_model_gives_every_layer_with_intervals(tiny_folder: dict[str, Path]) -> None:
    assert "layer by layer" in run(tiny_folder["qwen3"])
    profile = json.loads(run(tiny_folder["gpt2"], "--json"))[tiny_folder["gpt2"].name]
    assert (profile["sequences"], profile["tokens"]) == (3, 72)
    for row in profile["layers"]:
        assert set(row["figures"]) == set(FIGURES)
        assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in row["figures"].values())
    assert set(profile["correlations"]) == {"spearman", "kendall"}


def test_bundles_are_measured_in_their_own_graphs_and_compared_pair_by_pair(
    bundles: dict[str, Path], tiny_folder: dict[str, Path]
) -> None:
    for first, second in ((tiny_folder["llama"], bundles["fp32"]), (bundles["fp32"], bundles["int4"])):
        profiles = command.measure([str(first), str(second)], None, 3, 24, silent)
        assert [*profiles] == [first.name, second.name]
        values = [profile.layers[2].figures["cosine_raw"].value or 0.0 for profile in profiles.values()]
        change = profiles[second.name].change
        assert change is not None
        assert change.layers[2].figures["cosine_raw"].value == pytest.approx(values[1] - values[0])
        assert (abs(values[1] - values[0]) < 1e-5) == (second == bundles["fp32"])
    assert "int4 - fp32, paired over sequences" in run(bundles["fp32"], "--compare", bundles["int4"])


def test_out_holds_a_page_the_data_and_the_pictures(bundles: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "some" / "where"
    text = run(bundles["fp32"], "--compare", bundles["int4"], "--text", _text(tmp_path), "--out", out)
    assert text.splitlines()[-1] == f"page: {out / 'condensation.html'}"
    pictures = {f"condensation_{name}.png" for name in ("heatmap", "layers")}
    assert {path.name for path in out.iterdir()} == {"condensation.html", "condensation.json", *pictures}
    assert set(json.loads((out / "condensation.json").read_text())) == {"fp32", "int4"}
    page = (out / "condensation.html").read_text()
    assert page.count("<img") == 2 + 6 and "://" not in page and "<script" not in page


def _text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("Some sentences about a river and the town on its banks. " * 60)
    return path


def test_one_sequence_has_no_intervals_and_a_hostile_name_stays_text(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    profiles = command.measure([str(tiny_folder["llama"])], None, 1, 16, silent)
    assert "[" not in "".join(grid_text(grid, 200) for grid in profile_grids(profiles))
    page = write_condensation({"<script>alert(1)</script>": next(iter(profiles.values()))}, tmp_path)
    assert "<script" not in page.read_text()


# ---------------------------------------------------------------- what is refused


def test_what_cannot_be_measured_is_refused(
    tmp_path: Path, bundles: dict[str, Path], tiny_folder: dict[str, Path]
) -> None:
    (tmp_path / "notes.txt").write_text("not a model")
    refused(tmp_path / "notes.txt", match="not a GGUF file")
    refused(tmp_path, match=r"no config\.json")
    shutil.copyfile(bundles["fp32"] / "model.onnx", tmp_path / "model.onnx")
    refused(tmp_path, match=r"genai_config\.json is missing")
    refused(tmp_path / "nowhere", match="no such file or folder")
    for model in (tiny_folder["gpt2"], bundles["int4"]):
        refused(model, "--context", "257", match="takes 256 tokens at most, --context is 257")
    text = tmp_path / "short.txt"
    text.write_text("A few words are no corpus, and will not make eight blocks. " * 3)
    sizes = ["--sequences", "8", "--context", "16"]
    refused(tiny_folder["llama"], "--text", text, *sizes, match=r"holds \d+ blocks of 16 tokens, not 8")
    refused(tiny_folder["llama"], "--text", text, "--context", "250", match=r"too short for one block")


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


def test_models_with_other_tokens_are_not_compared(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    import graph_twins as twins

    twins.make(tmp_path / "other", "llama")
    refused(
        tiny_folder["llama"], "--compare", tmp_path / "other", *SMALL,
        match="its tokenizer makes other tokens of the text",
    )  # fmt: skip
    run(tiny_folder["llama"], "--compare", tiny_folder["qwen3"])  # other models, the same tokens
