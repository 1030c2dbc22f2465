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

from edgedisp.bench.bundles import checked_runtime
from edgedisp.bench.devices import MIB, BenchOptions, Device
from edgedisp.bench.results import device_result
from edgedisp.bench.system import RUNNER, describe, runner
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import GGUF_FILE
from edgedisp.core.progress import Progress, silent
from edgedisp.core.results import DeviceResult, Estimate, Json, Timing

MEMORY_SHARE = 0.8  # of what is available, for all bundles that are open together
TAIL_CHARS = 2000  # of what a program wrote to stderr
QUIT_S, KILL_S = 5.0, 0.5
SWEEP_TOKENS = 32  # of prompt and answer


class Worker:
    """A program that answers lines of JSON and ends with its standard input; a context manager ends it, too.

    Starts `command` and waits for its {"ready": facts}. Raises BadInput where it refuses the bundle (exit
    code 2), BuildFailed where it ends, sends something else than JSON or is silent for `timeout_s`.
    """

    def __init__(self, label: str, command: Sequence[str], timeout_s: float) -> None:
        self.label, self.timeout_s = label, timeout_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        pipe = subprocess.PIPE
        # A session of its own: Ctrl-C reaches this program alone, which then ends the workers.
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=self._log, start_new_session=True
        )
        self._input: Any = self._process.stdin
        self._output: Any = self._process.stdout
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            self.facts: Json = self._answer().get("ready", {})
        except BaseException:
            self.close(KILL_S)
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(KILL_S if kind else QUIT_S)

    def ask(self, command: Json) -> Json:
        """Send one command and wait for its answer; the runner's docstring lists them."""
        with suppress(OSError):  # it has ended, which is said below
            self._input.write(json.dumps(command).encode() + b"\n")
            self._input.flush()
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

    def _answer(self) -> Json:
        try:
            line = self._lines.get(timeout=self.timeout_s)
        except queue.Empty:
            raise BuildFailed(self._message(f"no answer within {self.timeout_s:g} s")) from None
        if line is None:
            code: int | None = None  # it only closed its output
            with suppress(subprocess.TimeoutExpired):
                code = self._process.wait(QUIT_S)
            message = self._message(f"the measuring process ended with code {code}")
            raise BadInput(message) if code == 2 else BuildFailed(message)
        with suppress(ValueError):
            answer = json.loads(line)
            if isinstance(answer, dict) and "error" not in answer:
                return answer
        raise BuildFailed(self._message(f"not an answer: {line[:200]!r}"))

    def _message(self, fault: str) -> str:
        return f"{self.label}: {fault}{log_tail(self._log)}"


def log_tail(file: Any) -> str:
    """The end of what a program wrote to its log, on lines of their own."""
    file.seek(0)
    text = file.read().decode("utf-8", "replace").strip()
    return f":\n{text[-TAIL_CHARS:]}" if text else ""


class Host(Device):
    """A machine with Python that has been reached; machine: what the runner's `--describe` gives there.

    Raises BadInput for bundles (label -> folder, in the order of the turns) that no host can time.
    """

    name: str
    machine: Json
    graph_name, advice = "model.onnx", "--layouts onnxruntime-genai"

    def __init__(self, bundles: Mapping[str, Path], options: BenchOptions) -> None:
        for label, path in bundles.items():
            if not (path / self.graph_name).is_file():
                raise BadInput(
                    f"{label}: {path} holds no {self.graph_name}; give a bundle folder made by the export "
                    f"with {self.advice}"
                )
        self.bundles, self.options = bundles, options

    @abstractmethod
    def command(self, bundle: Path, words: Sequence[str]) -> list[str]:
        """The local command whose streams and exit code are those of the runner on the host, with the options
        `words`; `bundle` is the folder on this machine."""

    def copy(self, progress: Progress) -> None:
        """Copy to the host what the runner needs."""

    def measure(self, progress: Progress = silent) -> DeviceResult:
        """Sweep threads if the options say so, time the bundles in turns, then score; see `devices.py`."""
        bundles, count = self.bundles, self.options.threads
        self.copy(progress)
        sweeps: dict[str, list[Timing]] = {}
        if count == "sweep":
            for label, bundle in bundles.items():
                sweep = self._sweep(label, bundle, progress)
                if sweep.lost:
                    return replace(sweep, sweeps=sweeps)
                sweeps[label] = sweep.rows
            threads = {label: fastest(rows).threads for label, rows in sweeps.items()}
        else:
            threads = dict.fromkeys(bundles, count)
        result = self._time(bundles, threads, self.options, progress)
        result = replace(result, sweeps=sweeps, warnings=(*result.warnings, *self._other_runtime()))
        return self._score(result, progress) if self.options.requests and not result.lost else result

    def _other_runtime(self) -> Iterator[str]:
        """What was checked with another onnxruntime than the host's, by its manifest."""
        version = self.machine["packages"].get("onnxruntime")  # None: another runtime runs the bundles
        for label, checked in {label: checked_runtime(path) for label, path in self.bundles.items()}.items():
            if version is not None and checked not in (None, version):
                yield f"{label} was checked with onnxruntime {checked}, and {version} ran it here"

    def _worker(self, label: str, bundle: Path, threads: int | None, **options: int) -> Worker:
        """A runner that has opened a bundle; threads None: its own choice."""
        words = [] if threads is None else ["--threads", str(threads)]
        for name, value in options.items():
            words += [f"--{name}", str(value)]
        return Worker(label, self.command(bundle, words), self.options.timeout_s)

    def _time(
        self,
        bundles: Mapping[str, Path],
        threads: Mapping[str, int | None],
        options: BenchOptions,
        progress: Progress,
    ) -> DeviceResult:
        """Time every bundle `options.repetitions` times, in turns."""
        available = self.machine["memory_available_bytes"]
        limit = options.memory_bytes or (None if available is None else int(MEMORY_SHARE * available))
        groups = group_by_memory(bundles, limit)
        facts: dict[str, Json] = {}  # of each bundle that was opened
        timed: list[Json] = []
        sizes = {name: getattr(options, name) for name in ("prompt", "generate", "seed", "warmup")}

        def step(note: str) -> None:
            progress(len(facts) + len(timed), (options.repetitions + 1) * len(bundles), note)

        lost: str | None = None
        try:
            for group in groups:
                with ExitStack() as stack:
                    workers = {}
                    for label in group:  # one by one: a worker answers when it has loaded and warmed up
                        worker = self._worker(label, bundles[label], threads[label], **sizes)
                        workers[label] = stack.enter_context(worker)
                        facts[label] = worker.facts
                        step(f"{label}: loaded in {worker.facts['load_s']:.1f} s")
                    for repetition, label in turns(group, options.repetitions):
                        if timed and options.pause_s:
                            time.sleep(options.pause_s)
                        turn = {"label": label, "repetition": repetition, "turn": len(timed)}
                        timed.append({**turn, **workers[label].ask({"run": 1})})
                        step(f"{label}: {timed[-1]['decode_tokens_per_s']:.1f} tokens/s")
        except BuildFailed as error:
            if not timed:
                raise
            lost = str(error)
        graphs = {label: (bundles[label] / self.graph_name, facts[label]) for label in facts}
        result = device_result(self.name, self.machine, timed, graphs, options)
        return replace(result, options={**result.options, "groups": groups}, lost=lost)

    def _sweep(self, label: str, bundle: Path, progress: Progress) -> DeviceResult:
        """A bundle timed with each thread count, a row each."""
        short = replace(self.options, prompt=SWEEP_TOKENS, generate=SWEEP_TOKENS)
        quota, cpus = self.machine["cpu_quota"], self.machine["logical_cpus"]
        allowed = cpus if quota is None else min(cpus, max(1, int(quota)))
        counts = thread_counts(self.machine["physical_cores"], allowed)
        threads = {f"{label}, {count} threads": count for count in counts}
        return self._time(dict.fromkeys(threads, bundle), threads, short, progress)

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
                with self._worker(label, self.bundles[label], threads[label], positions=positions) as worker:
                    for item in items:
                        answers[label].append(worker.ask({"score": item})["scores"])
                        progress(sum(map(len, answers.values())), total, f"{label}: scored")
        except (BadInput, BuildFailed) as error:
            return replace(result, lost=str(error))
        return result


