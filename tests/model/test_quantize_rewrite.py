"""A quantized bundle computes what torch computes with the rounded weights, and holds nothing twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from shared_store import SharedStore

from edgedisp.graph.export import export
from edgedisp.graph.session import OnnxModel
from edgedisp.quantize.grid import Grid, dequantize, quantize
from edgedisp.quantize.onnx_rewrite import Choice, bundle_bytes, quantize_assigned, quantize_bundle
from edgedisp.quantize.onnx_weights import find_uses, read_graph

UNTIED = "llama, untied, biases, wide heads"
EMBEDDING = "model.embed_tokens.weight"
POSITIONS = ("wpe", "embed_positions")  # stay fp32
FORMS = [*twins.FAMILIES, UNTIED]


@pytest.fixture(scope="module")
def exported(store: SharedStore) -> Callable[[str], tuple[Any, Path]]:
    """form -> (torch model, fp32 bundle)."""
    stored = twins.TwinStore(store)
    return lambda form: (stored.model(form), stored.fp32(form))


def round_weights(model: Any, body: Grid, ends: Grid) -> Any:
    """A copy of the torch model with every product's weight and the embedding rounded to the grids."""
    from transformers.pytorch_utils import Conv1D

    rounded = type(model)(model.config).eval()
    rounded.load_state_dict(model.state_dict())
    done = set()
    for name, module in rounded.named_modules():
        if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding, Conv1D)) or name.endswith(POSITIONS):
            continue
        if module.weight.data_ptr() in done:
            continue
        done.add(module.weight.data_ptr())
        outer = isinstance(module, torch.nn.Embedding) or name == "lm_head"
        grid = ends if outer else body
        turned = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
        values = dequantize(quantize(turned, grid), grid)
        module.weight.data.copy_(values.T if isinstance(module, Conv1D) else values)
    return rounded


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("bits", "head_bits", "group", "symmetric"), [(4, 8, 32, False), (8, 8, 16, True), (4, 4, 128, True)]
)
def test_logits_equal_torch_with_rounded_weights(
    form: str,
    bits: int,
    head_bits: int,
    group: int,
    symmetric: bool,
    exported: Callable[[str], tuple[Any, Path]],
    tmp_path: Path,
) -> None:
    model, bundle = exported(form)
    options = {"bits": bits, "group": group, "symmetric": symmetric, "head_bits": head_bits}
    quantize_bundle(bundle, tmp_path, accuracy_level=0, **options)
    reference = round_weights(model, Grid(bits, group, symmetric), Grid(head_bits, group, symmetric))
    rows = twins.ragged([40, 11])
    for row, ours in zip(rows, OnnxModel(tmp_path, 1)(*twins.padded(rows))):
        expected = twins.torch_logits(reference, row)
        np.testing.assert_allclose(ours[: len(row)], expected, atol=2e-4, rtol=2e-4)
        assert np.abs(expected - twins.torch_logits(model, row)).max() > 1e-2  # rounding did something


