"""One folder for three runtimes: weights once, graphs that give the same logits, browsers."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graph_twins import TwinStore, ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper
from onnx_node import node_model, run
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from edgedisp.core.errors import BuildFailed
from edgedisp.graph import runtime_layouts as layouts
from edgedisp.graph.device_graph import STAGES, replace_quantized_gathers, unfold
from edgedisp.graph.onnx_graph import to_bytes
from edgedisp.graph.runtime_layouts import GENAI, GGUF, OPTIMUM, WEB
from edgedisp.graph.verify import check_layouts

PACKED = st.fixed_dictionaries({
    "bits": st.sampled_from([2, 4, 8]), "group": st.sampled_from([16, 32, 64]), "groups": st.integers(1, 5),
    "symmetric": st.booleans(), "seed": st.integers(0, 2**32 - 1),
})  # fmt: skip


def packed_node(op: str, shape: dict[str, Any], rows: int, x: np.ndarray) -> ModelProto:
    """x -> y through one node over random bytes [rows, ...] for integers and zero points."""
    rng = np.random.default_rng(shape["seed"])
    bits, group, groups = (shape[name] for name in ("bits", "group", "groups"))
    is_product = op == "MatMulNBits"
    data = rng.integers(0, 256, (rows, groups, group * bits // 8), dtype=np.uint8)
    tensors = {
        "q": data if is_product else data.reshape(rows, -1),
        "s": rng.normal(size=(rows, groups)).astype(np.float32),
        "z": rng.integers(0, 256, (rows, -(-groups * bits // 8)), dtype=np.uint8),
    }
    if shape["symmetric"]:
        del tensors["z"]
    inputs = ["x", *tensors] if is_product else ["q", "x", *list(tensors)[1:]]
    options: dict[str, Any] = {"gather_axis": 0, "quantize_axis": 1}
    if is_product:
        options = {"K": x.shape[1], "N": rows, "accuracy_level": 0}
    options |= {"bits": bits, "block_size": group}
    node = helper.make_node(op, inputs, ["y"], name="node", domain="com.microsoft", **options)
    return node_model([node], tensors, x)


def rewritten(model: ModelProto, change: Any) -> ModelProto:
    changed = ir.from_proto(model)
    change(changed.graph)
    return ModelProto.FromString(to_bytes(changed))


@settings(max_examples=60, deadline=None)
@given(shape=PACKED, short=st.integers(0, 15))
def test_standard_operators_have_the_weights_of_the_packed_ones(shape: dict[str, Any], short: int) -> None:
    unit = np.eye(shape["groups"] * shape["group"] - short, dtype=np.float32)
    ids = np.random.default_rng(shape["seed"]).integers(0, 7, (2, 3))
    for op, change, x in (
        ("MatMulNBits", unfold, unit),
        ("GatherBlockQuantized", replace_quantized_gathers, ids),
    ):
        model = packed_node(op, shape, 7, x)
        standard = rewritten(model, change)
        assert not any(node.domain for node in standard.graph.node)
        np.testing.assert_array_equal(run(standard, x), run(model, x))


def operators(path: Path) -> Counter[str]:
    graph = onnx.load(path, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


def optimized(path: Path, folder: Path) -> Counter[str]:
    """Operators of a graph file once onnxruntime has optimized it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return operators(folder / "optimized.onnx")


@pytest.mark.parametrize(("family", "options"), [
    ("llama", {"bits": 4, "symmetric": False}),
    ("qwen3", {"bits": 4, "symmetric": True, "head_bits": 4, "group": 16}),
    ("gemma3_text", {"bits": 8, "symmetric": False}),
    ("gpt2", {"bits": 8, "symmetric": True, "group": 64}),
    ("gpt_neox", {"bits": 4, "symmetric": False}),
])  # fmt: skip
def test_browser_graphs_agree(family: str, options: dict[str, Any], twins: TwinStore, tmp_path: Path) -> None:
    source, precision = twins.quantized(family, **options), f"int{options['bits']}"
    web = tmp_path / "web"
    shutil.copytree(source, web)
    entries = layouts.arrange(web, (GENAI, OPTIMUM, WEB), precision, browser=True)
    check_layouts(web, entries, source, ragged([17])[0], 1)
    assert entries[WEB]["unfolded_bytes"] > 0 and "unfolded_bytes" not in entries[OPTIMUM]
    packed = operators(source / "model.onnx")
    assert operators(web / "model.onnx") == packed  # only the graph of transformers.js is unfolded
    path = web / entries[WEB]["graph"]
    graph = onnx.load(path, load_external_data=False).graph
    assert max(len(tensor.raw_data) for tensor in graph.initializer) <= 1024  # weights lie in the data file
    folded = optimized(path, tmp_path)
    assert folded["MatMul"] + folded["FusedMatMul"] + folded["Gemm"] == packed["MatMulNBits"]
    assert not {"If", "Dropout", "Transpose", "MatMulNBits", "GatherBlockQuantized"} & set(folded)


