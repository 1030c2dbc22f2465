"""What the dispersion term costs in time and memory. Writes results/dispersion_cost.json

    python benchmarks/dispersion_cost.py [--rounds 30]

Time: whole training steps (forward, backward, clip, AdamW) of SmolLM2-135M on real text, three ways in turn:
without the term, with ours in its default settings, and with the paper's form (256 tokens drawn for each
layer, all layers, written here from its formula; in every third round). A ratio is the median over rounds of
two steps of one round. Gradient: how near that of the drawn tokens is to that of all pairs. Memory: the most
bytes that tensors take at one moment of such a step, as torch's profiler counts, and the highest resident
memory of a fresh process, which differs by 2 % between two runs. For the loss over every pair of 4,096 tokens
of 1,024 features at 4 layers: what a fresh process grows by beyond its inputs.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from _results_file import median_and_quartiles, quickstart_base, quickstart_blocks, write
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from edgedisp import models
from edgedisp.dispersion.hooks import DispersionLoss, hidden_states
from edgedisp.dispersion.losses import DispersionConfig, angular
from edgedisp.dispersion.pairwise_kernel import pairwise_loss
from edgedisp.train.chunked_cross_entropy import chunked_head
from edgedisp.train.performance import keep_freed_memory, peak_memory_bytes

WAYS = ("off", "ours", "paper")
SETTINGS = {  # name: (batch, context, bf16, gradient checkpointing)
    "bf16_4x256": (4, 256, True, False),
    "fp32_4x256": (4, 256, False, False),
    "bf16_1x1024": (1, 1024, True, False),
    "bf16_4x256_checkpointing": (4, 256, True, True),
}
PAPER_TOKENS = 256
TOKENS, FEATURES, LAYERS = 4096, 1024, 4  # of the blockwise comparison


def paper_form(states: dict[int, Tensor]) -> Tensor:
    """`log mean exp(-arccos(cos) / pi)` over pairs of 256 drawn tokens, mean over sequences and layers."""
    values = []
    for state in states.values():
        tokens = state.shape[1]
        drawn = torch.randperm(tokens)[:PAPER_TOKENS]
        vectors = state[:, drawn].float()
        vectors = vectors / (vectors.norm(dim=-1, keepdim=True) + 1e-2)
        cosine = vectors @ vectors.transpose(1, 2)
        clamped = cosine + (cosine.clamp(-0.9, 0.9) - cosine).detach()
        scores = -torch.arccos(clamped) / math.pi
        apart = ~torch.eye(scores.shape[-1], dtype=torch.bool)
        pairs = scores[:, apart]
        values.append((pairs.logsumexp(dim=-1) - math.log(pairs.shape[-1])).mean())
    return torch.stack(values).mean()


class Steps:
    """A model with its optimizer, and one training step in each of the three ways."""

    def __init__(self, opened: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = opened.train(), tokenizer
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.term = DispersionLoss(DispersionConfig())
        self.blocks: Tensor = torch.empty(0)
        self.done = 0

    def prepare(self, name: str) -> None:
        self.batch, context, self.is_bf16, checkpointing = SETTINGS[name]
        self.blocks = torch.from_numpy(quickstart_blocks(self.tokenizer, context, 64).astype("int64"))
        self.model.activation_checkpointing_disable()
        if checkpointing:
            self.model.activation_checkpointing_enable({"use_reentrant": False})

    def step(self, way: str) -> float:
        """Seconds of one step."""
        first = self.done * self.batch % len(self.blocks)
        ids = self.blocks[first : first + self.batch]
        self.done += 1
        started = time.perf_counter()
        with ExitStack() as stack:
            stack.enter_context(chunked_head(self.model))
            if way == "ours":
                stack.enter_context(self.term.watch(self.model))
            layers = range(self.model.config.num_hidden_layers)
            seen = stack.enter_context(hidden_states(self.model, layers)) if way == "paper" else {}
            with torch.autocast("cpu", torch.bfloat16, enabled=self.is_bf16):
                loss = self.model(input_ids=ids, labels=ids, use_cache=False).loss
                if way == "paper":
                    loss = loss + 0.1 * paper_form(seen)
            if way == "ours":
                loss = loss + self.term.weight * self.term.loss()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def time_steps(rounds: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
    steps, figures, rows = Steps(*quickstart_base()), {}, []
    for name in SETTINGS:
        steps.prepare(name)
        taken: dict[str, dict[int, float]] = {way: {} for way in WAYS}  # by round
        for turn in range(rounds + 1):
            for way in WAYS if turn % 2 else WAYS[::-1]:
                if way != "paper" or turn % 3 == 0:
                    taken[way][turn] = steps.step(way)
            print(f"\r{name}: round {turn} of {rounds}", end="", file=sys.stderr)
        print(file=sys.stderr)
        for way in WAYS:
            counted = {turn: seconds for turn, seconds in taken[way].items() if turn}  # the first warms up
            ratios = [seconds / taken["off"][turn] for turn, seconds in counted.items()]
            (ratio, low, high), step_s = (
                median_and_quartiles(ratios),
                median_and_quartiles([*counted.values()])[0],
            )
            row = {"setting": name, "way": way, "step_s": step_s, "ratio": ratio}
            rows.append({**row, "ratio_quartiles": [low, high], "rounds": len(counted)})
            print(f"{name:26} {way:6} {step_s:.3f} s  {ratio:.3f} [{low:.3f}, {high:.3f}]")
        figures[f"step_time_ratio_{name}"] = rows[-2]["ratio"]
        figures[f"paper_form_step_time_ratio_{name}"] = rows[-1]["ratio"]
    return figures, rows


def peak_of_steps(name: str, way: str, folder: str) -> dict[str, float]:
    """Run in a fresh process: resident bytes at most in three steps, bytes in tensors at most in a fourth."""
    steps = Steps(*models.open_base(Path(folder)))
    steps.prepare(name)
    with keep_freed_memory():
        for _ in range(3):
            steps.step(way)
    resident = float(peak_memory_bytes())
    state = [value for values in steps.optimizer.state.values() for value in values.values()]
    held = sum(tensor.nbytes for tensor in [*steps.model.parameters(), *state])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        steps.step(way)
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        seen.export_chrome_trace(trace.name)
        events = json.loads(Path(trace.name).read_text())["traceEvents"]
    grown = max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")
    return {"resident": resident, "tensors": float(held + grown)}


PAIRS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda v: angular(v, torch.ones(v.shape[:2], dtype=torch.bool), clamp=0.1).mean(),
    "blockwise": lambda vectors: pairwise_loss("angular", vectors).mean(),
}


def gradients(counts: tuple[int, ...] = (32, 64, 128, 256)) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """How near the gradient of drawn tokens is to that of all pairs: cosines over all weights, float64."""
    opened, tokenizer = quickstart_base()
    figures, rows = {}, []
    for batch, context in ((4, 256), (1, 1024)):
        ids = torch.from_numpy(quickstart_blocks(tokenizer, context, batch).astype("int64"))

        def gradient(tokens: int | None, first: int, ids: Tensor = ids) -> Tensor:
            opened.zero_grad()
            term = DispersionLoss(DispersionConfig(tokens=tokens))
            with term.watch(opened.model):
                term.begin(first_sequence=first)
                opened.model(ids, use_cache=False)
                term.loss().backward()
            grads = [weight.grad.flatten() for weight in opened.parameters() if weight.grad is not None]
            return torch.cat(grads).double()

        whole = gradient(None, 0)
        for tokens in counts:
            drawn = [gradient(tokens, 100 * draw) for draw in range(3)]
            cosines = [float(one @ whole / (one.norm() * whole.norm())) for one in drawn]
            name = f"gradient_cosine_{tokens}_of_{batch}x{context}"
            figures[name] = sum(cosines) / len(cosines)
            rows.append({"setting": name, "cosines": cosines})
            print(f"{name}: {figures[name]:.5f}", file=sys.stderr)
    return figures, rows


def all_pairs(way: str) -> dict[str, float]:
    """Run in a fresh process: seconds of value and gradient, and resident bytes beyond the vectors."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(LAYERS, TOKENS, FEATURES, generator=generator, requires_grad=True)
    PAIRS[way](vectors[:, :300]).backward()  # wakes the threads and the allocator
    vectors.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (Linux)
    before = peak_memory_bytes()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        value = PAIRS[way](vectors)
        value.backward()
        seconds.append(time.perf_counter() - started)
        norm = float(vectors.grad.norm())  # type: ignore[union-attr]
        vectors.grad = None
    grown = float(peak_memory_bytes() - before)
    return {"seconds": min(seconds), "bytes": grown, "value": value.item(), "gradient_norm": norm}


