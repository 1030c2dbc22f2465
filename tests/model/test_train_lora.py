"""Adapters: which linear maps get one, QLoRA's base, the PEFT folder, and merged weights by the formula."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training import Interrupt, fit_tiny
from transformers.pytorch_utils import Conv1D

from edgedisp import models
from edgedisp.core.errors import BadInput
from edgedisp.recipe import Adapter
from edgedisp.train.lora import attach, load_dequantized, load_quantized, merge, save_adapter

ATTENTION = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
MLP = {f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
OPT = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")} | {"fc1", "fc2"}
ARCHITECTURES = {
    "llama": ("model.layers", ATTENTION | MLP),
    "gpt2": ("transformer.h", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    "opt": ("model.decoder.layers", OPT),
}
IDS = torch.randint(3, 400, (4, 24), generator=torch.Generator().manual_seed(0))


def open_base(folder: Path, quantization: str | None) -> nn.Module:
    model: nn.Module = load_quantized(folder, quantization) if quantization else models.load(folder)
    return model


def with_adapter(model: nn.Module, seed: int = 0, **changes: object) -> nn.Module:
    wrapped: nn.Module = attach(model, Adapter(kind="lora", **{"rank": 4, **changes}), seed)  # type: ignore
    return wrapped


def with_values(peft_model: nn.Module) -> nn.Module:
    """B starts at zero, which would hide A's gradient."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return peft_model


def saved(folder: Path, out: Path, quantization: str | None = None) -> nn.Module:
    """An adapter with weights in both halves, written to `out`; returns the model that carries it."""
    peft_model = with_values(with_adapter(open_base(folder, quantization), alpha=12))
    save_adapter(peft_model, str(folder), None, out)
    return peft_model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model.eval()(input_ids=IDS).logits
    return output


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_adapts_every_linear_map_of_attention_and_mlp_and_nothing_else(
    tiny_folder: dict[str, Path], architecture: str
) -> None:
    layers, parts = ARCHITECTURES[architecture]
    expected = {
        f"base_model.model.{layers}.{layer}.{part}.lora_{half}.default.weight"
        for layer in range(2)
        for part in parts
        for half in "AB"
    }
    for quantization in (None, "nf4"):
        peft_model = with_adapter(open_base(tiny_folder[architecture], quantization))
        assert {name for name, p in peft_model.named_parameters() if p.requires_grad} == expected


def test_named_targets_are_adapted_and_those_that_cannot_be_are_refused(tiny_folder: dict[str, Path]) -> None:
    model = with_adapter(models.load(tiny_folder["llama"]), targets=["q_proj", "self_attn.q_proj"])
    names = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"base_model.model.model.layers.{index}.self_attn.q_proj" for index in range(2)}
    for target in ("c_attn", "lm_head", "proj", "input_layernorm"):
        with pytest.raises(BadInput, match=rf"{target} is no linear map of this model, which has down_proj"):
            with_adapter(models.load(tiny_folder["llama"]), targets=[target, "q_proj"])


def test_the_random_half_depends_on_the_seed_alone(tiny_folder: dict[str, Path]) -> None:
    states = []
    for seed, global_seed in ((3, 5), (3, 6), (4, 6)):
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        states.append(with_adapter(models.load(tiny_folder["llama"]), seed=seed).state_dict())
        assert torch.equal(torch.random.get_rng_state(), before)
    name = next(name for name in states[0] if "lora_A" in name)
    assert torch.equal(states[0][name], states[1][name])
    assert not torch.equal(states[0][name], states[2][name])


# ---------------------------------------------------------------- quantized bases


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_gradients_through_a_quantized_base_are_those_through_its_dequantized_weights(
    tiny_folder: dict[str, Path], quantization: str
) -> None:
    quantized = load_quantized(tiny_folder["llama"], quantization)
    plain = load_dequantized(tiny_folder["llama"], quantization)
    trained = with_values(with_adapter(quantized)).train()
    expected, before = gradients(with_values(with_adapter(plain)).train()), gradients(trained)
    assert set(before) == set(expected) and len(before) == 28
    for name, gradient in before.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)
    # bitsandbytes repacks nf4 weights at the first eval pass on some CPUs, for a kernel without a backward.
    logits(trained)
    after = gradients(trained.train())
    assert all(torch.equal(gradient, after[name]) for name, gradient in before.items())


