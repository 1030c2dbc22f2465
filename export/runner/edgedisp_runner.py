#!/usr/bin/env python3
"""Time one ONNX bundle on this machine. Needs Python 3.9, numpy and onnxruntime, and this one file.

    python edgedisp_runner.py BUNDLE --prompt 128 --generate 128 --threads 4

prints ONE JSON object on stdout and its progress on stderr. What the figures mean:

- `load_s`: creation of the session (read, optimise, repack the weights); imports are not in it. The files lie
  where `--page-cache` puts them before: `warm` reads them first, `dropped` asks the system to forget them
  (Linux; `cached_share` is the part that was in memory even so), `found` leaves them alone.
- `ttft_ms`, time to first token: from handing over the prompt to knowing the first new token.
- `prefill_tokens_per_s`: prompt tokens / time to first token (llama-bench's `pp`).
- `token_ms`: one entry for each further token, so `generate - 1` entries.
- `decode_tokens_per_s`: `generate - 1` tokens / sum of `token_ms`: tokens a second AFTER the first one, as
  MLPerf Client counts (llama-bench's `tg` starts from an empty cache, so its figure is a little higher).
- `peak_memory_bytes`: the largest resident size this process ever had, onnxruntime itself included.
- `weights_bytes`: size of the graph with its weights on disk.
- `energy_j`: what the processor's own counter (RAPL) took over one repetition, whatever else ran and what it
  takes at rest included; None where no counter can be read (it often takes root).

Nothing else is inside the timed part: the prompt is made of random token ids (one seed, one prompt), so there
is no tokenizer; the next token is the argmax, so there is no sampling; and generation never stops early.
Batch is 1. Where genai_config.json says `past_present_share_buffer: true`, the key-value cache is allocated
once and each past tensor is also the present tensor, as onnxruntime-genai does it; else each step makes a
longer cache.

`--interactive` keeps the process and its session alive, so that several bundles can be timed in turns
(A B B A ...) by whoever started the processes. After loading it prints {"ready": ...}; then every line
{"run": 1} on stdin gives one line with one repetition, and {"quit": 1} or the end of stdin ends it.

`--logits IDS.json --out FILE.npy` times nothing: it writes the logits [tokens, vocab] that follow each of the
token ids listed in IDS.json, to be compared with another machine's.

`--score POSITIONS` times nothing either: it answers commands from stdin as `--interactive` does. The command
{"score": [[CONTEXT, CONTINUATION], ...]}, lists of token ids, gives {"scores": [[SUM, GREEDY], ...]}: the sum
of the continuation's log-probabilities, and whether each of its tokens was the most likely one. The two
together, but for the last token, have at most POSITIONS. A context is computed once for all continuations
that follow it one after another.

Left out on purpose: batching, speculative decoding, other execution providers.
Exit codes: 0 done, 1 the run failed, 2 bad bundle or usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NUMPY_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64"}


class BadBundle(ValueError):
    """The bundle or the options cannot work; the message says what, where and what would. Exit code 2."""


# ---------------------------------------------------------------- the bundle


def read_config(bundle: Path) -> dict[str, Any]:
    """genai_config.json of the bundle, or {} where there is none (the graph may say enough by itself)."""
    path = bundle / "genai_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadBundle(f"{path}: not readable as JSON ({error}); export the bundle again") from error
    if not isinstance(config, dict):
        raise BadBundle(f"{path}: expected a JSON object; export the bundle again")
    return config


def find_graph(bundle: Path, config: dict[str, Any]) -> Path:
    """The .onnx file of the bundle."""
    if not bundle.is_dir():
        raise BadBundle(f"{bundle}: no such folder; give a bundle folder that holds model.onnx")
    graph = bundle / str(decoder_of(config).get("filename", "model.onnx"))
    if not graph.is_file():
        raise BadBundle(f"{bundle}: holds no {graph.name}; give a bundle folder made by the export")
    return graph


def decoder_of(config: dict[str, Any]) -> dict[str, Any]:
    """Section `model.decoder` of genai_config.json."""
    section = config.get("model", {}).get("decoder", {})
    return section if isinstance(section, dict) else {}


def graph_files(graph: Path) -> list[Path]:
    """The graph and its weights: files beside it (`model.onnx.data`, `model.onnx_data` ...), or the one in
    `onnx/` that it shares with the graph for browsers."""
    files = [f for f in sorted(graph.parent.iterdir()) if f.is_file() and f.name.startswith(graph.name)]
    if len(files) == 1:
        files += sorted((graph.parent / "onnx").glob("*.onnx_data"))
    return files


def weights_bytes(graph: Path) -> int:
    """Bytes of the graph and of its weights on disk."""
    return sum(f.stat().st_size for f in graph_files(graph))


def default_threads(config: dict[str, Any]) -> int:
    """The thread count written into the bundle, else the CPUs this process may run on."""
    written = decoder_of(config).get("session_options", {}).get("intra_op_num_threads")
    if isinstance(written, int) and written > 0:
        return written
    if sys.platform.startswith("linux"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# ---------------------------------------------------------------- the page cache

BLOCK_BYTES = 1 << 20


def prepare_page_cache(files: Sequence[Path], wanted: str) -> float | None:
    """Put `files` where `wanted` says: `warm` reads them, `dropped` has them forgotten, `found` does nothing.

    Returns the share of their pages that is in memory now; None where the system does not tell.
    """
    for path in files:
        with path.open("rb") as file:
            if wanted == "warm":
                while file.read(BLOCK_BYTES):
                    pass
            elif wanted == "dropped" and hasattr(os, "posix_fadvise"):
                # Pages that wait to be written are not dropped, nor those that another process has mapped.
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_share(files)


def cached_share(files: Sequence[Path]) -> float | None:
    """Share of the files' pages that is in the page cache, as mincore tells; None outside Linux."""
    if not sys.platform.startswith("linux"):
        return None
    import ctypes
    import mmap

    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    sizes: list[Any] = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    libc.mmap.argtypes = sizes
    libc.munmap.argtypes = sizes[:2]
    libc.mincore.argtypes = [*sizes[:2], ctypes.c_char_p]
    pages = cached = 0
    for path in files:
        size = path.stat().st_size
        if size == 0:
            continue
        told = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        with path.open("rb") as file:
            place = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
        if place in (None, ctypes.c_void_p(-1).value):
            return None
        failed = libc.mincore(place, size, told)
        libc.munmap(place, size)
        if failed:
            return None
        pages += len(told)
        cached += sum(flag & 1 for flag in told.raw)
    return cached / pages if pages else None


