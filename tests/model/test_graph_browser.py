"""Products for a browser: standard operators over the packed bytes, folded when the graph is opened."""

from __future__ import annotations

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
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgedisp.core.errors import BadInput
from edgedisp.graph import runtime_layouts as layouts
from edgedisp.graph.browser_graph import STAGES, replace_quantized_gathers, unfold
from edgedisp.graph.runtime_layouts import GENAI, OPTIMUM, WEB


@pytest.fixture(scope="module")
def bundle(twins: TwinStore) -> Path:
    return twins.quantized("llama", symmetric=False)


def product(
    rng: np.random.Generator, bits: int, group: int, rows: int, columns: int, symmetric: bool
) -> ModelProto:
    """x [tokens, columns] -> MatMulNBits, with random bytes for integers and zero points."""
    groups = -(-columns // group)
    tensors = {
        "q": rng.integers(0, 256, (rows, groups, group * bits // 8), dtype=np.uint8),
        "s": rng.normal(size=(rows, groups)).astype(np.float32),
        "z": rng.integers(0, 256, (rows, -(-groups * bits // 8)), dtype=np.uint8),
    }
    if symmetric:
        del tensors["z"]
    node = helper.make_node(
        "MatMulNBits", ["x", *tensors], ["y"], name="product", domain="com.microsoft", K=columns, N=rows,
        bits=bits, block_size=group, accuracy_level=0,
    )  # fmt: skip
    given_, made = (helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y"))
    stored = [numpy_helper.from_array(values, name) for name, values in tensors.items()]
    graph = helper.make_graph([node], "product", [given_], [made], stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(model: ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(["y"], {"x": x})[0]
    return found


def ops(graph: onnx.GraphProto) -> set[str]:
    return {node.op_type for node in graph.node}


def unfolded(model: ModelProto) -> ModelProto:
    changed = ir.from_proto(model)
    unfold(changed)
    return ir.to_proto(changed)


def optimized(path: Path, folder: Path) -> Counter[str]:
    """What is left of a graph file once onnxruntime has opened it, by operator."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "optimized.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([16, 32, 64]),
    groups=st.integers(1, 5),
    short=st.integers(0, 15),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_unfolded_weight_is_the_one_that_the_packed_product_has(
    bits: int, group: int, groups: int, short: int, symmetric: bool, seed: int
) -> None:
    rng, columns = np.random.default_rng(seed), groups * group - short
    model = product(rng, bits, group, rows=7, columns=columns, symmetric=symmetric)
    unit = np.eye(columns, dtype=np.float32)
    packed = run(model, unit)
    model = unfolded(model)
    assert not any(node.domain for node in model.graph.node)
    np.testing.assert_array_equal(run(model, unit), packed)


@pytest.mark.parametrize(("family", "options"), [
    ("qwen3", {"bits": 4, "symmetric": True, "head_bits": 4, "group": 16}),
    ("gemma3_text", {"bits": 8, "symmetric": False}),
    ("gpt2", {"bits": 8, "symmetric": True, "group": 64}),
    ("gpt_neox", {"bits": 4, "symmetric": False}),
])  # fmt: skip
def test_every_family_says_in_a_browser_what_it_says_in_fp32_arithmetic(
    family: str, options: dict[str, Any], twins: TwinStore, tmp_path: Path
) -> None:
    source = twins.quantized(family, **options)
    precision = f"int{options['bits']}"
    shutil.copytree(source, tmp_path / "web")
    entries = layouts.arrange(tmp_path / "web", (OPTIMUM, WEB), precision, browser=True)
    layouts.check_same(tmp_path / "web", layouts.graphs(entries), source, ragged([17])[0], 1)
    assert entries[WEB]["unfolded_bytes"] > 0
    assert "unfolded_bytes" not in entries[OPTIMUM]
    left = optimized(tmp_path / "web" / entries[WEB]["graph"], tmp_path)
    packed = onnx.load(source / "model.onnx", load_external_data=False).graph
    products = sum(node.op_type == "MatMulNBits" for node in packed.node)
    assert left["MatMul"] + left["FusedMatMul"] + left["Gemm"] == products
    assert not {"If", "Dropout", "Transpose", "MatMulNBits", "GatherBlockQuantized"} & set(left)


def test_only_the_graph_of_transformers_js_is_unfolded_and_all_share_the_bytes(
    bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(bundle, tmp_path / "all")
    entries = layouts.arrange(tmp_path / "all", (GENAI, WEB, OPTIMUM), "int4", browser=True)
    top, web = (
        onnx.load(tmp_path / "all" / name, load_external_data=False).graph for name in layouts.graphs(entries)
    )
    assert "MatMulNBits" in ops(top) and "MatMulNBits" not in ops(web)
    data = tmp_path / "all" / "onnx" / "model_q4.onnx_data"
    assert data.read_bytes() == (bundle / "model.onnx.data").read_bytes()
    assert max(len(tensor.raw_data) for tensor in web.initializer) <= 1024
    shutil.copytree(bundle, tmp_path / "packed")
    entries = layouts.arrange(tmp_path / "packed", (WEB,), "int4")
    assert "unfolded_bytes" not in entries[WEB]
    packed = onnx.load(tmp_path / "packed" / entries[WEB]["graph"], load_external_data=False).graph
    assert "MatMulNBits" in ops(packed)


def test_a_model_that_would_not_fit_stays_packed(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "WEB_BYTES", 1000)
    shutil.copytree(bundle, tmp_path / "web")
    entries = layouts.arrange(tmp_path / "web", (WEB,), "int4", browser=True)
    assert "unfolded_bytes" not in entries[WEB]
    layouts.check_same(tmp_path / "web", layouts.graphs(entries), bundle, ragged([9])[0], 1)


def test_weights_are_folded_one_stage_after_the_other(bundle: Path) -> None:
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    model = unfolded(model)
    gates = [node.name for node in model.graph.node if node.op_type == "If"]
    waiting = {name for node in model.graph.node if node.op_type == "Add" for name in node.input}
    assert 2 < len(gates) < STAGES  # two layers have few products
    assert {gate.removesuffix(".float") for gate in gates} - waiting <= {gates[0].removesuffix(".float")}


def test_what_has_no_form_for_a_browser_is_refused() -> None:
    rng = np.random.default_rng(0)
    model = product(rng, 4, 16, rows=3, columns=32, symmetric=False)
    model.graph.node[0].input.append("order")
    with pytest.raises(BadInput, match="product: a MatMulNBits with more inputs"):
        unfolded(model)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([16, 32, 64]),
    groups=st.integers(1, 5),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_plain_operators_look_up_what_the_fused_one_does(
    bits: int, group: int, groups: int, symmetric: bool, seed: int
) -> None:
    rng, vocabulary = np.random.default_rng(seed), 7
    packed = rng.integers(0, 256, (vocabulary, groups * group * bits // 8), dtype=np.uint8)
    scales = rng.normal(size=(vocabulary, groups)).astype(np.float32)
    zeros = rng.integers(0, 256, (vocabulary, -(-groups * bits // 8)), dtype=np.uint8)
    tensors = {"packed": packed, "scales": scales} | ({} if symmetric else {"zeros": zeros})
    node = helper.make_node(
        "GatherBlockQuantized", ["packed", "ids", *list(tensors)[1:]], ["rows"], domain="com.microsoft",
        bits=bits, block_size=group, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(values, name) for name, values in tensors.items()]
    graph = helper.make_graph([node], "lookup", [ids], [rows], stored)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    asked = rng.integers(0, vocabulary, (2, 3))

    def looked_up(model: onnx.ModelProto) -> np.ndarray:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found: np.ndarray = session.run(["rows"], {"ids": asked})[0]
        return found

    fused = looked_up(model)
    changed = ir.from_proto(model)
    replace_quantized_gathers(changed)
    assert not any(node.domain for node in changed.graph)
    np.testing.assert_array_equal(looked_up(ir.to_proto(changed)), fused)
