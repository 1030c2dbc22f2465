"""model.gguf holds the bundle's weights and the model's tokenizer; transformers reads it as a second road."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from graph_twins import TEXTS, TwinStore, make, ragged
from safetensors.torch import load_file, save_file

from edgedisp import models
from edgedisp.core.errors import BadInput
from edgedisp.core.files import read_json, write_json
from edgedisp.graph.session import OnnxModel
from edgedisp.quantize.gguf_file import write_gguf
from edgedisp.quantize.grid import Choice, Grid
from edgedisp.quantize.onnx_rewrite import quantize_assigned
from edgedisp.quantize.onnx_weights import embedding_and_head, find_uses, read_fp32_graph

ROW, OUTER = ragged([40])[0], Grid(8, 32, True)


def bundle_of(fp32: Path, out: Path, layers: Grid, outer: Grid = OUTER) -> list[dict[str, object]]:
    """Writes a quantized bundle to the new folder `out`; returns how its weights are stored."""
    out.mkdir()
    uses = find_uses(read_fp32_graph(fp32).graph)
    grids = dict.fromkeys(uses, layers) | dict.fromkeys(embedding_and_head(uses), outer)
    assignment = {name: Choice(grid) for name, grid in grids.items()}
    return list(quantize_assigned(fp32, out, assignment, accuracy_level=0)["by_tensor"])


# transformers reads neither head sizes nor biases nor the tokenizer's form of other families out of a file:
# these are left to llama.cpp (slow/test_llama_cpp.py).
@pytest.mark.parametrize("form", ["llama", "qwen2"])
@pytest.mark.parametrize("grid", [None, Grid(4, 32, False), Grid(4, 64, True), Grid(8, 32, True)])
def test_the_file_computes_what_the_bundle_computes(
    form: str, grid: Grid | None, twins: TwinStore, tmp_path: Path
) -> None:
    bundle, by_tensor = twins.fp32(form), []
    if grid is not None:
        by_tensor = bundle_of(bundle, bundle := tmp_path / "bundle", grid)
    write_gguf(twins.model_dir(form), bundle, by_tensor, tmp_path / "model.gguf", 128)
    model, tokenizer = models.open_base(tmp_path / "model.gguf")
    ids = np.array([ROW])
    expected = OnnxModel(bundle, 1)(ids, np.ones_like(ids))[0]
    read = models.TorchModel(model).logits(ids[0], len(ROW))
    share = 5e-3 if grid == Grid(4, 32, False) else 1e-4  # minimums are fp16 numbers
    np.testing.assert_allclose(read, expected, rtol=0, atol=share * np.abs(expected).max())
    original = models.load_tokenizer(twins.model_dir(form))
    for text in TEXTS if form == "llama" else ():
        assert models.encode(tokenizer, text) == models.encode(original, text)


def refusal(model: Path, bundle: Path, by_tensor: list[dict[str, object]]) -> str:
    with pytest.raises(BadInput) as refused:
        write_gguf(model, bundle, by_tensor, model / "model.gguf", 128)
    return str(refused.value)


def test_a_grid_that_no_type_has_is_refused_with_layer_and_setting(twins: TwinStore, tmp_path: Path) -> None:
    model, fp32 = twins.model_dir("llama"), twins.fp32("llama")
    small = bundle_of(fp32, tmp_path / "small", Grid(4, 16, True))
    assert "model.layers.0.attn.qkv_proj.weight does not fit" in refusal(model, tmp_path / "small", small)
    points = bundle_of(fp32, tmp_path / "points", Grid(4, 32, True), Grid(8, 32, False))
    text = refusal(model, tmp_path / "points", points)
    assert "model.embed_tokens.weight does not fit" in text and "symmetric: true" in text


def test_what_llama_cpp_would_compute_otherwise_is_refused(twins: TwinStore, tmp_path: Path) -> None:
    for form, words in {
        "opt": "family 'opt' is not written; possible: llama, qwen2, qwen3, gemma3_text, gpt2",
        "llama, yarn rope": "rotary scaling yarn",
        "gemma3_text": "full attention in every sixth layer",
        "qwen2, window in one layer": "sliding windows of qwen2",
        "gpt2, scaled by layer, exact gelu": "gpt2",
    }.items():
        assert words in refusal(twins.model_dir(form), twins.fp32(form), [])


def test_a_weight_that_llama_cpp_has_no_place_for_is_refused(twins: TwinStore, tmp_path: Path) -> None:
    shutil.copytree(twins.model_dir("gpt2"), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    more = {"transformer.h.0.attn.bias": torch.zeros(1), "transformer.h.0.gate.weight": torch.zeros(4, 4)}
    save_file(weights | more, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert "no place for transformer.h.0.gate.weight" in refusal(tmp_path / "model", twins.fp32("gpt2"), [])


def test_a_tokenizer_without_a_name_in_llama_cpp_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "llama")
    settings = read_json(tmp_path / "tokenizer.json")
    settings["pre_tokenizer"] = {"type": "Whitespace"}
    write_json(tmp_path / "tokenizer.json", settings)
    assert "no name for this tokenizer (BPE, cut by Whitespace)" in refusal(tmp_path, tmp_path, [])
