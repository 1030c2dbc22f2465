"""Time bundles on a host in turns, then score items there.

Each bundle has a worker process of its own, loaded and warmed up once, so that this program's memory, threads
and imports stay out of the figures. The workers take turns: A B C, C B A, A B C ... Whatever changes slowly
(heat, clocks, another job) affects all alike; over an even number of rounds the reversal cancels what is
linear in time. `export/runner/runner.py` does the timing and defines the figures.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedisp.bench import results
from edgedisp.bench.bundles import find_graph, written_threads
from edgedisp.bench.devices import Address, BenchOptions, Device
from edgedisp.bench.system import RUNNER, describe
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import Progress, silent
from edgedisp.core.results import DeviceResult, Json, Timing

MIB = 1 << 20
MEMORY_SHARE = 0.8  # of what is available, for all bundles that are open together
TAIL_CHARS = 2000  # of what a worker wrote to stderr
QUIT_S, KILL_S = 5.0, 0.5
SWEEP_PROMPT, SWEEP_GENERATE, SWEEP_REPETITIONS = 32, 32, 5


class Worker:
    """A program that answers lines of JSON; a context manager that ends it with the block.

    Starts `command` and waits for its {"ready": facts}. Raises BadInput where it refuses the bundle (exit
    code 2), and BuildFailed where it ends, sends something else than JSON or is silent for `timeout_s`. It
    ends with its standard input, so it does not outlive this program.
    """

    def __init__(self, label: str, command: Sequence[str], timeout_s: float) -> None:
        self.label, self.timeout_s = label, timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        # A session of its own: Ctrl-C reaches this program alone, which then ends the workers.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        self._input: Any = self._process.stdin
        self._output: Any = self._process.stdout
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            self.facts: dict[str, Any] = self._answer().get("ready", {})
        except BaseException:
            self.close(KILL_S)
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(KILL_S if kind else QUIT_S)

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """Send one command and wait for its answer; the runner's docstring lists them."""
        try:
            self._input.write(json.dumps(command).encode() + b"\n")
            self._input.flush()
        except OSError as error:
            raise self._exited() from error
        return self._answer()

    def close(self, quit_s: float = QUIT_S) -> None:
        """Close the program's input, and kill it if it goes on for more than `quit_s`."""
        with suppress(OSError):
            self._input.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(quit_s)
        self._process.kill()
        self._process.wait()
        self._output.close()
        self._log.close()

    def _listen(self) -> None:
        """Queue each line of its output, then None."""
        with suppress(ValueError):  # closed meanwhile
            for line in self._output:
                self._lines.put(line)
        self._lines.put(None)

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self.timeout_s)
        except queue.Empty:
            raise BuildFailed(f"{self.label}: no answer within {self.timeout_s:g} s{self._tail()}") from None
        if line is None:
            raise self._exited()
        text = line.decode("utf-8", "replace").strip()[:200]
        try:
            answer = json.loads(line)
        except ValueError as error:
            raise BuildFailed(f"{self.label}: not JSON: {text!r}{self._tail()}") from error
        if not isinstance(answer, dict) or "error" in answer:
            raise BuildFailed(f"{self.label}: {text}")
        return answer

    def _exited(self) -> BadInput | BuildFailed:
        code: int | None = None  # it only closed its output
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(QUIT_S)
        message = f"{self.label}: the measuring process ended with code {code}{self._tail()}"
        return BadInput(message) if code == 2 else BuildFailed(message)

    def _tail(self) -> str:
        """The end of its stderr."""
        self._log.seek(0)
        text = self._log.read().decode("utf-8", "replace").strip()
        return f":\n{text[-TAIL_CHARS:]}" if text else ""


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

        Raises BadInput for a bundle that cannot be timed, and BuildFailed where a worker ends or is silent
        for `timeout_s` before anything is timed; later, the result has `lost`.
        """
        bundles, options = self.bundles, self.options
        self.copy(progress)
        sweeps: dict[str, list[Timing]] = {}
        if options.threads == "sweep":
            sweeps, lost = self._sweep(progress)
            if lost:
                return lost
            threads = {label: best_threads(rows) for label, rows in sweeps.items()}
        else:
            count, cores = options.threads, self.machine["physical_cores"]
            threads = {label: count or written_threads(path) or cores for label, path in bundles.items()}
        result = replace(self._time(bundles, threads, options, progress), sweeps=sweeps)
        return self._score(result, progress) if options.requests and not result.lost else result

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
            return replace(result(), lost=str(error))
        return result()

    def _sweep(self, progress: Progress) -> tuple[dict[str, list[Timing]], DeviceResult | None]:
        """Label -> its timings, one for each thread count; and the result in which the host was lost."""
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
            timed = self._time(dict.fromkeys(threads, bundle), threads, short, progress)
            sweeps[label] = timed.rows
            if timed.lost:
                return sweeps, timed
        return sweeps, None

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
                        answers[label].append(worker.ask({"score": item})["scores"])
                        progress(sum(map(len, answers.values())), total, f"{label}: scored")
        except (BadInput, BuildFailed) as error:
            return replace(result, lost=str(error))
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


def best_threads(rows: Sequence[Timing]) -> int:
    """The count with the highest median decoding speed; of equal ones the fewest threads."""
    speeds = {row.threads or 0: row.decode_tokens_per_s and row.decode_tokens_per_s.value for row in rows}
    return max(speeds, key=lambda count: (speeds[count] or 0.0, -count))


def thread_counts(physical_cores: int, logical_cpus: int) -> list[int]:
    """1 .. cores; beyond 8 only doublings, the physical cores, and all CPUs where a core has two of them."""
    counts = {*range(1, min(physical_cores, 8) + 1), physical_cores, max(physical_cores, logical_cpus)}
    return sorted(counts | {count for count in (16, 32, 64, 128) if count < physical_cores})
