"""Every method of the recipe through the stage that a build runs, on a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import pytest

from edgedisp.core.progress import silent
from edgedisp.graph.session import OnnxModel
from edgedisp.pipeline import bundles
from edgedisp.pipeline.options import BundleRounding, QuantizeOptions
from edgedisp.pipeline.stage import Inputs
from edgedisp.recipe.schema import Int8, QuantizeBits

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
    bundles.export(3, Inputs(model=found["model"]), found["fp32"], silent)
    return found


def quantized(
    folders: dict[str, Path], own: Path, section: QuantizeBits, bits: int
) -> tuple[dict[str, Any], float]:
    """The record, and the relative error of the bundle's logits."""
    own.mkdir()
    names = ("model", "corpus") if section.calibrated else ()
    inputs = {"bundle": folders["fp32"], **{name: folders[name] for name in names}}
    record = bundles.quantize(QuantizeOptions(BundleRounding(bits, section)), Inputs(**inputs), own, silent)
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
