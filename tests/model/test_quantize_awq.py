"""Rescaled models compute what they computed, and round better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graph_twins as twins
import numpy as np
import pytest
import torch
from torch import Tensor

from edgedisp.core.errors import BadInput
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.quantize.awq import rescale
from edgedisp.quantize.calibrate import calibrate
from edgedisp.quantize.grid import Grid, dequantize, quantize

GRID = Grid(4, 16, False)
TOKENS = np.random.default_rng(0).integers(0, twins.VOCABULARY, (6, 40)).astype(np.uint16)


def held(weight: Tensor) -> Tensor:
    return dequantize(quantize(weight, GRID), GRID)


def make(folder: Path, form: str) -> Any:
    """The twin, with inputs of uneven size."""
    family, _, _ = form.partition(", norm after")
    if family in ("opt", "gpt_neox"):
        from transformers import AutoConfig, AutoModelForCausalLM

        shape = {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": twins.VOCABULARY,
            "max_position_embeddings": 128,
            "initializer_range": 0.15,
        }
        opt = {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": not form.endswith("after")}
        sizes = {"opt": opt, "gpt_neox": {"intermediate_size": 96}}
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, **sizes[family]))
    else:
        model = twins.make(folder, form)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.from_numpy(TOKENS.astype(np.int64)), use_cache=False).logits
    return found


# The maps after which channels can be divided: norms and v in all, up where gated, the first map before relu.
FOLDS = {
    "llama": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    "qwen3": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    "llama, untied, biases, wide heads": [
        "input_layernorm",
        "self_attn.v_proj",
        "post_attention_layernorm",
        "mlp.up_proj",
    ],
    "gemma3_text": ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"],
    "gpt2": ["ln_1", "attn.c_attn", "ln_2"],
    "opt": ["self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"],
    "opt, norm after": ["self_attn.v_proj", "fc1"],  # its norms are part of the residual path
    "gpt_neox": ["input_layernorm", "attention.query_key_value", "post_attention_layernorm"],
}


@pytest.mark.parametrize("form", FOLDS)
def test_the_function_stays_and_every_exact_fold_is_found(tmp_path: Path, form: str) -> None:
    model = make(tmp_path, form)
    before, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    rows = rescale(model, decoder_layers(model), TOKENS, held)
    after = logits(model)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    assert [row["source"].split(".1.")[1] for row in rows if ".1." in row["source"]] == FOLDS[form]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, weights[name])}
    used = [row for row in rows if row["exponent"] > 0]
    assert used and moved == {
        f"{name}.{part}"
        for row in used
        for name, parts in [
            (row["source"], ("weight", "bias")),
            *((reader, ("weight",)) for reader in row["readers"]),
        ]
        for part in parts
        if f"{name}.{part}" in weights
    }


def output_error(model: Any, reference: Tensor) -> float:
    """Of the logits, once the layers are rounded to nearest."""
    blocks = torch.from_numpy(TOKENS.astype(np.int64))
    calibrate(model, decoder_layers(model), blocks, lambda wave: {n: held(w) for n, w in wave.wanted.items()})
    return float((logits(model) - reference).square().mean())


@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_a_rescaled_model_loses_less_by_rounding(tmp_path: Path, form: str) -> None:
    plain, rescaled = make(tmp_path, form), make(tmp_path, form)
    reference = logits(plain)
    rows = rescale(rescaled, decoder_layers(rescaled), TOKENS, held)
    assert all(0 < row["error_ratio"] <= 1 for row in rows)
    assert output_error(rescaled, reference) < 0.95 * output_error(plain, reference)


def test_the_exponent_found_is_the_best_of_all_tried(tmp_path: Path) -> None:
    model = make(tmp_path, "llama")
    layer = model.model.layers[0]
    maps = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    seen: list[Tensor] = []
    handle = maps[0].register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, 64)))
    logits(model)
    handle.remove()
    x, size = seen[0], seen[0].square().mean(0).sqrt()
    with torch.no_grad():
        errors = []
        for step in range(11):
            s = size.pow(step / 10)
            s = s / (s.max() * s.min()).sqrt()
            change = [x @ (held(m.weight * s) / s - m.weight).T for m in maps]
            errors.append(sum(float(c.square().sum(1).mean()) for c in change))
    row = rescale(model, decoder_layers(model), TOKENS, held, steps=10)[0]
    assert row["exponent"] == errors.index(min(errors)) / 10 > 0
    assert row["error_ratio"] == pytest.approx(min(errors) / errors[0], rel=1e-3)


def test_what_rounding_leaves_exact_is_left_alone(tmp_path: Path) -> None:
    model = make(tmp_path, "llama")
    weights = [p.clone() for p in model.parameters()]
    rows = rescale(model, decoder_layers(model), TOKENS, lambda weight: weight)
    assert {row["exponent"] for row in rows} == {0.0}
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights))


def test_a_channel_that_is_never_used_stays_finite(tmp_path: Path) -> None:
    model = make(tmp_path, "llama")
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[3] = 0
        layer.mlp.up_proj.weight.data[5] = 0
    before = logits(model)
    rescale(model, decoder_layers(model), TOKENS, held)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def test_rescaling_needs_text(tmp_path: Path) -> None:
    model = make(tmp_path, "llama")
    with pytest.raises(BadInput, match="no calibration text"):
        rescale(model, decoder_layers(model), TOKENS[:0], held)
