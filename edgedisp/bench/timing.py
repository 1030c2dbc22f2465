"""Time bundles on a host, in turns, and say how far the figures can be trusted.

Each bundle is loaded by a worker process of its own (`worker.py`) and warmed up once. Then the workers take
turns, one at a time: A B C, C B A, A B C ... Whatever changes slowly (heat, clocks, a neighbour's job) meets
all bundles alike, and the reversal takes out what is linear in time. What a repetition's figures mean stands
in `export/runner/edgedisp_runner.py`, which does the timing.

Three checks come with the figures (`summary.py`): drift over the repetitions, the CPU time that other
processes took meanwhile, and, for two bundles that ought to have one graph (the arms of a recipe), whether
they have and whether their speeds differ. Training changes values, not the graph, so a difference in speed
there is a fault of the measurement and is reported as one.

Bundles are timed together as long as they fit into memory; else bundles of equal size stay together. Before
that each is loaded once with its files forgotten by the system (`load_cold_s`), by a process that then ends:
the worker's own load, from memory, is the second one (`load_s`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from edgedisp.bench.devices import DeviceLost, Wanted
from edgedisp.bench.host import Host
from edgedisp.bench.scoring import with_answers
from edgedisp.bench.spread import percentile
from edgedisp.bench.summary import pair, row, warn_about_bits
from edgedisp.bench.worker import Worker
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent

MIB = 1 << 20
FEWEST = 5  # repetitions: with fewer, no interval of the median reaches 90 %
SHORTEST_TOLD_S = 0.5
STILL_CACHED = 0.05  # share of a file's pages: more than this in memory is no cold load


class Timed:
    """A host as a device: sweeps threads where that is asked for, then times.

    Raises BadInput for bundles that no host can time.
    """

    def __init__(self, host: Host, bundles: Mapping[str, Path], wanted: Wanted) -> None:
        check(bundles, wanted.pairs)
        self.host, self.bundles, self.wanted = host, bundles, wanted

    def measure(self, progress: Progress) -> dict[str, Any]:
        """See `devices.py`. Raises DeviceLost."""
        from edgedisp.bench.sweep import sweep

        wanted, found = self.wanted, {}
        threads: int | Mapping[str, int] | None = wanted.threads
        if wanted.sweep:
            found = sweep(self.bundles, self.host, wanted, progress)
            threads = {label: swept["best"] for label, swept in found.items()}
        result = measure(
            self.bundles,
            self.host,
            threads=threads,
            progress=progress,
            **wanted.timing(),
        )
        result = {**result, "threads": found} if found else result
        if not wanted.requests:
            return result
        return with_answers(result, self.host, self.bundles, wanted.requests, wanted.timeout_s, progress)


def measure(
    bundles: Mapping[str, Path],
    host: Host,
    *,
    prompt: int = 128,
    generate: int = 128,
    repetitions: int = 5,
    threads: int | Mapping[str, int] | None = None,
    seed: int = 0,
    pause_s: float = 0.0,
    warmup: int = 1,
    pairs: Sequence[tuple[str, str]] = (),
    cold: bool = True,
    memory_bytes: int | None = None,
    timeout_s: float = 900.0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Time every bundle `repetitions` times, in turns.

    bundles: label -> bundle folder; the labels' order is the order of the turns, so put arms of one
    precision side by side. `threads` for all, or by label; None: the physical cores of the host. `pairs`:
    labels (baseline, dispersed) that must have one graph. `cold`: load each once before, from the disk.
    `memory_bytes`: what the open bundles may take together (default: 80 % of what is available). Returns
    {device, rows, repetitions, pairs, machine, load_average, order, groups, warnings, options}, all JSON.

    Raises BadInput for a bundle that cannot be timed, BuildFailed where a worker dies or is silent for
    `timeout_s`, and of these DeviceLost once something has been timed. Workers are ended in every case.
    """
    check(bundles, pairs)
    machine, load_before = host.describe(), host.readings()["load_average_1m"]
    if memory_bytes is None and machine["memory_available_bytes"] is not None:
        memory_bytes = int(0.8 * machine["memory_available_bytes"])
    groups = group_by_memory(bundles, memory_bytes)
    threads = machine["physical_cores"] if threads is None else threads
    each = dict(threads) if isinstance(threads, Mapping) else dict.fromkeys(bundles, threads)
    options = {"prompt": prompt, "generate": generate, "seed": seed, "warmup": warmup}
    work = _Work(
        host, bundles, options, each, timeout_s, _Counter(progress, (repetitions + 1) * len(bundles))
    )
    host.place(bundles, progress)

    def result(load_after: float | None) -> dict[str, Any]:
        labels = [label for label in bundles if any(r["label"] == label for r in work.timed)]
        rows = [row(label, bundles[label], work.facts[label], work.timed, machine) for label in labels]
        warn_about_bits(rows, machine)
        return {
            "device": host.name,
            "rows": rows,
            "repetitions": work.timed,
            "pairs": [pair(a, b, bundles, work.timed) for a, b in pairs if {a, b} <= set(labels)],
            "machine": machine,
            "load_average": {"before": load_before, "after": load_after},
            "order": [repetition["label"] for repetition in work.timed],
            "groups": groups,
            "warnings": few(repetitions),
            "options": {**options, "threads": threads, "repetitions": repetitions, "pause_s": pause_s},
        }

    try:
        for group in groups:
            work.time(group, repetitions, pause_s, cold)
        return result(host.readings()["load_average_1m"])
    except BuildFailed as error:
        if not work.timed:
            raise
        lost = f"{host.name}: lost in the middle: {error}"
        raise DeviceLost(lost, {**result(None), "lost": str(error)}) from error


