"""The merge audit: its losses by hand, its rounding against the bundle, its choice by the written rule."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgedisp import models
from edgedisp.core.progress import silent
from edgedisp.core.stage_folder import finish, stage_output
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.pipeline import adapters
from edgedisp.pipeline.options import MergeOptions
from edgedisp.pipeline.stage import Inputs
from edgedisp.quantize.grid import Grid, dequantize, quantize
from edgedisp.recipe import Adapter, QuantizeBits
from edgedisp.train import lora
from edgedisp.train.lora import Base, attach, fingerprint, load_adapter, load_quantized, merge, save_adapter
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
    grid = Grid(bits, 32, False)
    return lambda name, weight: dequantize(quantize(weight, grid), grid)


def test_block_losses_are_the_summed_cross_entropy(tiny_folder: dict[str, Path]) -> None:
    scored = models.load(tiny_folder["gpt2"]).train()  # its dropout must not matter
    np.testing.assert_allclose(lora.block_losses(scored, BLOCKS[:3]), block_losses(scored, BLOCKS[:3]), 1e-5)


def stage_folders(root: Path, base: Path) -> dict[str, Path]:
    """Finished folders of the stages that a merge reads: base, corpus, an adapter over nf4."""
    folders = {name: root / name for name in ("base", "corpus", "adapter")}
    shutil.copytree(base, folders["base"])
    folders["corpus"].mkdir()
    np.save(folders["corpus"] / "heldout.npy", BLOCKS.astype(np.uint32))
    over = load_quantized(base, "nf4")
    peft_model = attach(over, decoder_layers(over), Adapter(kind="lora", rank=4), seed=0)
    ids = torch.from_numpy(BLOCKS)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(6):
        optimizer.zero_grad()
        peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with stage_output(folders["adapter"], {}) as own:
        save_adapter(peft_model, Base(str(base), fingerprint(models.load(base)), "nf4"), own)
        finish(own, folders["adapter"], {}, {"steps": 6, "weights_sha256": "abc"}, 0.0)
    return folders


def test_the_audit_holds_the_losses_of_models_made_by_hand(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    base = tiny_folder["llama"]
    folders = stage_folders(tmp_path, base)
    output_dir = tmp_path / "merged"
    output_dir.mkdir()
    options = MergeOptions(AUTO, INT4, int4_ships=True, seed=0)
    results = adapters.merge(options, Inputs(**folders), output_dir, silent)
    adapter, quantized = folders["adapter"], load_quantized(base, "nf4")
    by_hand = {
        "no adapter": models.load(base),
        "adapter on": load_adapter(adapter, load_quantized(base, "nf4")),
        "merged into full precision": merge(adapter, models.load(base)),
        "merged into dequantized nf4": merge(adapter, models.load(base), quantized=quantized),
    }
    expected = {name: block_losses(model, BLOCKS) for name, model in by_hand.items()}
    for name in by_hand.keys() - {"adapter on"}:
        round_weights(by_hand[name], on_grid(4), on_grid(8))
        expected[f"{name}, int4"] = block_losses(by_hand[name], BLOCKS)
    again = merge(adapter, models.load(base))
    for parameter in again.parameters():
        parameter.data = parameter.data.bfloat16().float()
    expected["merged into full precision, bf16"] = block_losses(again, BLOCKS)

    audit = results["merge_audit"]
    tokens = BLOCKS.shape[0] * (BLOCKS.shape[1] - 1)
    assert (audit["tokens"], audit["blocks"]) == (tokens, 12)
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
    into = "dequantized nf4" if audit["chosen"] == "dequantized" else "full precision"
    for kind, suffix in (("fp32", ""), ("int4", ", int4")):
        gain = rows[f"merged into {into}{suffix}"]["loss"] - rows[f"no adapter{suffix}"]["loss"]
        assert audit["gains"][kind]["difference"] == pytest.approx(gain)
    assert results["steps"] == 6 and results["adapter_sha256"] == "abc"
    assert results["weights_sha256"] != "abc"
    assert results["merged_into"].startswith("the full-precision" if audit["chosen"] == "full" else "the deq")
    # What is left in the folder is the merged model that was chosen.
    losses = block_losses(models.load(output_dir), BLOCKS)
    np.testing.assert_allclose(losses, expected[f"merged into {into}"], rtol=1e-5)


def choice(adapter: Adapter, value: float, low: float | None, high: float | None) -> dict[str, Any]:
    decision = {"judged_by": "int4", "difference": value, "low": low, "high": high}
    return adapters.choose_base(adapter, decision, None)


def test_the_dequantized_base_is_taken_only_if_it_is_better_beyond_noise() -> None:
    for interval, chosen, words in (
        ((-0.05, -0.06, -0.04), "dequantized", r"-0.0500 .* \[-0.0600, -0.0400\]: better"),
        ((-0.05, -0.12, 0.02), "full", "a tie, which goes to full precision"),
        ((0.05, -0.02, 0.12), "full", "a tie, which goes to full precision"),
        ((0.05, 0.04, 0.06), "full", "worse"),
        ((-0.5, None, None), "full", "without an interval .* a tie"),  # one block
    ):
        result = choice(AUTO, *interval)
        assert result["chosen"] == chosen and result["warning"] is None
        assert re.search(words, result["why"]), result["why"]


def test_an_audit_that_clearly_speaks_for_the_other_base_is_reported() -> None:
    for merge_into, low, high, is_reported in (
        ("full", -0.06, -0.04, True),
        ("full", -0.06, 0.04, False),
        ("full", 0.04, 0.06, False),
        ("dequantized", -0.06, -0.04, False),
        ("dequantized", -0.06, 0.04, False),  # a tie speaks for neither
        ("dequantized", 0.04, 0.06, True),
    ):
        adapter = AUTO.model_copy(update={"merge": merge_into})
        result = choice(adapter, (low + high) / 2, low, high)
        assert result["chosen"] == merge_into and (result["warning"] is not None) == is_reported
