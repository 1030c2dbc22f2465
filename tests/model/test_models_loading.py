"""Models opened and saved, and bases that must be refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_file import write_gguf
from local_hub import NOWHERE, serving
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from edgedisp.core.errors import BadInput
from edgedisp.data import synthetic_documents
from edgedisp.models import encode, load, load_tokenizer, load_weights, open_base, save, tiny_model
from edgedisp.recipe import Model

TEXTS = [document.text for document in synthetic_documents(120, seed=0)]
FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt2", "opt", "gpt_neox"]


@pytest.fixture
def llama(tiny_folder: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_folder["llama"], tmp_path / "model"))


def change(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes a key away."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def change_config(changes: dict[str, Any], folder: Path) -> None:
    change(folder / "config.json", **changes)


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("family", FAMILIES)
def test_load_gives_bit_for_bit_what_save_got(family: str, tiny_folder: dict[str, Path]) -> None:
    model, tokenizer = tiny_model(family, TEXTS, seed=0, context=256)
    loaded, again = load(tiny_folder[family]), load_tokenizer(tiny_folder[family])
    assert same_weights(model, loaded) and not loaded.training
    assert [encode(again, text) for text in TEXTS[:10]] == [encode(tokenizer, text) for text in TEXTS[:10]]
    for name in ("chat_template", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again, name) == getattr(tokenizer, name)


def test_a_saved_folder_is_plain_whole_and_holds_tied_weights_once(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    folder = tiny_folder["llama"]
    weights = load_weights(folder)
    assert "model.embed_tokens.weight" in weights and "lm_head.weight" not in weights
    everything = "".join(path.read_text() for path in folder.glob("*.json"))
    assert str(folder.parent) not in everything  # no path of this machine is shipped
    (tmp_path / "plain").touch()
    expected = (tmp_path / "plain").stat().st_mode  # safetensors itself writes for the owner alone
    assert {path.stat().st_mode for path in folder.iterdir()} == {expected}


def test_a_model_can_be_saved_over_the_folder_it_was_loaded_from(llama: Path) -> None:
    model = load(llama)  # its weights are still read from the file through memory
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    save(model, load_tokenizer(llama), llama)
    assert all(torch.equal(weight, expected[name]) for name, weight in load(llama).state_dict().items())


def test_loading_is_silent_and_the_settings_come_back(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(llama)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


def unused_biases(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    biases = {f"model.layers.{layer}.self_attn.q_proj.bias": torch.ones(64) for layer in range(2)}
    old_buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # harmless
    save_file(weights | biases | old_buffer, folder / "model.safetensors", {"format": "pt"})


def token_without_a_row(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)


def post_processor_without_a_row(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    start = TemplateProcessing("<tool> $A", None, [("<tool>", 4000)])
    tokenizer.backend_tokenizer.post_processor = start
    tokenizer.save_pretrained(folder)


def only_sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0epieces")
    change(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")


INDEX = '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'
TEMPLATE = "chat_template.jinja"


def only_an_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(INDEX)


BAD_FOLDERS: list[tuple[Callable[[Path], Any], str]] = [
    (lambda f: (f / "config.json").unlink(), "there is no config.json"),
    (lambda f: (f / "config.json").write_text('{"model_type": '), "config.json cannot be used"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "Pickled weights"),
    (lambda f: (f / "adapter_config.json").write_text("{}"), "holds a PEFT adapter: merge it"),
    (lambda f: os.truncate(f / "model.safetensors", 9000), "the weights cannot be opened"),
    (lambda f: [path.unlink() for path in f.glob("tokenizer*")], "no usable tokenizer"),
    (lambda f: (f / "model.safetensors.index.json").write_text(INDEX), "remove the one that is stale"),
    (only_an_index, "there is no model-00001-of-00002"),
    (unused_biases, r"2 weights in the files have no place .*: model.layers.0.self_attn.q_proj.bias"),
    (token_without_a_row, "1 tokens of the tokenizer have no row .* of 512 rows: <tool>"),
    (post_processor_without_a_row, "1 tokens of the tokenizer have no row .* of 512 rows: id 4000"),
    (lambda f: change(f / "generation_config.json", eos_token_id=[2, 512]), "eos_token_id is 512"),
    (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json: is no JSON"),
    (lambda f: os.truncate(f / "tokenizer.json", 3000), "no usable tokenizer.*Copy its files .* again"),
    (lambda f: change(f / "tokenizer.json", model=None), "no usable tokenizer: Model missing"),
    (only_sentencepiece, "tokenizer.model is a SentencePiece file, which takes `pip install sentencepiece"),
    (lambda f: os.truncate(f / TEMPLATE, 40), "its chat template cannot be used: "),
    (lambda f: os.truncate(f / TEMPLATE, 0), "its chat template shows nothing of a message"),
    (
        lambda f: (f / TEMPLATE).write_text("{{ messages[0].text.short }}"),
        "its chat template cannot be used: UndefinedError",
    ),
]
BAD_CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "not a causal .*: BertForMaskedLM"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal .*: LlamaForSequence"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already quantized \(gptq\)"),
    ({"num_hidden_layers": 1}, "9 weights in the files have no place in the model .*: model.layers.1.input"),
    ({"num_hidden_layers": 3}, "9 weights are not in the files: model.layers.2"),
    ({"intermediate_size": 256}, "6 weights have another shape: model.layers.0.mlp"),
    ({"pad_token_id": 512}, "config.json: pad_token_id is 512, and the embedding has the rows 0 to 511"),
    ({"pad_token_id": -1}, "config.json: pad_token_id is -1"),
    ({"sep_token_id": 512}, "config.json: sep_token_id is 512"),
    ({"bos_token_id": "0"}, "config.json cannot be used"),
]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [*BAD_FOLDERS, *((partial(change_config, changes), message) for changes, message in BAD_CONFIGS)],
)
def test_a_base_that_cannot_work_is_refused_with_the_reason(
    llama: Path, spoil: Callable[[Path], Any], message: str
) -> None:
    spoil(llama)
    with pytest.raises(BadInput, match=message) as problem:
        open_base(llama)
    assert str(problem.value).startswith(str(llama))


def test_choices_of_the_machine_that_saved_a_model_are_set_aside(
    llama: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected, text = load(llama), " ".join(TEXTS[:5])
    ids = encode(load_tokenizer(llama), text)
    change(llama / "config.json", _attn_implementation="flash_attention_2", dtype="bf16")
    change(llama / "config.json", output_attentions=True, return_dict=False, use_cache=False)
    truncation = {"direction": "Right", "max_length": 32, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 9000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "<|endoftext|>"}
    merges = json.loads((llama / "tokenizer.json").read_text())["model"] | {"dropout": 0.5}
    change(llama / "tokenizer.json", truncation=truncation, padding=padding, model=merges)
    model, tokenizer = open_base(llama)
    assert same_weights(model, expected) and model.config.use_cache
    assert model(torch.tensor([ids[:4]])).logits.shape[1] == 4
    assert encode(tokenizer, text) == ids
    assert "truncation and padding and dropout in tokenizer.json switched off" in capfd.readouterr().err
    save(model, tokenizer, llama)
    assert json.loads((llama / "tokenizer.json").read_text())["truncation"] is None
    assert load_tokenizer(llama) and not capfd.readouterr().err


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_rotary_positions_stand_under_their_names_of_transformers_4_too(
    family: str, tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoConfig

    model = load(tiny_folder[family])
    if family == "llama":
        rope = {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 4.0}
        model.config.rope_parameters = rope
    save(model, load_tokenizer(tiny_folder[family]), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    read = AutoConfig.from_pretrained(tmp_path).rope_parameters
    old = {key for key in config if key.startswith(("rope_", "rotary_", "partial_"))} - {"rope_parameters"}
    assert old and read == model.config.rope_parameters
    for unread in ({"rope_parameters"}, old):  # the old keys alone, and the new one alone, say the same
        change(tmp_path / "config.json", **(config | dict.fromkeys(unread)))
        assert AutoConfig.from_pretrained(tmp_path).rope_parameters == read


def test_a_separate_head_is_opened_although_the_configuration_calls_it_tied(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    assert torch.equal(load(llama).lm_head.weight, weights["lm_head.weight"])
    with pytest.raises(BadInput, match="the model's architecture is 'llama', the recipe says 'qwen3'"):
        open_base(llama, Model(base="llama", architecture="qwen3"))
    with pytest.raises(BadInput, match="no such model"):
        open_base(llama / "nothing")


def test_a_gguf_file_opens_in_float32_and_saves_as_a_plain_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = tiny_model("qwen2", TEXTS)
    save(model, tokenizer, tmp_path / "qwen2")
    write_gguf(tmp_path / "tiny.gguf", model, tmp_path / "qwen2" / "tokenizer.json")
    notes: list[str] = []
    section = Model(base="tiny.gguf", architecture="qwen2")
    opened, its_tokenizer = open_base(
        tmp_path / "tiny.gguf", section, lambda done, total, note: notes.append(note)
    )
    assert same_weights(opened, model)
    assert encode(its_tokenizer, TEXTS[0]) == encode(tokenizer, TEXTS[0])
    assert notes == [f"opening {tmp_path / 'tiny.gguf'}"]
    assert getattr(opened.config, "quantization_config", None) is None
    save(opened, its_tokenizer, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert same_weights(load(tmp_path / "plain"), model)
    assert capfd.readouterr() == ("", "")


def test_a_gguf_file_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("qwen2", TEXTS[:30])
    save(model, tokenizer, tmp_path / "qwen2")
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "tiny.gguf"
    write_gguf(path, model, tmp_path / "qwen2" / "tokenizer.json", family="nonsense")
    with pytest.raises(BadInput, match=r"tiny.gguf: .*architecture nonsense is not supported"):
        open_base(path)
    for content in (path.read_bytes()[:100_000], b"PK\x03\x04 something else"):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"tiny.gguf: the .* cannot be opened"):
            open_base(path)
    with pytest.raises(BadInput, match=r"no config.json. Did you mean .*tiny.gguf"):
        open_base(tmp_path / "folder")


@pytest.fixture
def at_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Point the hub's client at an address, with an empty cache of its own."""
    from huggingface_hub import constants

    from edgedisp.core.hub import unreachable

    def point(endpoint: str) -> None:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        unreachable.cache_clear()

    yield point
    unreachable.cache_clear()