def test_an_interrupted_run_continues_to_the_same_adapter_over_an_unchanged_base(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    # GPT-2 has dropout, and so needs the random streams to be restored.
    whole, cut, continued, untrained = (
        with_adapter(open_base(tiny_folder["gpt2"], "nf4"), dropout=0.1) for _ in range(4)
    )
    options = {"lr": 1e-2, "checkpoint_every": 3}
    fit_tiny(whole, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        fit_tiny(cut, tmp_path / "cut", callbacks=[Interrupt(4)], **options)
    assert fit_tiny(continued, tmp_path / "cut", **options).resumed_from == 3
    states = [model.state_dict() for model in (whole, continued, untrained)]
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[2][name])}
    assert changed == {name for name in states[0] if "lora_" in name}
    assert all(torch.equal(states[0][name], states[1][name]) for name in changed)


# ---------------------------------------------------------------- the folder, and merging


def test_the_folder_names_its_base(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(with_adapter(models.load(tiny_folder["llama"])), "some/model", "v1", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model" and config["revision"] == "v1"
    assert config["target_modules"] == sorted(config["target_modules"])


def by_bitsandbytes(module: nn.Module) -> Tensor:
    """float32 [out, in] of a linear map that it stores."""
    functional: Any = pytest.importorskip("bitsandbytes").functional
    weight: Any = module.weight
    if hasattr(weight, "quant_state"):
        return cast(Tensor, functional.dequantize_4bit(weight.data, weight.quant_state))
    return cast(Tensor, weight.data.float() * (weight.SCB / 127).unsqueeze(1))


def expected_weights(folder: Path, adapter: Path, quantization: str | None) -> dict[str, Tensor]:
    """W + (alpha / rank) B A, from the files alone; W dequantized where the base was quantized."""
    base = models.load(folder)
    config = json.loads((adapter / "adapter_config.json").read_text())
    halves = load_file(adapter / "adapter_model.safetensors")
    quantized = load_quantized(folder, quantization).named_modules() if quantization else ()
    stored = {name: by_bitsandbytes(module) for name, module in quantized if "Linear" in type(module).__name__
              and type(module) is not nn.Linear}  # fmt: skip
    expected = {name: weight.clone() for name, weight in base.state_dict().items()}
    for name, module in base.named_modules():
        a = halves.get(f"base_model.model.{name}.lora_A.weight")
        if a is not None:
            b = halves[f"base_model.model.{name}.lora_B.weight"]
            transposed = isinstance(module, Conv1D)
            w = stored.get(name, module.weight.T if transposed else module.weight).detach()
            new = w + config["lora_alpha"] / config["r"] * (b @ a)
            expected[f"{name}.weight"] = new.T if transposed else new
    return expected


@pytest.mark.parametrize(
    ("architecture", "quantization"), [("gpt2", None), ("llama", "nf4"), ("gpt2", "nf4"), ("llama", "int8")]
)
def test_merged_weights_are_w_plus_the_scaled_product(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str, quantization: str | None
) -> None:
    folder = tiny_folder[architecture]
    adapter_on = logits(saved(folder, tmp_path, quantization))
    for into in {None, quantization}:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merged = merge(tmp_path, load_dequantized(folder, into) if into else models.load(folder))
        expected, weights = expected_weights(folder, tmp_path, into), merged.state_dict()
        assert set(weights) == set(expected)
        for name, weight in expected.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6, msg=f"{name} into {into}")
        if into == quantization != "int8":  # whose layers round their input in eval mode
            torch.testing.assert_close(logits(merged), adapter_on, rtol=1e-4, atol=1e-4)
