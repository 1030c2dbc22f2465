"""What dispersion costs on a GPU, and whether twins are twins there. Writes results/gpu_training.json.

    python benchmarks/gpu_training.py [--rounds 5] [--steps 12]

Models of the sizes of SmolLM2-135M and Qwen3-0.6B with random weights, on random tokens: speed and memory do
not depend on the values, and nothing needs to be fetched. Each way trains the same few steps in turns, the
order reversed every other round; a ratio is the median over rounds, the first two steps of each training
left out. Memory is the most that torch has allocated on the GPU.

Twins: dispersion with weight 0 must leave the very weights of dispersion off, and a training that is stopped
and continued those of one that is not.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from record import spread, write
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from edgedisp.dispersion.config import DispersionConfig
from edgedisp.recipe import Train
from edgedisp.train.trainer import FitOptions, FitResult, fit

WARM_UP = 2


def smollm2_135m() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        )
    )  # fmt: skip


def qwen3_600m() -> Any:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        )
    )  # fmt: skip


SETTINGS: dict[str, tuple[Callable[[], Any], int, int]] = {  # name: (model, sequences in a step, context)
    "smollm2_135m_32x1024": (smollm2_135m, 32, 1024),
    "qwen3_600m_8x4096": (qwen3_600m, 8, 4096),
}
WAYS: dict[str, DispersionConfig | None] = {
    "off": None,
    "dispersed": DispersionConfig(),
    "all_pairs": DispersionConfig(tokens=None),
}


class Clock(TrainerCallback):
    """When each optimizer step had ended on the GPU."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> float:
        return (self.ends[-1] - self.ends[WARM_UP - 1]) / (len(self.ends) - WARM_UP)


def fresh(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make()


def blocks(model: Any, count: int, context: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.config.vocab_size, (count, context)).astype(np.int32)


def section_of(batch: int, **changes: Any) -> Train:
    return Train.model_validate({"tokens": 1, "lr": 1e-4, "batch": batch, "precision": "bf16", **changes})


def train(
    model: Any,
    data: np.ndarray,
    batch: int,
    steps: int,
    dispersion: DispersionConfig | None,
    checkpoints: Path | None = None,
    **more: Any,
) -> Clock:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        section = section_of(batch, **{"checkpoint_every": 10**9, **more})
        fit(model, data, section, FitOptions(steps, 0, checkpoints or Path(folder), dispersion, [clock]))
    return clock


def timed(name: str, rounds: int, steps: int) -> list[dict[str, Any]]:
    make, batch, context = SETTINGS[name]
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, int] = {}
    data = blocks(fresh(make), batch * steps, context)
    for turn in range(rounds):
        for way in WAYS if turn % 2 else [*WAYS][::-1]:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            seconds[way].append(train(fresh(make), data, batch, steps, WAYS[way]).seconds_per_step)
            peaks[way] = torch.cuda.max_memory_allocated()
            print(f"{name}: round {turn + 1} of {rounds}, {way} {seconds[way][-1]:.3f} s", file=sys.stderr)
    rows = []
    for way, taken in seconds.items():
        ratio, low, high = spread([here / off for here, off in zip(taken, seconds["off"])])
        row = {"setting": name, "way": way, "tokens_per_s": batch * context / spread(taken)[0]}
        row |= {"step_time_ratio": ratio, "step_time_ratio_quartiles": [low, high]}
        rows.append({**row, "peak_memory_bytes": peaks[way]})
    return rows


def same_weights(one: Any, other: Any) -> bool:
    pairs = zip(one.parameters(), other.parameters())
    return all(torch.equal(left.detach().cpu(), right.detach().cpu()) for left, right in pairs)


def twins() -> dict[str, float]:
    """1.0 for a fact that holds, 0.0 for one that does not."""
    data = blocks(fresh(smollm2_135m), 4 * 6, 256)
    trained = {}
    for way, dispersion in {
        "off": None,
        "zero": DispersionConfig(weight=0.0),
        "on": DispersionConfig(),
    }.items():
        trained[way] = fresh(smollm2_135m)
        train(trained[way], data, 4, 6, dispersion)
    continued = fresh(smollm2_135m)
    with tempfile.TemporaryDirectory() as folder:
        Stop.pending.append(4)

        def run(model: Any) -> FitResult:
            options = FitOptions(6, 0, Path(folder), DispersionConfig(), [Stop()])
            return fit(model, data, section_of(4, checkpoint_every=2), options)

        with contextlib.suppress(KeyboardInterrupt):
            run(fresh(smollm2_135m))
        done = run(continued)
    return {
        "weight_0_is_off": float(same_weights(trained["off"], trained["zero"])),
        "dispersion_changes_weights": float(not same_weights(trained["off"], trained["on"])),
        "resumed_from_step": float(done.resumed_from),
        "resumed_is_uninterrupted": float(same_weights(trained["on"], continued)),
    }


class Stop(TrainerCallback):
    """Interrupts a training."""

    pending: ClassVar[list[int]] = []  # of the class: a checkpoint remembers a callback's own settings

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in self.pending:
            self.pending.remove(state.global_step)
            raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of one training")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a GPU that torch can use")
    figures, rows = twins(), []
    print(figures, file=sys.stderr)
    for name in SETTINGS:
        found = timed(name, chosen.rounds, chosen.steps)
        rows += found
        for row in found:
            figures[f"step_time_ratio_{row['way']}_{name}"] = row["step_time_ratio"]
            figures[f"tokens_per_s_{row['way']}_{name}"] = row["tokens_per_s"]
            ratio = row["peak_memory_bytes"] / found[0]["peak_memory_bytes"]
            figures[f"peak_memory_ratio_{row['way']}_{name}"] = ratio
        write("gpu_training", figures, rows, gpu=torch.cuda.get_device_name())  # what is done is kept
    for key, value in figures.items():
        print(f"{key:55} {value:.4g}")


if __name__ == "__main__":
    main()
