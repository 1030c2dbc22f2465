"""Training speed against the plain transformers Trainer, and on a GPU. Writes results/training_speed.json

    python benchmarks/training_speed.py [--device cpu|cuda] [--rounds 5] [--steps 6]

In each round every variant trains the same steps from the same weights on the same data, in turns A B B A.
The first two steps of a training are left out of its speed (allocations, compilation). A ratio is the median
over rounds. On the CPU: SmolLM2-135M on real text; all variants must give one loss curve, and the largest
difference from the plain Trainer's is a column. On a GPU: models of the sizes of SmolLM2-135M and Qwen3-0.6B
with random weights, on random tokens, and the memory that torch has allocated; there the result is
training_speed_cuda.json.

    plain      transformers.Trainer with bf16 (or fp32), fused AdamW, loss logged at every step
    fit        edgedisp.train: no key-value cache, cross-entropy without logits, freed memory reused
    compiled   the same with the layers through torch.compile
    dispersed  `compiled` with the dispersion term in its default settings
    all_pairs  on a GPU: `compiled` with the term over all pairs of tokens
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results_file import median_and_quartiles, wikipedia_base, wikipedia_blocks, write
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from edgedisp.core.hub import quiet
from edgedisp.dispersion.losses import DispersionConfig
from edgedisp.recipe import Train
from edgedisp.train.trainer import FitOptions, PackedDataset, fit

CPU_SETTINGS = {  # name: (sequences of a step, context, precision)
    "bf16_4x256": (4, 256, "bf16"),
    "bf16_1x1024": (1, 1024, "bf16"),
    "fp32_4x256": (4, 256, "fp32"),
}
SMOLLM2_135M = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
    num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip
QWEN3_600M = Qwen3Config(
    vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
    num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
)  # fmt: skip
GPU_SETTINGS: dict[str, tuple[Callable[[], Any], int, int]] = {
    "smollm2_135m_32x1024": (lambda: LlamaForCausalLM(SMOLLM2_135M), 32, 1024),
    "qwen3_600m_8x4096": (lambda: Qwen3ForCausalLM(QWEN3_600M), 8, 4096),
}
DISPERSION = {"dispersed": DispersionConfig(), "all_pairs": DispersionConfig(tokens=None)}
VARIANTS = {
    "cpu": ("plain", "fit", "compiled", "dispersed"),
    "cuda": ("plain", "compiled", "dispersed", "all_pairs"),
}
WARM_UP = 2
LR = 1e-4


class Clock(TrainerCallback):
    """When each optimizer step ended, and the losses that were logged."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs.get("cross_entropy", logs["loss"])))

    @property
    def seconds_per_step(self) -> float:
        return (self.times[-1] - self.times[WARM_UP - 1]) / (len(self.times) - WARM_UP)


def train(variant: str, model: Any, blocks: np.ndarray, section: Train, steps: int) -> Clock:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, quiet():
        if variant == "plain":
            arguments = TrainingArguments(
                folder, max_steps=steps, per_device_train_batch_size=section.batch, learning_rate=LR,
                lr_scheduler_type="cosine", weight_decay=0.1, adam_beta2=0.95,
                bf16=section.precision == "bf16", train_sampling_strategy="sequential", save_strategy="no",
                logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            )  # fmt: skip
            trainer = Trainer(model, arguments, train_dataset=PackedDataset(blocks), callbacks=[clock])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        else:
            section = section.model_copy(update={"compile": variant != "fit"})
            fit(model, blocks, section, FitOptions(steps, 0, Path(folder), DISPERSION.get(variant), [clock]))
    return clock


def measure(name: str, device: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    """The rows of one setting, one for each variant."""
    if device == "cpu":
        batch, context, precision = CPU_SETTINGS[name]
        base, tokenizer = wikipedia_base()
        blocks = wikipedia_blocks(tokenizer, context, batch * steps)
    else:
        make, batch, context = GPU_SETTINGS[name]
        base, precision = make(), "bf16"
        random = np.random.default_rng(0)
        blocks = random.integers(0, base.config.vocab_size, (batch * steps, context)).astype(np.int32)
    settings = {"tokens": 1, "lr": LR, "batch": batch, "warmup": 0.0, "precision": precision}
    section = Train.model_validate({**settings, "checkpoint_every": 10**9})
    variants = VARIANTS[device]
    clocks: dict[str, list[Clock]] = {variant: [] for variant in variants}
    peaks: dict[str, int] = {}
    for turn in range(rounds):
        for variant in variants if turn % 2 else variants[::-1]:
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            # A copy each: a model that accelerate has prepared keeps the precision of that training.
            clocks[variant].append(train(variant, copy.deepcopy(base).train(), blocks, section, steps))
            if device == "cuda":
                peaks[variant] = torch.cuda.max_memory_allocated()
            print(f"{name}: round {turn + 1} of {rounds}, {variant}", file=sys.stderr)
    plain, rows = clocks["plain"], []
    for variant in variants:
        seconds = [clock.seconds_per_step for clock in clocks[variant]]
        ratios = [before.seconds_per_step / now for before, now in zip(plain, seconds)]
        ratio, low, high = median_and_quartiles(ratios)
        rate, losses = batch * context / median_and_quartiles(seconds)[0], clocks[variant][0].losses
        apart = float(np.abs(np.subtract(plain[0].losses, losses)).max())
        row: dict[str, Any] = {"setting": name, "variant": variant, "tokens_per_s": rate, "ratio": ratio}
        row |= {"ratio_quartiles": [low, high], "largest_loss_difference": apart, "losses": losses}
        rows.append({**row, "peak_memory_bytes": peaks[variant]} if peaks else row)
        print(f"{name:20} {variant:10} {rate:8.0f} tokens/s  {ratio:.2f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of one training")
    parser.add_argument("--only", nargs="*", help="settings; nothing is recorded")
    options = parser.parse_args()
    if (options.device == "cuda") != torch.cuda.is_available():
        sys.exit("--device cuda needs a GPU that torch can use; --device cpu none (CUDA_VISIBLE_DEVICES=)")
    rows: list[dict[str, Any]] = []
    for name in CPU_SETTINGS if options.device == "cpu" else GPU_SETTINGS:
        if options.only is None or name in options.only:
            rows += measure(name, options.device, options.rounds, options.steps)
    figures = {f"tokens_per_s_ratio_{row['variant']}_{row['setting']}": row["ratio"] for row in rows}
    if options.only is None:
        if options.device == "cpu":
            figures["tokens_per_s_ratio"] = figures["tokens_per_s_ratio_compiled_bf16_4x256"]
        write("training_speed", figures, rows, suffix="_cuda" if options.device == "cuda" else "")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