def test_a_hub_model_is_fetched_once_and_without_its_pickles(
    tiny_folder: dict[str, Path],
    tmp_path: Path,
    at_hub: Callable[[str], None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(tiny_folder["qwen3"], tmp_path / "hub" / "models" / "some" / "tiny")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle that nobody asked for")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"nor this")
    steps: list[Any] = []
    with serving(tmp_path / "hub") as endpoint:
        at_hub(endpoint)
        model, _ = open_base("some/tiny", progress=lambda *step: steps.append(step))
        with pytest.raises(BadInput, match="some/tiny: the model has no revision 'v2'"):
            open_base("some/tiny", Model(base="some/tiny", revision="v2"))
    assert same_weights(model, load(tiny_folder["qwen3"]))
    assert steps[-2][0] >= (folder / "model.safetensors").stat().st_size
    assert [step[2] for step in steps[-2:]] == ["downloading some/tiny", "opening some/tiny"]
    assert capfd.readouterr() == ("", "")
    names = {path.name for path in (tmp_path / "home").rglob("*")}
    assert "model.safetensors" in names and not names & {"pytorch_model.bin", "onnx"}

    at_hub(NOWHERE)  # the hub is gone, the cache is not; that is said once
    assert same_weights(open_base("some/tiny")[0], model)
    assert capfd.readouterr().err.count("the hub cannot be reached") == 1
    open_base("some/tiny")
    assert capfd.readouterr().err == ""


def test_a_hub_model_that_cannot_be_opened_says_why(
    tiny_folder: dict[str, Path], tmp_path: Path, at_hub: Callable[[str], None]
) -> None:
    models = tmp_path / "hub" / "models" / "some"
    pickled = Path(shutil.copytree(tiny_folder["qwen3"], models / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (models / "nothing").mkdir()
    (models / "nothing" / "README.md").write_text("no model")
    with serving(tmp_path / "hub") as endpoint:
        at_hub(endpoint)
        for name, message in (
            ("some/pickled", "pickled.*: there is no model.safetensors"),
            ("some/nothing", r"nothing.*: not a model folder, there is no config\.json"),
            ("some/x", "some/x: the hub has no such model"),
            ("not/a/hub id", "the hub has no such model"),
        ):
            with pytest.raises(BadInput, match=message):
                open_base(name)
    assert not list((tmp_path / "home").rglob("*.bin"))
    at_hub(NOWHERE)
    with pytest.raises(BadInput, match=r"^Qwen/Qwen3-0.6B: the hub cannot be reached \(.*\.gguf file.*$"):
        open_base("Qwen/Qwen3-0.6B")
