"""Time bundles on a host, in turns, and score them there when the timing is done.

Each bundle is loaded by a worker process of its own (`worker.py`) and warmed up once. Then the workers take
turns, one at a time: A B C, C B A, A B C ... Whatever changes slowly (heat, clocks, a neighbour's job) meets
all bundles alike; over an even number of rounds the reversal takes out what is linear in time. What a figure
means stands in `export/runner/runner.py`, which does the timing.

Bundles are open together as long as they fit into memory; else bundles of equal size stay together.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedisp.bench import results
from edgedisp.bench.devices import BenchOptions, Device, DeviceLost, Item
from edgedisp.bench.graph_stats import find_graph, written_threads
from edgedisp.bench.worker import Worker
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent

MIB = 1 << 20
MEMORY_SHARE = 0.8  # of what is available, for all bundles that are open together
SWEEP_PROMPT, SWEEP_GENERATE, SWEEP_REPETITIONS = 32, 32, 5
SWEEP_ALL_UP_TO = 8


class Host(ABC):
    """A machine with Python, reached and ready: what it is, and a way to start the runner there."""

    name: str
    """As it is shown: `local`, `ssh://pi@192.0.2.7`."""
    machine: dict[str, Any]
    """What the runner's `--describe` gives."""

    @abstractmethod
    def command(self, bundle: Path, options: Sequence[str]) -> list[str]:
        """The program to start HERE whose standard streams are those of the runner THERE.

        `bundle` is the folder on this machine, `options` the runner's. The exit code is the runner's.
        """

    def copy(self, bundles: Mapping[str, Path], progress: Progress) -> None:  # noqa: B027 (nothing to do here)
        """Put there what the runner needs and is not there yet."""


class TimedHost(Device):
    """A host as a device. Raises BadInput for bundles that no host can time."""

    def __init__(self, host: Host, bundles: Mapping[str, Path], options: BenchOptions) -> None:
        _check(bundles, options.pairs)
        self.host, self.bundles, self.options = host, bundles, options

    def measure(self, progress: Progress) -> dict[str, Any]:
        """Sweep threads where that is asked for, time, then score. Raises DeviceLost."""
        host, bundles, options = self.host, self.bundles, self.options
        if options.threads == "sweep":
            sweeps = sweep_threads(bundles, host, options, progress)
            threads = {label: sweep["best"] for label, sweep in sweeps.items()}
            result = {**measure(bundles, host, options, progress, threads), "threads": sweeps}
        else:
            result = measure(bundles, host, options, progress)
        return _score(result, host, bundles, options, progress) if options.requests else result


