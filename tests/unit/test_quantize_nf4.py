"""NF4: the bytes are bitsandbytes' own, and onnxruntime computes with the levels that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgedisp.bench.graph_facts import open_graph, weight_traffic
from edgedisp.core.errors import BadInput
from edgedisp.graph.export import export
from edgedisp.graph.genai import GenaiModel
from edgedisp.graph.session import OnnxModel
from edgedisp.quantize import grid, methods, nf4
from edgedisp.quantize.rewrite import quantize_bundle


def drawn(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.rand(*shape, generator=generator).exp()


def computed(levels: nf4.Levels, x: np.ndarray) -> np.ndarray:
    """x [..., in] times the weight, by onnxruntime's operator."""
    node = helper.make_node(
        "MatMulBnb4",
        ["x", "data", "absmax"],
        ["y"],
        domain="com.microsoft",
        K=levels.columns,
        N=levels.rows,
        block_size=levels.group,
        quant_type=nf4.QUANT_TYPE,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(levels.data, "data"), numpy_helper.from_array(levels.absmax, "absmax")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


sizes = {"rows": st.integers(1, 9), "columns": st.integers(1, 200), "group": st.sampled_from(grid.GROUPS)}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), zeros=st.booleans(), **sizes)
def test_onnxruntime_computes_with_the_dequantized_weight(
    seed: int, zeros: bool, rows: int, columns: int, group: int
) -> None:
    weight = drawn(seed, rows, columns)
    if zeros:
        weight[0] = 0
    levels = nf4.quantize(weight, group)
    held = nf4.dequantize(levels)
    identity = np.eye(columns, dtype=np.float32)
    np.testing.assert_array_equal(computed(levels, identity).T, held.numpy())
    x = drawn(seed + 1, 2, 3, columns).numpy()
    np.testing.assert_allclose(computed(levels, x), x @ held.numpy().T, rtol=1e-4, atol=1e-4)
    assert levels.size_bytes == nf4.size_bytes(rows, columns, group)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), **sizes)
def test_each_value_is_at_the_nearest_level_of_its_block(
    seed: int, rows: int, columns: int, group: int
) -> None:
    weight = drawn(seed, rows, columns)
    held = nf4.dequantize(nf4.quantize(weight, group)).flatten()
    for first in range(0, weight.numel(), group):
        block = weight.flatten()[first : first + group]
        reachable = torch.tensor(nf4.LEVELS) * block.abs().max()
        nearest = (block[:, None] - reachable).abs().min(dim=1).values
        torch.testing.assert_close((block - held[first : first + group]).abs(), nearest, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("shape", [(48, 64), (7, 20), (5, 33), (96, 576)])
def test_the_bytes_are_those_of_bitsandbytes(group: int, shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = drawn(2, *shape)
    ours = nf4.quantize(weight, group)
    data, state = functional.quantize_4bit(
        weight, blocksize=group, quant_type="nf4", compress_statistics=False
    )
    np.testing.assert_array_equal(ours.data, data.flatten().numpy())
    np.testing.assert_array_equal(ours.absmax, state.absmax.numpy())
    torch.testing.assert_close(torch.tensor(nf4.LEVELS), state.code.cpu())


def test_dequantized_levels_come_back_to_the_same_bytes() -> None:
    once = nf4.quantize(drawn(3, 40, 64), 64)
    again = nf4.quantize(nf4.dequantize(once), 64)
    np.testing.assert_array_equal(once.data, again.data)
    np.testing.assert_array_equal(once.absmax, again.absmax)


@pytest.fixture(scope="module", params=[*twins.FAMILIES, "llama, untied, biases, wide heads"])
def bundles(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, Any]]:
    """The torch model, its nf4 bundle and the record."""
    root = tmp_path_factory.mktemp("nf4")
    for name in ("fp32", "int4"):
        (root / name).mkdir()
    model = twins.make(root / "model", request.param)
    export(root / "model", root / "fp32", threads=1)
    record = quantize_bundle(
        root / "fp32", root / "int4", bits=4, group=64, method="nf4", accuracy_level=0, head_group=32
    )
    return model, root / "int4", record


def test_a_bundle_computes_what_torch_computes_with_the_levels(
    bundles: tuple[Any, Path, dict[str, Any]],
) -> None:
    from transformers.pytorch_utils import Conv1D

    model, bundle, record = bundles
    rounded = type(model)(model.config).eval()
    rounded.load_state_dict(model.state_dict())
    ends = {}
    for name, module in rounded.named_modules():
        is_lookup = isinstance(module, torch.nn.Embedding) and not name.endswith(("wpe", "embed_positions"))
        if is_lookup or name == "lm_head":
            ends[module.weight.data_ptr()] = module.weight.data
        elif isinstance(module, torch.nn.Linear | Conv1D):
            turned = isinstance(module, Conv1D)
            weight = module.weight.data.T if turned else module.weight.data
            held = nf4.dequantize(nf4.quantize(weight, 64))
            module.weight.data.copy_(held.T if turned else held)
    on_grid = grid.Grid(8, 32, True)
    for weight in ends.values():
        weight.copy_(grid.dequantize(methods.k_quant(weight, on_grid), on_grid))
    shipped = OnnxModel(bundle, 1)
    row = twins.ragged([30])[0]
    ids = np.array([row])
    ours = shipped(ids, np.ones_like(ids))[0]
    np.testing.assert_allclose(ours, twins.torch_logits(rounded, row), rtol=2e-4, atol=2e-4)
    assert np.abs(ours - twins.torch_logits(model, row)).max() > 1e-2
    assert record["nodes"]["MatMulBnb4"] == 8 and record["nodes"]["MatMulNBits"] == 1
    assert not {"MatMul", "FusedMatMul", "Gemm"} & set(record["nodes"])


def test_genai_decodes_the_bundle_like_onnxruntime(bundles: tuple[Any, Path, dict[str, Any]]) -> None:
    opened, row = OnnxModel(bundles[1], 1), twins.ragged([15], seed=3)[0]
    assert GenaiModel(bundles[1]).greedy(row, 12) == opened.greedy(row, 12, opened.end_ids)


def test_the_record_and_the_facts_count_the_stored_bytes(bundles: tuple[Any, Path, dict[str, Any]]) -> None:
    _, bundle, record = bundles
    row = next(row for row in record["by_tensor"] if "down_proj" in row["name"])
    assert (row["bits"], row["group"], row["component"]) == (4, 64, "mlp")
    assert row["size_bytes"] == nf4.size_bytes(*row["shape"], 64)
    assert 0.05 < row["relative_error"] < 0.15
    rows = [row for row in record["by_tensor"] if row["component"] == "mlp"]
    assert record["by_component"]["mlp"]["size_bytes"] >= sum(row["size_bytes"] for row in rows)
    facts = weight_traffic(open_graph(bundle))
    assert facts["weight_bits"] == 4
    read = [row for row in record["by_tensor"] if record["tied"] or row["component"] != "embedding"]
    stored = sum(row["size_bytes"] for row in read)
    assert stored <= facts["weight_bytes_per_token"] <= stored + 30_000  # norms and biases


def test_what_the_operator_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="group is 512"):
        nf4.quantize(drawn(0, 4, 4), 512)
    with pytest.raises(BadInput, match="not finite"):
        nf4.quantize(torch.tensor([[1.0, float("nan")]]), 64)
    with pytest.raises(BadInput, match="nf4 has 4 bits, not 8"):
        quantize_bundle(tmp_path, tmp_path, bits=8, method="nf4")