def test_a_large_model_stays_packed(
    twins: TwinStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "WEB_BYTES", 1000)
    for browser in (True, False):
        web = tmp_path / str(browser)
        shutil.copytree(twins.quantized("llama"), web)
        entries = layouts.arrange(web, (WEB,), "int4", browser=browser)
        assert "unfolded_bytes" not in entries[WEB]
        assert operators(web / entries[WEB]["graph"])["MatMulNBits"]
    check_layouts(web, entries, twins.quantized("llama"), ragged([9])[0], 1)


def test_weights_are_folded_one_stage_after_the_other(twins: TwinStore) -> None:
    model = onnx.load(twins.quantized("llama", symmetric=False) / "model.onnx", load_external_data=False)
    nodes = rewritten(model, unfold).graph.node
    gates = [node.name.removesuffix(".float") for node in nodes if node.op_type == "If"]
    waiting = {name for node in nodes if node.op_type == "Add" for name in node.input}
    assert 2 < len(gates) < STAGES  # two layers have few products
    assert set(gates) - waiting <= {gates[0]}


# Layouts

ONNX = GENAI, WEB, OPTIMUM
WEB_GRAPH, WEB_DATA = "onnx/model_q4.onnx", "onnx/model_q4.onnx_data"
PLAIN = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "weight_map.json"}
PLAIN |= {"config.json", "generation_config.json", "app.json"}


@pytest.fixture(scope="module")
def bundle(twins: TwinStore) -> Path:
    return twins.quantized("llama", symmetric=False)


def arranged(bundle: Path, out: Path, *names: str) -> tuple[Path, dict[str, dict[str, str]]]:
    shutil.copytree(bundle, out)
    return out, layouts.arrange(out, names, "int4")


@pytest.mark.parametrize(("names", "expected"), [
    (ONNX, {"genai_config.json", "model.onnx", WEB_GRAPH, WEB_DATA}),
    ((GENAI,), {"genai_config.json", "model.onnx", "model.onnx.data"}),
    ((OPTIMUM,), {"model.onnx", "model.onnx.data"}),
    ((WEB,), {WEB_GRAPH, WEB_DATA}),
])  # fmt: skip
def test_layouts_have_what_their_runtimes_read_and_the_weights_once(
    names: tuple[str, ...], expected: set[str], bundle: Path, tmp_path: Path
) -> None:
    folder, entries = arranged(bundle, tmp_path / "out", *names)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == PLAIN | expected and tuple(entries) == names
    data = WEB_DATA if WEB in names else "model.onnx.data"
    assert {entry["weights"] for entry in entries.values()} == {data}
    assert (folder / data).read_bytes() == (bundle / "model.onnx.data").read_bytes()
    assert (folder / data).stat().st_nlink == 1  # onnxruntime opens no hard-linked weights
    graphs = {name: entry["graph"] for name, entry in entries.items()}
    assert graphs == {name: WEB_GRAPH if name == WEB else "model.onnx" for name in names}
    check_layouts(folder, entries, bundle, ragged([17])[0], 1)  # bit for bit
    if WEB in names:
        config = json.loads((folder / "config.json").read_text())["transformers.js_config"]
        assert config == {"dtype": "q4", "use_external_data_format": {"model_q4.onnx": 1}}
        assert 'dtype: "q4"' in entries[WEB]["load"]


def test_a_bundle_for_llama_cpp_alone_has_no_graph(bundle: Path, tmp_path: Path) -> None:
    folder, entries = arranged(bundle, tmp_path / "out", GGUF)
    assert {path.name for path in folder.iterdir()} == PLAIN
    assert entries[GGUF]["graph"] == entries[GGUF]["weights"] == "model.gguf"


def test_a_graph_that_computes_something_else_is_not_shipped(bundle: Path, tmp_path: Path) -> None:
    folder, entries = arranged(bundle, tmp_path / "all", *ONNX)
    web = onnx.load(folder / WEB_GRAPH, load_external_data=False)
    norm = next(tensor for tensor in web.graph.initializer if tensor.name == "model.norm.weight")
    norm.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(norm) * np.float32(1.01), norm.name))
    (folder / WEB_GRAPH).write_bytes(web.SerializeToString())
    with pytest.raises(BuildFailed, match=r"onnx/model_q4\.onnx differs .* by 0\."):
        check_layouts(folder, entries, bundle, ragged([9])[0], 1)
    (folder / WEB_DATA).unlink()
    with pytest.raises(BuildFailed, match="onnxruntime cannot open"):
        check_layouts(folder, entries, bundle, ragged([9])[0], 1)


def test_tokenizer_settings_suit_every_runtime(bundle: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(bundle, source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    for name, written, post, adds_bos in (
        ("TokenizersBackend", "PreTrainedTokenizerFast", "<|im_start|> $A", True),
        ("Qwen2Tokenizer", "Qwen2Tokenizer", "$A <|im_end|>", None),
    ):
        (source / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": name}))
        inner = Tokenizer.from_file(str(bundle / "tokenizer.json"))
        special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
        inner.post_processor = TemplateProcessing(post, special_tokens=special)
        inner.save(str(source / "tokenizer.json"))
        folder, _ = arranged(source, tmp_path / name, OPTIMUM)
        result = json.loads((folder / "tokenizer_config.json").read_text())
        assert result["tokenizer_class"] == written and result.get("add_bos_token") is adds_bos
