"""Hidden states of bundles: the same as torch's in fp32, there in quantized graphs, and no byte changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from graph_twins import FAMILIES, TwinStore, ragged

from edgedisp.core.errors import BadInput
from edgedisp.graph.onnx_graph import hidden_states
from edgedisp.graph.session import HiddenStates

FORMS = (
    *FAMILIES,
    "llama, untied, biases, wide heads",
    "gemma3_text, capped logits, biases, long rope",
    "granite",  # written by onnxruntime-genai's builder
)
IDS = np.array(ragged([40])[0])


@pytest.fixture(scope="module")
def bundle(twins: TwinStore) -> Path:
    return twins.fp32("llama")


def torch_states(model: Any) -> list[np.ndarray]:
    """Embedding, every block, and the last one after the final norm: hooks of the test's own."""
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, output: seen.append(output)) for block in blocks]
    with torch.no_grad():
        listed = model(torch.tensor(IDS)[None], output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    return [state[0].numpy() for state in (listed[0], *seen, listed[-1])]


def relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize("form", FORMS)
def test_fp32_and_quantized_bundles_have_the_hidden_states_of_torch(form: str, twins: TwinStore) -> None:
    states = HiddenStates(twins.fp32(form), 1)
    found, expected = states(IDS), torch_states(twins.model(form))
    assert len(found) == 4
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == np.float32
        assert relative(ours, theirs) < 1e-4
    for bits in (8, 4):
        quantized = HiddenStates(twins.quantized(form, bits), 1)
        assert quantized.names == states.names
        for ours, theirs in zip(quantized(IDS), expected, strict=True):
            assert 1e-4 < relative(ours, theirs) < (0.15 if bits == 8 else 0.9)


def test_names_are_not_what_the_tensors_are_found_by(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    kept = {value.name for value in [*model.graph.input, *model.graph.output]}
    kept |= {tensor.name for tensor in model.graph.initializer} | {""}
    renamed: dict[str, str] = {}
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name not in kept:
                    names[place] = renamed.setdefault(name, f"tensor_{len(renamed)}")
    path.write_bytes(model.SerializeToString())
    again = HiddenStates(tmp_path / "bundle", 1)
    assert all(name.startswith("tensor_") for name in again.names)
    for ours, theirs in zip(again(IDS), HiddenStates(bundle, 1)(IDS), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# ---------------------------------------------------------------- what cannot be measured


def test_what_is_no_bundle_or_not_its_tokens_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.copyfile(bundle / "genai_config.json", tmp_path / "genai_config.json")
    with pytest.raises(BadInput, match=r"holds no model\.onnx"):
        HiddenStates(tmp_path, 1)
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(BadInput, match="no ONNX graph, or a damaged one"):
        HiddenStates(tmp_path, 1)
    for count in (0, 129):
        with pytest.raises(ValueError, match="tokens given"):
            HiddenStates(bundle, 1)(np.full(count, 7))


def test_a_graph_without_fused_attention_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    path = tmp_path / "bundle" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.op_type = "MultiHeadAttention"
    path.write_bytes(model.SerializeToString())
    assert len(hidden_states(ir.load(path).graph)) == 2
    with pytest.raises(BadInput, match=r"hidden states of 0 layers are found in model\.onnx but it has 2"):
        HiddenStates(tmp_path / "bundle", 1)
