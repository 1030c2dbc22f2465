"""Proves that a graph is well formed, and that the type and shape of every value follow from the inputs.

onnx's checker infers shapes for standard operators and stops at those it does not know; here that is at the
first fused one. onnxruntime knows its own operators as well, and fails on a wrong shape when told to be
strict. So onnxruntime infers first, and what it found is written into the graph for onnx's checker, whose
inference then runs through all of it. The checker also refuses what onnxruntime forgives, such as a name
that is used twice.

Weights are made inputs of the graph for that: nothing of them is read, so it takes a fraction of a second and
the 2 GB limit of a graph in memory is out of sight. One operator is called by its standard name:
onnxruntime's `SimplifiedLayerNormalization`, which runtimes on devices know, is `RMSNormalization` in the
standard since opset 23, with the same inputs and attributes.

Left out: shapes at run time, which the runs of `check.py` prove.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnxruntime
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from edgedisp.core.errors import BuildFailed

STANDARD_NAMES = {"SimplifiedLayerNormalization": "RMSNormalization"}
STANDARD_OPSET = 23  # the first with all of these
TYPES = {
    "tensor(float)": TensorProto.FLOAT,
    "tensor(float16)": TensorProto.FLOAT16,
    "tensor(int32)": TensorProto.INT32,
    "tensor(int64)": TensorProto.INT64,
    "tensor(uint8)": TensorProto.UINT8,
    "tensor(int8)": TensorProto.INT8,
    "tensor(bool)": TensorProto.BOOL,
}


def check_shapes(model: ModelProto, name: str) -> dict[str, Any]:
    """Check a graph read without its weights: {checker, values}; `values` is how many have a shape: all.

    BuildFailed says what onnx or onnxruntime found wrong.
    """
    bare = _without_weights(model)
    values = _inferred(bare, name)
    _call_by_standard_names(bare)
    bare.graph.ClearField("value_info")
    bare.graph.value_info.extend(values)
    try:
        onnx.checker.check_model(bare, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BuildFailed(f"{name}: onnx's checker refuses model.onnx: {_one_line(error)}") from error
    return {"checker": f"onnx {onnx.__version__}, full check", "values": len(values)}


def _without_weights(model: ModelProto) -> ModelProto:
    """A copy whose tensors in files are inputs; small ones (shapes, axes) stay."""
    bare = ModelProto()
    bare.CopyFrom(model)
    outside = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    inside = [t for t in model.graph.initializer if t.data_location != TensorProto.EXTERNAL]
    bare.graph.ClearField("initializer")
    bare.graph.initializer.extend(inside)
    bare.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in outside)
    return bare


def _inferred(bare: ModelProto, name: str) -> list[ValueInfoProto]:
    """Type and shape of every value that a node makes, as onnxruntime infers them."""
    asked = ModelProto()
    asked.CopyFrom(bare)
    known = {value.name for value in asked.graph.output}
    made = [output for node in asked.graph.node for output in node.output if output]
    asked.graph.output.extend(ValueInfoProto(name=output) for output in made if output not in known)
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # nothing is computed
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.strict_shape_type_inference", "1")
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            asked.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime has no common base class for its errors
        raise BuildFailed(f"{name}: onnxruntime finds model.onnx inconsistent: {_one_line(error)}") from error
    found = session.get_outputs()
    unknown = [value.name for value in found if value.shape is None or value.type not in TYPES]
    if unknown:
        raise BuildFailed(f"{name}: no shape follows for {len(unknown)} values of model.onnx: {unknown[:5]}")
    return [helper.make_tensor_value_info(v.name, TYPES[v.type], v.shape) for v in found]


def _call_by_standard_names(bare: ModelProto) -> None:
    renamed = [node for node in bare.graph.node if node.op_type in STANDARD_NAMES and not node.domain]
    for node in renamed:
        node.op_type = STANDARD_NAMES[node.op_type]
    for opset in bare.opset_import:
        if renamed and not opset.domain:
            opset.version = max(opset.version, STANDARD_OPSET)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
