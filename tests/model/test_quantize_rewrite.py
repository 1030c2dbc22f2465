"""A quantized bundle computes what torch computes with the rounded weights, and holds nothing twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from graph_twins import FAMILIES, FORMS, UNTIED, VOCABULARY, TwinStore, padded, ragged, torch_logits
from onnx import TensorProto
from transformers.pytorch_utils import Conv1D

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.graph.session import OnnxModel
from edgedisp.quantize.calibration import CalibrationText, gptq_model
from edgedisp.quantize.grid import Choice, Grid, dequantize, quantize
from edgedisp.quantize.onnx_rewrite import quantize_assigned, quantize_bundle
from edgedisp.quantize.onnx_weights import find_uses, read_fp32_graph

POSITIONS = ("wpe", "embed_positions")  # stay fp32


def round_weights(model: Any, body: Grid, outer: Grid) -> Any:
    """A copy of the torch model with every product's weight and the embedding rounded to the grids."""
    rounded = type(model)(model.config).eval()
    rounded.load_state_dict(model.state_dict())
    visited = set()
    for name, module in rounded.named_modules():
        is_embedding = isinstance(module, torch.nn.Embedding)
        if not (is_embedding or isinstance(module, torch.nn.Linear | Conv1D)) or name.endswith(POSITIONS):
            continue
        if module.weight.data_ptr() in visited:
            continue
        visited.add(module.weight.data_ptr())
        grid = outer if is_embedding or name == "lm_head" else body
        rows_first = module.weight.data.T if isinstance(module, Conv1D) else module.weight.data
        values = dequantize(quantize(rows_first, grid), grid)
        module.weight.data.copy_(values.T if isinstance(module, Conv1D) else values)
    return rounded


@pytest.mark.parametrize(("form", "bits", "head_bits", "group", "symmetric"), [
    ("llama", 4, 8, 32, False),
    (UNTIED, 4, 4, 128, True),
    ("qwen3", 8, 8, 16, True),
    ("gemma3_text", 4, 8, 32, False),
    ("gpt2", 4, 4, 128, True),
    ("opt", 8, 8, 16, True),
    ("gpt_neox", 4, 8, 32, False),
    ("granite", 8, 8, 32, True),  # written by onnxruntime-genai's builder
])  # fmt: skip
def test_logits_equal_torch_with_rounded_weights_and_every_product_is_packed(
    form: str, bits: int, head_bits: int, group: int, symmetric: bool, twins: TwinStore, tmp_path: Path
) -> None:
    model, options = twins.model(form), {"bits": bits, "group": group, "symmetric": symmetric}
    record = quantize_bundle(twins.fp32(form), tmp_path, accuracy_level=0, head_bits=head_bits, **options)
    outer = Grid(head_bits, group, symmetric or head_bits == 8)  # no zero points at 8 bits
    reference = round_weights(model, Grid(bits, group, symmetric), outer)
    rows = ragged([40, 11])
    for row, ours in zip(rows, OnnxModel(tmp_path, 1)(*padded(rows))):
        expected = torch_logits(reference, row)
        np.testing.assert_allclose(ours[: len(row)], expected, atol=2e-4, rtol=2e-4)
        assert np.abs(expected - torch_logits(model, row)).max() > 1e-2  # rounding did something
    assert record["nodes"]["GatherBlockQuantized"] == 1
    assert not {"MatMul", "FusedMatMul", "Gemm", "Transpose"} & set(record["nodes"])
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    assert {tensor.name for tensor in graph.initializer} <= {n for node in graph.node for n in node.input}
    matrices = [t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2]
    assert all("_cache" in name or "position" in name for name in matrices)
    # A tied embedding is stored once.
    assert len(record["by_tensor"]) == record["nodes"]["MatMulNBits"] + (form in (UNTIED, "gpt_neox"))


@pytest.mark.parametrize(("form", "symmetric"), [("llama", True), (UNTIED, False)])
def test_runtimes_without_folding_agree(form: str, symmetric: bool, twins: TwinStore, tmp_path: Path) -> None:
    """Scales that are stored in fp16 are then no constants to the product."""
    quantize_bundle(twins.fp32(form), tmp_path, symmetric=symmetric, bits=4, head_bits=8, accuracy_level=4)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    scales = {tensor.data_type for tensor in graph.initializer if ".scales" in tensor.name}
    assert scales == {TensorProto.FLOAT16}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    bundle = OnnxModel(tmp_path, 1)
    bundle.session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    rounded = round_weights(twins.model(form), Grid(4, 32, symmetric), Grid(8, 32, True))
    row = ragged([40])[0]
    expected = torch_logits(rounded, row)
    assert np.abs(bundle(*padded([row]))[0] - expected).max() < 0.1 * np.abs(expected).max()