def few(repetitions: int) -> list[str]:
    """What to say of a measurement with few repetitions."""
    if repetitions >= FEWEST:
        return []
    return [f"{repetitions} repetitions are too few to tell a difference from chance; {FEWEST} or more can"]


class _Work:
    """The turns of one measurement, and what has come of them so far."""

    def __init__(
        self,
        host: Host,
        bundles: Mapping[str, Path],
        options: Mapping[str, int],
        threads: Mapping[str, int],
        timeout_s: float,
        step: _Counter,
    ) -> None:
        self.host, self.bundles, self.options, self.threads = host, bundles, options, threads
        self.timeout_s, self.step = timeout_s, step
        self.timed: list[dict[str, Any]] = []
        self.facts: dict[str, dict[str, Any]] = {}

    def time(self, group: Sequence[str], repetitions: int, pause_s: float, cold: bool) -> None:
        """Open the group's bundles and time them in turns."""
        colds = {label: self._cold_load(label) for label in group} if cold else {}
        with ExitStack() as stack:
            workers = {}
            for label in group:  # one after another: a worker answers when it has loaded and warmed up
                workers[label] = stack.enter_context(self._worker(label))
                self.facts[label] = {**workers[label].facts, "load_cold_s": colds.get(label)}
                self.step(f"{label}: loaded in {self.facts[label]['load_s']:.1f} s")
            for repetition, label in turns(group, repetitions):
                if self.timed and pause_s:
                    time.sleep(pause_s)
                self.timed.append(_one(workers[label], self.host, label, repetition, len(self.timed)))
                self.step(f"{label}: {self.timed[-1]['decode_tokens_per_s']:.1f} tokens/s")

    def _worker(self, label: str, **changes: Any) -> Worker:
        wanted = {"page-cache": "warm", **self.options, "threads": self.threads[label], **changes}
        words = ["--interactive"]
        for name, value in wanted.items():
            words += [f"--{name}", str(value)]
        return Worker(label, self.host.command(self.bundles[label], words), self.timeout_s)

    def _cold_load(self, label: str) -> float | None:
        """Seconds to load from the disk; None where the files could not be made to leave the memory."""
        with self._worker(label, warmup=0, **{"page-cache": "dropped"}) as worker:
            share = worker.facts.get("cached_share")
            return worker.facts["load_s"] if share is not None and share <= STILL_CACHED else None


class _Counter:
    """Counts the steps done for the progress callback."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, note: str) -> None:
        self.done += 1
        self.progress(self.done, self.total, note)


def check(bundles: Mapping[str, Path], pairs: Sequence[tuple[str, str]] = ()) -> None:
    """Refuse what cannot work before any process is started."""
    problems = [] if bundles else ["no bundle to time; name at least one bundle folder"]
    problems += [
        f"{label}: {path} holds no model.onnx; give a bundle folder made by the export"
        + (" with --layouts onnxruntime-genai" if (path / "onnx").is_dir() else "")
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
    files = list(bundle.glob("model.onnx*"))
    if len(files) == 1:  # a bundle whose graphs share their weights
        files += bundle.glob("onnx/*.onnx_data")
    weights = sum(f.stat().st_size for f in files)
    rounded = round(weights / MIB)  # two arms differ by a few bytes of names at most
    return 256 * MIB + int(1.6 * rounded * MIB)


def _one(worker: Worker, host: Host, label: str, repetition: int, turn: int) -> dict[str, Any]:
    """One timed repetition with what the machine was doing meanwhile."""
    before, started = host.readings(), time.monotonic()
    run = worker.run()
    wall, after = time.monotonic() - started, host.readings()
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
        "battery_j": after["battery_j"],
        "other_cpus": other_cpus(before, after, run["cpu_s"], wall),
    }


def other_cpus(
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
