"""Bundles and torch models inside lm-evaluation-harness: its own entry, its own tasks, one answer."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from graph_twins import TwinStore
from harness_tasks import folder
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from edgedisp.commands import lm_eval
from edgedisp.commands.lm_eval import OnnxHarnessModel
from edgedisp.core.errors import BadInput

__all__ = ["folder"]  # a fixture


def answers(tasks: Path, model: str, arguments: str) -> dict[str, Any]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results: Any = simple_evaluate(
        model, arguments, tasks=["toy_choice", "toy_generate"], task_manager=manager, bootstrap_iters=0
    )
    return {
        name: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in results["samples"].items()
    }


def test_lm_eval_opens_both_by_name_and_they_agree_on_log_likelihoods_and_text(
    twins: TwinStore, folder: Path
) -> None:
    onnx = answers(folder, "edgedisp-onnx", f"bundle={twins.fp32('llama')},threads=1")
    torch = answers(folder, "edgedisp-torch", f"folder={twins.model_dir('llama')},threads=1")
    assert onnx["toy_generate"] == torch["toy_generate"]
    pairs = zip(*(chain.from_iterable(side["toy_choice"]) for side in (onnx, torch)), strict=True)
    for (log_prob, greedy), (expected, expected_greedy) in pairs:
        assert log_prob == pytest.approx(expected, abs=1e-3) and greedy == expected_greedy


def test_code_of_tasks_needs_trust(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "code.yaml").write_text("include: choice.yaml\ntask: toy_code\nprocess_docs: !function run.all")
    config = folder.parent / "config.yaml"
    config.write_text(f"tasks: [toy_code]\ninclude_path: {folder}\n")
    monkeypatch.setattr(lm_eval, "cli_evaluate", lambda: sys.exit(0))
    words = ["--include_path", str(folder)], ["--tasks", f"{folder}/code.y*ml"], ["--config", str(config)]
    for options, code in [*((each, 2) for each in words), (["--trust-task-code", *words[0]], 0)]:
        monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *options])
        with pytest.raises(SystemExit) as stop:
            lm_eval.main()
        assert stop.value.code == code and "--trust-task-code" not in sys.argv


def test_an_argument_that_does_not_exist_is_refused(twins: TwinStore) -> None:
    with pytest.raises(BadInput, match="thread: no such argument"):
        OnnxHarnessModel(str(twins.fp32("llama")), thread=1)
    with pytest.raises(BadInput, match="a bundle is a folder"):
        OnnxHarnessModel(str(twins.model_dir("llama")))
