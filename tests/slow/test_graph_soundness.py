"""Every graph is well formed, every value has a shape, and packed weights are read by CPU kernels.

onnx's checker infers shapes for standard operators and stops at the first fused one; onnxruntime knows the
fused ones and, in strict mode, fails on a wrong shape. So onnxruntime infers, and onnx's checker gets the
shapes. Weights in files become inputs, as nothing of them is read.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from graph_twins import FORMS, TwinStore, make, padded, ragged, torch_logits
from onnx import TensorProto, helper

from edgedisp.graph.export import export
from edgedisp.graph.session import OnnxModel
from edgedisp.graph.verify import check_bundle
from edgedisp.quantize.onnx_rewrite import quantize_bundle

TYPES = {f"tensor({name})": getattr(TensorProto, name.upper()) for name in (
    "float", "float16", "int32", "int64", "uint8", "bool",
)}  # fmt: skip


def without_weights(path: Path) -> onnx.ModelProto:
    model = onnx.load(path, load_external_data=False)
    tensors = list(model.graph.initializer)
    outside = [tensor for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL]
    model.graph.ClearField("initializer")
    model.graph.initializer.extend(tensor for tensor in tensors if tensor not in outside)
    model.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in outside)
    return model


def inferred(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Type and shape of every value that a node makes, by onnxruntime."""
    every = onnx.ModelProto()
    every.CopyFrom(model)
    outputs = {value.name for value in every.graph.output}
    inner = [name for node in every.graph.node for name in node.output if name and name not in outputs]
    every.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inner)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.strict_shape_type_inference", "1")
    content, providers = every.SerializeToString(), ["CPUExecutionProvider"]
    values = onnxruntime.InferenceSession(content, options, providers=providers).get_outputs()
    assert len(values) == len(inner) + len(outputs) and all(value.shape is not None for value in values)
    return [helper.make_tensor_value_info(v.name, TYPES[v.type], v.shape) for v in values]


@pytest.mark.parametrize("form", [*FORMS, "granite"])  # granite: the genai builder's graph
def test_every_value_of_every_familys_graphs_has_a_shape(form: str, twins: TwinStore) -> None:
    for bundle in (twins.fp32(form), twins.quantized(form, symmetric=False)):
        model = without_weights(bundle / "model.onnx")
        values = inferred(model)
        for node in model.graph.node:  # the standard's name, since opset 23, for the same operator
            if node.op_type == "SimplifiedLayerNormalization":
                node.op_type = "RMSNormalization"
        for opset in model.opset_import:
            opset.version = opset.version if opset.domain else max(opset.version, 23)
        model.graph.ClearField("value_info")
        model.graph.value_info.extend(values)
        onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("form", ["llama", "gpt_neox"])
def test_cpu_kernels_read_the_packed_weights(form: str, twins: TwinStore, tmp_path: Path) -> None:
    bundle = twins.quantized(form, symmetric=False)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    model = OnnxModel(bundle, 1)
    model.session = onnxruntime.InferenceSession(bundle / "model.onnx", options)
    model(*padded(ragged([8])))
    events = json.loads(Path(model.session.end_profiling()).read_text())
    kernels = [e["args"] for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    assert {kernel["provider"] for kernel in kernels} == {"CPUExecutionProvider"}
    operators = Counter(kernel["op_name"] for kernel in kernels)
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    assert operators["MatMulNBits"] == sum(node.op_type == "MatMulNBits" for node in graph.node) == 9
    assert operators["GroupQueryAttention"] == 2 and "DequantizeLinear" not in operators


def test_weights_beyond_two_gigabytes_are_written_read_and_checked(tmp_path: Path) -> None:
    """A hole of 2 GB at the start of the weights file: every offset is beyond what 32 bits hold."""
    model = make(tmp_path / "model", "llama")
    (tmp_path / "fp32").mkdir()
    (tmp_path / "int8").mkdir()
    data = tmp_path / "fp32" / "model.onnx.data"
    with data.open("wb") as file:
        file.truncate((1 << 31) + 4096)
    export(tmp_path / "model", tmp_path / "fp32", threads=1)
    assert data.stat().st_blocks * 512 < 1 << 24  # the hole takes no room
    rows, bundle = ragged([20]), OnnxModel(tmp_path / "fp32", 1)
    expected = torch_logits(model, rows[0])
    np.testing.assert_allclose(bundle(*padded(rows))[0], expected, atol=1e-4, rtol=1e-4)
    check_bundle(bundle, ragged([20, 5]))
    quantize_bundle(tmp_path / "fp32", tmp_path / "int8", bits=8, accuracy_level=0)
    np.testing.assert_allclose(OnnxModel(tmp_path / "int8", 1)(*padded(rows))[0], expected, atol=0.3)
