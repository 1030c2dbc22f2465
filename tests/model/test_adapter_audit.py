"""The merge audit: its losses by hand, its rounding against the bundle, its choice by the written rule."""

from __future__ import annotations

import math
import re
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
from edgedisp.pipeline.build_plan import stages
from edgedisp.pipeline.options import MergeOptions
from edgedisp.pipeline.stage import Inputs, plain
from edgedisp.quantize.grid import Grid, dequantize, quantize
from edgedisp.recipe import Adapter, QuantizeBits, load
from edgedisp.train import lora
from edgedisp.train.lora import Base, attach, fingerprint, load_adapter, load_quantized, merge, save_adapter
from edgedisp.train.quantized_weights import Rounding, round_weights

BLOCKS = np.random.default_rng(0).integers(3, 400, (12, 24)).astype(np.int64)
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


# ---------------------------------------------------------------- losses and rounding


def test_block_losses_are_the_summed_cross_entropy(tiny_folder: dict[str, Path]) -> None:
    scored = models.load(tiny_folder["gpt2"]).train()  # its dropout must not matter
    np.testing.assert_allclose(lora.block_losses(scored, BLOCKS[:3]), block_losses(scored, BLOCKS[:3]), 1e-5)


# ---------------------------------------------------------------- the stage


def stage_folders(root: Path, base: Path, quantization: str | None, arm: str = "baseline") -> dict[str, Path]:
    """Finished folders of the stages that a merge reads: base, corpus, adapter."""
    folders = {"base": root / "base", "corpus": root / "corpus", "adapter": root / arm / "adapter"}
    if not (root / "corpus").exists():
        with stage_output(folders["base"], {}) as own:
            for path in base.iterdir():
                (own / path.name).write_bytes(path.read_bytes())
            finish(own, folders["base"], {}, {}, 0.0)
        with stage_output(folders["corpus"], {}) as own:
            np.save(own / "heldout.npy", BLOCKS.astype(np.uint32))
            finish(own, folders["corpus"], {}, {}, 0.0)
    over = load_quantized(base, quantization) if quantization else models.load(base)
    peft_model = attach(over, decoder_layers(over), Adapter(kind="lora", rank=4), seed=0)
    ids = torch.from_numpy(BLOCKS)
    optimizer = torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(6 if arm == "baseline" else 3):
        optimizer.zero_grad()
        peft_model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    with stage_output(folders["adapter"], {}) as own:
        save_adapter(peft_model, Base(str(base), fingerprint(models.load(base)), quantization), own)
        finish(own, folders["adapter"], {}, {"steps": 6, "weights_sha256": "abc"}, 0.0)
    return folders


def merge_stage(
    folders: dict[str, Path], chosen: Adapter, *, int4_ships: bool = True, decider: Path | None = None
) -> dict[str, Any]:
    out = folders["adapter"].parent / "model"
    with stage_output(out, {}) as own:
        inputs = {**folders, **({} if decider is None else {"decider": decider})}
        options = MergeOptions(chosen, INT4, int4_ships, 0)
        results = adapters.merge(options, Inputs(**inputs), own, silent)
        finish(own, out, {}, results, 0.0)
    return results


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_audit_holds_the_losses_of_models_made_by_hand(
    tiny_folder: dict[str, Path], tmp_path: Path, quantization: str | None
) -> None:
    base = tiny_folder["llama"]
    folders = stage_folders(tmp_path, base, quantization)
    chosen = Adapter(kind="qlora", base=quantization) if quantization else Adapter(kind="lora")  # type: ignore[arg-type]
    results = merge_stage(folders, chosen)
    over = load_quantized(base, quantization) if quantization else models.load(base)
    merges = {"full precision": merge(folders["adapter"], models.load(base))}
    if quantization:
        quantized = load_quantized(base, quantization)
        merges[f"dequantized {quantization}"] = merge(
            folders["adapter"], models.load(base), quantized=quantized
        )
    by_hand = {"no adapter": models.load(base), "adapter on": load_adapter(folders["adapter"], over)}
    by_hand |= {f"merged into {name}": made for name, made in merges.items()}
    expected = {name: block_losses(made, BLOCKS) for name, made in by_hand.items()}
    for name in ("no adapter", *(f"merged into {name}" for name in merges)):
        round_weights(by_hand[name], on_grid(4), on_grid(8))
        expected[f"{name}, int4"] = block_losses(by_hand[name], BLOCKS)
    again = merge(folders["adapter"], models.load(base))
    for parameter in again.parameters():
        parameter.data = parameter.data.bfloat16().float()
    expected["merged into full precision, bf16"] = block_losses(again, BLOCKS)

    found = results["merge_audit"]
    tokens = BLOCKS.shape[0] * (BLOCKS.shape[1] - 1)
    assert (found["tokens"], found["blocks"]) == (tokens, 12)
    rows = {row["name"]: row for row in found["rows"]}
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
    into = f"dequantized {quantization}" if found["chosen"] == "dequantized" else "full precision"
    for kind, suffix in (("fp32", ""), ("int4", ", int4")):
        gain = rows[f"merged into {into}{suffix}"]["loss"] - rows[f"no adapter{suffix}"]["loss"]
        assert found["gains"][kind]["difference"] == pytest.approx(gain)
    assert results["steps"] == 6 and results["adapter_sha256"] == "abc"
    assert results["weights_sha256"] != "abc"
    assert results["merged_into"].startswith("the full-precision" if found["chosen"] == "full" else "the deq")
    # What is left in the folder is the merged model that was chosen.
    kept = block_losses(models.load(tmp_path / "baseline" / "model"), BLOCKS)
    np.testing.assert_allclose(kept, expected[f"merged into {into}"], rtol=1e-5)


