"""Bytes per token and sameness of graphs, read from model.onnx alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_bundle import Bundles

from edgedisp.bench.bundles import (
    find_graph,
    graph_hash,
    graph_traffic,
    needed_files,
    read_graph,
    tensor_bytes,
)
from edgedisp.core.errors import BadInput

HIDDEN, INNER, KV, LAYERS = 64, 128, 32, 2
PRODUCTS = LAYERS * (HIDDEN * (HIDDEN + 2 * KV) + HIDDEN * HIDDEN + 3 * HIDDEN * INNER)  # weights of a llama
NORMS = (2 * LAYERS + 1) * HIDDEN
ROTARY_ROW = 2 * 8 * 4  # one row of the cosine and one of the sine table, 8 float32 each


@pytest.mark.parametrize("name", ["fp32", "int4"])
def test_a_token_reads_every_weight_once(bundles: Bundles, name: str) -> None:
    model = read_graph(find_graph(bundles[name]))
    weights = PRODUCTS + model.graph.output[0].type.tensor_type.shape.dim[2].dim_value * HIDDEN
    # the embedding is tied: its rows are inside the head; int4 has a scale for each group of 32
    packed = 4 * weights if name == "fp32" else weights // 2 + 4 * weights // 32
    tensors = model.graph.initializer  # integers compute shapes
    shapes = sum(tensor_bytes(tensor) for tensor in tensors if tensor.data_type == TensorProto.INT64)
    expected = packed + 4 * NORMS + ROTARY_ROW + shapes
    assert graph_traffic(model) == expected


def graph_of(*nodes: onnx.NodeProto, **weights: np.ndarray) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "n"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, "n", 100])
    return helper.make_model(helper.make_graph(list(nodes), "g", [ids], [out], tensors))


def test_an_embedding_costs_one_row_a_tied_one_nothing_and_a_cast_what_it_is_cast_to() -> None:
    untied = graph_of(
        helper.make_node("Gather", ["embedding", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "head"], ["out"]),
        embedding=np.zeros((100, 16), np.float32),
        head=np.zeros((16, 100), np.float32),
    )
    assert graph_traffic(untied) == 16 * 4 + 16 * 100 * 4
    tied = graph_of(
        helper.make_node("Transpose", ["head"], ["embedding"], perm=[1, 0]),
        helper.make_node("Gather", ["embedding", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "head"], ["out"]),
        head=np.zeros((16, 100), np.float16),
    )
    assert graph_traffic(tied) == 16 * 100 * 2
    cast = graph_of(
        helper.make_node("Cast", ["scales"], ["wide"], saturate=1, to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "wide"], ["out"]),
        scales=np.zeros((16, 100), np.float16),
    )
    assert graph_traffic(cast) == 16 * 100 * 4


def test_arms_with_other_weights_have_the_same_graph_and_one_attribute_makes_another(
    bundles: Bundles, tmp_path: Path
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
