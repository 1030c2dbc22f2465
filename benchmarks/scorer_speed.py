"""Items per second: our lm-evaluation-harness models against its own. Writes results/scorer_speed.json

    python benchmarks/scorer_speed.py --model FOLDER --bundle FOLDER [--exact FOLDER] [--items 40]
        [--rounds 5] [--tasks arc_easy,winogrande] [--tasks-path FOLDER]

The first items of multiple-choice tasks of lm-eval, such as ARC-Easy (four short answers to one question) and
WinoGrande (two contexts that differ in one word, one ending). Each of four models scores all items of all
tasks in turns, every second round backwards: `edgedisp-onnx` and lm-eval's `onnxruntime-genai` on one bundle,
`edgedisp-torch` and lm-eval's `hf` (batches of 8, fp32) on one folder, all with the physical cores. A ratio
is the median over rounds of the times of one round, and comes with its interval.

The choices must agree. In int8 arithmetic they do but for near ties, so the share of items with the same
choice stands beside the accuracies; with `--exact`, a bundle in fp32 arithmetic, it must be all.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  makes lm-eval's own known
import numpy as np
import torch
from _results_file import write
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model

from edgedisp.bench.interleaved_timing import turns
from edgedisp.bench.results import compare_speeds
from edgedisp.bench.system import physical_cores
from edgedisp.commands.lm_eval import OnnxHarnessModel, TorchHarnessModel
from edgedisp.evaluate.lm_eval_adapter import quiet, task_index

PAIRS = {"edgedisp-onnx": "onnxruntime-genai", "edgedisp-torch": "hf"}


@dataclass(frozen=True)
class Run:
    """Seconds; the choice of each item and the accuracy, by task; how many requests were scored."""

    seconds: float
    choices: dict[str, list[int]]
    accuracy: dict[str, float]
    requests: int


def score(model: LM, index: Any, tasks: list[str], limit: int) -> Run:
    started = time.perf_counter()
    with quiet():
        results: Any = simple_evaluate(
            model, tasks=tasks, task_manager=index, limit=limit, bootstrap_iters=0, verbosity="ERROR"
        )
    seconds = time.perf_counter() - started
    choices: dict[str, list[int]] = {}
    requests = 0
    for name in tasks:
        rows = sorted(results["samples"][name], key=lambda row: row["doc_id"])
        choices[name] = [int(np.argmax([answer[0] for answer in row["filtered_resps"]])) for row in rows]
        requests += sum(len(row["filtered_resps"]) for row in rows)
    return Run(seconds, choices, {name: results["results"][name]["acc,none"] for name in tasks}, requests)


def same_choices(first: Run, second: Run) -> float:
    """Share of items with the same choice."""
    pairs = [pair for task in first.choices for pair in zip(first.choices[task], second.choices[task])]
    return sum(a == b for a, b in pairs) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle of it")
    parser.add_argument("--exact", type=Path, help="a bundle in fp32: both backends must choose alike")
    parser.add_argument("--items", type=int, default=40, help="of each task")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", default="arc_easy,winogrande", help="multiple choice, with commas between")
    parser.add_argument("--tasks-path", type=Path, help="a folder of lm-eval YAML")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    threads = physical_cores()
    torch.set_num_threads(threads)
    tasks = options.tasks.split(",")
    arguments = (task_index(tasks, options.tasks_path), tasks, options.items)
    genai = get_model("onnxruntime-genai")
    models: dict[str, LM] = {
        "edgedisp-onnx": OnnxHarnessModel(str(options.bundle), threads),
        "onnxruntime-genai": genai(pretrained=str(options.bundle)),
        "edgedisp-torch": TorchHarnessModel(str(options.model), threads),
        "hf": get_model("hf")(pretrained=str(options.model), device="cpu", dtype="float32", batch_size=8),
    }
    first = {name: score(model, *arguments) for name, model in models.items()}  # and a warm-up
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number, name in turns(list(models), options.rounds):
        seconds[name].append(score(models[name], *arguments).seconds)
        sys.stderr.write(f"round {number + 1} of {options.rounds}: {name} {seconds[name][-1]:.1f} s\n")
    requests = first["hf"].requests
    items = sum(map(len, first["hf"].choices.values()))
    figures: dict[str, float] = {"items": items, "requests": requests, "threads": threads}
    rows: list[dict[str, Any]] = []
    for ours, theirs in PAIRS.items():
        ratio = compare_speeds(seconds[ours], seconds[theirs])
        short = theirs.removeprefix("onnxruntime-")
        figures[f"items_per_s_ratio_lm_eval_{short}"] = ratio["ratio"]
        figures[f"same_choice_{short}"] = same_choices(first[ours], first[theirs])
        rows.append({"ours": ours, "theirs": theirs, "ratio": ratio})
    if options.exact is not None:
        pair = OnnxHarnessModel(str(options.exact), threads), genai(pretrained=str(options.exact))
        figures["same_choice_genai_fp32"] = same_choices(*(score(model, *arguments) for model in pair))
    for name in models:
        rate, accuracy = requests / sorted(seconds[name])[len(seconds[name]) // 2], first[name].accuracy
        rows.append({"name": name, "seconds": seconds[name], "requests_per_s": rate, "accuracy": accuracy})
        print(f"{name:20} {rate:6.1f} requests/s  {accuracy}")
    write("scorer_speed", figures, rows)


if __name__ == "__main__":
    main()
