"""Time a packed bundle in onnxruntime-genai, as export/runner/runner.py times it in onnxruntime:
same prompt of random tokens, same lines of JSON. Taking the best token is inside the timed part: genai does
both in one call.

    python benchmarks/genai_runner.py BUNDLE --threads 2 --interactive

Threads are those of the bundle's genai_config.json unless --threads is given; 0 takes the entry away, as in a
bundle that names none.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai


def with_threads(bundle: Path, threads: int, folder: Path) -> Path:
    """A copy of the bundle whose configuration names `threads`, or none where it is 0."""
    copy = folder / bundle.name
    shutil.copytree(bundle, copy)
    place = copy / "genai_config.json"
    config = json.loads(place.read_text(encoding="utf-8"))
    options = config["model"]["decoder"]["session_options"]
    options.pop("intra_op_num_threads", None)
    if threads:
        options["intra_op_num_threads"] = threads
    place.write_text(json.dumps(config), encoding="utf-8")
    return copy


def run(model: Any, prompt: list[int], count: int) -> dict[str, Any]:
    """One answer of `count` tokens, greedy, never ended early."""
    settings = genai.GeneratorParams(model)
    settings.set_search_options(
        do_sample=False, min_length=len(prompt) + count, max_length=len(prompt) + count
    )
    generator = genai.Generator(model, settings)
    times, before = [], time.perf_counter()
    generator.append_tokens(prompt)
    for _ in range(count):
        generator.generate_next_token()
        now = time.perf_counter()
        times.append(now - before)
        before = now
    return {
        "prefill_tokens_per_s": len(prompt) / times[0],
        "decode_tokens_per_s": (count - 1) / sum(times[1:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, help="default: the bundle's; 0: none named")
    for name, default in {"prompt": 128, "generate": 128, "seed": 0, "warmup": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--interactive", action="store_true", help="a repetition for each line of stdin")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = asked.bundle
        if asked.threads is not None:
            bundle = with_threads(bundle, asked.threads, Path(scratch))
        model = genai.Model(str(bundle))
    config = json.loads((asked.bundle / "genai_config.json").read_text(encoding="utf-8"))
    generator = np.random.default_rng(asked.seed)
    prompt = generator.integers(0, config["model"]["vocab_size"], asked.prompt).tolist()
    for _ in range(asked.warmup):
        run(model, prompt, asked.generate)
    print(json.dumps({"ready": {"genai": genai.__version__, "threads": asked.threads}}), flush=True)
    for line in sys.stdin if asked.interactive else ['{"run": 1}']:
        if json.loads(line).get("quit"):
            return
        print(json.dumps(run(model, prompt, asked.generate)), flush=True)


if __name__ == "__main__":
    main()
