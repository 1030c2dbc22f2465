"""Training: the twin is fair, a resumed run is the same run, and accumulation is one big batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgedisp import BadInput
from edgedisp.dispersion.collect import Dispersion, decoder_layers
from edgedisp.train import adapter
from edgedisp.train.trainer import TrainSettings, fit, last_checkpoint

BLOCKS = np.random.default_rng(0).integers(3, 400, (64, 24)).astype(np.uint32)
ARCHITECTURES = ["llama", "qwen3", "gemma3_text", "gpt2"]


def open_tiny(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def trained(folder: Path, checkpoints: Path, penalty: Dispersion | None, **changes: object) -> torch.Tensor:
    settings = TrainSettings(**{"steps": 6, "lr": 1e-3, "batch": 4, **changes})  # type: ignore[arg-type]
    model = open_tiny(folder)
    fit(model, BLOCKS, settings, checkpoints=checkpoints, penalty=penalty)
    return flat(model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_weight_zero_gives_bit_identical_weights_to_dispersion_off(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str, precision: str
) -> None:
    # GPT-2 has dropout: it would see the difference if dispersion drew from the global random stream.
    folder = tiny_folder[architecture]
    off = trained(folder, tmp_path / "off", None, precision=precision)
    zero = trained(folder, tmp_path / "zero", Dispersion(weight=0.0, tokens=8), precision=precision)
    on = trained(folder, tmp_path / "on", Dispersion(weight=0.5, tokens=8), precision=precision)
    assert torch.equal(off, zero)
    assert not torch.equal(off, on)


def test_the_same_settings_give_the_same_weights(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    runs = [trained(tiny_folder["gpt2"], tmp_path / str(i), Dispersion(tokens=8)) for i in range(2)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_accumulated_micro_batches_are_one_big_batch(
    tiny_folder: dict[str, Path], tmp_path: Path, weight: float
) -> None:
    # One step of plain size: AdamW's first step hides the gradient's scale, the clipped norm shows it.
    norms, weights = [], []
    for batch, accumulate in ((8, 1), (2, 4)):
        settings = TrainSettings(
            steps=2, lr=1e-3, batch=batch, accumulate=accumulate, warmup=0, precision="fp32"
        )
        model = open_tiny(tiny_folder["llama"])
        folder = tmp_path / f"{batch}"
        done = fit(
            model, BLOCKS, settings, checkpoints=folder, penalty=Dispersion(weight=weight, tokens=None)
        )
        norms.append([(row["loss"], row["dispersion"], row["grad_norm"]) for row in done.log])
        weights.append(flat(model))
    np.testing.assert_allclose(norms[0], norms[1], rtol=2e-4)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-5)


def test_logged_loss_is_the_plain_cross_entropy(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    model = open_tiny(tiny_folder["llama"])
    ids = torch.from_numpy(BLOCKS[:4].astype(np.int64))
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    settings = TrainSettings(steps=1, lr=0.0, batch=4, warmup=0, precision="fp32")
    done = fit(model, BLOCKS, settings, checkpoints=tmp_path, penalty=Dispersion(weight=5.0))
    assert done.log[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_run_resumed_from_its_checkpoint_ends_with_the_same_weights(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int, note: str) -> None:
        if done == 5:
            raise Killed

    settings = TrainSettings(steps=8, lr=1e-3, batch=4, checkpoint_every=3)
    whole = open_tiny(tiny_folder["gpt2"])
    rows = fit(whole, BLOCKS, settings, checkpoints=tmp_path / "whole", penalty=Dispersion(tokens=8)).log
    with pytest.raises(Killed):
        fit(
            open_tiny(tiny_folder["gpt2"]),
            BLOCKS,
            settings,
            checkpoints=tmp_path / "cut",
            penalty=Dispersion(tokens=8),
            progress=kill,
        )
    found = last_checkpoint(tmp_path / "cut")
    assert found is not None and found.name == "checkpoint-3"
    model = open_tiny(tiny_folder["gpt2"])
    done = fit(model, BLOCKS, settings, checkpoints=tmp_path / "cut", penalty=Dispersion(tokens=8))
    assert done.resumed_from == 3
    assert torch.equal(flat(model), flat(whole))
    assert [row["loss"] for row in done.log] == [row["loss"] for row in rows]


def test_a_half_written_checkpoint_is_not_resumed_from(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) is None
    # Left in place it would also be taken for the newest one, and the good ones before it rotated away.
    trained(tiny_folder["llama"], tmp_path, None, steps=2)
    found = last_checkpoint(tmp_path)
    assert found is not None and found.name == "checkpoint-2"
    assert not (tmp_path / "checkpoint-4").exists()


def test_training_leaves_the_global_random_streams_as_they_were(
    tiny_folder: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    trained(tiny_folder["gpt2"], tmp_path, Dispersion(tokens=8), steps=1)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_too_few_blocks_are_refused(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    settings = TrainSettings(steps=100, lr=1e-3)
    with pytest.raises(ValueError, match="need 400 blocks of tokens, 64 were given"):
        fit(open_tiny(tiny_folder["llama"]), BLOCKS, settings, checkpoints=tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_targets_are_every_linear_map_of_attention_and_mlp(
    tiny_folder: dict[str, Path], architecture: str
) -> None:
    expected = {
        "gpt2": {"c_attn", "c_proj", "c_fc"},
        "other": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    }
    model = open_tiny(tiny_folder[architecture])
    names = adapter.linear_names(decoder_layers(model))
    assert set(names) == expected.get(architecture, expected["other"])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merged_weights_are_w_plus_the_scaled_product(
    tiny_folder: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    base = open_tiny(tiny_folder[architecture])
    settings = adapter.AdapterSettings("lora", rank=4, alpha=12)
    wrapped = adapter.attach(base, decoder_layers(base), settings, seed=0)
    steps = TrainSettings(steps=3, lr=1e-2, batch=4, precision="fp32")
    fit(wrapped, BLOCKS, steps, checkpoints=tmp_path / "c", penalty=Dispersion(weight=0.1, tokens=8))
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = torch.from_numpy(BLOCKS[:2].astype(np.int64))
    with torch.no_grad():
        with_adapter = wrapped.eval()(input_ids=ids).logits
        merged = adapter.merge(tmp_path / "adapter", open_tiny(tiny_folder[architecture])).eval()
        torch.testing.assert_close(merged(input_ids=ids).logits, with_adapter, rtol=1e-4, atol=1e-4)
    assert not torch.equal(flat(merged), flat(open_tiny(tiny_folder[architecture])))


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_qlora_trains_on_a_quantized_base(tiny_folder: dict[str, Path], tmp_path: Path, base: str) -> None:
    model = adapter.load_quantized(tiny_folder["llama"], base)
    settings = adapter.AdapterSettings("qlora", rank=4)
    wrapped = adapter.attach(model, decoder_layers(model), settings, seed=0)
    steps = TrainSettings(steps=8, lr=1e-2, batch=4, warmup=0)
    repeated = np.tile(BLOCKS[:4], (8, 1))
    done = fit(wrapped, repeated, steps, checkpoints=tmp_path, penalty=Dispersion(tokens=8))
    assert done.log[-1]["loss"] < done.log[0]["loss"]


def test_a_target_that_matches_nothing_is_refused(tiny_folder: dict[str, Path]) -> None:
    model = open_tiny(tiny_folder["llama"])
    settings = adapter.AdapterSettings("lora", targets=["c_attn", "q_proj"])
    with pytest.raises(BadInput, match="c_attn is no linear map of this model, which has down_proj"):
        adapter.attach(model, decoder_layers(model), settings, seed=0)
