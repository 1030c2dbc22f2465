"""The check passes what works and names what does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph_twins import TEXTS, TwinStore, ragged
from onnx import helper

from edgedisp.core.errors import BuildFailed
from edgedisp.graph.session import OnnxModel
from edgedisp.graph.verify import CONVERSATION, check_bundle, relative_difference
from edgedisp.models import chat_template, load_tokenizer

PROMPTS = ragged([30, 7, 18])


@pytest.fixture(scope="module")
def bundle(twins: TwinStore) -> Path:
    return twins.fp32("gpt2")  # its positions depend on the mask, too


def test_a_good_bundle_passes_with_its_facts(bundle: Path, twins: TwinStore) -> None:
    record = check_bundle(OnnxModel(bundle, 1), PROMPTS, texts=TEXTS)
    assert record["difference_limit"] == 1e-3
    assert max(record["padded_difference"], record["cached_difference"]) < 1e-5
    ids = load_tokenizer(bundle).apply_chat_template(CONVERSATION, add_generation_prompt=True)["input_ids"]
    chat = {"chat": f"{len(ids)}/{len(ids)}", "example": "22/22", "chat_template": "as transformers"}
    assert record["genai"] == {"opened": True, "greedy_agrees": "3/3", "tokenizer_agrees": "4/4", **chat}
    assert json.loads(json.dumps(record)) == record
    pad = json.loads((bundle / "genai_config.json").read_text())["model"]["pad_token_id"]
    ended = check_bundle(OnnxModel(bundle, 1), [[*prompt, pad] for prompt in PROMPTS], texts=TEXTS)
    assert ended["genai"] == record["genai"], "genai masks a pad token at the end of a prompt"
    assert check_bundle(OnnxModel(twins.quantized("gpt2", 4), 1), PROMPTS)["difference_limit"] == 0.2


def cache_off_by_one(graph: Any) -> None:
    less = helper.make_node("Sub", ["cached_or_negative", "index_1"], ["one_less"])
    index = next(i for i, node in enumerate(graph.node) if node.output[0] == "cached_tokens")
    graph.node[index].input[0] = "one_less"  # positions while decoding, never below 0 in a prefill
    graph.node.insert(index, less)


def leaking_padding(graph: Any) -> None:
    next(node for node in graph.node if node.op_type == "FusedMatMul").input[0] = "leaked"
    mean = helper.make_node("ReduceMean", ["model.norm"], ["leaked_mean"], keepdims=1)  # over all rows
    for node in (mean, helper.make_node("Add", ["model.norm", "leaked_mean"], ["leaked"])):
        graph.node.insert(len(graph.node) - 1, node)


@pytest.mark.parametrize(("change", "message"), [
    (cache_off_by_one, "logits of cached and full rows disagree"),
    (leaking_padding, "logits of a right-padded batch and single rows disagree"),
])  # fmt: skip
def test_a_graph_that_is_wrong_fails(change: Any, message: str, bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    change(model.graph)
    (tmp_path / "bundle" / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BuildFailed, match=message):
        check_bundle(OnnxModel(tmp_path / "bundle", 1), PROMPTS)


def test_files_that_genai_reads_otherwise_fail_with_its_reason(bundle: Path, tmp_path: Path) -> None:
    copied = tmp_path / "bundle"
    shutil.copytree(bundle, copied)
    # genai does not know this normalizer's rule and goes on without it.
    rule = {"type": "Replace", "pattern": {"String": "o"}, "content": "0"}
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    (copied / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": rule}))
    with pytest.raises(BuildFailed, match="tokenizer gives other ids"):
        check_bundle(OnnxModel(copied, 1), PROMPTS, texts=TEXTS)
    with pytest.raises(BuildFailed, match=r"for a conversation: token \d+ of \d+ is \d+ '.+', not \d+ '"):
        check_bundle(OnnxModel(copied, 1), PROMPTS)
    path = copied / "genai_config.json"
    path.write_text(path.read_text().replace('"type": "decoder"', '"type": "made_up"'))
    with pytest.raises(BuildFailed, match=r"onnxruntime-genai cannot open it: .*made_up"):
        check_bundle(OnnxModel(copied, 1), PROMPTS)


def test_the_record_says_how_a_conversation_reaches_the_model(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "bundle"
    shutil.copytree(bundle, copied)
    (copied / "app.json").unlink()

    path = copied / "tokenizer_config.json"

    def genai(template: str) -> Any:
        (copied / "chat_template.jinja").write_text(template)  # transformers reads this, genai the settings
        settings = {**json.loads(path.read_text()), "chat_template": template}
        path.write_text(json.dumps(settings))
        return check_bundle(OnnxModel(copied, 1), PROMPTS)["genai"]

    assert genai("{{ messages[0]['content'] }}")["chat_template"] == "as transformers"
    # genai leaves the line ends and blanks around a template's blocks, which transformers takes away.
    record = genai("{% for m in messages %}\n  {% if true %}\n{{ m['content'] }}{% endif %}\n{% endfor %}")
    assert record["chat"].split("/")[0] == record["chat"].split("/")[1]
    assert record["chat_template"].startswith("other text than transformers")
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    record = genai("{{ messages[0].content }}" + "{{ 1 }}" * 4000)  # its parser takes ten times as long
    tokens = record["chat"].split("/")
    assert tokens[0] == tokens[1] and int(tokens[0]) > 4000 and "or none" in record["chat_template"]
    assert "no system" in genai("{{ raise_exception('no system') }}")["chat"]
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings))
    (copied / "chat_template.jinja").unlink()
    assert "no chat template" in check_bundle(OnnxModel(copied, 1), PROMPTS)["genai"]["chat"]


def test_another_template_than_in_training_fails_with_the_first_token(bundle: Path, tmp_path: Path) -> None:
    copied = tmp_path / "bundle"
    shutil.copytree(bundle, copied)
    (copied / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|im_end|>")
    with pytest.raises(BuildFailed, match=r"the example in app.json: token 1 of 22 is 42 'H', not 1 '<\|im"):
        check_bundle(OnnxModel(copied, 1), PROMPTS)


def test_the_relative_difference_is_the_worst_row_and_blind_to_a_shift() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(3, 50)).astype(np.float32)
    assert relative_difference(reference + 7, reference) < 1e-6
    changed, noise = reference.copy(), rng.normal(size=50)
    noise, centred = noise - noise.mean(), reference[1] - reference[1].mean()
    changed[1] += noise * 0.25 * np.sqrt((centred**2).mean() / (noise**2).mean())
    assert relative_difference(changed, reference) == pytest.approx(0.25, rel=1e-4)
