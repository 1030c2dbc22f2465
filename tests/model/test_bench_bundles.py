"""Bytes per token, bits per weight and sameness of graphs, read from model.onnx alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgedisp.bench.bundles import (
    find_graph,
    graph_hash,
    needed_files,
    read_graph,
    tensor_bytes,
    weight_traffic,
)
from edgedisp.core.errors import BadInput

HIDDEN, INNER, KV, LAYERS = 64, 128, 32, 2
PRODUCTS = LAYERS * (HIDDEN * (HIDDEN + 2 * KV) + HIDDEN * HIDDEN + 3 * HIDDEN * INNER)  # weights of a llama
NORMS = (2 * LAYERS + 1) * HIDDEN
ROTARY_ROW = 2 * 8 * 4  # one row of the cosine and one of the sine table, 8 float32 each


def vocabulary(bundle: Path) -> int:
    return int(read_graph(find_graph(bundle)).graph.output[0].type.tensor_type.shape.dim[2].dim_value)


def small_constants(bundle: Path) -> int:
    """Bytes of the integer constants that the graph computes shapes with."""
    tensors = read_graph(find_graph(bundle)).graph.initializer
    return sum(tensor_bytes(t) for t in tensors if t.data_type == TensorProto.INT64)


def test_fp32_reads_every_weight_once_and_one_row_of_the_tables(bundles: dict[str, Path]) -> None:
    found = weight_traffic(read_graph(find_graph(bundles["fp32"])))
    head = vocabulary(bundles["fp32"]) * HIDDEN  # tied: the embedding's rows are inside the head
    expected = 4 * (PRODUCTS + NORMS + head) + ROTARY_ROW + small_constants(bundles["fp32"])
    assert found == (expected, 32)


def test_int4_reads_half_a_byte_per_weight_and_a_scale_per_group_of_32(bundles: dict[str, Path]) -> None:
    found = weight_traffic(read_graph(find_graph(bundles["int4"])))
    weights = PRODUCTS + vocabulary(bundles["int4"]) * HIDDEN
    expected = weights // 2 + 4 * weights // 32 + 4 * NORMS + ROTARY_ROW
    assert found == (expected + small_constants(bundles["int4"]), 4)


def graph_of(*nodes: onnx.NodeProto, **weights: np.ndarray) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "n"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, "n", 100])
    return helper.make_model(helper.make_graph(list(nodes), "g", [ids], [out], tensors))


def test_an_embedding_apart_from_the_head_costs_one_row() -> None:
    model = graph_of(
        helper.make_node("Gather", ["embedding", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "head"], ["out"]),
        embedding=np.zeros((100, 16), np.float32),
        head=np.zeros((16, 100), np.float32),
    )
    assert weight_traffic(model)[0] == 16 * 4 + 16 * 100 * 4


def test_a_tied_embedding_is_found_behind_a_transpose() -> None:
    model = graph_of(
        helper.make_node("Transpose", ["head"], ["embedding"], perm=[1, 0]),
        helper.make_node("Gather", ["embedding", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "head"], ["out"]),
        head=np.zeros((16, 100), np.float16),
    )
    assert weight_traffic(model) == (16 * 100 * 2, 16)


def test_a_cast_counts_as_what_it_is_cast_to_whatever_its_other_attributes() -> None:
    model = graph_of(
        helper.make_node("Cast", ["scales"], ["wide"], saturate=1, to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "wide"], ["out"]),
        scales=np.zeros((16, 100), np.float16),
    )
    assert weight_traffic(model)[0] == 16 * 100 * 4


def test_arms_with_other_weights_have_the_same_graph_and_one_attribute_makes_another(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    files = [bundles[name] / "model.onnx.data" for name in ("fp32", "twin")]
    assert files[0].read_bytes() != files[1].read_bytes()
    assert set(needed_files(bundles["fp32"])) == {"model.onnx", "model.onnx.data", "genai_config.json"}
    hashes = {name: graph_hash(find_graph(path)) for name, path in bundles.items()}
    assert hashes["fp32"] == hashes["twin"] != hashes["int4"]
    model = onnx.load(str(find_graph(bundles["int4"])), load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "MatMulNBits")
    next(a for a in node.attribute if a.name == "accuracy_level").i = 0
    onnx.save(model, str(tmp_path / "model.onnx"))
    assert graph_hash(tmp_path / "model.onnx") != hashes["int4"]


def test_a_folder_without_a_graph_or_with_a_broken_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no model\.onnx"):
        read_graph(find_graph(tmp_path))
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 50)
    with pytest.raises(BadInput, match="not an ONNX graph"):
        read_graph(find_graph(tmp_path))
