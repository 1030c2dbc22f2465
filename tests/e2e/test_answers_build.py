"""A build from chat rows: base, baseline and dispersed are asked the same questions at every precision."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from tiny_build import Command

from edgedisp.commands.compare import join_runs
from edgedisp.core.files import data_folder
from edgedisp.pipeline.run_results import load

TASK = "heldout_answers"
ROWS = data_folder("recipes") / "data" / "home_commands_eval.jsonl"


def test_base_and_arms_answer_the_same_questions_and_the_table_comes_last(
    edgedisp: Command, tmp_path: Path
) -> None:
    options: list[Any] = ["--smoke", "--set", "precisions=[int4]", "--set", "evaluate.answer_tokens=8"]
    ended = edgedisp("build", "home_commands_smollm2_135m", *options, "--out", tmp_path / "run")
    assert ended.code == 0, ended.err
    run = load(tmp_path / "run")
    labels = ["base/int4", "baseline/int4", "dispersed/int4"]
    assert run.has_base and run.arms == ["baseline", "dispersed"]
    assert run.latency and [row.label for row in run.latency.rows] == labels
    for precision in ("torch", "int4"):
        base, dispersed = (run.measured(name, precision).scores[TASK] for name in ("base", "dispersed"))
        assert base.items_sha256 == dispersed.items_sha256 and base.main.metric == "exact"
        gain = run.gains["dispersed"][precision][TASK].metrics["answer_loss"]
        assert gain.first == base.metrics["answer_loss"].estimate.value
        assert gain.second == dispersed.metrics["answer_loss"].estimate.value
    assert run.answers and all([*wrong.answers] == labels for wrong in run.answers)
    lines = [line for line in ended.out.splitlines() if line]
    assert [line.split()[0] for line in lines[-4:]] == [lines[-4].split()[0], "int4", "report:", "try"]
    assert shlex.split(lines[-1])[2:] == [
        "edgedisp",
        "chat",
        str(tmp_path / "run/dispersed/int4"),
        "--prompt",
        run.prompt,
    ]
    (tmp_path / "again").symlink_to(tmp_path / "run")
    joined = join_runs([tmp_path / "run", tmp_path / "again"])
    assert joined.has_base and len(joined.arms) == 4 and joined.gains["baseline"] == run.gains["baseline"]
    bundles = [tmp_path / "run" / arm / "int4" for arm in ("baseline", "dispersed")]
    ended = edgedisp(
        "compare", *bundles, "--tasks", TASK, "--text", ROWS, "--limit", "2", "--out", tmp_path / "two"
    )
    assert ended.code == 0, ended.err
    assert {*json.loads((tmp_path / "two" / "items.json").read_text())} == {"baseline/int4", "dispersed/int4"}
