"""Time a GGUF model at Q4_0 in llama.cpp, as export/runner/runner.py times a bundle: same prompt of
random tokens, same greedy loop without tokenizer or sampling, same figures, same lines of JSON.

    python benchmarks/llama_cpp_runner.py MODEL.gguf --work FOLDER --threads 2 --interactive

Needs llama-cpp-python. Whatever the file holds is requantized to Q4_0, llama.cpp's fastest layout on CPUs:
good for speed, worthless for quality.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def requantized(gguf: Path, folder: Path) -> Path:
    """The model at Q4_0, made once."""
    done = folder / f"{gguf.stem}.as-q4_0.gguf"
    if not done.exists():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / done.name
            if llama_cpp.llama_model_quantize(str(gguf).encode(), str(made).encode(), ctypes.byref(options)):
                raise RuntimeError(f"{gguf}: llama.cpp cannot requantize it")
            made.rename(done)
    return done


class Decoder:
    """One loaded model with its cache."""

    def __init__(self, gguf: Path, threads: int, positions: int) -> None:
        self.model = llama_cpp.llama_model_load_from_file(
            str(gguf).encode(), llama_cpp.llama_model_default_params()
        )
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = positions
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError(f"{gguf}: llama.cpp cannot open it")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def step(self, ids: list[int]) -> int:
        """Append `ids`; the best next token."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def run(self, prompt: list[int], count: int) -> dict[str, Any]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)
        times, before, ids = [], time.perf_counter(), prompt
        for _ in range(count):
            ids = [self.step(ids)]
            now = time.perf_counter()
            times.append(now - before)
            before = now
        return {
            "prefill_tokens_per_s": len(prompt) / times[0],
            "decode_tokens_per_s": (count - 1) / sum(times[1:]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the requantized file")
    for name, default in {"prompt": 128, "generate": 128, "threads": 1, "seed": 0, "warmup": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--interactive", action="store_true", help="a repetition for each line of stdin")
    asked = parser.parse_args()
    decoder = Decoder(requantized(asked.gguf, asked.work), asked.threads, asked.prompt + asked.generate)
    generator = np.random.default_rng(asked.seed)
    prompt = generator.integers(0, decoder.vocabulary, asked.prompt).tolist()
    for _ in range(asked.warmup):
        decoder.run(prompt, asked.generate)
    facts = {"llama_cpp": llama_cpp.__version__, "threads": asked.threads}
    print(json.dumps({"ready": facts}), flush=True)
    for line in sys.stdin if asked.interactive else ['{"run": 1}']:
        if json.loads(line).get("quit"):
            return
        print(json.dumps(decoder.run(prompt, asked.generate)), flush=True)


if __name__ == "__main__":
    main()
