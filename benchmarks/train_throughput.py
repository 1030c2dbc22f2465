"""Training speed against the plain transformers Trainer. Writes results/train_throughput.json.

    python benchmarks/train_throughput.py [--rounds 5] [--steps 6]

One model (SmolLM2-135M), one batch size, one order of the same real text, one optimizer and schedule. In each
round every way trains the same few steps from the same weights, in turn, the order reversed every other
round. The first two steps of a training are left out of its speed (allocations, compilation). A ratio is the
median over rounds. All ways must give one loss curve: the largest difference from the plain Trainer's is
written beside the speed.

The ways:
    plain      transformers.Trainer as it comes, with bf16 (or fp32), fused AdamW, loss logged at every step
    fit        this package's loop: no key-value cache, cross-entropy without logits (train/),
               freed memory kept in the process
    compiled   the same with the layers through torch.compile
    dispersed  `compiled` with the dispersion term in its default settings
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import quickstart_base, quickstart_blocks, spread, write
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from edgedisp.dispersion.config import DispersionConfig
from edgedisp.models import quiet
from edgedisp.recipe import Train
from edgedisp.train.packed_dataset import PackedDataset
from edgedisp.train.trainer import FitOptions, fit

SETTINGS = {"bf16_4x256": (4, 256, "bf16"), "bf16_1x1024": (1, 1024, "bf16"), "fp32_4x256": (4, 256, "fp32")}
WAYS = ("plain", "fit", "compiled", "dispersed")
WARM_UP = 2
LR = 1e-4


class Clock(TrainerCallback):
    """When each optimizer step ended, and the losses that were logged."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs.get("cross_entropy", logs["loss"])))

    @property
    def seconds_per_step(self) -> float:
        return (self.ends[-1] - self.ends[WARM_UP - 1]) / (len(self.ends) - WARM_UP)


def train(way: str, model: Any, blocks: np.ndarray, batch: int, precision: str, steps: int) -> Clock:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, quiet():
        if way == "plain":
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch,
                learning_rate=LR,
                lr_scheduler_type="cosine",
                weight_decay=0.1,
                adam_beta2=0.95,
                bf16=precision == "bf16",
                train_sampling_strategy="sequential",
                save_strategy="no",
                logging_steps=1,
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            )
            trainer = Trainer(model, arguments, train_dataset=PackedDataset(blocks), callbacks=[clock])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        else:
            section = Train.model_validate(
                {
                    "tokens": 1,
                    "lr": LR,
                    "batch": batch,
                    "warmup": 0.0,
                    "precision": precision,
                    "compile": way != "fit",
                    "checkpoint_every": 10**9,
                }
            )
            dispersion = DispersionConfig() if way == "dispersed" else None
            fit(model, blocks, section, FitOptions(steps, 0, Path(folder), dispersion, [clock]))
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of one training")
    chosen = parser.parse_args()
    base, tokenizer = quickstart_base()
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for name, (batch, context, precision) in SETTINGS.items():
        blocks = quickstart_blocks(tokenizer, context, batch * chosen.steps)
        clocks: dict[str, list[Clock]] = {way: [] for way in WAYS}
        for turn in range(chosen.rounds):
            for way in WAYS if turn % 2 else WAYS[::-1]:
                # A copy each: a model that accelerate has prepared keeps the precision of that training.
                copied = copy.deepcopy(base).train()
                clocks[way].append(train(way, copied, blocks, batch, precision, chosen.steps))
                print(f"\r{name}: round {turn + 1} of {chosen.rounds}, {way:9}", end="", file=sys.stderr)
        print(file=sys.stderr)
        for way in WAYS:
            taken = [clock.seconds_per_step for clock in clocks[way]]
            plain = [clock.seconds_per_step for clock in clocks["plain"]]
            ratio, low, high = spread([before / here for before, here in zip(plain, taken)])
            difference = np.abs(np.subtract(clocks["plain"][0].losses, clocks[way][0].losses)).max()
            rows.append(
                {
                    "setting": name,
                    "way": way,
                    "tokens_per_s": batch * context / spread(taken)[0],
                    "ratio": ratio,
                    "ratio_quartiles": [low, high],
                    "largest_loss_difference": float(difference),
                    "losses": clocks[way][0].losses,
                }
            )
            figures[f"tokens_per_s_ratio_{way}_{name}"] = ratio
    figures["tokens_per_s_ratio"] = figures["tokens_per_s_ratio_compiled_bf16_4x256"]
    print(table(rows))
    write("train_throughput", figures, rows)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| setting | way | tokens/s | against plain | quartiles | loss differs by at most |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        low, high = row["ratio_quartiles"]
        lines.append(
            f"| {row['setting']} | {row['way']} | {row['tokens_per_s']:.0f} | {row['ratio']:.2f} "
            f"| {low:.2f} to {high:.2f} | {row['largest_loss_difference']:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