# ---------------------------------------------------------------- the session


class Decoder:
    """One open session with its cache: `generate(prompt, count)` gives tokens and the time of each.

    Raises BadBundle where the graph has inputs this program cannot feed, or where `positions` (prompt and
    new tokens together) do not fit into the model's context.
    """

    def __init__(
        self,
        bundle: Path,
        threads: int,
        positions: int,
        *,
        session: Sequence[tuple[str, str]] = (),
        page_cache: str = "found",
    ) -> None:
        import onnxruntime

        onnxruntime.disable_telemetry_events()

        self.config = read_config(bundle)
        self.graph = find_graph(bundle, self.config)
        context = self.config.get("model", {}).get("context_length")
        if isinstance(context, int) and positions > context:
            raise BadBundle(
                f"{bundle}: the run needs {positions} positions, the model's context is {context}"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        for key, value in session:
            options.add_session_config_entry(key, value)
        self.cached_share = prepare_page_cache(graph_files(self.graph), page_cache)
        started = time.perf_counter()
        try:
            self.session = onnxruntime.InferenceSession(
                str(self.graph), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises a dozen types of its own that share no base
            raise BadBundle(f"{self.graph}: onnxruntime cannot open it: {error}") from error
        self.load_s = time.perf_counter() - started
        self.positions = positions
        self._read_signature()

    def _read_signature(self) -> None:
        """Names, shapes and types of the cache; what the graph leaves open is in genai_config.json."""
        decoder = decoder_of(self.config)
        inputs, outputs = decoder.get("inputs", {}), decoder.get("outputs", {})
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        present = {o.name: o for o in self.session.get_outputs()}
        self.logits = str(outputs.get("logits", "logits"))
        self.ids = str(inputs.get("input_ids", "input_ids"))
        self.mask = str(inputs.get("attention_mask", "attention_mask"))
        self.position_ids = str(inputs.get("position_ids", "position_ids"))
        self.cache: dict[str, str] = {}  # past name -> present name
        for kind in ("key", "value"):
            past = str(inputs.get(f"past_{kind}_names", f"past_key_values.%d.{kind}"))
            now = str(outputs.get(f"present_{kind}_names", f"present.%d.{kind}"))
            layer = 0
            while past % layer in self.inputs:
                self.cache[past % layer] = now % layer
                layer += 1
        unknown = sorted(set(self.inputs) - set(self.cache) - {self.ids, self.mask, self.position_ids})
        missing = sorted(({self.logits} | set(self.cache.values())) - set(present))
        if unknown or missing or not self.cache or self.ids not in self.inputs:
            raise BadBundle(
                f"{self.graph}: not a decoder graph with a key-value cache: "
                f"inputs not known {unknown}, outputs missing {missing}, cache tensors {len(self.cache)}"
            )
        self.vocab_size = self._number(present[self.logits].shape[-1], "model.vocab_size")
        first = self.inputs[next(iter(self.cache))]
        self.cache_type = NUMPY_TYPES.get(first.type)
        if self.cache_type is None:
            raise BadBundle(f"{self.graph}: cache of type {first.type}; known are {sorted(NUMPY_TYPES)}")
        self.cache_heads = self._number(first.shape[1], "model.decoder.num_key_value_heads")
        self.head_size = self._number(first.shape[3], "model.decoder.head_size")
        self.last_alone = present[self.logits].shape[1] == 1  # a graph with the last token's logits alone
        self.logits_type = NUMPY_TYPES.get(present[self.logits].type, "float32")
        self.shared = bool(self.config.get("search", {}).get("past_present_share_buffer", False))

    def _number(self, in_graph: Any, key: str) -> int:
        """A size from the graph, or from genai_config.json where the graph has only a symbol."""
        if isinstance(in_graph, int):
            return in_graph
        found: Any = self.config
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if not isinstance(found, int):
            raise BadBundle(
                f"{self.graph}: the graph leaves {in_graph!r} open and genai_config.json has no {key}; "
                f"export the bundle again"
            )
        return found

    def allocate(self) -> None:
        """Allocate all that runs need, once: cache, mask, positions; room for logits comes at the warm-up."""
        import numpy as np
        import onnxruntime

        new = onnxruntime.OrtValue.ortvalue_from_numpy
        shape = (1, self.cache_heads, self.positions if self.shared else 0, self.head_size)
        self.past = {name: new(np.zeros(shape, self.cache_type)) for name in self.cache}
        self.ones = np.ones((1, self.positions), np.int64)
        self.places = np.arange(self.positions, dtype=np.int64)[None]
        self.binding = self.session.io_binding()
        self.rooms: dict[int, Any] = {}  # tokens with logits -> [1, tokens, vocab]
        if self.shared:
            for past, now in self.cache.items():
                self.binding.bind_ortvalue_input(past, self.past[past])
                self.binding.bind_ortvalue_output(now, self.past[past])

    def step(self, ids: Any, total: int, cache: dict[str, Any]) -> Any:
        """Run `ids` int64 [1, n] at positions total-n .. total-1; logits [1, n or 1, vocab]; fills cache."""
        import numpy as np

        count = ids.shape[1]
        rows = 1 if self.last_alone else count
        if rows not in self.rooms:
            self.rooms[rows] = np.empty((1, rows, self.vocab_size), self.logits_type)
        room = self.rooms[rows]
        binding = self.binding
        binding.bind_cpu_input(self.ids, ids)
        if self.mask in self.inputs:
            binding.bind_cpu_input(self.mask, self.ones[:, :total])
        if self.position_ids in self.inputs:
            binding.bind_cpu_input(self.position_ids, self.places[:, total - count : total])
        binding.bind_output(self.logits, "cpu", 0, room.dtype, room.shape, room.ctypes.data)
        if not self.shared:
            for past, now in self.cache.items():
                binding.bind_ortvalue_input(past, cache[past])
                binding.bind_output(now)
        self.session.run_with_iobinding(binding)
        if not self.shared:  # outputs come back in the order in which they were bound
            made = dict(zip([self.logits, *self.cache.values()], binding.get_outputs()))
            cache.update({past: made[now] for past, now in self.cache.items()})
        return room

    def generate(self, prompt: Any, count: int) -> tuple[list[int], list[float]]:
        """`count` greedy tokens after `prompt` int64 [1, n], and the ms of each; the first reads the prompt.

        The shared cache is not cleared: attention reads no further than the mask is long.
        """
        import numpy as np

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

    def follow(self, ids: Sequence[int], start: int, cache: dict[str, Any]) -> Any:
        """Yield the logits [vocab] after each of `ids`, which stand at the positions from `start` on.

        A row is to be used before the next is asked for: its memory is used again.
        """
        import numpy as np

        most = 1 if self.last_alone else SCORED_AT_ONCE
        if most not in self.rooms:  # one room, of which shorter steps use the beginning
            room = np.empty(most * self.vocab_size, self.logits_type)
            for rows in range(1, most + 1):
                self.rooms[rows] = room[: rows * self.vocab_size].reshape(1, rows, self.vocab_size)
        for at in range(0, len(ids), most):
            part = np.asarray(ids[at : at + most], np.int64)[None]
            yield from self.step(part, start + at + part.shape[1], cache)[0]

    def score(self, requests: Sequence[Sequence[Sequence[int]]]) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, all greedy) of each continuation after its context."""
        found: list[tuple[float, bool]] = []
        known: Any = None
        cache: dict[str, Any] = {}
        after: Any = None
        for context, continuation in requests:
            if context != known:
                cache, known = dict(self.past), context
                for row in self.follow(context, 0, cache):
                    after = row
                after = after.copy()
            total, greedy = likelihood(after, continuation[0])
            rest = self.follow(continuation[:-1], len(context), dict(cache))
            for row, token in zip(rest, continuation[1:]):
                logprob, likeliest = likelihood(row, token)
                total, greedy = total + logprob, greedy and likeliest
            found.append((total, greedy))
        return found

    def all_logits(self, ids: Any) -> Any:
        """Logits float [n, vocab] after each of `ids` int64 [n]: in one go, or token by token where the graph
        gives the last token's alone."""
        import numpy as np

        cache = dict(self.past)
        count = len(ids)
        if not self.last_alone:
            return self.step(ids[None], count, cache)[0].copy()
        rows = [self.step(ids[None, at : at + 1], at + 1, cache)[0, -1].copy() for at in range(count)]
        return np.stack(rows)


# ---------------------------------------------------------------- scores

SCORED_AT_ONCE = 64  # tokens of a step: their logits take 13 MB with a vocabulary of 49,152


def likelihood(logits: Any, token: int) -> tuple[float, bool]:
    """Log-probability of a token from logits [vocab], summed in float64, and whether it is the likeliest.

    Raises ValueError for logits that are not finite.
    """
    import numpy as np

    logits = logits.astype(np.float32, copy=False)
    peak = logits.max()
    total = np.exp(logits - peak).sum(dtype=np.float64)
    value = float(logits[token]) - float(peak) - float(np.log(total))
    if not np.isfinite(value):
        raise ValueError("logits that are not finite (NaN or infinity)")
    return value, int(logits.argmax()) == token


def requests_of(command: dict[str, Any], decoder: Decoder) -> list[Any]:
    """The requests of a command. Raises ValueError for what cannot be scored."""
    requests = command["score"]
    for context, continuation in requests:
        ids = [*context, *continuation]
        if not context or not continuation or not all(type(i) is int for i in ids):
            raise ValueError("a request is two lists of token ids, neither empty")
        if len(ids) - 1 > decoder.positions:
            raise ValueError(f"{len(ids)} tokens, but there is room for {decoder.positions}")
        if not 0 <= min(ids) <= max(ids) < decoder.vocab_size:
            raise ValueError(f"a token outside the vocabulary of {decoder.vocab_size}")
    return list(requests)


def run_scoring(decoder: Decoder, options: argparse.Namespace) -> None:
    """Answer commands from stdin, one line each, until {"quit": 1} or the end of stdin."""
    put({"ready": facts(decoder, options)})
    for line in sys.stdin:
        try:
            command = json.loads(line)
            if command.get("quit"):
                return
            put({"scores": decoder.score(requests_of(command, decoder))})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            put({"error": f"cannot be scored: {error}"})


# ---------------------------------------------------------------- figures


def prompt_ids(vocab_size: int, count: int, seed: int) -> Any:
    """Random token ids int64 [1, count]; the same for every bundle of one vocabulary size."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, vocab_size, (1, count), dtype=np.int64)


def one_repetition(decoder: Decoder, prompt: Any, generate: int) -> dict[str, Any]:
    """Time one prompt and `generate` tokens. Garbage collection waits until the clock has stopped."""
    gc.collect()
    gc.disable()
    zones = energy_zones()
    energy = energy_uj(zones)
    cpu = time.process_time()
    started = time.perf_counter()
    try:
        tokens, times_ms = decoder.generate(prompt, generate)
    finally:
        gc.enable()
    wall_s = time.perf_counter() - started
    first, rest = times_ms[0], times_ms[1:]
    return {
        "ttft_ms": first,
        "prefill_tokens_per_s": prompt.shape[1] / first * 1000.0,
        "decode_tokens_per_s": len(rest) / sum(rest) * 1000.0,
        "token_ms": rest,
        "tokens": tokens,
        "wall_s": wall_s,
        "cpu_s": time.process_time() - cpu,
        "energy_j": energy_j(zones, energy, energy_uj(zones)),
        **memory(),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, linear between neighbours (numpy's default)."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(repetitions: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over the repetitions; the token times of all repetitions are pooled for p50 and p90."""
    names = ("ttft_ms", "prefill_tokens_per_s", "decode_tokens_per_s")
    figures = {name: statistics.median([r[name] for r in repetitions]) for name in names}
    pooled = [t for r in repetitions for t in r["token_ms"]]
    return {**figures, "token_ms_p50": percentile(pooled, 0.5), "token_ms_p90": percentile(pooled, 0.9)}


def energy_zones(root: Path = Path("/sys/class/powercap")) -> list[Path]:
    """Folders of the energy counters of whole processors ("package-0" ...) that this process may read."""
    zones = [zone for zone in sorted(root.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    named = [zone for zone in zones if (_text(zone / "name") or "").startswith("package")]
    return named if named and energy_uj(named) is not None else []


def energy_uj(zones: Sequence[Path]) -> list[int] | None:
    """What each counter says, in microjoules; None where there is none or one cannot be read."""
    texts = [_text(zone / "energy_uj") for zone in zones]
    found = [int(text) for text in texts if text and text.isdigit()]
    return found if found and len(found) == len(texts) else None


def energy_j(zones: Sequence[Path], before: list[int] | None, after: list[int] | None) -> float | None:
    """Joules between two readings; a counter that has started again from 0 meanwhile is made up for."""
    if before is None or after is None:
        return None
    total = 0
    for zone, start, end in zip(zones, before, after):
        full = _text(zone / "max_energy_range_uj")
        if end < start and not (full and full.isdigit()):
            return None
        total += end - start + (int(full) if end < start and full else 0)
    return total / 1e6


def _text(path: Path) -> str | None:
    """Stripped text of a small system file; None where it is absent or may not be read."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None


def memory() -> dict[str, int | None]:
    """Peak resident bytes of this process, and its proportional share now where Linux tells (else None).

    Weights that are mapped from their file count while they are resident. Linux: VmHWM, not `ru_maxrss`,
    which a child inherits from the process that started it. macOS: `ru_maxrss`, in bytes there. Windows:
    PeakWorkingSetSize. A system that tells nothing gives None.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return {
            "peak_memory_bytes": _kilobytes(status, "VmHWM:"),
            "proportional_memory_bytes": _kilobytes(Path("/proc/self/smaps_rollup"), "Pss:"),
        }
    if sys.platform == "win32":
        return {"peak_memory_bytes": _windows_peak_bytes(), "proportional_memory_bytes": None}
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return {"peak_memory_bytes": peak, "proportional_memory_bytes": None}


def _kilobytes(path: Path, key: str) -> int | None:
    """Bytes of one `Key:  123 kB` line of a /proc file; None where the kernel does not offer it."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(key)]
    return int(found[0]) * 1024 if found else None


def _windows_peak_bytes() -> int | None:
    """PeakWorkingSetSize from GetProcessMemoryInfo (psapi)."""
    import ctypes

    class Counters(ctypes.Structure):
        _fields_ = (  # PROCESS_MEMORY_COUNTERS
            ("cb", ctypes.c_uint32),
            ("PageFaultCount", ctypes.c_uint32),
            ("PeakWorkingSetSize", ctypes.c_size_t),
            *((f"other{i}", ctypes.c_size_t) for i in range(7)),
        )

    counters = Counters()
    counters.cb = ctypes.sizeof(counters)
    windll = getattr(ctypes, "windll", None)
    if windll is None:
        return None
    windll.kernel32.GetCurrentProcess.restype = ctypes.c_void_p
    process = ctypes.c_void_p(windll.kernel32.GetCurrentProcess())
    done = windll.psapi.GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
    return int(counters.PeakWorkingSetSize) if done else None


# ---------------------------------------------------------------- the program


def say(text: str) -> None:
    """One line of progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def put(value: dict[str, Any]) -> None:
    """One result as one line of JSON on stdout."""
    print(json.dumps(value), flush=True)


def facts(decoder: Decoder, options: argparse.Namespace) -> dict[str, Any]:
    """All that does not change from repetition to repetition."""
    import numpy
    import onnxruntime

    layers = len(decoder.cache) // 2
    item = numpy.dtype(decoder.cache_type).itemsize
    return {
        "bundle": str(options.bundle),
        "model_type": decoder.config.get("model", {}).get("type"),
        "prompt": options.prompt,
        "generate": options.generate,
        "threads": options.threads,
        "seed": options.seed,
        "warmup": options.warmup,
        "load_s": decoder.load_s,
        "page_cache": options.page_cache,
        "cached_share": decoder.cached_share,
        "weights_bytes": weights_bytes(decoder.graph),
        "kv_cache_bytes_per_position": 2 * layers * decoder.cache_heads * decoder.head_size * item,
        "kv_cache_shared_buffer": decoder.shared,
        "vocab_size": decoder.vocab_size,
        "layers": layers,
        "provider": "CPUExecutionProvider",
        "onnxruntime": onnxruntime.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
    }


def run_batch(decoder: Decoder, prompt: Any, options: argparse.Namespace) -> None:
    """Warm-up is done; time `--repetitions` repetitions and print everything as one JSON object."""
    repetitions = []
    for index in range(options.repetitions):
        if index and options.pause:
            time.sleep(options.pause)
        repetition = one_repetition(decoder, prompt, options.generate)
        repetitions.append(repetition)
        say(
            f"repetition {index + 1}/{options.repetitions}: first token {repetition['ttft_ms']:.1f} ms, "
            f"prefill {repetition['prefill_tokens_per_s']:.1f} tokens/s, "
            f"decode {repetition['decode_tokens_per_s']:.1f} tokens/s"
        )
    put({**facts(decoder, options), **summary(repetitions), **memory(), "repetitions": repetitions})


def run_interactive(decoder: Decoder, prompt: Any, options: argparse.Namespace) -> None:
    """Answer commands from stdin, one line each, until {"quit": 1} or the end of stdin."""
    put({"ready": facts(decoder, options)})
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            command = json.loads(line)
        except ValueError:
            command = None
        if isinstance(command, dict) and command.get("quit"):
            return
        if isinstance(command, dict) and command.get("run"):
            put(one_repetition(decoder, prompt, options.generate))
        else:
            put({"error": f'unknown command {line.strip()[:80]!r}; known are {{"run": 1}} and {{"quit": 1}}'})


def write_logits(decoder: Decoder, ids: Sequence[int], out: Path) -> None:
    """Write float32 logits [tokens, vocab] as a .npy file, whole or not at all, and say so."""
    import numpy as np
    import onnxruntime

    found = decoder.all_logits(np.asarray(ids, np.int64)).astype(np.float32)
    unfinished = out.with_name(out.name + ".partial")
    with unfinished.open("wb") as file:
        np.save(file, found)
    unfinished.replace(out)
    shape = {"tokens": found.shape[0], "vocab_size": found.shape[1]}
    versions = {"onnxruntime": onnxruntime.__version__, "machine": platform.machine()}
    put({"logits": str(out), **shape, **versions, "load_s": decoder.load_s})


def read_ids(path: Path) -> list[int]:
    """The token ids in a JSON file. Raises BadBundle where it holds something else."""
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadBundle(f"{path}: not readable as JSON ({error}); give a list of token ids") from error
    if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
        raise BadBundle(f"{path}: expected a list of at least one token id")
    return ids


def pair_of(text: str) -> tuple[str, str]:
    """An argparse type: KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def at_least(low: int) -> Any:
    """An argparse type: a whole number of at least `low`."""

    def read(text: str) -> int:
        if not text.lstrip("-").isdigit() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)

    return read


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; argparse ends with exit code 2 on its own where it is wrong."""
    parser = argparse.ArgumentParser(description="Time one ONNX bundle; one JSON object on stdout.")
    parser.add_argument("bundle", type=Path, help="folder with model.onnx and genai_config.json")
    parser.add_argument("--prompt", type=at_least(1), default=128, help="prompt tokens (default 128)")
    parser.add_argument(
        "--generate", type=at_least(2), default=128, help="new tokens, the first one included (default 128)"
    )
    parser.add_argument("--threads", type=at_least(1), help="default: what the bundle says, else all CPUs")
    parser.add_argument("--repetitions", type=at_least(1), default=5, help="timed runs (default 5)")
    parser.add_argument("--warmup", type=at_least(0), default=1, help="untimed runs before (default 1)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the random prompt (default 0)")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between repetitions (default 0)")
    parser.add_argument("--interactive", action="store_true", help="wait for commands on stdin")
    parser.add_argument(
        "--page-cache",
        choices=("found", "warm", "dropped"),
        default="found",
        help="where the files are before they are loaded (default: where they are found)",
    )
    parser.add_argument(
        "--session",
        type=pair_of,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a session option of onnxruntime, e.g. mlas.disable_kleidiai=1",
    )
    parser.add_argument(
        "--score", type=at_least(2), metavar="POSITIONS", help="score requests from stdin, time nothing"
    )
    parser.add_argument("--logits", type=Path, metavar="IDS.json", help="write logits, time nothing")
    parser.add_argument("--out", type=Path, metavar="FILE.npy", help="where --logits writes them")
    options = parser.parse_args(arguments)
    if (options.logits is None) != (options.out is None):
        parser.error("--logits and --out go together")
    return options


def work(options: argparse.Namespace) -> None:
    """Open the bundle, warm up, then time it."""
    find_graph(options.bundle, read_config(options.bundle))
    if options.threads is None:
        options.threads = default_threads(read_config(options.bundle))
    ids = read_ids(options.logits) if options.logits else []
    positions = len(ids) or options.score or options.prompt + options.generate
    decoder = Decoder(
        options.bundle,
        options.threads,
        positions,
        session=options.session,
        page_cache=options.page_cache,
    )
    decoder.allocate()
    if ids:
        if max(ids) >= decoder.vocab_size:
            raise BadBundle(f"{options.logits}: token {max(ids)}, but the model knows {decoder.vocab_size}")
        write_logits(decoder, ids, options.out)
        return
    if options.score:
        run_scoring(decoder, options)
        return
    prompt = prompt_ids(decoder.vocab_size, options.prompt, options.seed)
    say(f"{options.bundle}: loaded in {decoder.load_s:.2f} s, {options.threads} threads")
    for _ in range(options.warmup):
        decoder.generate(prompt, options.generate)
    (run_interactive if options.interactive else run_batch)(decoder, prompt, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        work(options)
    except BadBundle as error:
        say(f"error: {error}")
        return 2
    except ModuleNotFoundError as error:
        say(f"error: {error.name} is missing; install it: {sys.executable} -m pip install numpy onnxruntime")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except Exception as error:  # the program ends here; the kind of failure goes into the message
        say(f"error: {options.bundle}: the run failed: {type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
