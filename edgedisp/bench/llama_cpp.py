"""llama.cpp as a device: model.gguf of a bundle, timed and scored on this machine by llama-cpp-python.

    python -m edgedisp.bench.llama_cpp BUNDLE --threads 2     what `LlamaCpp` starts: the runner's protocol

The program is the runner with another decoder: the same prompt of random tokens, the same greedy loop, the
same figures. Keys and values are fp16, as llama.cpp has them by default.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.interleaved_timing import Local
from edgedisp.bench.system import installed_version, runner
from edgedisp.core.errors import BadInput
from edgedisp.core.files import GGUF_FILE

PACKAGE = "llama_cpp_python"


class LlamaCpp(Local):
    """llama.cpp on this machine."""

    graph_name, advice = GGUF_FILE, "--layouts gguf"

    def __init__(self, bundles: Mapping[str, Path], options: BenchOptions) -> None:
        super().__init__(bundles, options)
        self.name = "llama.cpp"
        self.machine["packages"] = {name: installed_version(name) for name in ("numpy", PACKAGE)}

    def command(self, bundle: Path, words: Sequence[str]) -> list[str]:
        return [sys.executable, "-m", "edgedisp.bench.llama_cpp", *words, str(bundle)]


@contextmanager
def connect(name: str, bundles: Mapping[str, Path], options: BenchOptions) -> Iterator[LlamaCpp]:
    """llama.cpp as a device; see `devices.py`."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise BadInput(f"{name}: llama.cpp is missing here: pip install llama-cpp-python")
    yield LlamaCpp(bundles, options)


class LlamaDecoder:
    """model.gguf, open, with the interface of the runner's `Decoder`. BadBundle where llama.cpp cannot open
    it, or its context is shorter than `positions`."""

    def __init__(self, bundle: Path, threads: int | None, positions: int) -> None:
        import llama_cpp

        bad, graph = runner().BadBundle, bundle / GGUF_FILE
        self.library: Any = llama_cpp
        self.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silent, None)
        self.threads, self.weights_bytes = threads or runner().physical_cores(), graph.stat().st_size
        graph.read_bytes()  # into the page cache: `load_s` is a warm load
        started = time.perf_counter()
        model = llama_cpp.llama_model_load_from_file(
            str(graph).encode(), llama_cpp.llama_model_default_params()
        )
        if not model:
            raise bad(f"{graph}: llama.cpp cannot open it")
        if positions > (context := llama_cpp.llama_model_n_ctx_train(model)):
            raise bad(f"{bundle}: the run needs {positions} positions, its context is {context}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = positions
        settings.n_threads = settings.n_threads_batch = self.threads
        self.context = llama_cpp.llama_init_from_model(model, settings)
        if not self.context:
            raise bad(f"{graph}: llama.cpp cannot open a context of {positions} tokens")
        self.load_s = time.perf_counter() - started
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        heads, width = llama_cpp.llama_model_n_head_kv(model), llama_cpp.llama_model_n_embd(model)
        head_size = width // llama_cpp.llama_model_n_head(model)
        self.kv_cache_bytes = 2 * 2 * llama_cpp.llama_model_n_layer(model) * heads * head_size
        self.shared, self.batch = True, llama_cpp.llama_batch_init(positions, 0, 1)

    def read(self, ids: Sequence[int], start: int, rows: int) -> NDArray[np.float32]:
        """Logits [rows, vocab] after the last of `ids`, at the positions from `start` on; 0 begins anew. The
        memory of them is used again."""
        library, batch, count = self.library, self.batch, len(ids)
        if start == 0:
            library.llama_memory_clear(library.llama_get_memory(self.context), False)
        batch.n_tokens = count
        for index, token in enumerate(ids):
            batch.token[index], batch.pos[index] = int(token), start + index
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            batch.logits[index] = index >= count - rows
        if library.llama_decode(self.context, batch):
            raise ValueError("llama.cpp cannot decode")
        logits = library.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, (rows, self.vocab_size))

    def generate(self, prompt: Any, count: int) -> tuple[list[int], list[float]]:
        """As the runner's: tokens, and the ms of each."""
        ids, total, tokens, times_ms = prompt[0].tolist(), 0, list[int](), list[float]()
        before = time.perf_counter()
        for _ in range(count):
            token = int(self.read(ids, total, 1)[0].argmax())
            now = time.perf_counter()
            tokens.append(token)
            times_ms.append((now - before) * 1000.0)
            before, ids, total = now, [token], total + len(ids)
        return tokens, times_ms

    def score(self, requests: Sequence[Sequence[Sequence[int]]]) -> list[tuple[float, bool]]:
        """As the runner's."""
        scores = []
        for context, continuation in requests:
            rows = self.read([*context, *continuation[:-1]], 0, len(continuation))
            pairs = [runner().log_prob(row, token) for row, token in zip(rows, continuation)]
            scores.append((sum(value for value, _ in pairs), all(likeliest for _, likeliest in pairs)))
        return scores


if __name__ == "__main__":
    program = runner()
    try:
        program.main(kind=LlamaDecoder)
    except program.BadBundle as problem:
        sys.stderr.write(f"error: {problem}\n")
        sys.exit(2)