def test_the_record_adds_up(twins: TwinStore, tmp_path: Path) -> None:
    record = quantize_bundle(twins.fp32("llama"), tmp_path, bits=4, group=32, symmetric=False, head_bits=8)
    assert json.loads(json.dumps(record)) == record
    by_name = {row["name"]: row for row in record["by_tensor"]}
    embedding, gate_up = (
        by_name[f"model.{name}.weight"] for name in ("embed_tokens", "layers.1.mlp.gate_up_proj")
    )
    expected = {"bits": 8, "component": "embedding", "size_bytes": VOCABULARY * (64 + 2 * 2)}
    assert expected.items() <= embedding.items()
    assert (gate_up["bits"], gate_up["component"]) == (4, "mlp")
    assert record["size_bytes"] == sum(path.stat().st_size for path in tmp_path.glob("model.onnx*"))
    with pytest.raises(BadInput, match="is already quantized"):
        quantize_bundle(tmp_path, tmp_path / "again", bits=4)


@pytest.mark.parametrize("form", ["gpt2", UNTIED])
def test_each_weight_is_stored_as_it_was_assigned(form: str, twins: TwinStore, tmp_path: Path) -> None:
    grids = [Grid(4, 16, False), Grid(8, 32, True), Grid(4, 64, True), Grid(4, 32, False), Grid(8, 16, False)]
    names = find_uses(read_fp32_graph(twins.fp32(form)).graph)
    methods = ("rtn", "k_quant")
    assignment = {name: Choice(grids[k % 5], methods[k % 2]) for k, name in enumerate(names)}
    rows = quantize_assigned(twins.fp32(form), tmp_path, assignment, accuracy_level=1)["by_tensor"]
    columns = ("bits", "group", "symmetric")
    assert assignment == {
        row["name"]: Choice(Grid(*(row[column] for column in columns)), row["method"]) for row in rows
    }
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    fields = [{a.name: a.i for a in node.attribute} for node in graph.node if node.op_type == "MatMulNBits"]
    assert {f["accuracy_level"] for f in fields} == {1} and {f["bits"] for f in fields} == {4, 8}
    assert not set(assignment) & {tensor.name for tensor in graph.initializer}
    assert np.isfinite(OnnxModel(tmp_path, 1)(*padded([ragged([21])[0]]))).all()


TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (6, 40)).astype(np.uint16)
CASES = [(form, 8) for form in FORMS] + [(form, 4) for form in (*FAMILIES, UNTIED)]


@pytest.mark.parametrize(("form", "head_bits"), CASES)
def test_a_graph_of_gptqs_blocks_agrees_with_the_model(
    form: str, head_bits: int, twins: TwinStore, tmp_path: Path
) -> None:
    """A head of 4 bits is calibrated, and a tied embedding with it; one of 8 bits is rounded to nearest."""
    model, fp32, grid, outer_grid = (
        twins.model(form),
        twins.fp32(form),
        Grid(4, 16, False),
        Grid(head_bits, 16, head_bits == 8),
    )
    text = CalibrationText(TOKENS)
    by_parameter = gptq_model(model, text, grid, head=grid if head_bits == 4 else None)
    options: dict[str, Any] = {"bits": 4, "group": 16, "head_bits": head_bits, "symmetric": False}
    quantize_bundle(fp32, tmp_path, accuracy_level=0, blocks=by_parameter, **options)
    head = model.get_output_embeddings().weight
    for weight in {id(w): w for w in (model.get_input_embeddings().weight, head)}.values():
        if head_bits == 8 or weight is not head:
            weight.data.copy_(dequantize(quantize(weight.data, outer_grid), outer_grid))
    shipped = OnnxModel(tmp_path, 1)
    for row in ragged([5, 30]):
        logits = shipped(np.array([row]), np.ones((1, len(row)), np.int64))[0]
        np.testing.assert_allclose(logits, torch_logits(model, row), rtol=1e-3, atol=2e-3)


def test_blocks_that_lack_a_weight_of_the_layers_are_refused(twins: TwinStore, tmp_path: Path) -> None:
    matrices = {name: value for name, value in twins.model("llama").named_parameters() if value.ndim == 2}
    blocks = {name: quantize(value.detach(), Grid(4, 32, True)) for name, value in matrices.items()}
    del blocks["model.layers.1.mlp.down_proj.weight"]
    for present, name in ((blocks, r"layers\.1\.mlp\.down_proj"), ({}, r"layers\.0\.")):
        with pytest.raises(BuildFailed, match=f"{name}.* is no weight of the model that was calibrated"):
            quantize_bundle(twins.fp32("llama"), tmp_path, bits=4, blocks=present)


def test_a_bundle_that_is_no_fresh_export_is_refused(twins: TwinStore, tmp_path: Path) -> None:
    bundle = tmp_path / "fp32"
    shutil.copytree(twins.fp32("llama"), bundle)
    for damage, message in (
        (lambda: (bundle / "weight_map.json").unlink(), "no fp32 bundle as edgedisp exports it"),
        (lambda: (bundle / "model.onnx").write_bytes(b"\xff" * 100), "no ONNX graph, or a damaged one"),
        (lambda: (bundle / "model.onnx").unlink(), r"no bundle \(model\.onnx is missing\)"),
    ):
        damage()
        with pytest.raises(BadInput, match=message):
            quantize_bundle(bundle, tmp_path, bits=4)
    assert not (tmp_path / "model.onnx").exists()
