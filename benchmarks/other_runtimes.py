"""Time a bundle in onnxruntime-genai as export/runner/runner.py times it in onnxruntime.

    python benchmarks/other_runtimes.py BUNDLE --threads 2

Same prompt of random tokens, same greedy loop without tokenizer or sampling, same lines of JSON: a repetition
for each line {"run": 1} on stdin. genai takes the best token inside the timed part; --threads 0 removes the
count from its configuration. Other benchmarks import `time_in_turns` from here.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from edgedisp.bench.interleaved_timing import Worker, turns
from edgedisp.bench.system import RUNNER, physical_cores

PROMPT, GENERATE = 128, 128
FIGURES = ("decode_tokens_per_s", "prefill_tokens_per_s")
Speeds = dict[str, dict[str, list[float]]]


def onnxruntime_command(bundle: Path) -> list[str]:
    """The command that times an ONNX bundle with the runner."""
    sizes = ["--prompt", str(PROMPT), "--generate", str(GENERATE), "--threads", str(physical_cores())]
    return [sys.executable, str(RUNNER), str(bundle), *sizes]


def genai_command(bundle: Path, threads: int) -> list[str]:
    return [sys.executable, __file__, str(bundle), "--threads", str(threads)]


def llama_cpp_command(gguf: Path, work: Path) -> list[str] | None:
    """The command that times llama.cpp at Q4_0, its fastest layout on CPUs; None where it is not installed.
    Whatever `gguf` holds is requantized once, into a folder in `work`: worthless for quality."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    import llama_cpp

    path = work / f"{gguf.stem}.as-q4_0" / "model.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
        partial = path.with_suffix(".partial")
        if llama_cpp.llama_model_quantize(str(gguf).encode(), str(partial).encode(), ctypes.byref(options)):
            raise RuntimeError(f"{gguf}: llama.cpp cannot requantize it")
        partial.rename(path)
    words = ["--prompt", PROMPT, "--generate", GENERATE, "--threads", physical_cores(), path.parent]
    return [sys.executable, "-m", "edgedisp.bench.llama_cpp", *map(str, words)]


def time_in_turns(commands: Mapping[str, Sequence[str]], repetitions: int) -> Speeds:
    """Name -> {decode_tokens_per_s, prefill_tokens_per_s: one value for each round}, in turns A B B A."""
    speeds: Speeds = {name: {key: [] for key in FIGURES} for name in commands}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, words, 900.0)) for name, words in commands.items()}
        for repetition, name in turns(list(commands), repetitions):
            print(f"  timing {name}: {repetition + 1} of {repetitions}", file=sys.stderr)
            run = workers[name].ask({"run": 1})
            for key in FIGURES:
                speeds[name][key].append(run[key])
    return speeds


Step = Callable[[list[int]], list[int]]
"""Append token ids to the context; the best next token, for the following step."""


def open_genai(bundle: Path, threads: int, folder: Path) -> tuple[int, Callable[[], Step]]:
    """Vocabulary size, and a function that starts an empty context."""
    import onnxruntime_genai as genai

    copy = folder / bundle.name
    shutil.copytree(bundle, copy)
    path = copy / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    options = config["model"]["decoder"]["session_options"]
    options.pop("intra_op_num_threads", None)
    if threads:
        options["intra_op_num_threads"] = threads
    path.write_text(json.dumps(config), encoding="utf-8")
    model = genai.Model(str(copy))

    def start() -> Step:
        settings, length = genai.GeneratorParams(model), PROMPT + GENERATE
        settings.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator = genai.Generator(model, settings)

        def step(ids: list[int]) -> list[int]:
            if ids:  # later tokens are appended by genai itself
                generator.append_tokens(ids)
            generator.generate_next_token()
            return []

        return step

    return int(config["model"]["vocab_size"]), start


def run(step: Step, prompt: list[int]) -> dict[str, Any]:
    """Time one prompt and GENERATE tokens."""
    times, ids = [time.perf_counter()], prompt
    for _ in range(GENERATE):
        ids = step(ids)
        times.append(time.perf_counter())
    decode = (GENERATE - 1) / (times[-1] - times[1])
    return {"prefill_tokens_per_s": PROMPT / (times[1] - times[0]), "decode_tokens_per_s": decode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="a packed bundle")
    parser.add_argument("--threads", type=int, default=physical_cores())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        vocab_size, start = open_genai(options.bundle, options.threads, Path(scratch))
        prompt = np.random.default_rng(0).integers(0, vocab_size, PROMPT).tolist()
        run(start(), prompt)  # warm-up
        print(json.dumps({"ready": {"threads": options.threads}}), flush=True)
        for _ in sys.stdin:
            print(json.dumps(run(start(), prompt)), flush=True)


if __name__ == "__main__":
    main()
