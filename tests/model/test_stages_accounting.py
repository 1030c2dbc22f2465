"""What the accounting tells before anything runs, against the files of real exports."""

from __future__ import annotations

import json
from pathlib import Path

import graph_twins as twins
import numpy as np
import pytest
from shared_store import SharedStore

from edgedisp import models
from edgedisp.commands.plan import render
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
    sections = [
        QuantizeBits(group=group, symmetric=symmetric, head_bits=head) for _, group, symmetric, head in GRIDS
    ]
    quantized = {
        str(n): BundleRounding(bits, section) for n, ((bits, *_), section) in enumerate(zip(GRIDS, sections))
    }
    found = size_account(models.empty_model(folder), quantized, {})
    assert found["tied"] == models.empty_model(folder).config.tie_word_embeddings
    told = {name: one["size_bytes"] for name, one in found["precisions"].items()}
    assert told["fp32"] == pytest.approx(size(fp32), rel=0.02)
    for (bits, group, symmetric, head), name in zip(GRIDS, quantized):
        bundle = tmp_path / name
        bundle.mkdir()
        record = quantize_bundle(fp32, bundle, bits=bits, group=group, symmetric=symmetric, head_bits=head)
        assert told[name] == pytest.approx(record["size_bytes"], rel=0.05)  # pages weigh in a twin


@pytest.mark.parametrize("form", twins.FAMILIES)
def test_the_cache_is_what_the_session_returns(form: str, store: SharedStore) -> None:
    stored = twins.TwinStore(store)
    folder, bundle = stored.model_dir(form), stored.fp32(form)
    shipped = OnnxModel(bundle, 1)
    names = [one.name for one in shipped.session.get_outputs() if one.name.startswith("present")]
    feed = {
        one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
        for one in shipped.session.get_inputs()
        if "past" in one.name
    }
    ids = np.arange(3, 14)[None]
    present = shipped.session.run(names, {"input_ids": ids, "attention_mask": np.ones_like(ids), **feed})
    found = size_account(models.empty_model(folder), {}, {"here": 11, "far": 10_000})
    assert found["kv_cache"]["here"]["size_bytes"] == sum(one.nbytes for one in present)
    assert found["kv_cache"]["far"]["positions"] == found["context"] == twins.CONTEXT


def test_the_plan_shows_the_table() -> None:
    component = {"embedding": 113_246_208, "attention": 106_168_320, "positions": 2_097_152}
    fp32 = {"components": component, "size_bytes": 222_000_000}
    sizes = {
        "tied": True,
        "context": 8192,
        "precisions": {"fp32": fp32},
        "kv_cache": {"laptop-x64": {"positions": 4096, "size_bytes": 188_743_680}},
    }
    planned = {"recipe": "r", "run": "x", "steps": 1, "tokens": 1, "threads": 1, "stages": []}
    seen = {"items": 500, "seeds": 1, "differing": 0.06, "points": 3.07}
    seen |= {"published_points": 0.7, "items_for_published": 9611, "nats": {"int4": 0.0065}}
    planned |= {"warning": None, "estimate": None, "sizes": sizes, "sizes_unknown": None, "detectable": seen}
    text = render(planned)
    assert "with 500 items a task shows differences of 3.1 points or more" in text
    assert "loss shows 0.0065 at int4" in text
    assert "0.7 points, takes 9,611 items" in text and "seeds: 3 can" in text
    lines = [line.split() for line in text.splitlines()]
    assert ["embedding", "=", "head", "113.2"] in lines
    assert ["file", "222.0"] in lines and not any(line[:1] == ["mlp"] for line in lines)
    assert "KV cache of 4,096 positions (laptop-x64): 188.7 MB" in text
    json.dumps(sizes)
