"""What the dispersion term costs in time and memory. Writes results/dispersion_cost.json

    python benchmarks/dispersion_cost.py [--rounds 30]

Time: whole training steps (forward, backward, clip, AdamW) of SmolLM2-135M on real text, in turns:
without the term, with ours in its default settings, and with the paper's form (256 tokens drawn for each
layer, all layers, written here from its formula; in every third round). A ratio is the median over rounds of
two steps of one round. Gradient: how near that of the drawn tokens is to that of all pairs. Memory: the most
bytes that tensors take at one moment of such a step, as torch's profiler counts in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _results_file import median_and_quartiles, wikipedia_base, wikipedia_blocks, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from edgedisp import models
from edgedisp.dispersion.hooks import DispersionLoss, hidden_states
from edgedisp.dispersion.losses import DispersionConfig
from edgedisp.train.chunked_cross_entropy import chunked_head
from edgedisp.train.performance import keep_freed_memory

VARIANTS = ("off", "ours", "paper")
Result = tuple[dict[str, float], list[dict[str, Any]]]  # figures and rows
SETTINGS = {  # name: (batch, context, bf16, gradient checkpointing)
    "bf16_4x256": (4, 256, True, False),
    "fp32_4x256": (4, 256, False, False),
    "bf16_1x1024": (1, 1024, True, False),
    "bf16_4x256_checkpointing": (4, 256, True, True),
}


def paper_form(states: list[Tensor]) -> Tensor:
    """`log mean exp(-arccos(cos) / pi)` over pairs of 256 drawn tokens, mean over sequences and layers."""
    values = []
    for state in states:
        vectors = state[:, torch.randperm(state.shape[1])[:256]].float()
        vectors = vectors / (vectors.norm(dim=-1, keepdim=True) + 1e-2)
        cosine = vectors @ vectors.transpose(1, 2)
        clamped = cosine + (cosine.clamp(-0.9, 0.9) - cosine).detach()
        scores = -torch.arccos(clamped) / math.pi
        pairs = scores[:, ~torch.eye(scores.shape[-1], dtype=torch.bool)]
        values.append((pairs.logsumexp(dim=-1) - math.log(pairs.shape[-1])).mean())
    return torch.stack(values).mean()


class Steps:
    """A model with its optimizer, and one training step of each variant."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.train(), tokenizer
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.term = DispersionLoss(DispersionConfig())
        self.count = 0

    def prepare(self, setting: str) -> None:
        self.batch, context, self.is_bf16, checkpointing = SETTINGS[setting]
        self.blocks = torch.from_numpy(wikipedia_blocks(self.tokenizer, context, 64).astype("int64"))
        self.model.activation_checkpointing_disable()
        if checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})

    def step(self, variant: str) -> float:
        """Seconds of one step."""
        first = self.count * self.batch % len(self.blocks)
        ids = self.blocks[first : first + self.batch]
        self.count += 1
        started = time.perf_counter()
        with ExitStack() as stack:
            stack.enter_context(chunked_head(self.model))
            if variant == "ours":
                stack.enter_context(self.term.watch(self.model))
            states = stack.enter_context(hidden_states(self.model)) if variant == "paper" else []
            with torch.autocast("cpu", torch.bfloat16, enabled=self.is_bf16):
                loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
                if variant == "paper":
                    loss = loss + 0.1 * paper_form(states[1:])
            if variant == "ours":
                loss = loss + self.term.weight * self.term.loss()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def time_steps(rounds: int) -> Result:
    steps, figures, rows = Steps(*wikipedia_base()), {}, []
    for setting in SETTINGS:
        steps.prepare(setting)
        times: dict[str, dict[int, float]] = {variant: {} for variant in VARIANTS}  # seconds by round
        for turn in range(rounds + 1):
            for variant in VARIANTS if turn % 2 else VARIANTS[::-1]:
                if variant != "paper" or turn % 3 == 0:
                    times[variant][turn] = steps.step(variant)
        for variant in VARIANTS:
            del times[variant][0]  # the first round warms up
            steps_s = times[variant]
            ratio, *quartiles = median_and_quartiles([s / times["off"][turn] for turn, s in steps_s.items()])
            row = {"setting": setting, "variant": variant, "step_s": median(steps_s.values())}
            rows.append({**row, "ratio": ratio, "ratio_quartiles": quartiles, "rounds": len(steps_s)})
        figures[f"step_time_ratio_{setting}"] = rows[-2]["ratio"]
        figures[f"paper_form_step_time_ratio_{setting}"] = rows[-1]["ratio"]
    return figures, rows


def peak_of_step(setting: str, variant: str, folder: str) -> int:
    """Run in a fresh process: bytes in tensors at most in the second step."""
    steps = Steps(*models.open_base(Path(folder)))
    steps.prepare(setting)
    steps.step(variant)
    state = [value for values in steps.optimizer.state.values() for value in values.values()]
    before = sum(tensor.nbytes for tensor in [*steps.model.parameters(), *state])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps.step(variant)
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profiler.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    return before + max(
        event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"
    )


def gradients(counts: tuple[int, ...] = (32, 64, 128, 256)) -> Result:
    """How near the gradient of drawn tokens is to that of all pairs: cosines over all weights, float64."""
    model, tokenizer = wikipedia_base()
    figures, rows = {}, []
    for batch, context in ((4, 256), (1, 1024)):
        ids = torch.from_numpy(wikipedia_blocks(tokenizer, context, batch).astype("int64"))

        def gradient(tokens: int | None, first: int, ids: Tensor = ids) -> Tensor:
            model.zero_grad()
            term = DispersionLoss(DispersionConfig(tokens=tokens))
            with term.watch(model.model):
                term.next_sequence = first
                model.model(ids, use_cache=False)
                term.loss().backward()
            grads = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
            return torch.cat(grads).double()

        exact = gradient(None, 0)
        for tokens in counts:
            samples = [gradient(tokens, 100 * draw) for draw in range(3)]
            cosines = [float(sample @ exact / (sample.norm() * exact.norm())) for sample in samples]
            name = f"gradient_cosine_{tokens}_of_{batch}x{context}"
            figures[name] = sum(cosines) / len(cosines)
            rows.append({"setting": name, "cosines": cosines})
    return figures, rows


def memory_of_steps() -> Result:
    figures, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for part in wikipedia_base():
            part.save_pretrained(folder)
        for setting in SETTINGS:
            peaks: dict[str, list[int]] = {"off": [], "ours": []}
            for variant in ("ours", "off", "off", "ours"):
                command = [sys.executable, __file__, "--peak", setting, variant, folder]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                peaks[variant].append(int(output.splitlines()[-1]))
            for variant, runs in peaks.items():
                row = {"setting": setting, "variant": variant, "tensors_bytes": runs}
                rows.append({**row, "tensors_ratio": sum(runs) / sum(peaks["off"])})
            figures[f"peak_memory_ratio_{setting}"] = rows[-1]["tensors_ratio"]
    figures["peak_memory_ratio"] = max(figures.values())
    return figures, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="measured rounds of each setting")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_of_step(*options.peak))
        return
    with keep_freed_memory():  # as in a build
        timing = time_steps(options.rounds)
    parts = [timing, *(part() for part in (memory_of_steps, gradients))]
    figures = {name: value for part, _ in parts for name, value in part.items()}
    write("dispersion_cost", figures, [row for _, rows in parts for row in rows])


if __name__ == "__main__":
    main()
