"""Bundles and torch models inside lm-evaluation-harness: its own entry, its own tasks, one answer."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import graph_twins as twins
import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from edgedisp.commands.lm_eval import OnnxHarnessModel
from edgedisp.core.errors import BadInput
from edgedisp.graph.export import export

TASK = """\
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
"""
TEXT = """\
task: toy_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lm_eval")
    twins.make(root / "model", "llama")
    (root / "fp32").mkdir()
    export(root / "model", root / "fp32", threads=1)
    rows = [
        {"question": f"The quick {word} fox", "choices": [" jumps over", " lazy dog", " 12345"], "gold": 0}
        for word in ("brown", "red", "grey", "old")
    ]
    (root / "tasks").mkdir()
    data = root / "tasks" / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in (("choice", TASK), ("text", TEXT)):
        (root / "tasks" / f"{name}.yaml").write_text(text.format(data=data), encoding="utf-8")
    return {name: root / name for name in ("model", "fp32", "tasks")}


def answers(folders: dict[str, Path], model: str, arguments: str) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folders["tasks"]), include_defaults=False)
    found: Any = simple_evaluate(
        model, arguments, tasks=["toy_choice", "toy_text"], task_manager=manager, bootstrap_iters=0
    )
    return {
        name: [sample["filtered_resps"] for sample in sorted(samples, key=lambda one: one["doc_id"])]
        for name, samples in found["samples"].items()
    }


def test_lm_eval_opens_both_by_name_and_they_agree_on_log_likelihoods_and_text(
    folders: dict[str, Path],
) -> None:
    onnx = answers(folders, "edgedisp-onnx", f"bundle={folders['fp32']},threads=1")
    torch = answers(folders, "edgedisp-torch", f"folder={folders['model']},threads=1")
    assert onnx["toy_text"] == torch["toy_text"]
    pairs = zip(*(chain.from_iterable(one["toy_choice"]) for one in (onnx, torch)), strict=True)
    for (ours, ours_greedy), (theirs, theirs_greedy) in pairs:
        assert ours == pytest.approx(theirs, abs=1e-3) and ours_greedy == theirs_greedy


def test_an_argument_that_does_not_exist_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(BadInput, match="thread: no such argument"):
        OnnxHarnessModel(str(folders["fp32"]), thread=1)
    with pytest.raises(BadInput, match="a bundle is a folder"):
        OnnxHarnessModel(str(folders["model"]))
