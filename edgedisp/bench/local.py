"""Time bundles on this machine's CPU, in turns, and say how far the figures can be trusted.

Each bundle is loaded by a worker process of its own (`worker.py`) and warmed up once. Then the workers take
turns, one at a time: A B C, C B A, A B C ... Whatever changes slowly (heat, clocks, a neighbour's job) meets
all bundles alike, and the reversal takes out what is linear in time. What a repetition's figures mean stands
in `export/runner/edgedisp_runner.py`, which does the timing.

Three checks come with the figures (`summary.py`): drift over the repetitions, the CPU time that other
processes took meanwhile, and, for two bundles that ought to have one graph (the arms of a recipe), whether
they have and whether their speeds differ. Training changes values, not the graph, so a difference in speed
there is a fault of the measurement and is reported as one.

Bundles are timed together as long as they fit into memory; else bundles of equal size stay together.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edgedisp import BadInput, Progress, silent
from edgedisp.bench.machine import describe, physical_cores, readings
from edgedisp.bench.spread import percentile
from edgedisp.bench.summary import pair, row, warn_about_bits
from edgedisp.bench.worker import Worker

MIB = 1 << 20
SHORTEST_TOLD_S = 0.5


def measure(
    bundles: Mapping[str, Path],
    *,
    runner: Path,
    prompt: int = 128,
    generate: int = 128,
    repetitions: int = 5,
    threads: int | None = None,
    seed: int = 0,
    pause_s: float = 0.0,
    warmup: int = 1,
    pairs: Sequence[tuple[str, str]] = (),
    memory_bytes: int | None = None,
    timeout_s: float = 900.0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time every bundle `repetitions` times, in turns.

    bundles: label -> bundle folder; the labels' order is the order of the turns, so put arms of one
    precision side by side. `threads` None: the physical cores of this process. `pairs`: labels (baseline,
    dispersed) that must have one graph. `memory_bytes`: what the open bundles may take together (default:
    80 % of what is available). Returns {rows, repetitions, pairs, machine, load_average, order, groups,
    options}, all JSON.

    Raises BadInput for a bundle that cannot be timed, BuildFailed where a worker dies or is silent for
    `timeout_s`. Workers are ended in every case.
    """
    _check(bundles, runner, pairs)
    threads = physical_cores() if threads is None else threads
    machine, load_before = describe(), readings()["load_average_1m"]
    if memory_bytes is None and machine["memory_available_bytes"] is not None:
        memory_bytes = int(0.8 * machine["memory_available_bytes"])
    groups = group_by_memory(bundles, memory_bytes)
    options = {"prompt": prompt, "generate": generate, "threads": threads, "seed": seed, "warmup": warmup}
    command = [sys.executable, str(runner), "--interactive"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]

    timed: list[dict[str, Any]] = []
    facts: dict[str, dict[str, Any]] = {}
    step = _Counter(progress, (repetitions + 1) * len(bundles))
    for group in groups:
        with ExitStack() as stack:
            workers = {}
            for label in group:  # one after another: a worker answers when it has loaded and warmed up
                workers[label] = stack.enter_context(
                    Worker(label, [*command, str(bundles[label])], timeout_s)
                )
                facts[label] = workers[label].facts
                step(f"{label}: loaded in {facts[label]['load_s']:.1f} s")
            for repetition, label in turns(group, repetitions):
                if timed and pause_s:
                    time.sleep(pause_s)
                timed.append(_one(workers[label], label, repetition, len(timed)))
                step(f"{label}: {timed[-1]['decode_tokens_per_s']:.1f} tokens/s")
    rows = [row(label, path, facts[label], timed) for label, path in bundles.items()]
    warn_about_bits(rows)
    return {
        "rows": rows,
        "repetitions": timed,
        "pairs": [pair(a, b, bundles, timed) for a, b in pairs],
        "machine": machine,
        "load_average": {"before": load_before, "after": readings()["load_average_1m"]},
        "order": [repetition["label"] for repetition in timed],
        "groups": groups,
        "options": {**options, "repetitions": repetitions, "pause_s": pause_s},
    }


