"""Time bundles on a host in turns, then score items there.

Each bundle has a worker process of its own (`worker.py`), loaded and warmed up once. The workers take turns:
A B C, C B A, A B C ... Whatever changes slowly (heat, clocks, another job) affects all bundles alike; over an
even number of rounds the reversal cancels what is linear in time. `export/runner/runner.py` does the timing
and defines the figures. Bundles are open together as far as they fit into memory.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgedisp.bench import results
from edgedisp.bench.devices import BenchOptions, Device, DeviceLost, Item
from edgedisp.bench.graph_stats import find_graph, written_threads
from edgedisp.bench.worker import Worker
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.core.results import DeviceResult

MIB = 1 << 20
MEMORY_SHARE = 0.8  # of what is available, for all bundles that are open together
SWEEP_PROMPT, SWEEP_GENERATE, SWEEP_REPETITIONS = 32, 32, 5


class Host(ABC):
    """A machine with Python, connected: what it is, and how to start the runner there.

    name: as it is shown, `local` or `ssh://pi@192.0.2.7`. machine: what the runner's `--describe` gives.
    """

    name: str
    machine: dict[str, Any]

    @abstractmethod
    def command(self, bundle: Path, options: Sequence[str]) -> list[str]:
        """The command to start HERE whose standard streams and exit code are those of the runner THERE.

        `bundle` is the folder on this machine, `options` the runner's.
        """

    def copy(self, bundles: Mapping[str, Path], progress: Progress) -> None:  # noqa: B027 (nothing to do here)
        """Copy there what the runner needs."""


class TimedHost(Device):
    """A host as a device. Raises BadInput for bundles that no host can time."""

    def __init__(self, host: Host, bundles: Mapping[str, Path], options: BenchOptions) -> None:
        _check(bundles, options.pairs)
        self.host, self.bundles, self.options = host, bundles, options

    def measure(self, progress: Progress) -> DeviceResult:
        """Sweep threads if the options say so, time, then score. Raises DeviceLost."""
        host, bundles, options = self.host, self.bundles, self.options
        if options.threads == "sweep":
            sweeps = sweep_threads(bundles, host, options, progress)
            threads = {label: sweep["best"] for label, sweep in sweeps.items()}
            result = replace(measure(bundles, host, options, progress, threads), threads=sweeps)
        else:
            result = measure(bundles, host, options, progress)
        return self._score(result, progress) if options.requests else result

    def _score(self, result: DeviceResult, progress: Progress) -> DeviceResult:
        """`result` with `answers`. Items go to a worker one by one, so a lost host leaves those before."""
        requests = self.options.requests
        answers: dict[str, list[Any]] = {label: [] for label in requests}
        result = replace(result, answers=answers)
        threads = {row.label: row.threads for row in result.rows}
        total = sum(map(len, requests.values()))
        try:
            for label, items in requests.items():
                words = ["--positions", str(_positions(items)), "--threads", str(threads[label])]
                command = self.host.command(self.bundles[label], ["--interactive", *words])
                with Worker(label, command, self.options.timeout_s) as worker:
                    for item in items:
                        answers[label].append(_checked_scores(item, worker.ask({"score": item}), label))
                        progress(sum(map(len, answers.values())), total, f"{label}: scored")
        except (BadInput, BuildFailed) as error:
            lost = f"{self.host.name}: lost while it scored: {error}"
            raise DeviceLost(lost, replace(result, lost=str(error))) from error
        return result


def measure(
    bundles: Mapping[str, Path],
    host: Host,
    options: BenchOptions,
    progress: Progress = silent,
    threads: Mapping[str, int] | None = None,
) -> DeviceResult:
    """Time every bundle `options.repetitions` times, in turns.

    bundles: label -> folder, in the order of the turns; put arms of one precision side by side. threads: by
    label; None: as `options.threads` says. Raises BadInput for a bundle that cannot be timed. Where a worker
    ends or is silent for `timeout_s`: BuildFailed, or DeviceLost if something was timed before.
    """
    _check(bundles, options.pairs)
    available = host.machine["memory_available_bytes"]
    limit = options.memory_bytes or (None if available is None else int(MEMORY_SHARE * available))
    groups = group_by_memory(bundles, limit)
    measurement = _Measurement(host, bundles, options, threads or _threads(bundles, host, options), progress)
    host.copy(bundles, progress)
    try:
        for group in groups:
            measurement.time(group)
    except BuildFailed as error:
        if not measurement.timed:
            raise
        partial = replace(measurement.result(groups), lost=str(error))
        raise DeviceLost(f"{host.name}: lost in the middle: {error}", partial) from error
    return measurement.result(groups)


def _threads(bundles: Mapping[str, Path], host: Host, options: BenchOptions) -> dict[str, int]:
    """Label -> the option's count, else the one written into the bundle, else the host's physical cores."""
    if isinstance(options.threads, int):
        return dict.fromkeys(bundles, options.threads)
    return {label: written_threads(path) or host.machine["physical_cores"] for label, path in bundles.items()}


@dataclass
class _Measurement:
    """The turns of one measurement so far. facts: label -> what its worker said when it was ready."""

    host: Host
    bundles: Mapping[str, Path]
    options: BenchOptions
    threads: Mapping[str, int]
    progress: Progress
    timed: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)

    def time(self, group: Sequence[str]) -> None:
        """Open the group's bundles and time them in turns."""
        with ExitStack() as stack:
            workers = {}
            for label in group:  # one after another: a worker answers when it has loaded and warmed up
                words = ["--interactive", "--threads", str(self.threads[label])]
                for name in ("prompt", "generate", "seed", "warmup"):
                    words += [f"--{name}", str(getattr(self.options, name))]
                command = self.host.command(self.bundles[label], words)
                workers[label] = stack.enter_context(Worker(label, command, self.options.timeout_s))
                self.facts[label] = workers[label].facts
                self._step(f"{label}: loaded in {self.facts[label]['load_s']:.1f} s")
            for repetition, label in turns(group, self.options.repetitions):
                if self.timed and self.options.pause_s:
                    time.sleep(self.options.pause_s)
                turn = {"label": label, "repetition": repetition, "turn": len(self.timed)}
                self.timed.append({**turn, **workers[label].run()})
                self._step(f"{label}: {self.timed[-1]['decode_tokens_per_s']:.1f} tokens/s")

    def _step(self, note: str) -> None:
        total = (self.options.repetitions + 1) * len(self.bundles)
        self.progress(len(self.facts) + len(self.timed), total, note)

    def result(self, groups: list[list[str]]) -> DeviceResult:
        """What `measure` returns, of the turns so far."""
        bundles = {label: (find_graph(self.bundles[label]), facts) for label, facts in self.facts.items()}
        host = self.host
        result = results.device_result(host.name, host.machine, self.timed, bundles, self.options)
        return replace(result, options={**result.options, "groups": groups})


