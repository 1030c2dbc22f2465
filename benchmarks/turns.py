"""Decode and prefill speed of several programs, all in turns in one run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from edgedisp.bench.graph_stats import find_graph, graph_hash
from edgedisp.bench.interleaved_timing import turns
from edgedisp.bench.system import physical_cores
from edgedisp.bench.worker import RUNNER, Worker

PROMPT, GENERATE = 128, 128
FIGURES = ("decode_tokens_per_s", "prefill_tokens_per_s")
PATIENCE_S = 900.0


def runner(bundle: Path) -> list[str]:
    """The command that times an ONNX bundle on request."""
    return _asked(RUNNER, bundle)


def llama_cpp(gguf: Path, folder: Path) -> list[str] | None:
    """The command that times the model in llama.cpp at Q4_0; None where llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    return [*_asked(Path(__file__).with_name("llama_cpp_runner.py"), gguf), "--work", str(folder)]


def _asked(program: Path, what: Path) -> list[str]:
    sizes = ["--prompt", str(PROMPT), "--generate", str(GENERATE), "--threads", str(physical_cores())]
    return [sys.executable, str(program), str(what), *sizes, "--seed", "0", "--warmup", "1", "--interactive"]


def graphs(bundles: Mapping[str, Path]) -> dict[str, str]:
    """Name -> the first name whose bundle has the same graph: weights' values do not change a speed."""
    firsts: dict[str, str] = {}
    return {name: firsts.setdefault(graph_hash(find_graph(path)), name) for name, path in bundles.items()}


def timed(commands: Mapping[str, Sequence[str]], repetitions: int) -> dict[str, dict[str, list[float]]]:
    """Name -> {decode_tokens_per_s, prefill_tokens_per_s: one for each round}. Every second round goes
    backwards."""
    found: dict[str, dict[str, list[float]]] = {name: {key: [] for key in FIGURES} for name in commands}
    with ExitStack() as stack:
        workers = {}
        for name, command in commands.items():
            workers[name] = stack.enter_context(Worker(name, command, PATIENCE_S))
        for repetition, name in turns(list(commands), repetitions):
            print(f"  timing {name}: {repetition + 1} of {repetitions}", file=sys.stderr)
            run = workers[name].run()
            for key in FIGURES:
                found[name][key].append(run[key])
    return found
