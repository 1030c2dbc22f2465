"""Every method of the recipe through the stage that a build runs, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import onnx
import pytest

from edgedisp.core.progress import silent
from edgedisp.graph.session import OnnxModel
from edgedisp.recipe.schema import Int4, Int8, QuantizeBits
from edgedisp.stages import bundles

TOKENS = np.random.default_rng(5).integers(0, twins.VOCABULARY, (12, 64)).astype(np.uint16)
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


@pytest.mark.parametrize("method", ["rtn", "k_quant", "gptq"])
def test_int8_by_every_method_is_near_lossless(folders: dict[str, Path], tmp_path: Path, method: Any) -> None:
    record, error = quantized(folders, tmp_path / "int8", Int8(method=method, **SMALL), 8)
    assert record["method"] == method and record["bits"] == 8
    assert {row["bits"] for row in record["by_tensor"]} == {8}
    assert error < 0.05


def test_the_calibrated_head_is_the_one_that_ships_and_is_stored_once(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {**SMALL, "head_bits": 4, "group": 64}
    record, _ = quantized(folders, tmp_path / "gptq", Int4(method="gptq", **options), 4)
    plain, _ = quantized(folders, tmp_path / "rtn", Int4(method="rtn", **options), 4)
    assert record["size_bytes"] == plain["size_bytes"]
    assert record["calibrated_tensors"] == record["tensors"] - (not record["tied"])
    graph = onnx.load(tmp_path / "gptq" / "model.onnx", load_external_data=False).graph
    heads = [t for t in graph.initializer if t.name.endswith(".q4") and t.dims[0] == twins.VOCABULARY]
    assert len(heads) == (1 if record["tied"] else 2) and tuple(heads[0].dims) == (twins.VOCABULARY, 32)


def test_a_stage_that_calibrates_asks_for_its_model(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs the model and the corpus"):
        bundles.quantize(Int8(method="gptq"), 8, folders["fp32"], None, None, tmp_path, silent)
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
