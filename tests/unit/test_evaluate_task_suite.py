"""Task names: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgedisp.core.errors import BadInput
from edgedisp.evaluate.heldout_tasks import TASKS
from edgedisp.evaluate.task_suite import SETS, check_tasks, expand
from edgedisp.recipe.values import TASK_SETS


def test_other_names_without_lm_eval_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(BadInput, match=r'arc_easy: not a held-out task.*pip install "edgedisp\[bench\]"'):
        check_tasks(["arc_easy"])
    with pytest.raises(BadInput, match=r"heldout_clozes.*did you mean heldout_cloze,"):
        check_tasks(["heldout_clozes"])


def test_no_task_at_all_is_refused() -> None:
    with pytest.raises(BadInput, match=r"evaluate\.tasks is empty; choose from heldout_perplexity"):
        check_tasks([])


def test_a_tasks_path_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"evaluate\.tasks_path: .*nothing is no folder"):
        check_tasks(["heldout_cloze"], tmp_path / "nothing")


def test_names_of_lm_eval_and_of_a_folder_are_known(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "own.yaml").write_text("task: my_very_own\ndataset_path: json\n")
    check_tasks(["arc_easy", "mmlu", "my_very_own", "heldout_cloze"], tmp_path)


def test_unknown_names_get_the_nearest_ones_of_lm_eval_and_of_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "own.yaml").write_text("task: qwerty_zebra\ndataset_path: json\n")
    with pytest.raises(BadInput) as refused:
        check_tasks(["arc_esy", "qwerty_zebr", "piqa"], tmp_path)
    message = str(refused.value)
    assert "arc_esy, qwerty_zebr: no such task" in message
    assert "arc_easy" in message
    assert "qwerty_zebra" in message


def test_every_task_of_a_set_exists_and_the_recipe_knows_the_same_sets() -> None:
    check_tasks([*SETS])
    assert tuple(SETS) == TASK_SETS
    assert expand(["heldout_cloze", "heldout", "small", "arc_easy"]) == [
        "heldout_cloze",
        *(task for task in TASKS if task != "heldout_cloze"),
        *SETS["small"],
    ]
