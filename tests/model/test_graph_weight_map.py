"""weight_map.json names the torch parameters of every matrix that a quantizer may pack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgedisp.graph.builder_fallback import ARCHITECTURES
from edgedisp.graph.device_graph import for_device
from edgedisp.graph.export import export

PHI3 = {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}


def exported(root: Path, form: str) -> tuple[Any, Path]:
    model = twins.make(root / "model", form, **(PHI3 if form == "phi3" else {}))
    (root / "bundle").mkdir()
    export(root / "model", root / "bundle", threads=1)
    return model, root / "bundle"


@pytest.mark.parametrize("form", [*twins.FORMS, *ARCHITECTURES])
def test_each_initializer_equals_its_torch_parameters(form: str, tmp_path: Path) -> None:
    model, bundle = exported(tmp_path, form)
    weight_map = json.loads((bundle / "weight_map.json").read_text())
    graph = onnx.load(bundle / "model.onnx").graph
    parameters = dict(model.named_parameters())
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for name, entry in weight_map.items():
        expected = torch.cat([parameters[parameter] for parameter in entry["torch"]]).detach()
        expected = expected[entry["rows"]] if "rows" in entry else expected
        expected = expected.T if entry["transposed"] else expected
        np.testing.assert_array_equal(numpy_helper.to_array(stored[name]), expected.numpy(), err_msg=name)
    read = {node.input[1] for node in graph.node if node.op_type in ("MatMul", "FusedMatMul")}
    read |= {node.input[0] for node in graph.node if node.op_type == "Gather" and "input_ids" in node.input}
    assert set(weight_map) == {name for name in stored if name in read}
    assert {name for entry in weight_map.values() for name in entry["torch"]} == {
        name
        for name, p in parameters.items()
        if p.ndim == 2 and "positions" not in name and "wpe" not in name
    }
    tied = [entry for entry in weight_map.values() if entry.get("tied_head")]
    assert len(tied) == bool(model.config.tie_word_embeddings)


def test_a_bundle_for_a_device_has_no_weight_map(tmp_path: Path) -> None:
    _, bundle = exported(tmp_path, "llama")
    (tmp_path / "device").mkdir()
    for_device(bundle, tmp_path / "device", threads=1)
    assert not (tmp_path / "device" / "weight_map.json").exists()
