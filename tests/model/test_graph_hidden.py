"""Hidden states of bundles: those of torch in fp32, present in quantized graphs, whatever their names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graph_twins import FAMILIES, UNTIED, TwinStore, ragged

from edgedisp.core.errors import BadInput
from edgedisp.graph.session import HiddenStates

FORMS = (*FAMILIES, UNTIED, "gemma3_text, capped logits, biases, long rope", "granite")  # the last: genai's
IDS = np.array(ragged([40])[0])


def torch_states(model: Any) -> list[np.ndarray]:
    """Embedding, every block, and the last block after the final norm."""
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    outputs: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda _, __, output: outputs.append(output)) for block in blocks]
    with torch.no_grad():
        listed = model(torch.tensor(IDS)[None], output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    return [state[0].numpy() for state in (listed[0], *outputs, listed[-1])]


@pytest.mark.parametrize("form", FORMS)
def test_fp32_and_quantized_bundles_have_the_hidden_states_of_torch(form: str, twins: TwinStore) -> None:
    states, expected = HiddenStates(twins.fp32(form), 1), torch_states(twins.model(form))
    for bits, least, most in ((32, 0, 1e-4), (8, 1e-4, 0.15), (4, 1e-4, 0.9)):
        bundle = states if bits == 32 else HiddenStates(twins.quantized(form, bits), 1)
        assert bundle.names == states.names
        for ours, reference in zip(bundle(IDS), expected, strict=True):
            assert ours.shape == reference.shape and ours.dtype == np.float32
            assert least <= np.linalg.norm(ours - reference) / np.linalg.norm(reference) < most


def test_what_has_no_hidden_states_is_refused(twins: TwinStore, tmp_path: Path) -> None:
    bundle = twins.fp32("llama")
    for count in (0, 129):
        with pytest.raises(ValueError, match="tokens given"):
            HiddenStates(bundle, 1)(np.full(count, 7))
    shutil.copyfile(bundle / "genai_config.json", tmp_path / "genai_config.json")
    with pytest.raises(BadInput, match=r"holds no model\.onnx"):
        HiddenStates(tmp_path, 1)
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.op_type = "MultiHeadAttention"
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BadInput, match=r"hidden states of 0 layers are found in model\.onnx but it has 2"):
        HiddenStates(tmp_path, 1)