def measure(
    bundles: Mapping[str, Path],
    host: Host,
    options: BenchOptions,
    progress: Progress = silent,
    threads: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Time every bundle `options.repetitions` times, in turns.

    bundles: label -> folder; their order is that of the turns, so put arms of one precision side by side.
    threads: by label; None: as `options.threads` says. Returns {device, rows, repetitions, pairs, machine,
    load_average, order, groups, warnings, options}, all JSON.

    Raises BadInput for a bundle that cannot be timed, BuildFailed where a worker dies or is silent for
    `timeout_s`, and of these DeviceLost once something has been timed. Workers are ended in every case.
    """
    _check(bundles, options.pairs)
    available = host.machine["memory_available_bytes"]
    room = options.memory_bytes or (None if available is None else int(MEMORY_SHARE * available))
    groups = group_by_memory(bundles, room)
    turns_left = _Turns(host, bundles, options, threads or _threads(bundles, host, options), progress)
    host.copy(bundles, progress)
    try:
        for group in groups:
            turns_left.time(group)
        return turns_left.result(groups)
    except BuildFailed as error:
        if not turns_left.timed:
            raise
        lost = f"{host.name}: lost in the middle: {error}"
        raise DeviceLost(lost, {**turns_left.result(groups), "lost": str(error)}) from error


def _threads(bundles: Mapping[str, Path], host: Host, options: BenchOptions) -> dict[str, int]:
    """Label -> the count asked for, else the one written into the bundle, else the host's physical cores."""
    if isinstance(options.threads, int):
        return dict.fromkeys(bundles, options.threads)
    return {label: written_threads(path) or host.machine["physical_cores"] for label, path in bundles.items()}


class _Turns:
    """The turns of one measurement, and what has come of them so far."""

    def __init__(
        self,
        host: Host,
        bundles: Mapping[str, Path],
        options: BenchOptions,
        threads: Mapping[str, int],
        progress: Progress,
    ) -> None:
        self.host, self.bundles, self.options, self.threads = host, bundles, options, threads
        self.progress, self.done = progress, 0
        self.timed: list[dict[str, Any]] = []
        self.facts: dict[str, dict[str, Any]] = {}

    def time(self, group: Sequence[str]) -> None:
        """Open the group's bundles and time them in turns."""
        with ExitStack() as stack:
            workers = {}
            for label in group:  # one after another: a worker answers when it has loaded and warmed up
                workers[label] = stack.enter_context(self._worker(label))
                self.facts[label] = workers[label].facts
                self._step(f"{label}: loaded in {self.facts[label]['load_s']:.1f} s")
            for repetition, label in turns(group, self.options.repetitions):
                if self.timed and self.options.pause_s:
                    time.sleep(self.options.pause_s)
                place = {"label": label, "repetition": repetition, "turn": len(self.timed)}
                self.timed.append({**place, **workers[label].run()})
                self._step(f"{label}: {self.timed[-1]['decode_tokens_per_s']:.1f} tokens/s")

    def _worker(self, label: str) -> Worker:
        words = ["--interactive", "--threads", str(self.threads[label])]
        for name in ("prompt", "generate", "seed", "warmup"):
            words += [f"--{name}", str(getattr(self.options, name))]
        return Worker(label, self.host.command(self.bundles[label], words), self.options.timeout_s)

    def _step(self, note: str) -> None:
        self.done += 1
        self.progress(self.done, (self.options.repetitions + 1) * len(self.bundles), note)

    def result(self, groups: list[list[str]]) -> dict[str, Any]:
        """What `measure` returns, of the turns so far."""
        options, machine, timed = self.options, self.host.machine, self.timed
        labels = [label for label in self.bundles if any(r["label"] == label for r in timed)]
        rows = [
            results.summarize_bundle(
                label, find_graph(self.bundles[label]), self.facts[label], timed, machine
            )
            for label in labels
        ]
        results.warn_about_bits(rows, machine)
        counts = set(self.threads.values())
        names = ("prompt", "generate", "seed", "warmup", "repetitions", "pause_s")
        return {
            "device": self.host.name,
            "rows": rows,
            "repetitions": timed,
            "pairs": [
                results.compare_twins(a, b, self.bundles, timed)
                for a, b in options.pairs
                if {a, b} <= set(labels)
            ],
            "machine": machine,
            "load_average": {
                "before": machine.get("load_average_1m"),
                "after": timed[-1]["load_average_1m"] if timed else None,
            },
            "order": [repetition["label"] for repetition in timed],
            "groups": groups,
            "warnings": results.few_repetitions(options.repetitions),
            "options": {
                **{name: getattr(options, name) for name in names},
                "threads": counts.pop() if len(counts) == 1 else dict(self.threads),
            },
        }


def _check(bundles: Mapping[str, Path], pairs: Sequence[tuple[str, str]] = ()) -> None:
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
    rounded = round(sum(f.stat().st_size for f in files) / MIB)  # two arms differ by a few bytes of names
    return 256 * MIB + int(1.6 * rounded * MIB)


def thread_counts(physical_cores: int, logical_cpus: int) -> list[int]:
    """1 .. cores; beyond 8 only doublings, the physical cores, and all CPUs where a core has two of them."""
    counts = set(range(1, min(physical_cores, SWEEP_ALL_UP_TO) + 1))
    counts |= {count for count in (16, 32, 64, 128) if count < physical_cores}
    return sorted({*counts, physical_cores, max(physical_cores, logical_cpus)})


def sweep_threads(
    bundles: Mapping[str, Path], host: Host, options: BenchOptions, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Label -> {best, rows [{threads, decode_tokens_per_s, low, high, prefill_tokens_per_s}]}.

    Each count has a worker of its own, and the counts take turns. `best` has the highest median decoding
    speed; of equal ones the fewest threads.
    """
    machine = host.machine
    quota = machine["cpu_quota"]
    cpus = machine["logical_cpus"] if quota is None else min(machine["logical_cpus"], max(1, int(quota)))
    short = replace(
        options,
        prompt=min(SWEEP_PROMPT, options.prompt),
        generate=min(SWEEP_GENERATE, options.generate),
        repetitions=max(SWEEP_REPETITIONS, options.repetitions),
        pairs=(),
    )
    sweeps = {}
    for label, bundle in bundles.items():
        threads = {
            f"{label}, {count} threads": count for count in thread_counts(machine["physical_cores"], cpus)
        }
        timed = measure(dict.fromkeys(threads, bundle), host, short, progress, threads)
        rows = [
            {
                **{name: row[name] for name in ("threads", "decode_tokens_per_s", "prefill_tokens_per_s")},
                **{name: row["spread"]["decode_tokens_per_s"][name] for name in ("low", "high")},
            }
            for row in timed["rows"]
        ]
        best = max(rows, key=lambda row: (row["decode_tokens_per_s"], -row["threads"]))
        sweeps[label] = {"best": best["threads"], "rows": rows}
    return sweeps


def _score(
    result: dict[str, Any],
    host: Host,
    bundles: Mapping[str, Path],
    options: BenchOptions,
    progress: Progress,
) -> dict[str, Any]:
    """`result` with `answers`: bundle -> items answered, (sum of log-probabilities, all greedy) by request.

    An item is one line to a bundle's worker, so a host that is lost leaves the items that it had answered.
    Raises DeviceLost with these where a worker refuses, dies, says something else, or is silent.
    """
    answers: dict[str, list[Any]] = {label: [] for label in options.requests}
    threads = {row["label"]: row["threads"] for row in result["rows"]}
    done, total = 0, sum(map(len, options.requests.values()))
    try:
        for label, items in options.requests.items():
            words = ["--interactive", "--positions", str(positions(items)), "--threads", str(threads[label])]
            with Worker(label, host.command(bundles[label], words), options.timeout_s) as worker:
                for item in items:
                    scores = worker.ask({"score": item}).get("scores")
                    answers[label].append(_checked_scores(item, scores, label))
                    done += 1
                    progress(done, total, f"{label}: scored")
    except (BadInput, BuildFailed) as error:
        lost = f"{host.name}: lost while it scored: {error}"
        raise DeviceLost(lost, {**result, "answers": answers, "lost": str(error)}) from error
    return {**result, "answers": answers}


def positions(items: Sequence[Item]) -> int:
    """Most positions that a request takes: the last token is only predicted."""
    sizes = [len(context) + len(continuation) - 1 for item in items for context, continuation in item]
    return max([2, *sizes])


def _checked_scores(item: Item, scores: Any, label: str) -> list[tuple[float, bool]]:
    """The answers to one item. BuildFailed for anything else."""
    try:
        pairs = [(float(total), greedy) for total, greedy in scores]
        fits = all(math.isfinite(total) and isinstance(greedy, bool) for total, greedy in pairs)
    except (TypeError, ValueError):
        pairs, fits = [], False
    if not fits or len(pairs) != len(item):
        raise BuildFailed(f"{label}: sent something else than {len(item)} scores: {str(scores)[:200]}")
    return pairs
