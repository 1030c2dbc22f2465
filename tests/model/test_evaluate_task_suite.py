"""Task names against lm-eval's own index, which takes seconds to read; what scoring imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgedisp.core.errors import BadInput
from edgedisp.core.files import data_folder
from edgedisp.evaluate.heldout_tasks import TASKS
from edgedisp.evaluate.task_suite import SETS, check_tasks, expand
from edgedisp.recipe import load
from edgedisp.recipe.values import TASK_SETS

pytest.importorskip("lm_eval")


def test_names_of_lm_eval_and_of_a_folder_are_known_and_unknown_ones_get_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "zebra.yaml").write_text("task: qwerty_zebra\ndataset_path: json\n")
    check_tasks(["arc_easy", "mmlu", "qwerty_zebra", "heldout_cloze"], tmp_path)
    with pytest.raises(BadInput) as error:
        check_tasks(["arc_esy", "qwerty_zebr", "piqa"], tmp_path)
    for part in ("arc_esy, qwerty_zebr: no such task", "arc_easy", "qwerty_zebra"):
        assert part in str(error.value)


def test_every_task_of_a_set_or_a_packaged_recipe_exists() -> None:
    recipes = [load(path) for path in data_folder("recipes").glob("*.yaml")]
    tasks = {task for recipe in recipes for task in recipe.evaluate.tasks}
    assert any(not task.startswith("heldout_") for task in tasks)
    check_tasks([*SETS, *tasks])
    assert tuple(SETS) == TASK_SETS
    assert expand(["heldout_cloze", "heldout", "small", "arc_easy"]) == [
        "heldout_cloze",
        *(task for task in TASKS if task != "heldout_cloze"),
        *SETS["small"],
    ]


def test_scoring_loads_neither_torch_nor_lm_eval() -> None:
    code = "import sys, edgedisp.evaluate.task_suite; print({'torch', 'lm_eval'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
