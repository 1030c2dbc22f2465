"""What the accounting tells before anything runs, against the files of real exports."""

from __future__ import annotations

from pathlib import Path

import graph_twins as twins
import numpy as np
import pytest
from shared_store import SharedStore

from edgedisp import models
from edgedisp.graph.export import export
from edgedisp.graph.session import OnnxModel
from edgedisp.pipeline.options import BundleRounding
from edgedisp.pipeline.size_estimate import size_account
from edgedisp.quantize.onnx_rewrite import quantize_bundle
from edgedisp.recipe import QuantizeBits

# bits, group, symmetric, head bits
GRIDS = [(8, 32, True, 8), (4, 32, False, 8), (4, 16, True, 4)]


def size(bundle: Path) -> int:
    return sum((bundle / name).stat().st_size for name in ("model.onnx.data", "model.onnx"))


@pytest.mark.parametrize("form", ["llama", "gemma3_text", "gpt2", "opt", "gpt_neox", "smollm3"])
def test_the_accounting_is_the_files_within_two_percent(form: str, tmp_path: Path) -> None:
    wide = {"n_embd": 256} if form == "gpt2" else {"hidden_size": 256}
    if form in ("llama", "gemma3_text", "smollm3"):
        wide |= {"intermediate_size": 768, "head_dim": 64}
    folder, fp32 = tmp_path / "model", tmp_path / "fp32"
    twins.make(folder, form, **wide)
    fp32.mkdir()
    export(folder, fp32, threads=1)
    roundings = {
        str(grid): BundleRounding(grid[0], QuantizeBits(group=grid[1], symmetric=grid[2], head_bits=grid[3]))
        for grid in GRIDS
    }
    account = size_account(models.empty_model(folder), roundings, {})
    assert account["tied"] == models.empty_model(folder).config.tie_word_embeddings
    estimates = {name: sizes["size_bytes"] for name, sizes in account["precisions"].items()}
    assert estimates["fp32"] == pytest.approx(size(fp32), rel=0.02)
    for bits, group, symmetric, head in GRIDS:
        name = str((bits, group, symmetric, head))
        (tmp_path / name).mkdir()
        options = {"bits": bits, "group": group, "symmetric": symmetric, "head_bits": head}
        record = quantize_bundle(fp32, tmp_path / name, **options)
        assert estimates[name] == pytest.approx(record["size_bytes"], rel=0.05)  # pages weigh in a twin


@pytest.mark.parametrize("form", twins.FAMILIES)
def test_the_cache_is_what_the_session_returns(form: str, store: SharedStore) -> None:
    stored = twins.TwinStore(store)
    ids = np.arange(3, 14)[None]
    _, cache = OnnxModel(stored.fp32(form), 1).decode(ids, np.ones_like(ids))
    model = models.empty_model(stored.model_dir(form))
    account = size_account(model, {}, {"here": 11, "far": 10_000})
    assert account["kv_cache"]["here"]["size_bytes"] == sum(part.nbytes for part in cache.values())
    assert account["kv_cache"]["far"]["positions"] == account["context"] == twins.CONTEXT
