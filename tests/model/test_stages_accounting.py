"""What the accounting tells before anything runs, against the files of real exports."""

from __future__ import annotations

from pathlib import Path

import graph_twins
import numpy as np
import pytest

from edgedisp import models
from edgedisp.graph.export import export
from edgedisp.graph.session import OnnxModel
from edgedisp.pipeline.options import BundleRounding
from edgedisp.pipeline.size_estimate import size_account
from edgedisp.quantize.onnx_rewrite import quantize_bundle
from edgedisp.recipe import QuantizeBits

GRIDS = [
    {"bits": 8, "group": 32, "symmetric": True, "head_bits": 8},
    {"bits": 4, "group": 32, "symmetric": False, "head_bits": 8},
    {"bits": 4, "group": 16, "symmetric": True, "head_bits": 4},
]


@pytest.mark.parametrize("form", ["llama", "gemma3_text", "gpt2", "opt", "gpt_neox", "smollm3"])
def test_the_accounting_is_the_files_within_two_percent(form: str, tmp_path: Path) -> None:
    wide = {"n_embd": 256} if form == "gpt2" else {"hidden_size": 256}
    if form in ("llama", "gemma3_text", "smollm3"):
        wide |= {"intermediate_size": 768, "head_dim": 64}
    graph_twins.make(tmp_path / "model", form, **wide)
    names = ["fp32", *map(str, range(len(GRIDS)))]
    for name in names:
        (tmp_path / name).mkdir()
    export(tmp_path / "model", tmp_path / "fp32", threads=1)
    roundings = {
        name: BundleRounding(grid["bits"], QuantizeBits(**{key: grid[key] for key in grid if key != "bits"}))
        for name, grid in zip(names[1:], GRIDS)
    }
    model = models.empty_model(tmp_path / "model")
    account = size_account(model, roundings, {})
    assert account["tied"] == model.config.tie_word_embeddings
    estimates = {name: sizes["size_bytes"] for name, sizes in account["precisions"].items()}
    size = sum((tmp_path / "fp32" / name).stat().st_size for name in ("model.onnx.data", "model.onnx"))
    assert estimates["fp32"] == pytest.approx(size, rel=0.02)
    for name, grid in zip(names[1:], GRIDS):
        record = quantize_bundle(tmp_path / "fp32", tmp_path / name, **grid)
        assert estimates[name] == pytest.approx(record["size_bytes"], rel=0.05)  # pages weigh in a twin


@pytest.mark.parametrize("form", graph_twins.FAMILIES)
def test_the_cache_is_what_the_session_returns(form: str, twins: graph_twins.TwinStore) -> None:
    ids = np.arange(3, 14)[None]
    _, cache = OnnxModel(twins.fp32(form), 1).decode(ids, np.ones_like(ids))
    account = size_account(models.empty_model(twins.model_dir(form)), {}, {"here": 11, "far": 10_000})
    assert account["kv_cache"]["here"]["size_bytes"] == sum(part.nbytes for part in cache.values())
    assert account["kv_cache"]["far"]["positions"] == account["context"] == graph_twins.CONTEXT
