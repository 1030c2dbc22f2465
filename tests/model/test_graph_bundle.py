"""What stands beside the graph, the fallback to the genai builder, and running a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graph_twins import FAMILIES, TEMPLATE, UNTIED, TwinStore, make, padded, ragged, torch_logits

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.graph import genai_config
from edgedisp.graph.export import export
from edgedisp.graph.session import HiddenStates, OnnxModel
from edgedisp.models import end_of_text_id, load_tokenizer


@pytest.fixture(scope="module")
def bundle(twins: TwinStore) -> Path:
    return twins.fp32("llama")


@pytest.fixture
def folder(twins: TwinStore, tmp_path: Path) -> Path:
    """A copy of the llama twin's model folder."""
    shutil.copytree(twins.model_dir("llama"), tmp_path / "model")
    return tmp_path / "model"


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**(read(path) if path.is_file() else {}), **values}))


def test_a_bundle_has_the_files_of_every_runtime(bundle: Path) -> None:
    graph = {"model.onnx", "model.onnx.data", "weight_map.json"}
    configs = {"genai_config.json", "config.json", "generation_config.json", "app.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {path.name for path in bundle.iterdir()} == graph | configs | tokenizer
    assert read(bundle / "genai_config.json")["model"]["eos_token_id"] == [0, 2]  # <|endoftext|>, <|im_end|>
    assert read(bundle / "tokenizer_config.json")["chat_template"] == TEMPLATE
    assert (bundle / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE


def test_ends_of_text_and_the_template_come_from_every_file(
    folder: Path, tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    (folder / "chat_template.jinja").unlink()
    change(folder / "generation_config.json", eos_token_id=[9, 4])
    assert genai_config.end_ids(folder) == [9, 4, 0]
    for path in tiny_folder.values():  # what separates documents in training ends an answer
        assert end_of_text_id(load_tokenizer(path)) in genai_config.end_ids(path)
    default = "D{{ messages[0]['content'] }}"
    templates = [{"name": "tools", "template": "T"}, {"name": "default", "template": default}]
    change(folder / "tokenizer_config.json", chat_template=templates)
    genai_config.copy_files(folder, tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == default
    assert read(tmp_path / "tokenizer_config.json")["chat_template"] == default


@pytest.mark.parametrize(("special", "ids"), [(True, [2, 0]), (False, [2])])
def test_a_chat_model_that_names_the_turns_end_alone_stops_at_the_end_of_a_text_too(
    special: bool, ids: list[int], folder: Path, tmp_path: Path
) -> None:
    # As SmolLM2-135M-Instruct does: 2 (<|im_end|>) in every file; its documents ended with 0 (<|endoftext|>).
    # A token that is text, as Gemma's </s>, ends nothing.
    (folder / "generation_config.json").unlink()
    change(folder / "generation_config.json", eos_token_id=2, pad_token_id=2)
    change(folder / "config.json", eos_token_id=2)
    change(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    tokenizer = read(folder / "tokenizer.json")
    tokenizer["added_tokens"][0]["special"] = special
    change(folder / "tokenizer.json", **tokenizer)
    genai_config.copy_files(folder, tmp_path)
    # transformers.js and optimum look here.
    assert read(tmp_path / "generation_config.json") == {"eos_token_id": ids, "pad_token_id": 2}


def test_the_genai_builder_covers_other_families(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = make(tmp_path / "model", "granite")
    capfd.readouterr()
    (tmp_path / "bundle").mkdir()
    record = export(tmp_path / "model", tmp_path / "bundle", threads=2)
    assert capfd.readouterr() == ("", "")
    assert record["exporter"] == "onnxruntime-genai"
    rows = ragged([30, 8])
    logits = OnnxModel(tmp_path / "bundle", 1)(*padded(rows))
    for row, ours in zip(rows, logits):
        np.testing.assert_allclose(ours[: len(row)], torch_logits(model, row), atol=1e-4, rtol=1e-4)
    graph = onnx.load(tmp_path / "bundle" / "model.onnx", load_external_data=False).graph
    caches = [value for value in graph.input if value.name.startswith("past_key_values.")]
    assert {value.type.tensor_type.shape.dim[3].dim_value for value in caches} == {16}
    settings = read(tmp_path / "bundle" / "genai_config.json")["model"]
    assert settings["decoder"]["session_options"]["intra_op_num_threads"] == 2
    assert settings["eos_token_id"] == [0, 2]  # the builder alone: 0
    for file in (tmp_path / "model").glob("*token*"):
        file.unlink()
    with pytest.raises(BuildFailed, match=r"could not write family 'granite': .*tokenizer"):
        export(tmp_path / "model", tmp_path / "bundle", threads=1)


def test_greedy_stops_with_the_stop_token_and_where_the_context_ends(bundle: Path) -> None:
    model, row = OnnxModel(bundle, 1), ragged([12], seed=5)[0]
    free = model.greedy(row, 20, frozenset())
    index = next(i for i, token in enumerate(free) if i > 2 and token not in free[:i])
    assert len(free) == 20
    assert model.greedy(row, 20, frozenset([free[index]])) == free[: index + 1]
    row = ragged([model.context - 3])[0]
    assert len(model.greedy(row, 20, frozenset())) == 3
    assert model.greedy([*row, 4, 4, 4], 20, frozenset()) == []
    for wrong in ([], [*row, 4, 4, 4, 4]):
        with pytest.raises(ValueError, match="context of 128"):
            model.greedy(wrong, 20, frozenset())


def test_batches_that_would_be_computed_wrong_are_refused(bundle: Path) -> None:
    model = OnnxModel(bundle, 1)
    for length, mask in ((3, [0, 1, 1]), (3, [1, 0, 1]), (3, [0, 0, 0]), (3, [1, 1]), (129, [1] * 129)):
        with pytest.raises(ValueError, match="padded on the right and within the context of 128"):
            model(np.full((1, length), 5), np.array([mask]))


def test_what_is_no_bundle_and_no_number_of_threads_is_refused(bundle: Path, tmp_path: Path) -> None:
    copied = tmp_path / "bundle"
    shutil.copytree(bundle, copied)
    genai_config.set_threads(copied, 5)
    settings = read(copied / "genai_config.json")["model"]["decoder"]["session_options"]
    assert settings["intra_op_num_threads"] == 5
    for use in (genai_config.set_threads, OnnxModel):
        with pytest.raises(BadInput, match="threads is 0; at least 1"):
            use(copied, 0)
        with pytest.raises(BadInput, match=r"genai_config\.json is missing"):
            use(tmp_path, 1)
    (copied / "model.onnx.data").unlink()
    with pytest.raises(BuildFailed, match="onnxruntime cannot open"):
        OnnxModel(copied, 1)


# Hidden states

STATE_FORMS = (
    *FAMILIES,
    UNTIED,
    "gemma3_text, capped logits, biases, long rope",
    "granite",
)  # the last: genai's
IDS = np.array(ragged([40])[0])


def torch_states(model: Any) -> list[np.ndarray]:
    with torch.no_grad():
        listed = model(torch.tensor(IDS)[None], output_hidden_states=True).hidden_states
    return [state[0].numpy() for state in listed]


@pytest.mark.parametrize("form", STATE_FORMS)
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
    with pytest.raises(BadInput, match=r"hidden states of 0 layers are found of 2"):
        HiddenStates(tmp_path, 1)
