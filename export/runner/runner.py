#!/usr/bin/env python3
"""Time or score one ONNX bundle on this machine. Needs Python 3.9, numpy, onnxruntime, and this one file.

    echo '{"run": 1}' | python runner.py BUNDLE --prompt 128 --generate 128 --threads 4

opens the bundle, warms up, prints {"ready": facts} and answers lines of JSON until stdin ends:
    {"run": 1}                                      times one prompt with the tokens after it
    {"score": [[CONTEXT, CONTINUATION], ...]}       token ids; gives {"scores": [[SUM, GREEDY], ...]},
        the continuation's log-probability and whether each of its tokens was the likeliest. Equal contexts
        that follow one another are computed once. `--positions`: most tokens of a request, less its last.
`--describe` prints what this machine is and needs no numpy. Exit code 2: bad bundle or usage.

Batch is 1, the prompt is random token ids, the next token is the argmax, and generation never stops early.
`load_s`: the session is made from files in the page cache. `ttft_ms`: from handing over the prompt to knowing
the first new token. `prefill_tokens_per_s`: prompt tokens / that time. `token_ms`: each of the `generate - 1`
further tokens. `decode_tokens_per_s`: their number / their time (as MLPerf Client counts). Sensors are read
after a repetition; `other_cpus`: CPUs that other processes kept busy during it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

np: Any = None  # numpy and onnxruntime, imported by `load_libraries`: --describe works without them
ort: Any = None
NUMPY_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}
SCORED_AT_ONCE = 64  # tokens of a step: their logits take 13 MB with a vocabulary of 49,152
BLOCK_BYTES = 1 << 20
MOST_THREADS = 1024


class BadBundle(ValueError):
    """The bundle or the options cannot work; the message says what, where and what would. Exit code 2."""


def load_libraries() -> None:
    """Import numpy and onnxruntime."""
    global np, ort
    import numpy
    import onnxruntime

    np, ort = numpy, onnxruntime
    ort.disable_telemetry_events()


# ---------------------------------------------------------------- the bundle


def read_config(bundle: Path) -> dict[str, Any]:
    """genai_config.json of the bundle, or {} where there is none (the graph may say enough by itself)."""
    path = bundle / "genai_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise BadBundle(f"{path}: not readable as JSON ({error}); export the bundle again") from error
    return config


def value_of(config: dict[str, Any], key: str) -> Any:
    """The value of a dotted key; None where it is not there."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def graph_files(graph: Path) -> list[Path]:
    """The graph and its weights: the files beside it, or the one in `onnx/` shared with a browser's graph."""
    files = [f for f in sorted(graph.parent.iterdir()) if f.is_file() and f.name.startswith(graph.name)]
    return files if len(files) > 1 else [*files, *sorted((graph.parent / "onnx").glob("*.onnx_data"))]


# ---------------------------------------------------------------- the decoder


