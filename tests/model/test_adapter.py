"""Adapters: which linear maps get one, what is refused, and that QLoRA trains over a quantized base."""

from __future__ import annotations

import copy
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from edgedisp import data, models
from edgedisp.core.errors import BadInput
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.train.adapter import AdapterSettings, adapter_size, attach, linear_maps, linear_names
from edgedisp.train.checkpoints import run_identity
from edgedisp.train.noise import quiet_bitsandbytes
from edgedisp.train.quantized import dequantized, expand, load_quantized
from edgedisp.train.settings import TrainSettings
from edgedisp.train.trainer import fit

ATTENTION = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
MLP = {f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
GPT2 = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
OPT = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")} | {"fc1", "fc2"}
NEOX = {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
ARCHITECTURES = {
    "llama": ("model.layers", ATTENTION | MLP),
    "qwen3": ("model.layers", ATTENTION | MLP),
    "gemma3_text": ("model.layers", ATTENTION | MLP),
    "mistral": ("model.layers", ATTENTION | MLP),
    "qwen2": ("model.layers", ATTENTION | MLP),
    "gpt2": ("transformer.h", GPT2),
    "opt": ("model.decoder.layers", OPT),
    "gpt_neox": ("gpt_neox.layers", NEOX),
}
IDS = torch.randint(3, 400, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tiny_folder: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    texts = [document.text for document in data.synthetic_documents(60, seed=0)]
    found = dict(tiny_folder)
    for architecture in ("mistral", "qwen2"):
        found[architecture] = tmp_path_factory.mktemp(architecture)
        models.save(*models.tiny_model(architecture, texts, seed=0, context=256), found[architecture])
    return found


def wrapped(opened: nn.Module, kind: str = "lora", seed: int = 0, **changes: object) -> nn.Module:
    settings = AdapterSettings(kind, **{"rank": 4, **changes})  # type: ignore[arg-type]
    return attach(opened, decoder_layers(opened), settings, seed)


def adapted(peft_model: nn.Module) -> set[str]:
    """Names of the modules that carry an adapter, as the bare model calls them."""
    names = {name for name, module in peft_model.named_modules() if hasattr(module, "lora_A")}
    return {name.removeprefix("base_model.model.") for name in names}


def loss_of(opened: nn.Module, ids: Tensor = IDS) -> Tensor:
    found: Tensor = opened(input_ids=ids, labels=ids, use_cache=False).loss
    return found


def gradients(opened: nn.Module) -> dict[str, Tensor]:
    opened.zero_grad()
    loss_of(opened).backward()
    return {name: p.grad.clone() for name, p in opened.named_parameters() if p.grad is not None}


def give_b_values(peft_model: nn.Module) -> None:
    """B starts at zero, which would hide A's gradient."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)


# ---------------------------------------------------------------- targets


@pytest.mark.parametrize("held_as", [None, "nf4", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_adapts_every_linear_map_of_attention_and_mlp_and_nothing_else(
    folders: dict[str, Path], architecture: str, held_as: str | None
) -> None:
    folder = folders[architecture]
    opened = load_quantized(folder, held_as) if held_as else models.load(folder)
    where, parts = ARCHITECTURES[architecture]
    expected = {f"{where}.{layer}.{part}" for layer in range(2) for part in parts}
    # The same set by walking the tree: within the layers, norms alone have weights that are no matrix.
    walked = {
        name
        for name, module in opened.named_modules()
        if name.startswith(where) and getattr(module, "weight", torch.zeros(1)).ndim == 2
    }
    ends = {part.rsplit(".", 1)[-1] for part in parts}
    assert set(linear_names(decoder_layers(opened))) == ends
    peft_model = wrapped(opened)
    assert adapted(peft_model) == expected == walked
    trainable = {name for name, p in peft_model.named_parameters() if p.requires_grad}
    assert trainable == {
        f"base_model.model.{name}.lora_{half}.default.weight" for name in expected for half in "AB"
    }


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapter_size_counts_the_trainable_parameters(folders: dict[str, Path], architecture: str) -> None:
    opened = models.load(folders[architecture])
    layers = decoder_layers(opened)
    some = sorted(name.rsplit(".", 1)[-1] for name in linear_maps(layers))[:1]
    for targets in ("auto", some):
        counted = adapter_size(layers, 4, targets)
        peft_model = wrapped(models.load(folders[architecture]), targets=targets)
        assert counted == sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    with pytest.raises(BadInput, match="nowhere is no linear map"):
        adapter_size(layers, 4, ["nowhere"])


def test_a_map_outside_the_layers_is_left_alone_even_if_its_name_ends_alike(
    folders: dict[str, Path],
) -> None:
    opened = models.load(folders["llama"])
    opened.vision = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})
    found = adapted(wrapped(opened))
    assert "vision.q_proj" not in found and len(found) == 14


def test_named_targets_alone_are_adapted(folders: dict[str, Path]) -> None:
    named = adapted(wrapped(models.load(folders["llama"]), targets=["q_proj", "mlp.up_proj"]))
    assert named == {
        f"model.layers.{layer}.{part}" for layer in range(2) for part in ("self_attn.q_proj", "mlp.up_proj")
    }


@pytest.mark.parametrize("target", ["c_attn", "lm_head", "embed_tokens", "proj", "input_layernorm"])
def test_a_target_that_is_no_linear_map_of_the_layers_is_refused(
    folders: dict[str, Path], target: str
) -> None:
    with pytest.raises(
        BadInput, match=rf"{target} is no linear map of this model, which has down_proj, gate"
    ):
        wrapped(models.load(folders["llama"]), targets=[target, "q_proj"])


def test_layers_without_a_linear_map_are_refused() -> None:
    with pytest.raises(BadInput, match="LoRA has nothing to adapt"):
        linear_names(nn.ModuleList([nn.LayerNorm(4), nn.Conv1d(4, 4, 3)]))


def test_experts_in_one_tensor_are_not_passed_over_in_silence() -> None:
    layer = nn.Module()
    layer.q_proj, layer.experts = nn.Linear(4, 4), nn.Parameter(torch.zeros(2, 4, 4))
    with pytest.raises(BadInput, match=r"but 0.experts cannot carry an adapter; name .* yourself: q_proj"):
        linear_names(nn.ModuleList([layer]))


def test_the_random_half_depends_on_the_seed_alone(folders: dict[str, Path]) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = wrapped(models.load(folders["llama"]), seed=3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    again = wrapped(models.load(folders["llama"]), seed=3).state_dict()
    other = wrapped(models.load(folders["llama"]), seed=4).state_dict()
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


# ---------------------------------------------------------------- quantized bases

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
"""The 16 levels of the QLoRA paper (arXiv 2305.14314, appendix E)."""


def nf4_by_hand(weight: Tensor) -> Tensor:
    """Blocks of 64 along the flattened weight: the nearest level times the largest value of the block."""
    blocks = weight.contiguous().reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    levels = torch.tensor(NF4)
    nearest = (blocks / largest).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return (levels[nearest] * largest).reshape(weight.shape)


def int8_by_hand(weight: Tensor) -> Tensor:
    """Each row over its largest value in 127 steps, from float16."""
    halved = weight.half().float()
    largest = halved.abs().amax(1, keepdim=True)
    return torch.round(halved * 127 / largest) * largest / 127


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("held_as", ["nf4", "int8"])
def test_dequantized_weights_follow_the_formula_of_their_format(
    folders: dict[str, Path], architecture: str, held_as: str
) -> None:
    full = dict(models.load(folders[architecture]).named_modules())
    found = dequantized(load_quantized(folders[architecture], held_as))
    where, parts = ARCHITECTURES[architecture]
    assert set(found) == {f"{where}.{layer}.{part}" for layer in range(2) for part in parts}
    for name, weight in found.items():
        module = full[name]
        turned = module.weight.T if isinstance(module, Conv1D) else module.weight
        by_hand = nf4_by_hand(turned) if held_as == "nf4" else int8_by_hand(turned)
        # A value halfway between two steps may go either way.
        off = (weight - by_hand).abs() > 1e-6 * by_hand.abs().max()
        assert off.float().mean() < 1e-3, name
        assert (weight - turned).abs().max() <= (0.16 if held_as == "nf4" else 0.005) * turned.abs().max()


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("held_as", ["nf4", "int8"])
def test_a_quantized_base_computes_with_its_dequantized_weights(
    folders: dict[str, Path], architecture: str, held_as: str
) -> None:
    quantized = load_quantized(folders[architecture], held_as)
    plain = expand(quantized, models.load(folders[architecture]))
    with torch.no_grad():
        expected = plain(input_ids=IDS).logits
        if held_as == "int8":  # as in training; in eval mode the input is rounded to 8 bits too
            rounded = quantized.eval()(input_ids=IDS).logits
            assert (rounded - expected).abs().max() < 0.1 * expected.abs().max()
            for module in quantized.modules():
                module.training = "Linear8bit" in type(module).__name__
        torch.testing.assert_close(quantized(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_expanding_into_another_model_is_refused(folders: dict[str, Path]) -> None:
    quantized = load_quantized(folders["llama"], "int8")
    with pytest.raises(ValueError, match=r"is no linear map of the full-precision model"):
        expand(quantized, models.load(folders["gpt2"]))


@pytest.mark.parametrize("held_as", ["nf4", "int8"])
def test_gradients_through_a_quantized_base_are_those_through_its_dequantized_weights(
    folders: dict[str, Path], held_as: str
) -> None:
    quantized = load_quantized(folders["llama"], held_as)
    plain = wrapped(expand(quantized, models.load(folders["llama"]))).train()
    held = wrapped(quantized, "qlora").train()
    give_b_values(plain)
    give_b_values(held)
    expected, found = gradients(plain), gradients(held)
    assert set(found) == set(expected) and len(found) == 28
    for name, gradient in found.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("held_as", ["nf4", "int8"])
def test_an_eval_pass_between_two_steps_changes_no_gradient(folders: dict[str, Path], held_as: str) -> None:
    # bitsandbytes repacks nf4 weights at the first eval pass on some CPUs, for a kernel without a backward.
    held = wrapped(load_quantized(folders["llama"], held_as), "qlora").train()
    give_b_values(held)
    before = gradients(held)
    with torch.no_grad():
        held.eval()(input_ids=IDS)
    after = gradients(held.train())
    for name, gradient in before.items():
        assert torch.equal(gradient, after[name]), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("held_as", ["nf4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_qlora_lowers_the_loss_and_leaves_its_base_as_it_was(
    folders: dict[str, Path], architecture: str, held_as: str, checkpointing: bool
) -> None:
    quantized = load_quantized(folders[architecture], held_as)
    before = {name: weight.clone() for name, weight in dequantized(quantized).items()}
    held = wrapped(quantized, "qlora").train()
    if checkpointing:
        held.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    trainable = [p for p in held.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = loss_of(held)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    after = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): weight
        for name, weight in dequantized(held).items()
    }
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


@pytest.mark.parametrize("held_as", [None, "nf4"])
def test_a_killed_run_continues_to_the_same_adapter(
    folders: dict[str, Path], tmp_path: Path, held_as: str | None
) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int, note: str) -> None:
        if done == 5:
            raise Killed

    def fresh() -> nn.Module:
        folder = folders["gpt2"]  # which has dropout, and so needs the random streams to be restored
        return wrapped(load_quantized(folder, held_as) if held_as else models.load(folder), dropout=0.1)

    def adapter_of(opened: nn.Module) -> list[Tensor]:
        return [p.detach() for name, p in opened.named_parameters() if "lora_" in name]

    blocks = np.random.default_rng(0).integers(3, 400, (32, 24)).astype(np.uint32)
    settings = TrainSettings(steps=6, lr=1e-2, batch=4, checkpoint_every=3)
    whole = fresh()
    fit(whole, blocks, settings, checkpoints=tmp_path / "whole")
    with pytest.raises(Killed):
        fit(fresh(), blocks, settings, checkpoints=tmp_path / "cut", progress=kill)
    continued = fresh()
    assert fit(continued, blocks, settings, checkpoints=tmp_path / "cut").resumed_from == 3
    pairs = list(zip(adapter_of(whole), adapter_of(continued), adapter_of(fresh()), strict=True))
    assert len(pairs) == 16
    assert all(torch.equal(a, b) for a, b, _ in pairs) and not all(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize(("field", "told"), [("alpha", "lora_alpha"), ("dropout", "lora_dropout")])
def test_an_adapter_with_another_alpha_or_dropout_is_another_run(
    folders: dict[str, Path], tmp_path: Path, field: str, told: str
) -> None:
    blocks = np.random.default_rng(0).integers(3, 400, (4, 24)).astype(np.uint32)
    settings = TrainSettings(steps=2, lr=1e-2, batch=2)
    given: dict[str, Any] = {"alpha": 8, "dropout": 0.1}
    fit(wrapped(models.load(folders["llama"]), **given), blocks, settings, checkpoints=tmp_path)
    other = given | {field: {"alpha": 64, "dropout": 0.5}[field]}
    said = rf"differs in adapter.default.{told} \({given[field]} there, {other[field]} here\);"
    with pytest.raises(BadInput, match=said):
        fit(wrapped(models.load(folders["llama"]), **other), blocks, settings, checkpoints=tmp_path)


@pytest.mark.parametrize("held_as", ["nf4", "int8"])
def test_the_scales_of_a_quantized_base_are_part_of_what_a_run_is(
    folders: dict[str, Path], held_as: str
) -> None:
    def identity(opened: nn.Module) -> dict[str, Any]:
        return run_identity(opened, np.zeros((1, 8), np.uint32), TrainSettings(steps=1, lr=1e-3))

    held = wrapped(load_quantized(folders["llama"], held_as))
    before = identity(held)
    loss_of(held.train())  # bitsandbytes moves the int8 scales about at the first pass
    assert identity(held) == before == identity(wrapped(load_quantized(folders["llama"], held_as)))
    module: Any = held.get_submodule("base_model.model.model.layers.0.mlp.up_proj.base_layer")
    scales = module.weight.quant_state.absmax if held_as == "nf4" else module.state.SCB
    scales.mul_(2)
    assert identity(held)["initial weights"] != before["initial weights"]


def test_what_a_run_is_does_not_depend_on_the_process(folders: dict[str, Path]) -> None:
    opened = models.load(folders["llama"])
    targets = linear_names(decoder_layers(opened))
    held: Any = wrapped(opened)
    held.peft_config["default"].base_model_name_or_path = "/somewhere/else"
    found = run_identity(held, np.zeros((1, 8), np.uint32), TrainSettings(steps=1, lr=1e-3))
    assert found["adapter.default.target_modules"] == sorted(targets)  # peft keeps a set
    told = json.dumps(found)
    assert "somewhere" not in told and str(folders["llama"]) not in told and "0x" not in told


# ---------------------------------------------------------------- noise


def test_importing_the_trainer_prints_nothing_of_bitsandbytes() -> None:
    script = (
        "import edgedisp.train.trainer, bitsandbytes, logging; print(logging.getLogger('bitsandbytes').level)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
    assert "gemm_4bit" not in done.stderr and "bitsandbytes" not in done.stderr


def test_the_two_lines_are_dropped_inside_the_block_alone(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    filters, note = copy.copy(logger.filters), "MatMul8bitLt: inputs will be cast from %s to float16"
    with quiet_bitsandbytes():
        logger.warning(note, "x")
        logger.warning("something else")
    logger.warning(note, "y")
    assert [record.getMessage() for record in caplog.records] == ["something else", note % "y"]
    assert logger.filters == filters
