"""The merge audit: its losses by hand, its rounding against the bundle, its choice by the written rule."""

from __future__ import annotations

import gc
import math
import shutil
from pathlib import Path

import graph_twins
import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from edgedisp import models
from edgedisp.core.progress import silent
from edgedisp.core.stage_folder import finish, stage_output
from edgedisp.graph.session import OnnxModel
from edgedisp.pipeline import adapters, bundles
from edgedisp.pipeline.options import BundleRounding, MergeOptions, QuantizeOptions
from edgedisp.pipeline.rounding import round_as_bundle
from edgedisp.pipeline.stage import Inputs
from edgedisp.quantize.grid import Grid, dequantize, quantize
from edgedisp.recipe import Adapter, QuantizeBits
from edgedisp.train.lora import attach, load_adapter, load_dequantized, load_quantized, merge, save_adapter
from edgedisp.train.quantized_weights import Rounding, round_weights

BLOCKS = np.random.default_rng(0).integers(3, 400, (12, 24)).astype(np.int64)
AUTO = Adapter(kind="qlora", base="nf4")
INT4 = QuantizeBits(group=32, symmetric=False, head_bits=8, accuracy_level=0)


def block_losses(scored: nn.Module, blocks: np.ndarray) -> list[float]:
    ids = torch.from_numpy(blocks)
    with torch.no_grad():
        log_p = scored.eval()(input_ids=ids).logits.double().log_softmax(dim=-1)
    losses: list[float] = (-log_p[:, :-1].gather(2, ids[:, 1:, None])).sum(dim=(1, 2)).tolist()
    return losses


def on_grid(bits: int) -> Rounding:
    grid = Grid(bits, 32, bits == 8)
    return lambda name, weight: dequantize(quantize(weight, grid), grid)


def models_in_memory() -> int:
    gc.collect()
    return sum(issubclass(type(each), PreTrainedModel) for each in gc.get_objects())


def stage_folders(root: Path, base: Path) -> dict[str, Path]:
    """Finished folders of the stages that a merge reads: base, corpus, an adapter over nf4."""
    folders = {name: root / name for name in ("base", "corpus", "adapter")}
    shutil.copytree(base, folders["base"])
    folders["corpus"].mkdir()
    np.save(folders["corpus"] / "heldout.npy", BLOCKS.astype(np.uint32))
    peft_model = attach(load_quantized(base, "nf4"), Adapter(kind="lora", rank=4), seed=0)
    ids = torch.from_numpy(BLOCKS)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(6):
        optimizer.zero_grad()
        peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with stage_output(folders["adapter"], {}) as output_dir:
        save_adapter(peft_model, str(base), None, output_dir)
        finish(output_dir, folders["adapter"], {}, {"steps": 6, "weights_sha256": "abc"}, 0.0)
    return folders


