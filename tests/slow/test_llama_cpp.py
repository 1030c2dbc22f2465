"""llama.cpp computes from model.gguf what onnxruntime computes from the bundle, and cuts texts alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from graph_twins import TEXTS, TwinStore, make, ragged

from edgedisp import models
from edgedisp.bench.devices import BenchOptions, connect
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import silent
from edgedisp.graph.export import export
from edgedisp.graph.session import OnnxModel
from edgedisp.quantize.gguf_file import write_gguf
from edgedisp.quantize.onnx_rewrite import quantize_bundle

llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama.cpp is missing: pip install llama-cpp-python")

CONTEXT, PROMPTS, NEW_TOKENS = 128, 10, 64
GEMMA = {"num_hidden_layers": 6, "query_pre_attn_scalar": 32, "layer_types": None, "sliding_window": 16}
FORMS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, untied, biases, wide heads": {},
    "qwen2": {},
    "qwen3": {},
    "gpt2": {},
    "gemma3_text": GEMMA,
}


def opened(path: Path) -> Any:
    f32 = 0  # of keys and values
    return llama_cpp.Llama(str(path), n_ctx=CONTEXT, logits_all=True, verbose=False, type_k=f32, type_v=f32)


def logits(model: Any, ids: list[int]) -> np.ndarray:
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@pytest.mark.parametrize("form", FORMS)
def test_every_family_is_computed_as_onnxruntime_does(form: str, tmp_path: Path) -> None:
    make(tmp_path / "model", form, **FORMS[form])
    (tmp_path / "fp32").mkdir()
    export(tmp_path / "model", tmp_path / "fp32", threads=1)
    write_gguf(tmp_path / "model", tmp_path / "fp32", [], tmp_path / "model.gguf", CONTEXT)
    model, ids = opened(tmp_path / "model.gguf"), ragged([60])[0]
    row = np.array([ids])
    expected = OnnxModel(tmp_path / "fp32", 1)(row, np.ones_like(row))[0]
    np.testing.assert_allclose(logits(model, ids), expected, rtol=0, atol=2e-3 * np.abs(expected).max())
    tokenizer = models.load_tokenizer(tmp_path / "model")
    for text in TEXTS:
        prompt = models.render_conversation(tokenizer, [{"role": "user", "content": text.strip()}])
        for words in (text, prompt):
            assert model.tokenize(words.encode(), False, True) == models.encode(tokenizer, words)


def test_greedy_tokens_of_a_bundle_are_llama_cpps_but_for_near_ties(twins: TwinStore, tmp_path: Path) -> None:
    bundle = tmp_path / "int4"
    bundle.mkdir()
    record = quantize_bundle(twins.fp32("llama"), bundle, bits=4, symmetric=False)
    write_gguf(twins.model_dir("llama"), bundle, record["by_tensor"], tmp_path / "model.gguf", CONTEXT)
    model, onnx, equal = opened(tmp_path / "model.gguf"), OnnxModel(bundle, 1), 0
    for prompt in ragged([5 + index for index in range(PROMPTS)]):
        text = onnx.greedy(prompt, NEW_TOKENS, frozenset())
        rows = logits(model, [*prompt, *text])[len(prompt) - 1 : -1]
        equal += int((rows.argmax(1) == text).sum())
        behind = rows.max(1) - rows[np.arange(len(text)), text]
        assert behind.max() < 0.05 * np.abs(rows).max()  # both round activations to 8 bits, in other groups
    assert equal > 0.95 * PROMPTS * NEW_TOKENS


def test_the_device_llama_cpp_times_and_scores_as_onnxruntime_does(twins: TwinStore, tmp_path: Path) -> None:
    bundle = tmp_path / "int4"
    bundle.mkdir()
    record = quantize_bundle(twins.fp32("llama"), bundle, bits=4, symmetric=False)
    items = [[([5, 6, 7], [8, 9]), ([5, 6, 7], [10])], [([11], [12, 13, 14])]]
    options = BenchOptions(prompt=8, generate=4, repetitions=2, threads=1, requests={"int4": items})
    with pytest.raises(BadInput, match=r"holds no model\.gguf; .* --layouts gguf"):
        connect("llama.cpp", {"int4": bundle}, options).__enter__()
    write_gguf(twins.model_dir("llama"), bundle, record["by_tensor"], bundle / "model.gguf", CONTEXT)
    results = []
    for name in ("llama.cpp", "local"):
        with connect(name, {"int4": bundle}, options) as device:
            results.append(device.measure(silent))
    llama, local = results
    assert [len(result.rows) for result in results] == [1, 1] and llama.rows[0].decode_tokens_per_s.value > 0
    assert llama.rows[0].weights_bytes == (bundle / "model.gguf").stat().st_size
    for ours, theirs in zip(llama.answers["int4"], local.answers["int4"]):
        for (value, _), (expected, _) in zip(ours, theirs):
            assert value == pytest.approx(expected, abs=0.2)
