"""Graphs are well formed, every value has a shape, and the kernels that run are the ones meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgedisp.core.errors import BuildFailed
from edgedisp.graph import kernels
from edgedisp.graph.check import check
from edgedisp.graph.export import export
from edgedisp.graph.kernels import check_kernels
from edgedisp.graph.session import OnnxModel
from edgedisp.graph.shapes import STANDARD_NAMES, check_shapes
from edgedisp.quantize.rewrite import quantize_bundle

PROMPT = twins.ragged([8])[0]


def made(root: Path, form: str) -> dict[str, Path]:
    """The bundles fp32 and int4 of a twin."""
    twins.make(root / "model", form)
    found = {name: root / name for name in ("fp32", "int4")}
    for folder in found.values():
        folder.mkdir()
    export(root / "model", found["fp32"], threads=1)
    quantize_bundle(found["fp32"], found["int4"], bits=4, group=32, symmetric=False)
    return found


def graph_of(bundle: Path) -> onnx.ModelProto:
    return onnx.load(bundle / "model.onnx", load_external_data=False)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return made(tmp_path_factory.mktemp("twin"), "llama")


@pytest.mark.parametrize("form", [*twins.FORMS, "granite"])  # granite: the genai builder's graph
def test_every_value_of_every_familys_graphs_has_a_shape(form: str, tmp_path: Path) -> None:
    for name, bundle in made(tmp_path, form).items():
        model = graph_of(bundle)
        made_by_nodes = {output for node in model.graph.node for output in node.output if output}
        assert check_shapes(model, name)["values"] == len(made_by_nodes)
        # The file as it ships, by its path: only one operator's name keeps it from passing.
        own_name = any(node.op_type in STANDARD_NAMES for node in model.graph.node)
        if own_name:
            with pytest.raises(onnx.checker.ValidationError, match="SimplifiedLayerNormalization"):
                onnx.checker.check_model(bundle / "model.onnx", full_check=True)
        else:
            onnx.checker.check_model(bundle / "model.onnx", full_check=True)
        assert own_name == (form.split(",")[0] not in ("gpt2", "opt", "gpt_neox"))


def set_vocabulary(model: Any) -> None:
    logits = next(value for value in model.graph.output if value.name == "logits")
    logits.type.tensor_type.shape.dim[2].dim_value += 1


def shorten_a_weight(model: Any) -> None:
    weight = next(t for t in model.graph.initializer if t.name == "model.layers.1.mlp.down_proj.weight")
    weight.dims[0] -= 1


def read_nothing(model: Any) -> None:
    model.graph.node[-1].input[0] = "nowhere"


def add_an_attribute(model: Any) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Gather")
    node.attribute.append(helper.make_attribute("made_up", 1))


def add_a_stranger(model: Any) -> None:
    model.graph.node.append(helper.make_node("MadeUp", ["logits"], ["more"], domain="com.microsoft"))


def state_a_wrong_shape(model: Any) -> None:
    cut = next(node for node in model.graph.node if node.op_type == "Split")
    model.graph.value_info.append(helper.make_tensor_value_info(cut.output[0], 1, ["batch_size", 3, 7, 7]))


def repeat_a_weight(model: Any) -> None:  # onnxruntime takes the first of the two
    model.graph.initializer.append(model.graph.initializer[0])


def forget_the_name(model: Any) -> None:
    model.graph.name = ""


@pytest.mark.parametrize(
    ("spoil", "who"),
    [
        (set_vocabulary, "onnxruntime finds"),
        (shorten_a_weight, "onnxruntime finds"),
        (read_nothing, "onnxruntime finds"),
        (add_an_attribute, "onnxruntime finds"),
        (add_a_stranger, "onnxruntime finds"),
        (state_a_wrong_shape, "onnxruntime finds"),
        (repeat_a_weight, "onnx's checker refuses"),
        (forget_the_name, "onnx's checker refuses"),
    ],
)
def test_a_graph_that_is_not_sound_is_refused(
    spoil: Callable[[Any], None], who: str, bundles: dict[str, Path]
) -> None:
    model = graph_of(bundles["fp32"])
    check_shapes(model, "sound")
    spoil(model)
    with pytest.raises(BuildFailed, match=f"^spoilt: {who}"):
        check_shapes(model, "spoilt")


def test_a_check_records_shapes_and_kernels(bundles: dict[str, Path]) -> None:
    prompts = twins.ragged([30, 7])
    for name, product in (("fp32", "MatMul"), ("int4", "MatMulNBits")):
        record = check(bundles[name], prompts, threads=1)
        assert record["checker"].startswith("onnx ") and record["values"] > 30
        assert record["providers"] == {"CPUExecutionProvider": sum(record["kernels"].values())}
        assert record["kernels"][product] == record["nodes"][product]
        assert record["kernels"]["GroupQueryAttention"] == 2
        # Sigmoid and Mul of the activation are one kernel by now.
        assert record["kernels"]["QuickGelu"] == 2 and "Sigmoid" not in record["kernels"]


def with_product(
    bundle: Path, out: Path, weight: onnx.TensorProto, scale: np.ndarray, between: str, **attributes: int
) -> Path:
    """The bundle with its logits multiplied by one more matrix, dequantized and perhaps changed."""
    out.mkdir()
    for file in bundle.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    model = graph_of(out)
    model.graph.node[-1].output[0] = "before"
    model.graph.initializer.extend([weight, numpy_helper.from_array(scale, "scale")])
    model.graph.node.append(
        helper.make_node("DequantizeLinear", [weight.name, "scale"], ["plain"], name="unpack", **attributes)
    )
    if between:
        model.graph.node.append(helper.make_node(between, ["plain"], ["changed"]))
    model.graph.node.append(
        helper.make_node("MatMul", ["before", "changed" if between else "plain"], ["logits"])
    )
    (out / "model.onnx").write_bytes(model.SerializeToString())
    return out


def test_weights_dequantized_apart_from_their_product_are_refused(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    weight = numpy_helper.from_array(np.eye(twins.VOCABULARY, dtype=np.int8), "weight")
    out = with_product(bundles["int4"], tmp_path / "bundle", weight, np.array(1.0, np.float32), between="Abs")
    with pytest.raises(BuildFailed, match=r"dequantized apart from their products .*\['unpack'\]"):
        check_kernels(out, graph_of(out).graph, PROMPT, 1)


def test_a_pair_that_onnxruntime_joins_is_as_good_as_one_operator(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    size = twins.VOCABULARY
    identity = np.eye(size, dtype=np.int32).reshape(-1)
    weight = helper.make_tensor("weight", onnx.TensorProto.INT4, [size, size], identity)
    scale = np.ones((size // 32, size), np.float32)
    out = with_product(bundles["int4"], tmp_path / "bundle", weight, scale, between="", axis=0, block_size=32)
    before = check_kernels(bundles["int4"], graph_of(bundles["int4"]).graph, PROMPT, 1)["kernels"]
    after = check_kernels(out, graph_of(out).graph, PROMPT, 1)["kernels"]
    assert after == dict(Counter(before) + Counter(MatMulNBits=1))


def test_a_node_on_another_provider_is_named() -> None:
    ran = {
        "product": {"op_name": "MatMul", "provider": kernels.NATIVE},
        "norm": {"op_name": "Add", "provider": "OtherProvider"},
    }
    with pytest.raises(BuildFailed, match=r"1 nodes ran .*\['norm \(OtherProvider\)'\]"):
        kernels._hold_native(ran, "bundle")


def test_weights_beyond_two_gigabytes_are_written_read_and_checked(tmp_path: Path) -> None:
    """A hole of 2 GB at the start of the weights file: every offset is beyond what 32 bits hold."""
    model = twins.make(tmp_path / "model", "llama")
    (tmp_path / "fp32").mkdir()
    (tmp_path / "int4").mkdir()
    data = tmp_path / "fp32" / "model.onnx.data"
    with data.open("wb") as file:
        file.truncate((1 << 31) + 4096)
    export(tmp_path / "model", tmp_path / "fp32", threads=1)
    assert data.stat().st_blocks * 512 < 1 << 24  # the hole takes no room
    tensors = graph_of(tmp_path / "fp32").graph.initializer
    offsets = [int(e.value) for t in tensors for e in t.external_data if e.key == "offset"]
    assert len(offsets) > 10 and min(offsets) > 1 << 31
    rows = twins.ragged([20])
    ours = OnnxModel(tmp_path / "fp32", 1)(*twins.padded(rows))[0]
    np.testing.assert_allclose(ours, twins.torch_logits(model, rows[0]), atol=1e-4, rtol=1e-4)
    check(tmp_path / "fp32", twins.ragged([20, 5]), threads=1)
    quantize_bundle(tmp_path / "fp32", tmp_path / "int4", bits=8, accuracy_level=0)
    ours = OnnxModel(tmp_path / "int4", 1)(*twins.padded(rows))[0]
    np.testing.assert_allclose(ours, twins.torch_logits(model, rows[0]), atol=0.3)