@pytest.mark.parametrize("form", ["llama", UNTIED])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_runtime_that_folds_nothing_computes_no_nonsense(
    form: str, symmetric: bool, exported: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    """Scales that are stored in fp16 are then no constants to the product."""
    model, bundle = exported(form)
    quantize_bundle(bundle, tmp_path, symmetric=symmetric, bits=4, head_bits=8, accuracy_level=4)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    kept = {tensor.name: tensor.data_type for tensor in graph.initializer if ".scales" in tensor.name}
    assert kept and set(kept.values()) == {TensorProto.FLOAT16}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = OnnxModel(tmp_path, 1)
    plain.session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    grids = Grid(4, 32, symmetric), Grid(8, 32, symmetric)
    (row,) = rows = twins.ragged([40])
    expected = twins.torch_logits(round_weights(model, *grids), row)
    found = plain(*twins.padded(rows))[0]
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_product_is_replaced_and_no_weight_is_left_in_fp32(
    form: str, bits: int, exported: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    record = quantize_bundle(exported(form)[1], tmp_path, bits=bits)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    nodes = record["nodes"]
    assert nodes["MatMulNBits"] == 9 and nodes["GatherBlockQuantized"] == 1
    assert not {"MatMul", "FusedMatMul", "Gemm", "Transpose"} & set(nodes)
    read = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read
    plain = [
        t.name
        for t in graph.initializer
        if t.data_type == TensorProto.FLOAT and len(t.dims) == 2 and not t.name.endswith(".scales")
    ]
    assert all("_cache" in name or "position" in name for name in plain)
    is_tied = form not in (UNTIED, "gpt_neox")
    assert len(record["by_tensor"]) == (9 if is_tied else 10)  # tied: embedding and head are one


def test_the_record_adds_up(exported: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    record = quantize_bundle(exported("llama")[1], tmp_path, bits=4, group=32, symmetric=False, head_bits=8)
    assert json.loads(json.dumps(record)) == record
    by_name = {row["name"]: row for row in record["by_tensor"]}
    embedding, gate_up = (by_name[name] for name in (EMBEDDING, "model.layers.1.mlp.gate_up_proj.weight"))
    assert (embedding["bits"], embedding["component"]) == (8, "embedding")
    assert embedding["size_bytes"] == twins.VOCABULARY * (64 + 2 * 2 + 2)
    assert (gate_up["bits"], gate_up["component"]) == (4, "mlp")
    on_disk = sum((tmp_path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert record["size_bytes"] == on_disk


def test_the_genai_builders_bundle_is_quantized_with_its_embedding_stored_once(tmp_path: Path) -> None:
    model = twins.make(tmp_path / "model", "granite")
    for name in ("bundle", "quantized"):
        (tmp_path / name).mkdir()
    export(tmp_path / "model", tmp_path / "bundle", threads=1)
    record = quantize_bundle(tmp_path / "bundle", tmp_path / "quantized", bits=8, accuracy_level=0)
    nodes = record["nodes"]
    assert "Transpose" not in nodes and "MatMul" not in nodes
    assert nodes["GatherBlockQuantized"] == 1
    grid = Grid(8, 32, True)
    row = twins.ragged([25])[0]
    ours = OnnxModel(tmp_path / "quantized", 1)(*twins.padded([row]))[0]
    expected = twins.torch_logits(round_weights(model, grid, grid), row)
    np.testing.assert_allclose(ours, expected, atol=2e-4, rtol=2e-4)


def small_bundle(folder: Path, nodes: list[Any], weights: dict[str, np.ndarray]) -> Path:
    """A bundle of hand-made nodes from `x` [n, 20] to `y`."""
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 20])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "model.onnx.data").write_bytes(b"")
    return folder


def test_a_gemm_keeps_its_bias_and_a_row_that_fills_no_group_is_right(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(12, 20)).astype(np.float32), rng.normal(size=12).astype(np.float32)
    node = helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], name="gemm", transB=1)
    source = small_bundle(tmp_path / "source", [node], {"weight": weight, "bias": bias})
    (tmp_path / "out").mkdir()
    quantize_bundle(source, tmp_path / "out", bits=4, head_bits=4, accuracy_level=0)
    x = rng.normal(size=(3, 20)).astype(np.float32)
    path = str(tmp_path / "out" / "model.onnx")
    ours = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    grid = Grid(4, 32, True)
    np.testing.assert_allclose(
        ours,
        x @ dequantize(quantize(torch.from_numpy(weight), grid), grid).numpy().T + bias,
        rtol=1e-4,
        atol=1e-5,
    )


def weights_of(bundle: Path) -> list[str]:
    return list(find_uses(read_graph(bundle).graph))


def mixed(bundle: Path) -> dict[str, Choice]:
    """A choice of its own for each weight of a twin."""
    grids = [Grid(4, 16, False), Grid(8, 32, True), Grid(4, 64, True), Grid(4, 32, False), Grid(8, 16, False)]
    return {
        name: Choice(grids[index % 5], ("rtn", "k_quant")[index % 2], (0, 1)[index % 2])
        for index, name in enumerate(weights_of(bundle))
    }


@pytest.mark.parametrize("form", ["llama", "gpt2", UNTIED])
def test_each_weight_is_stored_as_it_was_assigned(
    form: str, exported: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    bundle = exported(form)[1]
    assignment = mixed(bundle)
    record = quantize_assigned(bundle, tmp_path, assignment)
    rows = {row["name"]: row for row in record["by_tensor"]}
    assert set(rows) == set(assignment)
    for name, choice in assignment.items():
        row, grid = rows[name], choice.grid
        assert (row["bits"], row["group"], row["symmetric"]) == (grid.bits, grid.group, grid.symmetric)
        assert row["method"] == choice.method
    graph = read_graph(tmp_path).graph
    fields = [{a.name: a.i for a in node.attribute} for node in graph.node if node.op_type == "MatMulNBits"]
    wanted = {(c.grid.bits, c.grid.group, c.accuracy_level) for c in assignment.values()}
    assert {(f["bits"], f["block_size"], f["accuracy_level"]) for f in fields} <= wanted
    assert len({f["bits"] for f in fields}) == 2
    assert not set(assignment) & {tensor.name for tensor in graph.initializer}
    row = twins.ragged([21])[0]
    assert np.isfinite(OnnxModel(tmp_path, 1)(*twins.padded([row]))).all()


@pytest.mark.parametrize("form", ["llama", "gpt2", UNTIED])
def test_the_size_of_a_bundle_is_known_before_it_is_written(
    form: str, exported: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    bundle = exported(form)[1]
    one = Choice(Grid(4, 32, False))
    for index, assignment in enumerate([mixed(bundle), dict.fromkeys(weights_of(bundle), one)]):
        out = tmp_path / str(index)
        out.mkdir()
        assert bundle_bytes(bundle, assignment) == quantize_assigned(bundle, out, assignment)["size_bytes"]