def test_the_audit_holds_the_losses_of_models_made_by_hand(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    base = tiny_folder["llama"]
    folders = stage_folders(tmp_path, base)
    output_dir = tmp_path / "merged"
    output_dir.mkdir()
    options = MergeOptions(AUTO, INT4, seed=0)
    in_memory: list[int] = []
    results = adapters.merge(
        options, Inputs(**folders), output_dir, lambda *_: in_memory.append(models_in_memory())
    )
    assert in_memory == [in_memory[0]] * 4  # before each model is opened, the last one is gone
    adapter = folders["adapter"]
    by_hand = {
        "no adapter": models.load(base),
        "adapter on": load_adapter(adapter, load_quantized(base, "nf4")),
        "merged into the full base": merge(adapter, models.load(base)),
        "merged into the dequantized base": merge(adapter, load_dequantized(base, "nf4")),
    }
    expected = {name: block_losses(model, BLOCKS) for name, model in by_hand.items()}
    for name in by_hand.keys() - {"adapter on"}:
        round_weights(by_hand[name], on_grid(4), on_grid(8))
        expected[f"{name}, int4"] = block_losses(by_hand[name], BLOCKS)
    again = merge(adapter, models.load(base))
    for parameter in again.parameters():
        parameter.data = parameter.data.bfloat16().float()
    expected["merged into the full base, bf16"] = block_losses(again, BLOCKS)

    audit = results["merge_audit"]
    tokens = BLOCKS.shape[0] * (BLOCKS.shape[1] - 1)
    assert audit["tokens"] == tokens
    rows = {row["name"]: row for row in audit["rows"]}
    assert set(rows) == set(expected)
    reference = np.array(expected["adapter on"])
    for name, losses in expected.items():
        row = rows[name]
        assert row["loss"] == pytest.approx(sum(losses) / tokens, rel=1e-5), name
        each = (np.array(losses) - reference) / (BLOCKS.shape[1] - 1)
        assert row["difference"] == pytest.approx(each.mean(), abs=1e-5), name
        # The bootstrap's interval against Student's, which holds for means of 12 alike blocks.
        half = 2.2 * each.std(ddof=1) / math.sqrt(12)
        assert row["low"] == pytest.approx(each.mean() - half, abs=0.5 * half + 1e-5), name
        assert row["high"] == pytest.approx(each.mean() + half, abs=0.5 * half + 1e-5), name
    assert rows["no adapter"]["low"] > 0  # the adapter was trained on these blocks
    merged = f"merged into the {audit['chosen']} base"
    for kind, suffix in (("fp32", ""), ("int4", ", int4")):
        gain = rows[f"{merged}{suffix}"]["loss"] - rows[f"no adapter{suffix}"]["loss"]
        assert audit["gains"][kind]["difference"] == pytest.approx(gain)
    assert results["steps"] == 6 and results["weights_sha256"] != "abc"
    # What is left in the folder is the merged model that was chosen.
    losses = block_losses(models.load(output_dir), BLOCKS)
    np.testing.assert_allclose(losses, expected[merged], rtol=1e-5)


@pytest.mark.parametrize("form", [graph_twins.UNTIED, "gpt2"])
@pytest.mark.parametrize(("method", "head_bits"), [("rtn", 8), ("k_quant", 4), ("gptq", 8), ("gptq", 4)])
def test_the_audit_rounds_as_the_bundle_is_rounded(
    method: str, head_bits: int, form: str, twins: graph_twins.TwinStore, tmp_path: Path
) -> None:
    options = {"method": method, "head_bits": head_bits, "group": 16, "accuracy_level": 0}
    rounding = BundleRounding(4, QuantizeBits(**options, calibration_tokens=256))
    inputs, output_dir = {"bundle": twins.fp32(form)}, tmp_path / "int4"
    if method == "gptq":
        inputs |= {"model": twins.model_dir(form), "corpus": tmp_path}
    output_dir.mkdir()
    np.save(tmp_path / "tokens.npy", BLOCKS.astype(np.uint32) % graph_twins.VOCABULARY)
    bundles.quantize(QuantizeOptions(rounding), Inputs(**inputs), output_dir, silent)
    model, ids = twins.model(form), BLOCKS[:2] % graph_twins.VOCABULARY
    round_as_bundle(rounding, model, tmp_path)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(OnnxModel(output_dir, 1)(ids, np.ones_like(ids)), expected, atol=2e-3)


@pytest.mark.parametrize(
    ("merge_into", "low", "high", "base", "is_reported"),
    [
        ("auto", -0.06, -0.04, "dequantized", False),
        ("auto", -0.12, 0.02, "full", False),
        ("auto", 0.04, 0.06, "full", False),
        ("auto", None, None, "full", False),  # one block
        ("full", -0.06, -0.04, "full", True),
        ("full", -0.06, 0.04, "full", False),
        ("dequantized", -0.06, 0.04, "dequantized", False),  # a tie speaks for neither
        ("dequantized", 0.04, 0.06, "dequantized", True),
    ],
)
def test_the_dequantized_base_is_taken_if_it_is_better_beyond_noise_or_the_recipe_says_so(
    merge_into: str, low: float | None, high: float | None, base: str, is_reported: bool
) -> None:
    adapter = AUTO.model_copy(update={"merge": merge_into})
    result = adapters.choose_base(adapter, {"difference": -0.05, "low": low, "high": high}, None)
    assert result["chosen"] == base and (result["warning"] is not None) == is_reported