class Decoder:
    """One open session with its cache: `generate(prompt, count)` gives tokens and the time of each.

    Raises BadBundle where the graph has inputs this program cannot feed, or where `positions` (prompt and
    new tokens together) do not fit into the model's context.
    """

    def __init__(self, bundle: Path, threads: int | None, positions: int) -> None:
        self.config, self.graph = read_config(bundle), bundle / "model.onnx"
        if not self.graph.is_file():
            raise BadBundle(f"{bundle}: holds no model.onnx; give a bundle folder made by the export")
        context = value_of(self.config, "model.context_length")
        if isinstance(context, int) and positions > context:
            raise BadBundle(f"{bundle}: the run needs {positions} positions, its context is {context}")
        written = value_of(self.config, "model.decoder.session_options.intra_op_num_threads")
        self.threads: int = threads or written or physical_cores()
        if not isinstance(self.threads, int) or not 1 <= self.threads <= MOST_THREADS:
            raise BadBundle(f"{bundle}: genai_config.json asks for {written!r} threads; export it again")
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        for path in graph_files(self.graph):  # into the page cache: `load_s` is a warm load
            with path.open("rb") as file:
                while file.read(BLOCK_BYTES):
                    pass
        started = time.perf_counter()
        try:
            self.session = ort.InferenceSession(str(self.graph), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a dozen types of its own that share no base
            raise BadBundle(f"{self.graph}: onnxruntime cannot open it: {error}") from error
        self.load_s = time.perf_counter() - started
        self.positions, self.weights_bytes = positions, sum(f.stat().st_size for f in graph_files(self.graph))
        self._read_signature()
        self._allocate()

    def _read_signature(self) -> None:
        """Names, shapes and types of the cache; sizes that the graph leaves open are in genai_config.json."""
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        present = {o.name: o for o in self.session.get_outputs()}
        layers = sum(name.endswith(".key") for name in self.inputs)
        self.cache = {  # past name -> present name
            f"past_key_values.{layer}.{kind}": f"present.{layer}.{kind}"
            for kind in ("key", "value")
            for layer in range(layers)
        }
        unknown = sorted(set(self.inputs) - {*self.cache, "input_ids", "attention_mask", "position_ids"})
        missing = sorted({*self.cache.values(), "logits"} - set(present))
        if unknown or missing or not self.cache:
            raise BadBundle(
                f"{self.graph}: not a decoder graph with a key-value cache: inputs not known {unknown}, "
                f"missing {missing}, cache tensors {len(self.cache)}"
            )
        self.vocab_size = self._size(present["logits"].shape[-1], "model.vocab_size")
        first = self.inputs[next(iter(self.cache))]
        self.cache_type = NUMPY_TYPES.get(first.type)
        if self.cache_type is None:
            raise BadBundle(f"{self.graph}: cache of type {first.type}; known are {sorted(NUMPY_TYPES)}")
        self.cache_heads = self._size(first.shape[1], "model.decoder.num_key_value_heads")
        self.head_size = self._size(first.shape[3], "model.decoder.head_size")
        item = np.dtype(self.cache_type).itemsize  # of a key or value; the cache has both for every layer
        self.kv_cache_bytes = len(self.cache) * self.cache_heads * self.head_size * item  # of a position
        self.last_token_only = present["logits"].shape[1] == 1  # logits of the last token alone
        self.logits_type = NUMPY_TYPES.get(present["logits"].type, "float32")
        self.shared = bool(value_of(self.config, "search.past_present_share_buffer"))

    def _size(self, in_graph: Any, key: str) -> int:
        """A size from the graph, or from genai_config.json where the graph has only a symbol."""
        value = in_graph if isinstance(in_graph, int) else value_of(self.config, key)
        if not isinstance(value, int):
            raise BadBundle(
                f"{self.graph}: the graph leaves {in_graph!r} open and genai_config.json has no {key}; "
                f"export the bundle again"
            )
        return value

    def _allocate(self) -> None:
        """Allocate all that runs need, once; the buffer of logits grows at the warm-up."""
        new = ort.OrtValue.ortvalue_from_numpy
        shape = (1, self.cache_heads, self.positions if self.shared else 0, self.head_size)
        self.past = {name: new(np.zeros(shape, self.cache_type)) for name in self.cache}
        self.ones = np.ones((1, self.positions), np.int64)
        self.arange = np.arange(self.positions, dtype=np.int64)[None]
        self.binding = self.session.io_binding()
        self.logits = np.empty(0, self.logits_type)
        if self.shared:
            for past, now in self.cache.items():
                self.binding.bind_ortvalue_input(past, self.past[past])
                self.binding.bind_ortvalue_output(now, self.past[past])

    def step(self, ids: Any, total: int, cache: dict[str, Any]) -> Any:
        """Run `ids` int64 [1, n] at positions total-n .. total-1; logits [1, n or 1, vocab]; fills cache."""
        count = ids.shape[1]
        rows = 1 if self.last_token_only else count
        if self.logits.size < rows * self.vocab_size:
            self.logits = np.empty(rows * self.vocab_size, self.logits_type)
        buffer = self.logits[: rows * self.vocab_size].reshape(1, rows, self.vocab_size)
        binding = self.binding
        binding.bind_cpu_input("input_ids", ids)
        if "attention_mask" in self.inputs:
            binding.bind_cpu_input("attention_mask", self.ones[:, :total])
        if "position_ids" in self.inputs:
            binding.bind_cpu_input("position_ids", self.arange[:, total - count : total])
        binding.bind_output("logits", "cpu", 0, buffer.dtype, buffer.shape, buffer.ctypes.data)
        if not self.shared:
            for past, now in self.cache.items():
                binding.bind_ortvalue_input(past, cache[past])
                binding.bind_output(now)
        self.session.run_with_iobinding(binding)
        if not self.shared:  # outputs come back in the order in which they were bound
            values = dict(zip(["logits", *self.cache.values()], binding.get_outputs()))
            cache.update({past: values[now] for past, now in self.cache.items()})
        return buffer

    def generate(self, prompt: Any, count: int) -> tuple[list[int], list[float]]:
        """`count` greedy tokens after `prompt` int64 [1, n], and the ms of each; the first reads the prompt.

        The shared cache is not cleared: attention reads no further than the mask is long.
        """
        cache = dict(self.past)
        ids, total = prompt, prompt.shape[1]
        tokens: list[int] = []
        times_ms: list[float] = []
        clock = time.perf_counter
        before = clock()
        for _ in range(count):
            token = int(self.step(ids, total, cache)[0, -1].argmax())
            now = clock()
            tokens.append(token)
            times_ms.append((now - before) * 1000.0)
            before = now
            ids, total = np.array([[token]], np.int64), total + 1
        return tokens, times_ms

    def logits_after(self, ids: Sequence[int], start: int, cache: dict[str, Any]) -> Iterator[Any]:
        """Yield the logits [vocab] after each of `ids`, which stand at the positions from `start` on.

        A row is to be used before the next is asked for: its memory is used again.
        """
        most = 1 if self.last_token_only else SCORED_AT_ONCE
        for at in range(0, len(ids), most):
            part = np.asarray(ids[at : at + most], np.int64)[None]
            yield from self.step(part, start + at + part.shape[1], cache)[0]

    def score(self, requests: Sequence[Sequence[Sequence[int]]]) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, all greedy) of each continuation after its context."""
        scores: list[tuple[float, bool]] = []
        last_context: Any = None
        cache: dict[str, Any] = {}
        logits: Any = None
        for context, continuation in requests:
            if context != last_context:
                cache, last_context = dict(self.past), context
                for row in self.logits_after(context, 0, cache):
                    logits = row
                logits = logits.copy()
            total, greedy = log_prob(logits, continuation[0])
            rest = self.logits_after(continuation[:-1], len(context), dict(cache))
            for row, token in zip(rest, continuation[1:]):
                value, likeliest = log_prob(row, token)
                total, greedy = total + value, greedy and likeliest
            scores.append((total, greedy))
        return scores


def log_prob(logits: Any, token: int) -> tuple[float, bool]:
    """Log-probability of a token from logits [vocab], summed in float64, and whether it is the likeliest.

    Raises ValueError for logits that are not finite.
    """
    logits = logits.astype(np.float32, copy=False)
    peak = logits.max()
    total = np.exp(logits - peak).sum(dtype=np.float64)
    value = float(logits[token]) - float(peak) - float(np.log(total))
    if not np.isfinite(value):
        raise ValueError("logits that are not finite (NaN or infinity)")
    return value, int(logits.argmax()) == token


# ---------------------------------------------------------------- figures


def prompt_ids(vocab_size: int, count: int, seed: int) -> Any:
    """Random token ids int64 [1, count]; the same for every bundle of one vocabulary size."""
    import numpy

    return numpy.random.default_rng(seed).integers(0, vocab_size, (1, count), dtype=numpy.int64)


def time_repetition(decoder: Decoder, prompt: Any, generate: int) -> dict[str, Any]:
    """Time one prompt and `generate` tokens. Garbage collection waits until the clock has stopped."""
    gc.collect()
    gc.disable()
    before = read_sensors()
    cpu, started = time.process_time(), time.perf_counter()
    try:
        tokens, times_ms = decoder.generate(prompt, generate)
    finally:
        gc.enable()
    wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
    after = read_sensors()
    first, rest = times_ms[0], times_ms[1:]
    other_cpus = None
    if before["busy_cpu_s"] is not None and after["busy_cpu_s"] is not None and wall_s >= 0.5:
        # CPUs that other processes kept busy; ticks of 10 ms are too coarse for less than 0.5 s.
        other_cpus = max(0.0, after["busy_cpu_s"] - before["busy_cpu_s"] - cpu_s) / wall_s
    return {
        "ttft_ms": first,
        "prefill_tokens_per_s": prompt.shape[1] / first * 1000.0,
        "decode_tokens_per_s": len(rest) / sum(rest) * 1000.0,
        "token_ms": rest,
        "tokens": tokens,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "peak_memory_bytes": peak_memory_bytes(),
        "other_cpus": other_cpus,
        **{name: after[name] for name in ("load_average_1m", "clock_mhz", "temperature_c")},
    }


def facts(decoder: Decoder, options: argparse.Namespace) -> dict[str, Any]:
    """All that does not change from repetition to repetition."""
    return {
        "prompt": options.prompt,
        "generate": options.generate,
        "threads": decoder.threads,
        "load_s": decoder.load_s,
        "weights_bytes": decoder.weights_bytes,
        "kv_cache_bytes_per_position": decoder.kv_cache_bytes,
        "kv_cache_shared_buffer": decoder.shared,
        "vocab_size": decoder.vocab_size,
    }


# ---------------------------------------------------------------- the machine

READ_BYTES, READINGS = 256 << 20, 4  # more than the caches hold; the best of so many counts

FEATURES = (
    "avx2 fma avx512f avx512_vnni avx_vnni avx512_bf16 amx_int8 amx_bf16 asimd asimddp asimdhp i8mm bf16 sve"
)
"""Flags of /proc/cpuinfo that decide which matrix kernels onnxruntime picks."""
ROOT = Path("/")  # stands before /proc and /sys; another folder in tests


def describe(packages: Sequence[str] = ("numpy", "onnxruntime")) -> dict[str, Any]:
    """The machine in plain JSON values; what the system does not tell is None."""
    return {
        **cpu(),
        "architecture": platform.machine(),
        "physical_cores": physical_cores(),
        "logical_cpus": len(logical_cpus()),
        "cpu_quota": cpu_quota(),
        **memory(),
        "memory_gb_per_s": memory_gb_per_s(),
        "load_average_1m": read_sensors()["load_average_1m"],
        "system": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: installed_version(name) for name in packages},
    }


def installed_version(package: str) -> str | None:
    """Version of an installed distribution; None where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def read_text(path: Path) -> str:
    """Stripped text of a small system file; "" where the system does not offer it."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().rstrip("\0")
    except OSError:
        return ""


def sysctl(key: str) -> str:
    """One value of macOS's sysctl; "" elsewhere."""
    if sys.platform != "darwin":
        return ""
    result = subprocess.run(["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, timeout=5)
    return result.stdout.strip()


def cpu(root: Path = ROOT) -> dict[str, Any]:
    """`cpu`, the processor's or board's name, and `features`, those of FEATURES that it has."""
    text = read_text(root / "proc/cpuinfo")
    info = dict(reversed(re.findall(r"^([^:\n]+?)\s*:[ \t]*(.*)$", text, re.MULTILINE)))  # the first CPU's
    model_name = info.get("model name") or info.get("Hardware") or read_text(root / "proc/device-tree/model")
    flags = (info.get("flags") or info.get("Features") or "").split()
    if sys.platform == "darwin" and platform.machine() == "arm64":
        flags = ["asimd", "asimddp"]  # every Mac on ARM has both
    part = f"ARM part {info['CPU part']}" if "CPU part" in info else None
    name = model_name or part or sysctl("machdep.cpu.brand_string") or platform.processor() or None
    return {"cpu": name, "features": [flag for flag in FEATURES.split() if flag in flags]}


def logical_cpus() -> set[int]:
    """Numbers of the logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def physical_cores(root: Path = ROOT, cpus: set[int] | None = None) -> int:
    """Physical cores that this process may really use, at least 1: siblings among `cpus` count once.

    A quota of 2.5 CPUs gives 2: onnxruntime's threads wait for one another, so one that is stopped stops all.
    """
    cpus = logical_cpus() if cpus is None else cpus
    folders = [root / f"sys/devices/system/cpu/cpu{cpu}/topology" for cpu in cpus]
    siblings = {read_text(f / "core_cpus_list") or read_text(f / "thread_siblings_list") for f in folders}
    cores = len(cpus) if "" in siblings else len(siblings)
    cores = min(cores, int(sysctl("hw.physicalcpu") or cores))
    quota = cpu_quota(root)
    return max(1, cores if quota is None else min(cores, int(quota)))


def cgroup_folders(root: Path) -> list[Path]:
    """This process's control group (version 2) and its parents. A container sees its own at the top."""
    group = re.search(r"^0::/(.*)$", read_text(root / "proc/self/cgroup"), re.MULTILINE)
    path = Path(group.group(1) if group else "")
    return [root / "sys/fs/cgroup" / part for part in (path, *path.parents)]


def cpu_quota(root: Path = ROOT) -> float | None:
    """CPUs' worth of time that the control groups of this process allow; None without a limit."""
    texts = [read_text(folder / "cpu.max") for folder in cgroup_folders(root)]
    limits = [text.split() for text in texts if text and not text.startswith("max")]
    return min((int(quota) / int(period) for quota, period in limits), default=None)


def memory(root: Path = ROOT) -> dict[str, int | None]:
    """`memory_bytes` and `memory_available_bytes` (a container's limit considered)."""
    table = dict(re.findall(r"^(\w+):\s+(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE))
    total, available = (int(table[k]) * 1024 if k in table else None for k in ("MemTotal", "MemAvailable"))
    free = []
    for folder in cgroup_folders(root):
        limit, used = read_text(folder / "memory.max"), read_text(folder / "memory.current")
        if limit.isdigit() and used.isdigit():
            cache = re.search(r"^inactive_file (\d+)$", read_text(folder / "memory.stat"), re.MULTILINE)
            free.append(max(0, int(limit) - int(used) + int(cache.group(1) if cache else 0)))
    return {
        "memory_bytes": total or int(sysctl("hw.memsize") or 0) or None,
        "memory_available_bytes": None if available is None else min([available, *free]),
    }


def memory_gb_per_s() -> float | None:
    """The rate at which all cores read memory, each a part of an array: what decoding could reach at most.
    None without numpy, or where little memory is free."""
    available = memory()["memory_available_bytes"]
    if importlib.util.find_spec("numpy") is None or (available is not None and available < 4 * READ_BYTES):
        return None
    import numpy

    parts = numpy.array_split(numpy.ones(READ_BYTES // 4, numpy.int32), physical_cores())
    seconds = []
    with ThreadPoolExecutor(len(parts)) as threads:
        for _ in range(READINGS):
            started = time.perf_counter()
            list(threads.map(numpy.max, parts))
            seconds.append(time.perf_counter() - started)
    return READ_BYTES / min(seconds) / 1e9


def read_sensors(root: Path = ROOT) -> dict[str, float | None]:
    """Load average, mean clock in MHz, hottest zone in degrees, CPU seconds since boot that were not idle.

    The last includes what a hypervisor gave to other guests.
    """
    ticks = [int(field) for field in read_text(root / "proc/stat").partition("\n")[0].split()[1:9]]
    clocks = [
        float(read_text(f) or 0) / 1000
        for f in root.glob("sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq")
    ]
    if not clocks:  # x86 without cpufreq
        clocks = [float(mhz) for mhz in re.findall(r"cpu MHz\s*: ([\d.]+)", read_text(root / "proc/cpuinfo"))]
    zones = [read_text(f) for f in root.glob("sys/class/thermal/thermal_zone*/temp")]
    return {
        "load_average_1m": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "clock_mhz": sum(clocks) / len(clocks) if clocks else None,
        "temperature_c": max((int(text) / 1000 for text in zones if text), default=None),
        # user nice system idle iowait irq softirq steal; guest time is inside user time already
        "busy_cpu_s": (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK") if ticks else None,
    }


def peak_memory_bytes() -> int | None:
    """Largest resident size of this process. Linux: VmHWM, as a child inherits its parent's `ru_maxrss`."""
    if match := re.search(r"VmHWM:\s*(\d+) kB", read_text(Path("/proc/self/status"))):
        return int(match.group(1)) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# ---------------------------------------------------------------- the program


def put(value: dict[str, Any]) -> None:
    """One result as one line of JSON on stdout."""
    print(json.dumps(value), flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse ends with exit code 2 on its own where it is wrong."""
    parser = argparse.ArgumentParser(description="Time or score one ONNX bundle: lines of JSON on stdin.")
    add = parser.add_argument
    add("bundle", type=Path, nargs="?", default=Path(), help="folder with model.onnx and genai_config.json")
    add("--prompt", type=int, default=128, help="prompt tokens (default 128)")
    add("--generate", type=int, default=128, help="new tokens, the first included (default 128)")
    add("--threads", type=int, help="default: what the bundle says, else the physical cores")
    add("--warmup", type=int, default=1, help="untimed runs before (default 1)")
    add("--seed", type=int, default=0, help="of the random prompt (default 0)")
    add("--positions", type=int, help="most tokens of a request (default: prompt and new tokens)")
    add("--describe", action="store_true", help="print what this machine is")
    options = parser.parse_args(arguments)
    for name, least in {"prompt": 1, "generate": 2, "threads": 1}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"argument --{name}: {value} is less than {least}")
    return options


def main(arguments: Sequence[str] | None = None, kind: Any = Decoder) -> None:
    """Describe the machine, or open the bundle, warm up and answer commands. kind: class of the decoder."""
    options = parse(arguments)
    if options.describe:
        put(describe())
        return
    load_libraries()
    decoder = kind(options.bundle, options.threads, options.positions or options.prompt + options.generate)
    prompt = prompt_ids(decoder.vocab_size, options.prompt, options.seed)
    for _ in range(0 if options.positions else options.warmup):
        decoder.generate(prompt, options.generate)
    put({"ready": facts(decoder, options)})
    for line in sys.stdin:
        try:
            command = json.loads(line)
            if command.get("run"):
                put(time_repetition(decoder, prompt, options.generate))
            else:
                put({"scores": decoder.score(command["score"])})
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            put({"error": f"{line.strip()[:80]!r} is no command that can be answered: {error}"})


if __name__ == "__main__":
    try:
        main()
    except (BadBundle, ModuleNotFoundError, PermissionError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