def in_fresh_process(task: str, *arguments: str) -> Any:
    command = [sys.executable, __file__, "--task", task, *arguments]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def memory_of_steps() -> tuple[dict[str, float], list[dict[str, Any]]]:
    figures, rows = {}, []
    opened, tokenizer = quickstart_base()
    with tempfile.TemporaryDirectory() as folder:
        for part in (opened, tokenizer):
            part.save_pretrained(folder)
        del opened
        for name in SETTINGS:
            peaks: dict[str, list[dict[str, float]]] = {"off": [], "ours": []}
            for turn in range(2):
                for way in ("off", "ours") if turn % 2 else ("ours", "off"):
                    peaks[way].append(in_fresh_process("steps", name, way, folder))
            for way, runs in peaks.items():
                row: dict[str, Any] = {"setting": name, "way": way}
                for kind in ("tensors", "resident"):
                    row[f"{kind}_bytes"] = [run[kind] for run in runs]
                    off = sum(run[kind] for run in peaks["off"])
                    row[f"{kind}_ratio"] = sum(run[kind] for run in runs) / off
                rows.append(row)
            print(f"{name}: {rows[-1]}", file=sys.stderr)
            figures[f"peak_memory_ratio_{name}"] = rows[-1]["tensors_ratio"]
            figures[f"resident_memory_ratio_{name}"] = rows[-1]["resident_ratio"]
    figures["peak_memory_ratio"] = max(figures[f"peak_memory_ratio_{name}"] for name in SETTINGS)
    return figures, rows


