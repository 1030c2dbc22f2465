"""Device profiles are read as strictly as recipes, and all that are shipped load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from edgedisp.core.errors import BadInput
from edgedisp.graph.runtime_layouts import LAYOUTS
from edgedisp.recipe.device_profile import Layout, load_target
from edgedisp.recipe.values import target_names

SHIPPED = ["browser", "laptop-x64", "phone-arm64", "raspberry-pi"]
GOOD = "name: box\ndescription: a box\narchitecture: arm64\ncontext: 512\n"


def test_every_shipped_profile_loads_under_its_name_with_sources_for_its_figures() -> None:
    targets = {name: load_target(name) for name in target_names()}
    assert list(targets) == SHIPPED
    for name, target in targets.items():
        assert target.name == name and target.precision == "int4" and 2048 <= target.context <= 4096
        assert target.notes and target.sources
    assert [target.threads for target in targets.values()] == [1, None, 4, 4]
    assert targets["browser"].layouts == ("transformers.js",)
    assert targets["laptop-x64"].layouts == ("onnxruntime-genai", "optimum")
    assert get_args(Layout) == LAYOUTS


def test_a_profile_is_a_shipped_name_or_a_path_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "box.yaml").write_text(GOOD)
    target = load_target(str(tmp_path / "box.yaml"))
    assert (target.quantize.group, target.layouts) == (32, ("onnxruntime-genai",))
    with pytest.raises(BadInput, match="no such file"):
        load_target(str(tmp_path / "cup.yaml"))
    with pytest.raises(BadInput, match="did you mean 'phone-arm64'") as problem:
        load_target("phone-arm")
    assert ", ".join(SHIPPED) in str(problem.value)


PROBLEMS = {  # the text of box.yaml -> how its problems begin, after its path
    GOOD + "layouts: [optimum, optimum]\n": [":5: layouts: 'optimum' is listed twice"],
    GOOD.replace("512", "16"): [":4: context: "],
    GOOD.replace("description: a box\n", ""): [":1: description: missing"],
    "- a\n": [":1: a device profile is a mapping with name"],
    "a: [": [":1:"],
    GOOD + "colour: red\nthreads: two\nlayouts: [optimun]\nquantize:\n  group: 33\n": [
        ": 4 problems", ":5: colour: ", ":6: threads: ", ":7: layouts.0: ", ":9: quantize.group: "
    ],
}  # fmt: skip


@pytest.mark.parametrize("text", PROBLEMS)
def test_all_problems_of_a_profile_are_listed_each_with_its_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "box.yaml").write_text(text)
    with pytest.raises(BadInput) as error:
        load_target(str(tmp_path / "box.yaml"))
    message = str(error.value).replace(str(tmp_path), "")
    lines = [re.sub(r"^ *\d+\. ", "", line) for line in message.splitlines()]
    problems = [f"/box.yaml{problem}" for problem in PROBLEMS[text]]
    assert all(line.startswith(problem) for line, problem in zip(lines, problems))
    assert len(lines) == len(problems) or len(problems) == 1
    assert "optimun" not in text or "did you mean 'optimum'?" in message
