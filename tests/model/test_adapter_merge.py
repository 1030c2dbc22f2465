"""Adapters on disk: plain PEFT folders that know their base; merged weights follow the formula."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from edgedisp import models
from edgedisp.core.errors import BadInput
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.train.adapter import AdapterSettings, attach
from edgedisp.train.merge import MARK, WEIGHTS, Base, fingerprint, merge, save
from edgedisp.train.quantized import dequantized, load_quantized

IDS = torch.randint(3, 400, (2, 24), generator=torch.Generator().manual_seed(0))


def trained(folder: Path, out: Path, held_as: str | None = None, **changes: object) -> nn.Module:
    """An adapter with weights in both halves, written to `out`; returns the model that carries it."""
    opened = load_quantized(folder, held_as) if held_as else models.load(folder)
    settings = AdapterSettings("lora", **{"rank": 4, "alpha": 12, **changes})  # type: ignore[arg-type]
    peft_model = attach(opened, decoder_layers(opened), settings, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    save(peft_model, Base(str(folder), fingerprint(models.load(folder)), held_as), out)
    return peft_model.eval()


def logits(opened: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = opened.eval()(input_ids=IDS).logits
    return found


# ---------------------------------------------------------------- the folder


@pytest.mark.parametrize("held_as", [None, "nf4", "int8"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_peft_alone_opens_the_folder_and_computes_the_same(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str, held_as: str | None
) -> None:
    expected = logits(trained(tiny_folder[architecture], tmp_path / "adapter", held_as))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    base = (
        load_quantized(tiny_folder[architecture], held_as)
        if held_as
        else AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    )
    found = logits(PeftModel.from_pretrained(base, tmp_path / "adapter"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_folder_names_its_base(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    opened = models.load(tiny_folder["llama"])
    sha256 = fingerprint(opened)
    peft_model = attach(opened, decoder_layers(opened), AdapterSettings("lora", rank=2), seed=0)
    save(peft_model, Base("some/model", sha256, "nf4", "v1"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "edgedisp.json",
    ]  # fmt: skip
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/model" and config["revision"] == "v1"
    assert config["target_modules"] == sorted(config["target_modules"]) and config["inference_mode"]
    mark = json.loads((tmp_path / MARK).read_text())
    assert (mark["name"], mark["sha256"], mark["held_as"]) == ("some/model", sha256, "nf4")
    card = (tmp_path / "README.md").read_text()
    assert 'base_model: "some/model"' in card and sha256 in card and "held as nf4" in card


def test_the_fingerprint_is_of_the_values_and_not_of_the_files(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    opened = models.load(tiny_folder["gpt2"])
    found = fingerprint(opened)
    opened.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert fingerprint(models.load(tmp_path)) == found
    rounded = opened.bfloat16()
    in_bfloat16 = fingerprint(rounded)
    assert in_bfloat16 != found and fingerprint(rounded.float()) == in_bfloat16
    with torch.no_grad():
        rounded.transformer.ln_f.bias[0] += 1e-3
    assert fingerprint(rounded) != in_bfloat16


# ---------------------------------------------------------------- the formula


def expected_weights(folder: Path, adapter: Path, held_as: str | None) -> dict[str, Tensor]:
    """W + (alpha / rank) B A, from the files alone; W dequantized where the base was quantized."""
    base = models.load(folder)
    config = json.loads((adapter / "adapter_config.json").read_text())
    halves = load_file(adapter / WEIGHTS)
    over = dequantized(load_quantized(folder, held_as)) if held_as else {}
    expected = {name: weight.clone() for name, weight in base.state_dict().items()}
    for name, module in base.named_modules():
        a = halves.get(f"base_model.model.{name}.lora_A.weight")
        if a is None:
            continue
        b = halves[f"base_model.model.{name}.lora_B.weight"]
        turned = isinstance(module, Conv1D)
        w = over.get(name, module.weight.T if turned else module.weight).detach()
        new = w + config["lora_alpha"] / config["r"] * (b @ a)
        expected[f"{name}.weight"] = new.T if turned else new
    return expected


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("held_as", [None, "nf4", "int8"])
def test_merged_weights_are_w_plus_the_scaled_product(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str, held_as: str | None
) -> None:
    folder = tiny_folder[architecture]
    trained(folder, tmp_path, held_as)
    bases = {None: None} | ({held_as: load_quantized(folder, held_as)} if held_as else {})
    for into, quantized in bases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merged = merge(tmp_path, models.load(folder), quantized=quantized)
        expected = expected_weights(folder, tmp_path, into)
        found = merged.state_dict()
        assert set(found) == set(expected)
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6, msg=f"{name} into {into}")
    assert any(
        not torch.equal(found[name], weight) for name, weight in models.load(folder).state_dict().items()
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_merged_model_computes_what_its_adapter_did(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    folder = tiny_folder[architecture]
    on = logits(trained(folder, tmp_path / "lora"))
    merged = merge(tmp_path / "lora", models.load(folder))
    torch.testing.assert_close(logits(merged), on, rtol=1e-4, atol=1e-4)
    over_nf4 = logits(trained(folder, tmp_path / "qlora", "nf4"))
    merged = merge(tmp_path / "qlora", models.load(folder), quantized=load_quantized(folder, "nf4"))
    torch.testing.assert_close(logits(merged), over_nf4, rtol=1e-4, atol=1e-4)
    into_full = logits(merge(tmp_path / "qlora", models.load(folder)))
    assert (into_full - over_nf4).abs().max() > 1e-2  # the two bases are not the same


def test_merging_leaves_the_random_stream_as_it_was(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    trained(tiny_folder["llama"], tmp_path)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    merge(tmp_path, models.load(tiny_folder["llama"]))
    assert torch.equal(torch.random.get_rng_state(), before)


# ---------------------------------------------------------------- refusals


def test_another_base_is_refused(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    trained(tiny_folder["llama"], tmp_path)
    other = models.load(tiny_folder["llama"])
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    sha256 = fingerprint(models.load(tiny_folder["llama"]))[:12]
    said = (
        rf"trained on another base: on {tiny_folder['llama']}, whose weights have the fingerprint {sha256}; "
        rf"these have {fingerprint(other)[:12]}. Give the base that it was trained on"
    )
    with pytest.raises(BadInput, match=said):
        merge(tmp_path, other)


def rename(adapter: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    (adapter / MARK).unlink(missing_ok=True)  # as if it came from elsewhere: names and shapes must tell
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)


def configured(**changes: object) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


UP = "base_model.model.model.layers.0.mlp.up_proj"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "deeper model": (
        lambda at: rename(at, lambda w: {n.replace("layers.1", "layers.7"): t for n, t in w.items()}),
        r"7 adapted modules are not in this base: model.layers.7.mlp.down_proj, .* \.\.\.",
    ),
    "wider input": (
        lambda at: rename(at, lambda w: w | {f"{UP}.lora_A.weight": torch.zeros(4, 96)}),
        r"1 weights do not fit this base: model.layers.0.mlp.up_proj.lora_A is \[4, 96\], .* width is 64",
    ),
    "wider output": (
        lambda at: rename(at, lambda w: w | {f"{UP}.lora_B.weight": torch.zeros(96, 4)}),
        r"model.layers.0.mlp.up_proj.lora_B is \[96, 4\], the base's width is 128",
    ),
    "half": (
        lambda at: rename(at, lambda w: {n: t for n, t in w.items() if n != f"{UP}.lora_B.weight"}),
        r"1 adapted modules have half of their weights: model.layers.0.mlp.up_proj",
    ),
    "incomplete": (
        lambda at: rename(at, lambda w: {n: t for n, t in w.items() if UP not in n}),
        r"names 14 modules, .* holds nothing for 1 of them: model.layers.0.mlp.up_proj",
    ),
    "no linear map": (
        lambda at: rename(
            at, lambda w: {n.replace("mlp.up_proj", "input_layernorm"): t for n, t in w.items()}
        ),
        r"4 weights do not fit this base: model.layers.0.input_layernorm.lora_A is \[4, 64\], .* is None",
    ),
    "other weights": (
        lambda at: rename(at, lambda w: w | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}),
        r"holds other weights than LoRA's: base_model.model.lm_head.weight",
    ),
    "another rank": (
        configured(r=8),
        "adapter_config.json and adapter_model.safetensors do not fit: .*mismatch",
    ),
    "fewer layers": (
        configured(layers_to_transform=[0]),
        r"holds weights for 14 modules, .* leaves out 7 of them: model.layers.1.mlp.down_proj, ",
    ),
    "excluded modules": (
        configured(exclude_modules=["layers.1.mlp.up_proj"]),
        r"holds weights for 14 modules, .* leaves out 1 of them: model.layers.1.mlp.up_proj",
    ),
    "DoRA": (configured(use_dora=True), r"config.json: use_dora is true; only plain LoRA"),
    "an empty variant": (configured(kasa_config={}), r"config.json: kasa_config is {}; only plain LoRA"),
    "rank in words": (
        configured(r="x"),
        r'config.json: r is "x", but has to be a whole number of at least 1',
    ),
    "rank 0": (configured(r=0), r"config.json: r is 0, but has to be a whole number of at least 1"),
    "alpha in words": (configured(lora_alpha="x"), r'config.json: lora_alpha is "x", but has to be a number'),
    "alpha without a value": (configured(lora_alpha=math.nan), r"config.json: lora_alpha is NaN, but has to"),
    "targets in numbers": (
        configured(target_modules=5),
        r"config.json: target_modules is 5, but has to be a list",
    ),
    "ranks in words": (
        configured(rank_pattern={"up_proj": "x"}),
        r"config.json: rank_pattern is {.*}, but has",
    ),
    "half a pattern": (configured(target_modules="("), r"do not fit: missing \)"),
    "a field of the wrong kind": (configured(bias=5), r"adapter_config.json and .* do not fit: 'int' object"),
    "damaged weights": (
        lambda at: (at / WEIGHTS).write_bytes(b"not safetensors") and None,
        "adapter_model.safetensors: cannot be opened",
    ),
    "damaged mark": (lambda at: (at / MARK).write_text("{") and None, "edgedisp.json: is damaged"),
    "another kind": (
        lambda at: (at / "adapter_config.json").write_text('{"peft_type": "IA3"}') and None,
        "an adapter of the kind IA3; only LORA can be merged here",
    ),
    "no folder": (lambda at: (at / "adapter_config.json").unlink(), "there is no adapter_config.json"),
    "pickle": (
        lambda at: (at / WEIGHTS).rename(at / "adapter_model.bin") and None,
        "there is no adapter_model.safetensors .adapter_model.bin is a pickle",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    tiny_folder: dict[str, Path], tmp_path: Path, case: str
) -> None:
    trained(tiny_folder["llama"], tmp_path)
    damage, said = DAMAGE[case]
    damage(tmp_path)
    with pytest.raises(BadInput, match=said):
        merge(tmp_path, models.load(tiny_folder["llama"]))


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapted_head_is_merged_unless_it_is_tied_to_the_embedding(tmp_path: Path, tied: bool) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=400, tie_word_embeddings=tied, **sizes)).eval()
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "lm_head"])
    adapted = get_peft_model(copy.deepcopy(base), config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    if tied:
        said = "lm_head is adapted, but in this base model.embed_tokens and lm_head are one weight"
        with pytest.raises(BadInput, match=said):
            merge(tmp_path, base)
    else:
        torch.testing.assert_close(logits(merge(tmp_path, base)), logits(adapted), rtol=1e-4, atol=1e-4)


def test_a_folder_from_elsewhere_without_our_mark_is_merged(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    on = logits(trained(tiny_folder["llama"], tmp_path))
    (tmp_path / MARK).unlink()
    torch.testing.assert_close(
        logits(merge(tmp_path, models.load(tiny_folder["llama"]))), on, rtol=1e-4, atol=1e-4
    )