def memory_of_pairs() -> tuple[dict[str, float], list[dict[str, Any]]]:
    figures, rows = {}, []
    pairs = {way: [in_fresh_process("pairs", way) for _ in range(3)] for way in PAIRS}
    best = {way: min(runs, key=lambda run: run["seconds"]) for way, runs in pairs.items()}
    grown = {way: median_and_quartiles([run["bytes"] for run in runs])[0] for way, runs in pairs.items()}
    figures["blockwise_memory_ratio_4096"] = grown["blockwise"] / grown["plain"]
    figures["blockwise_time_ratio_4096"] = best["blockwise"]["seconds"] / best["plain"]["seconds"]
    for way, run in best.items():
        rows.append({"setting": f"all pairs of {LAYERS} x {TOKENS} x {FEATURES}", "way": way, **run})
        rows[-1]["bytes"] = grown[way]
    return figures, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="measured rounds of each setting")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.task:
        name, *arguments = chosen.task
        print(json.dumps(peak_of_steps(*arguments) if name == "steps" else all_pairs(*arguments)))
        return
    with keep_freed_memory():  # as in a build
        timed = time_steps(chosen.rounds)
    parts = [timed, *(part() for part in (memory_of_steps, memory_of_pairs, gradients))]
    figures = {name: value for part, _ in parts for name, value in part.items()}
    write("dispersion_cost", figures, [row for _, rows in parts for row in rows])


if __name__ == "__main__":
    main()