def _check(bundles: Mapping[str, Path], pairs: Sequence[tuple[str, str]]) -> None:
    """Refuse what cannot work before any process is started."""
    if not bundles:
        raise BadInput("no bundle to time; name at least one bundle folder")
    for label, path in bundles.items():
        if not (path / "model.onnx").is_file():
            layouts = " with --layouts onnxruntime-genai" if (path / "onnx").is_dir() else ""
            raise BadInput(
                f"{label}: {path} holds no model.onnx; give a bundle folder made by the export{layouts}"
            )
    if missing := [label for pair in pairs for label in pair if label not in bundles]:
        raise BadInput(f"pairs: {missing[0]} is not among the bundles")


def turns(labels: Sequence[str], repetitions: int) -> list[tuple[int, str]]:
    """(repetition, label) in the order of timing: every second round is reversed, A B B A A B ..."""
    return [(r, label) for r in range(repetitions) for label in (labels if r % 2 == 0 else labels[::-1])]


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
    251 MB; the factor covers weights that are in memory both as read and as repacked.
    """
    files = list(bundle.glob("model.onnx*"))
    if len(files) == 1:  # a bundle whose graphs share their weights
        files += bundle.glob("onnx/*.onnx_data")
    rounded = round(sum(f.stat().st_size for f in files) / MIB)  # two arms differ by a few bytes of names
    return 256 * MIB + int(1.6 * rounded * MIB)


def thread_counts(physical_cores: int, logical_cpus: int) -> list[int]:
    """1 .. cores; beyond 8 only doublings, the physical cores, and all CPUs where a core has two of them."""
    counts = {*range(1, min(physical_cores, 8) + 1), physical_cores, max(physical_cores, logical_cpus)}
    return sorted(counts | {count for count in (16, 32, 64, 128) if count < physical_cores})


def sweep_threads(
    bundles: Mapping[str, Path], host: Host, options: BenchOptions, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Label -> {best, rows [{threads, decode_tokens_per_s, low, high, prefill_tokens_per_s}]}.

    Each count has a worker of its own, and the counts take turns. `best` has the highest median decoding
    speed; of equal ones the fewest threads.
    """
    machine = host.machine
    quota, cpus = machine["cpu_quota"], machine["logical_cpus"]
    cpus = cpus if quota is None else min(cpus, max(1, int(quota)))
    short = replace(
        options,
        prompt=min(SWEEP_PROMPT, options.prompt),
        generate=min(SWEEP_GENERATE, options.generate),
        repetitions=max(SWEEP_REPETITIONS, options.repetitions),
        pairs=(),
    )
    sweeps = {}
    for label, bundle in bundles.items():
        counts = thread_counts(machine["physical_cores"], cpus)
        threads = {f"{label}, {count} threads": count for count in counts}
        timings = measure(dict.fromkeys(threads, bundle), host, short, progress, threads).rows
        rows: list[dict[str, Any]] = [
            {
                "threads": row.threads,
                "decode_tokens_per_s": row.decode_tokens_per_s.value,
                "low": row.decode_tokens_per_s.low,
                "high": row.decode_tokens_per_s.high,
                "prefill_tokens_per_s": row.prefill_tokens_per_s.value,
            }
            for row in timings
            if row.decode_tokens_per_s and row.prefill_tokens_per_s
        ]
        best = max(rows, key=lambda row: (row["decode_tokens_per_s"], -row["threads"]))
        sweeps[label] = {"best": best["threads"], "rows": rows}
    return sweeps


def _positions(items: Sequence[Item]) -> int:
    """Most positions that a request takes: the last token is only predicted."""
    sizes = [len(context) + len(continuation) - 1 for item in items for context, continuation in item]
    return max([2, *sizes])


def _checked_scores(item: Item, answer: Mapping[str, Any], label: str) -> list[tuple[float, bool]]:
    """The scores of one item. BuildFailed for anything else."""
    scores = answer.get("scores")
    try:
        pairs = [(float(total), greedy) for total, greedy in scores or ()]
    except (TypeError, ValueError):
        pairs = []
    valid = all(math.isfinite(total) and isinstance(greedy, bool) for total, greedy in pairs)
    if not valid or len(pairs) != len(item):
        raise BuildFailed(f"{label}: sent something else than {len(item)} scores: {str(scores)[:200]}")
    return pairs
