"""Time bundles on a host in turns, then score items there.

Each bundle has a worker process of its own (`worker.py`), loaded and warmed up once. The workers take turns:
A B C, C B A, A B C ... Whatever changes slowly (heat, clocks, another job) affects all bundles alike; over an
even number of rounds the reversal cancels what is linear in time. `export/runner/runner.py` does the timing
and defines the figures. Bundles are open together as far as they fit into memory.
"""

from __future__ import annotations

import math
import sys
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedisp.bench import results
from edgedisp.bench.bundles import find_graph, written_threads
from edgedisp.bench.devices import Address, BenchOptions, Device, DeviceLost, Item
from edgedisp.bench.system import describe
from edgedisp.bench.worker import RUNNER, Worker
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.core.results import DeviceResult, Json

MIB = 1 << 20
MEMORY_SHARE = 0.8  # of what is available, for all bundles that are open together
SWEEP_PROMPT, SWEEP_GENERATE, SWEEP_REPETITIONS = 32, 32, 5


class TimedHost(Device):
    """A machine with Python that has been reached. Raises BadInput for bundles that no host can time.

    name: as it is shown, `local` or `ssh://pi@192.0.2.7`. machine: what the runner's `--describe` gives.
    bundles: label -> folder, in the order of the turns; put arms of one precision side by side.
    """

    name: str
    machine: Json

    def __init__(self, bundles: Mapping[str, Path], options: BenchOptions) -> None:
        if not bundles:
            raise BadInput("no bundle to time; name at least one bundle folder")
        for label, path in bundles.items():
            if not (path / "model.onnx").is_file():
                layouts = " with --layouts onnxruntime-genai" if (path / "onnx").is_dir() else ""
                raise BadInput(
                    f"{label}: {path} holds no model.onnx; give a bundle folder made by the export{layouts}"
                )
        if missing := [label for pair in options.pairs for label in pair if label not in bundles]:
            raise BadInput(f"pairs: {missing[0]} is not among the bundles")
        self.bundles, self.options = bundles, options

    @abstractmethod
    def command(self, bundle: Path, words: Sequence[str]) -> list[str]:
        """The local command whose standard streams and exit code are those of the runner on the host.

        `bundle` is the folder on this machine, `words` the runner's options.
        """

    def copy(self, progress: Progress) -> None:
        """Copy to the host what the runner needs."""

    def measure(self, progress: Progress = silent) -> DeviceResult:
        """Sweep threads if the options say so, time the bundles in turns, then score.

        Raises BadInput for a bundle that cannot be timed. Where a worker ends or is silent for `timeout_s`:
        BuildFailed, or DeviceLost if something was timed before.
        """
        bundles, options = self.bundles, self.options
        self.copy(progress)
        sweeps: dict[str, Json] = {}
        if options.threads == "sweep":
            sweeps = self._sweep(progress)
            threads = {label: sweep["best"] for label, sweep in sweeps.items()}
        else:
            count, cores = options.threads, self.machine["physical_cores"]
            threads = {label: count or written_threads(path) or cores for label, path in bundles.items()}
        result = replace(self._time(bundles, threads, options, progress), threads=sweeps)
        return self._score(result, progress) if options.requests else result

    def _time(
        self,
        bundles: Mapping[str, Path],
        threads: Mapping[str, int],
        options: BenchOptions,
        progress: Progress,
    ) -> DeviceResult:
        """Time every bundle `options.repetitions` times, in turns."""
        available = self.machine["memory_available_bytes"]
        limit = options.memory_bytes or (None if available is None else int(MEMORY_SHARE * available))
        groups = group_by_memory(bundles, limit)
        facts: dict[str, Json] = {}  # of each bundle that was opened
        timed: list[Json] = []

        def step(note: str) -> None:
            progress(len(facts) + len(timed), (options.repetitions + 1) * len(bundles), note)

        def result() -> DeviceResult:
            graphs = {label: (find_graph(bundles[label]), facts[label]) for label in facts}
            measured = results.device_result(self.name, self.machine, timed, graphs, options)
            return replace(measured, options={**measured.options, "groups": groups})

        names = ("prompt", "generate", "seed", "warmup")
        sizes = [word for name in names for word in (f"--{name}", str(getattr(options, name)))]
        try:
            for group in groups:
                with ExitStack() as stack:
                    workers = {}
                    for label in group:  # one by one: a worker answers when it has loaded and warmed up
                        words = ["--interactive", "--threads", str(threads[label]), *sizes]
                        command = self.command(bundles[label], words)
                        workers[label] = stack.enter_context(Worker(label, command, options.timeout_s))
                        facts[label] = workers[label].facts
                        step(f"{label}: loaded in {facts[label]['load_s']:.1f} s")
                    for repetition, label in turns(group, options.repetitions):
                        if timed and options.pause_s:
                            time.sleep(options.pause_s)
                        turn = {"label": label, "repetition": repetition, "turn": len(timed)}
                        timed.append({**turn, **workers[label].ask({"run": 1})})
                        step(f"{label}: {timed[-1]['decode_tokens_per_s']:.1f} tokens/s")
        except BuildFailed as error:
            if not timed:
                raise
            message = f"{self.name}: lost in the middle: {error}"
            raise DeviceLost(message, replace(result(), lost=str(error))) from error
        return result()

    def _sweep(self, progress: Progress) -> dict[str, Json]:
        """Label -> {best, rows [{threads, decode_tokens_per_s, low, high, prefill_tokens_per_s}]}.

        Each count has a worker of its own, and the counts take turns. `best` has the highest median decoding
        speed; of equal ones the fewest threads.
        """
        quota, cpus = self.machine["cpu_quota"], self.machine["logical_cpus"]
        cpus = cpus if quota is None else min(cpus, max(1, int(quota)))
        short = replace(
            self.options,
            prompt=min(SWEEP_PROMPT, self.options.prompt),
            generate=min(SWEEP_GENERATE, self.options.generate),
            repetitions=max(SWEEP_REPETITIONS, self.options.repetitions),
            pairs=(),
        )
        counts = thread_counts(self.machine["physical_cores"], cpus)
        sweeps = {}
        for label, bundle in self.bundles.items():
            threads = {f"{label}, {count} threads": count for count in counts}
            rows = []
            for row in self._time(dict.fromkeys(threads, bundle), threads, short, progress).rows:
                decode, prefill = row.decode_tokens_per_s, row.prefill_tokens_per_s
                if decode and prefill:
                    speed = {"decode_tokens_per_s": decode.value, "low": decode.low, "high": decode.high}
                    rows.append({"threads": row.threads, **speed, "prefill_tokens_per_s": prefill.value})
            best = max(rows, key=lambda row: (row["decode_tokens_per_s"], -row["threads"]))  # type: ignore[operator]
            sweeps[label] = {"best": best["threads"], "rows": rows}
        return sweeps

    def _score(self, result: DeviceResult, progress: Progress) -> DeviceResult:
        """`result` with `answers`. Items go to a worker one by one, so a lost host leaves those before."""
        requests = self.options.requests
        answers: dict[str, list[Any]] = {label: [] for label in requests}
        result = replace(result, answers=answers)
        threads = {row.label: row.threads for row in result.rows}
        total = sum(map(len, requests.values()))
        try:
            for label, items in requests.items():
                # The last token of a request is only predicted.
                positions = max([2, *(len(c) + len(d) - 1 for item in items for c, d in item)])
                words = ["--interactive", "--positions", str(positions), "--threads", str(threads[label])]
                command = self.command(self.bundles[label], words)
                with Worker(label, command, self.options.timeout_s) as worker:
                    for item in items:
                        answers[label].append(_checked_scores(item, worker.ask({"score": item}), label))
                        progress(sum(map(len, answers.values())), total, f"{label}: scored")
        except (BadInput, BuildFailed) as error:
            message = f"{self.name}: lost while it scored: {error}"
            raise DeviceLost(message, replace(result, lost=str(error))) from error
        return result


class Local(TimedHost):
    """This machine: the runner is started by the Python that runs this program."""

    def __init__(self, bundles: Mapping[str, Path], options: BenchOptions, runner: Path = RUNNER) -> None:
        super().__init__(bundles, options)
        self.name, self.runner, self.machine = "local", runner, describe()

    def command(self, bundle: Path, words: Sequence[str]) -> list[str]:
        return [sys.executable, str(self.runner), *words, str(bundle)]


@contextmanager
def connect(address: Address, bundles: Mapping[str, Path], options: BenchOptions) -> Iterator[Local]:
    """This machine as a device; see `devices.py`."""
    yield Local(bundles, options)


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