class Local(Host):
    """This machine: the runner is started by the Python that runs this program."""

    def __init__(self, bundles: Mapping[str, Path], options: BenchOptions, runner: Path = RUNNER) -> None:
        super().__init__(bundles, options)
        self.name, self.runner, self.machine = "local", runner, describe()

    def command(self, bundle: Path, words: Sequence[str]) -> list[str]:
        return [sys.executable, str(self.runner), *words, str(bundle)]


@contextmanager
def connect(name: str, bundles: Mapping[str, Path], options: BenchOptions) -> Iterator[Local]:
    """This machine as a device; see `devices.py`."""
    yield Local(bundles, options)


def turns(labels: Sequence[str], repetitions: int) -> list[tuple[int, str]]:
    """(repetition, label) in the order of timing: every second round is reversed, A B B A A B ..."""
    return [(r, label) for r in range(repetitions) for label in (labels if r % 2 == 0 else labels[::-1])]


def group_by_memory(bundles: Mapping[str, Path], memory_bytes: int | None) -> list[list[str]]:
    """Labels that are open at the same time: all if they fit, else those of equal size (the arms at one
    precision), each alone where even these do not fit."""
    needed = {label: expected_memory_bytes(path) for label, path in bundles.items()}
    if memory_bytes is None or sum(needed.values()) <= memory_bytes:
        return [list(bundles)]
    groups: list[list[str]] = []
    for size in dict.fromkeys(needed.values()):
        equal = [label for label in bundles if needed[label] == size]
        groups += [equal] if size * len(equal) <= memory_bytes else [[label] for label in equal]
    return groups


def expected_memory_bytes(bundle: Path) -> int:
    """Rough resident size of a worker: 256 MiB for the program, and 1.6 times the weights.

    Measured with SmolLM2-135M on x86: fp32 (540 MB of weights) 827 MB, int8 (267 MB) 315 MB, int4 (87 MB)
    251 MB; the factor covers weights that are in memory both as read and as repacked.
    """
    files = runner().graph_files(bundle / "model.onnx") or [*bundle.glob(GGUF_FILE)]
    rounded = round(sum(f.stat().st_size for f in files) / MIB)  # two arms differ by a few bytes of names
    return 256 * MIB + int(1.6 * rounded * MIB)


def fastest(rows: Sequence[Timing]) -> Timing:
    """The row with the highest median decode speed; the first of equal ones."""
    return max(rows, key=lambda row: (row.decode_tokens_per_s or Estimate(None)).value or 0.0)


def thread_counts(physical_cores: int, logical_cpus: int) -> list[int]:
    """1 .. cores; beyond 8 only doublings, the physical cores, and all CPUs where a core has two of them."""
    counts = {*range(1, min(physical_cores, 8) + 1), physical_cores, max(physical_cores, logical_cpus)}
    return sorted(counts | {count for count in (16, 32, 64, 128) if count < physical_cores})
