"""Items per second: our lm-evaluation-harness models against its own. Writes results/scorer_speed.json

    python benchmarks/scorer_speed.py --model FOLDER --bundle FOLDER [--items 40] [--rounds 5]
        [--tasks arc_easy,winogrande] [--include FOLDER]

The first items of tasks of lm-eval, such as ARC-Easy (four short answers to one question) and WinoGrande (two
contexts that differ in their last word, one ending); without --tasks, two made in these forms of the
quickstart's text, whose two contexts differ early, so that there is little to share. Nothing is fetched for
those. Each of four models scores all items of all tasks in turns, every second round backwards:
`edgedisp-onnx` and lm-eval's `onnxruntime-genai` on one bundle, `edgedisp-torch` and lm-eval's `hf` (batches
of 8, fp32) on one folder, all with the physical cores. A ratio is the median over rounds of the times of one
round, and comes with its interval.

The choices must agree. In int8 arithmetic they do but for near ties, so the share of items with the same
choice is told beside the accuracies; and with `--exact BUNDLE`, a bundle in fp32 arithmetic, it must be all.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  makes lm-eval's own known
import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from record import write

from edgedisp import lm_eval_models
from edgedisp.bench.interleaved_timing import turns
from edgedisp.bench.results import compare_speeds
from edgedisp.bench.system import physical_cores
from edgedisp.core.paths import data_folder
from edgedisp.pipeline.prepare import read_documents
from edgedisp.recipe import load

PAIRS = {"edgedisp-onnx": "onnxruntime-genai", "edgedisp-torch": "hf"}
ARC = """\
task: like_arc_easy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
WINO = """\
task: like_winogrande
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: gold
doc_to_choice: "{{{{contexts}}}}"
doc_to_target: ending
metric_list: [{{metric: acc}}]
"""


def items(count: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """`X is a ...` of the text's first sentences: which X is described, and which X goes on so."""
    recipe = load(data_folder("recipes") / "quickstart.yaml")
    documents = read_documents(recipe.data, recipe.folder, False, lambda done, total, note: None)
    found = [re.match(r"([^.,(]{4,40}?) (?:is|was) (an? [^.]{60,160})\.", one.text) for one in documents]
    known = [match.groups() for match in found if match]
    arc, wino = [], []
    for number in range(count):
        name, said = known[4 * number]
        others = [known[4 * number + k][0] for k in (1, 2, 3)]
        gold = number % 4
        choices = [*others[:gold], name, *others[gold:]]
        arc.append({"question": f"Which of these is {said}?", "choices": choices, "gold": gold})
        half = len(said.split()) // 2
        beginning, ending = " ".join(said.split()[:half]), " ".join(said.split()[half:])
        pair = [f"This text is about {one}: {one} is {beginning}" for one in (choices[gold], others[0])]
        wino.append(
            {"contexts": pair if number % 2 else pair[::-1], "gold": 1 - number % 2, "ending": ending}
        )
    return arc, wino


def tasks(folder: Path, count: int) -> TaskManager:
    for name, text, rows in zip(("arc", "wino"), (ARC, WINO), items(count)):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


def scored(
    subject: LM, manager: TaskManager, names: list[str], limit: int
) -> tuple[float, dict[str, list[int]], dict[str, float], dict[str, int]]:
    """Seconds, the choice of each item, the accuracies, and the requests of each task."""
    started = time.perf_counter()
    found: Any = simple_evaluate(
        subject, tasks=names, task_manager=manager, limit=limit, bootstrap_iters=0, verbosity="ERROR"
    )
    seconds = time.perf_counter() - started
    choices, requests = {}, {}
    for name in names:
        samples = sorted(found["samples"][name], key=lambda one: one["doc_id"])
        choices[name] = [
            max(range(len(one["resps"])), key=lambda k: one["filtered_resps"][k][0]) for one in samples
        ]
        requests[name] = sum(len(one["resps"]) for one in samples)
    return seconds, choices, {name: found["results"][name]["acc,none"] for name in names}, requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle of it")
    parser.add_argument("--exact", type=Path, help="a bundle in fp32: both backends must choose alike")
    parser.add_argument("--items", type=int, default=40, help="of each task")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", help="of lm-eval, with commas between; default: made ones")
    parser.add_argument("--include", type=Path, help="a folder of lm-eval tasks")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    threads = physical_cores()
    torch.set_num_threads(threads)
    subjects: dict[str, LM] = {
        "edgedisp-onnx": lm_eval_models.OnnxHarnessModel(str(asked.bundle), threads),
        "onnxruntime-genai": get_model("onnxruntime-genai")(pretrained=str(asked.bundle)),
        "edgedisp-torch": lm_eval_models.TorchHarnessModel(str(asked.model), threads),
        "hf": get_model("hf")(pretrained=str(asked.model), device="cpu", dtype="float32", batch_size=8),
    }
    with tempfile.TemporaryDirectory() as scratch:
        names = (asked.tasks or "like_arc_easy,like_winogrande").split(",")
        if asked.tasks is None:
            manager = tasks(Path(scratch), asked.items)
        else:
            manager = TaskManager(include_path=asked.include and str(asked.include))
        all_of = {"manager": manager, "names": names, "limit": asked.items}
        first = {name: scored(subject, **all_of) for name, subject in subjects.items()}  # and a warm-up
        times: dict[str, list[float]] = {name: [] for name in subjects}
        for number, name in turns(list(subjects), asked.rounds):
            times[name].append(scored(subjects[name], **all_of)[0])
            print(f"round {number + 1} of {asked.rounds}: {name} {times[name][-1]:.1f} s", file=sys.stderr)
        if asked.exact is not None:
            exact = [
                scored(lm_eval_models.OnnxHarnessModel(str(asked.exact), threads), **all_of)[1],
                scored(get_model("onnxruntime-genai")(pretrained=str(asked.exact)), **all_of)[1],
            ]
    requests = sum(first["hf"][3].values())
    scored_items = sum(len(choices) for choices in first["hf"][1].values())
    figures, rows = {"items": scored_items, "requests": requests, "threads": threads}, []
    for ours, theirs in PAIRS.items():
        ratio = compare_speeds(times[ours], times[theirs])
        same = [
            a == b for task in first[ours][1] for a, b in zip(first[ours][1][task], first[theirs][1][task])
        ]
        short = theirs.removeprefix("onnxruntime-")
        figures[f"items_per_s_ratio_lm_eval_{short}"] = ratio["ratio"]
        figures[f"same_choice_{short}"] = sum(same) / len(same)
        rows.append({"ours": ours, "theirs": theirs, "ratio": ratio})
    if asked.exact is not None:
        figures["same_choice_genai_fp32"] = float(exact[0] == exact[1])
    for name in subjects:
        middle = sorted(times[name])[len(times[name]) // 2]
        rows.append({"name": name, "seconds": times[name], "requests_per_s": requests / middle,
                     "accuracy": first[name][2]})  # fmt: skip
        print(f"{name:20} {requests / middle:6.1f} requests/s  {first[name][2]}")
    print(figures)
    write("scorer_speed", figures, rows)


if __name__ == "__main__":
    main()