AUTO = Adapter(kind="qlora", base="nf4")
DECISIONS = {
    # difference, low, high -> chosen, the words
    "clearly better": ((-0.05, -0.06, -0.04), "dequantized", r"-0.0500 .* \[-0.0600, -0.0400\]: better"),
    "better within noise": ((-0.05, -0.12, 0.02), "full", "a tie, which goes to full precision"),
    "worse within noise": ((0.05, -0.02, 0.12), "full", "a tie, which goes to full precision"),
    "clearly worse": ((0.05, 0.04, 0.06), "full", "worse"),
    "one block": ((-0.5, None, None), "full", "without an interval .* a tie"),
}


@pytest.mark.parametrize("case", DECISIONS)
def test_the_dequantized_base_is_taken_only_if_it_is_better_beyond_noise(case: str) -> None:
    (difference, low, high), chosen, words = DECISIONS[case]
    decision = {"judged_by": "int4", "difference": difference, "low": low, "high": high}
    found = adapters.choose_base(AUTO, decision, None)
    assert found["chosen"] == chosen and found["warning"] is None
    assert re.search(words, found["why"]), found["why"]


@pytest.mark.parametrize(
    ("fixed", "interval", "warned"),
    [
        ("full", (-0.06, -0.04), True),
        ("full", (-0.06, 0.04), False),
        ("full", (0.04, 0.06), False),
        ("dequantized", (-0.06, -0.04), False),
        ("dequantized", (-0.06, 0.04), False),  # a tie speaks for neither
        ("dequantized", (0.04, 0.06), True),
    ],
)
def test_an_audit_that_clearly_speaks_for_the_other_base_is_reported(
    fixed: Any, interval: tuple[float, float], warned: bool
) -> None:
    low, high = interval
    decision = {"judged_by": "int4", "difference": (low + high) / 2, "low": low, "high": high}
    found = adapters.choose_base(AUTO.model_copy(update={"merge": fixed}), decision, None)
    assert found["chosen"] == fixed and (found["warning"] is not None) == warned


# ---------------------------------------------------------------- in a build

RECIPE = """\
name: tiny
model: {{base: base}}
data: {{train: [{{source: text.jsonl}}], context: 64}}
train: {{tokens: 2k, lr: 1e-3, adapter: {adapter}}}
"""


def keys(tmp_path: Path, adapter: str, *overrides: str) -> dict[str, Any]:
    """Stage name -> its options and inputs."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(adapter=adapter))
    (tmp_path / "text.jsonl").write_text('{"text": "A sentence."}\n')
    return {one.name: (plain(one.options), dict(one.inputs)) for one in stages(load(path, overrides), 1)}


def test_a_changed_grid_or_merge_merges_again_and_trains_nothing_again(tmp_path: Path) -> None:
    before = keys(tmp_path, "{kind: qlora}")
    for override in ("quantize.int4.group=64", "train.adapter.merge=full", "precisions=[fp32]"):
        after = keys(tmp_path, "{kind: qlora}", override)
        for arm in ("baseline", "dispersed"):
            assert after[f"{arm}/adapter"] == before[f"{arm}/adapter"]
            assert after[f"{arm}/model"] != before[f"{arm}/model"]
    after = keys(tmp_path, "{kind: qlora}", "quantize.int8.group=64")
    assert after["baseline/model"] == before["baseline/model"]


def test_the_other_arms_wait_for_the_baselines_audit_only_where_it_decides(tmp_path: Path) -> None:
    alone = {"base": "base", "corpus": "corpus", "adapter": "dispersed/adapter"}
    assert keys(tmp_path, "{kind: qlora}")["dispersed/model"][1] == {**alone, "decider": "baseline/model"}
    assert keys(tmp_path, "{kind: qlora, merge: full}")["dispersed/model"][1] == alone
    assert keys(tmp_path, "{kind: lora}")["dispersed/model"][1] == alone
    assert keys(tmp_path, "{kind: qlora}")["baseline/model"][1] == {**alone, "adapter": "baseline/adapter"}
    # The stage that decides comes first, also in a recipe that names it last.
    turned = list(keys(tmp_path, "{kind: qlora}", "arms=[dispersed, baseline]"))
    assert turned.index("baseline/model") < turned.index("dispersed/model")
