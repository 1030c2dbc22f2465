"""Every method of the recipe through the stage that a build runs, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import onnx
import pytest

from edgedisp import models
from edgedisp.cli import main
from edgedisp.core.progress import silent
from edgedisp.graph.session import OnnxModel
from edgedisp.recipe.quantizing import Int4, Int8, QuantizeBits
from edgedisp.stages import bundles

TOKENS = np.random.default_rng(5).integers(0, twins.VOCABULARY, (12, 64)).astype(np.uint16)
PAIR = ("int8", "int4")
SMALL: dict[str, Any] = {"group": 16, "accuracy_level": 0, "calibration_tokens": 512}


@pytest.fixture(scope="module", params=twins.FAMILIES)
def folders(request: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, its fp32 bundle (for 3 threads) and a corpus."""
    root = tmp_path_factory.mktemp("stage")
    found = {name: root / name for name in ("model", "corpus", "fp32")}
    twins.make(found["model"], request.param)
    for name in ("corpus", "fp32"):
        found[name].mkdir()
    np.save(found["corpus"] / "tokens.npy", TOKENS)
    bundles.export(found["model"], 3, found["fp32"], silent)
    return found


def quantized(
    folders: dict[str, Path], own: Path, section: QuantizeBits, bits: int
) -> tuple[dict[str, Any], float]:
    """The record, and the relative error of the bundle's logits."""
    own.mkdir()
    reads = (folders["model"], folders["corpus"]) if section.calibrated else (None, None)
    record = bundles.quantize(section, bits, folders["fp32"], *reads, own, silent)
    ids = TOKENS[8:, :32].astype(np.int64)
    expected = OnnxModel(folders["fp32"], 1)(ids, np.ones_like(ids))
    found = OnnxModel(own, 1)(ids, np.ones_like(ids))
    return record, float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("method", ["rtn", "clip", "k_quant", "hqq", "gptq"])
@pytest.mark.parametrize("rescale", [False, True])
def test_int8_by_every_method_is_near_lossless(
    folders: dict[str, Path], tmp_path: Path, method: Any, rescale: bool
) -> None:
    record, error = quantized(folders, tmp_path / "int8", Int8(method=method, rescale=rescale, **SMALL), 8)
    assert record["method"] == method and record["bits"] == 8
    assert {row["bits"] for row in record["by_tensor"]} == {8}
    assert error < 0.05


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rtn"},
        {"method": "clip"},
        {"method": "gptq"},
        {"method": "gptq", "head_bits": 4, "head_group": 32},
        {"method": "k_quant", "head_bits": 4},
        {"method": "nf4", "group": 64},
    ],
)
def test_a_rescaled_bundle_is_the_same_model_in_the_parents_layout(
    folders: dict[str, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    record, error = quantized(folders, tmp_path / "int4", Int4(rescale=True, **{**SMALL, **options}), 4)
    assert error < 0.5
    names = {row["source"] for row in record["rescaled"]}
    assert len(names) == len(record["rescaled"]) >= 4
    assert json.loads(json.dumps(record["rescaled"])) == record["rescaled"]
    own, parent = ({p.name for p in f.iterdir()} for f in (tmp_path / "int4", folders["fp32"]))
    assert own == parent
    for name in own - {"model.onnx", "model.onnx.data"}:
        assert (tmp_path / "int4" / name).read_bytes() == (folders["fp32"] / name).read_bytes()
    head = next(row for row in record["by_tensor"] if row["component"] == "embedding")
    assert head["bits"] == options.get("head_bits", 8)
    assert head["group"] == options.get("head_group", options.get("group", 16))
    heads_too = options["method"] in ("gptq", "k_quant") and head["bits"] == 4
    ends = 1 if record["tied"] else 2
    body = 0 if options["method"] in ("rtn", "nf4") else record["tensors"] - ends
    assert record["calibrated_tensors"] == body + heads_too


def test_the_calibrated_head_is_the_one_that_ships_and_is_stored_once(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {**SMALL, "head_bits": 4, "head_group": 64}
    record, _ = quantized(folders, tmp_path / "gptq", Int4(method="gptq", **options), 4)
    plain, _ = quantized(folders, tmp_path / "rtn", Int4(method="rtn", **options), 4)
    assert record["size_bytes"] == plain["size_bytes"]
    assert record["calibrated_tensors"] == record["tensors"] - (not record["tied"])
    graph = onnx.load(tmp_path / "gptq" / "model.onnx", load_external_data=False).graph
    heads = [t for t in graph.initializer if t.name.endswith(".q4") and t.dims[0] == twins.VOCABULARY]
    assert len(heads) == (1 if record["tied"] else 2) and tuple(heads[0].dims) == (twins.VOCABULARY, 32)


def test_a_stage_that_calibrates_asks_for_its_model(folders: dict[str, Path], tmp_path: Path) -> None:
    for section in (Int4(rescale=True), Int8(method="gptq")):
        assert section.calibrated
        with pytest.raises(ValueError, match="needs the model and the corpus"):
            bundles.quantize(section, 4, folders["fp32"], None, None, tmp_path, silent)
    assert not Int4(method="nf4").calibrated
    assert models.load(folders["model"]) is not None
    assert not list(tmp_path.iterdir())


def test_a_model_trained_under_plain_rounding_needs_no_folder_and_may_be_given_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    graphs = []
    for name, model_folder in (("without", None), ("with", folders["model"])):
        own = tmp_path / name
        own.mkdir()
        parent, section = folders["fp32"], Int4(**SMALL)
        bundles.quantize(section, 4, parent, model_folder, None, own, silent, is_trained=True)
        graphs.append([(own / file).read_bytes() for file in ("model.onnx", "model.onnx.data")])
    assert graphs[0] == graphs[1]


def test_a_build_with_the_keys_of_a_recipe_reaches_the_report(
    tiny_folder: dict[str, Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = text_file.parent / "tiny.yaml"
    recipe.write_text(f"""\
name: tiny
model: {{base: {tiny_folder["llama"]}, architecture: llama}}
data: {{train: [{{source: {text_file.name}}}], heldout: 20%, context: 64}}
train: {{tokens: 512, lr: 1e-3, batch: 4, dispersion: null}}
arms: [baseline]
precisions: [int8, int4]
quantize:
  int8: {{method: gptq, rescale: true, head_group: 64, calibration_tokens: 256}}
  int4: {{method: nf4, rescale: true, group: 64, calibration_tokens: 256}}
verify: {{tokens: 64, int8_top1: 0, int8_kl: 1, int4_top1: 0, int4_kl: 5}}
evaluate: {{limit: 2, perplexity_tokens: 128, bootstrap: 100, tasks: [heldout_perplexity]}}
latency: {{prompt: 8, generate: 4, repetitions: 1, threads: 1}}
""")
    run = text_file.parent / "run"
    monkeypatch.setattr("sys.argv", ["edgedisp", "build", str(recipe), "--out", str(run)])
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, capsys.readouterr().err
    int8, int4 = (json.loads((run / "baseline" / p / "record.json").read_text())["results"] for p in PAIR)
    assert (int8["method"], int4["method"]) == ("gptq", "nf4")
    assert int8["rescaled"] and int4["rescaled"] and int8["head_group"] == 64
    assert int4["nodes"]["MatMulBnb4"] == 8 and "nf4" not in int8["nodes"]
    assert (run / "report.html").is_file()