class _Counter:
    """Counts the steps done for the progress callback."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, note: str) -> None:
        self.done += 1
        self.progress(self.done, self.total, note)


def _check(bundles: Mapping[str, Path], runner: Path, pairs: Sequence[tuple[str, str]]) -> None:
    """Refuse what cannot work before any process is started."""
    problems = [] if bundles else ["no bundle to time; name at least one bundle folder"]
    if not runner.is_file():
        problems.append(f"{runner}: the runner program is missing; install edgedisp again")
    problems += [
        f"{label}: {path} holds no model.onnx; give a bundle folder made by the export"
        for label, path in bundles.items()
        if not (path / "model.onnx").is_file()
    ]
    problems += [
        f"pair {a}, {b}: {x} is not among the bundles" for a, b in pairs for x in (a, b) if x not in bundles
    ]
    if problems:
        raise BadInput("\n".join(problems))


def turns(labels: Sequence[str], repetitions: int) -> list[tuple[int, str]]:
    """(repetition, label) in the order of timing: every second round is reversed, A B B A A B ..."""
    rounds = [list(labels) if r % 2 == 0 else list(reversed(labels)) for r in range(repetitions)]
    return [(r, label) for r, labels_of_round in enumerate(rounds) for label in labels_of_round]


def group_by_memory(bundles: Mapping[str, Path], memory_bytes: int | None) -> list[list[str]]:
    """Labels that are open at the same time; one group unless `memory_bytes` forbids it.

    Bundles of equal size (the arms at one precision) stay together as long as they fit by themselves.
    """
    needed = {label: expected_memory_bytes(path) for label, path in bundles.items()}
    if memory_bytes is None or sum(needed.values()) <= memory_bytes:
        return [list(bundles)]
    groups: list[list[str]] = []
    for size in dict.fromkeys(needed.values()):
        equal = [label for label in bundles if needed[label] == size]
        parts = [equal] if size * len(equal) <= memory_bytes else [[label] for label in equal]
        for part in parts:
            if groups and sum(needed[label] for label in [*groups[-1], *part]) <= memory_bytes:
                groups[-1] += part
            else:
                groups.append(part)
    return groups


def expected_memory_bytes(bundle: Path) -> int:
    """Rough resident size of a worker: 256 MiB for the program, and 1.6 times the weights.

    Measured with SmolLM2-135M on x86: fp32 (540 MB of weights) 827 MB, int8 (267 MB) 315 MB, int4 (87 MB)
    251 MB; the factor covers weights that are held both as read and as repacked.
    """
    weights = sum(f.stat().st_size for f in bundle.glob("model.onnx*"))
    rounded = round(weights / MIB)  # two arms differ by a few bytes of names at most
    return 256 * MIB + int(1.6 * rounded * MIB)


def _one(worker: Worker, label: str, repetition: int, turn: int) -> dict[str, Any]:
    """One timed repetition with what the machine was doing meanwhile."""
    before, started = readings(), time.monotonic()
    run = worker.run()
    wall, after = time.monotonic() - started, readings()
    token_ms = run["token_ms"]
    return {
        "label": label,
        "repetition": repetition,
        "turn": turn,
        **run,
        "token_ms_p50": percentile(token_ms, 0.5),
        "token_ms_p90": percentile(token_ms, 0.9),
        "load_average_1m": after["load_average_1m"],
        "clock_mhz": after["clock_mhz"],
        "temperature_c": after["temperature_c"],
        "other_cpus": _others(before, after, run["cpu_s"], wall),
    }


def _others(
    before: Mapping[str, float | None], after: Mapping[str, float | None], own_s: float, wall_s: float
) -> float | None:
    """CPUs that other processes, or other guests of the host, kept busy on average; None if not told.

    The kernel counts in ticks of 10 ms, so nothing is said about runs too short for that.
    """
    if wall_s < SHORTEST_TOLD_S:
        return None
    taken = 0.0
    for name in ("busy_cpu_s", "stolen_cpu_s"):
        start, end = before[name], after[name]
        if start is None or end is None:
            return None
        taken += end - start
    return max(0.0, taken - own_s) / wall_s
