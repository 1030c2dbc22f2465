"""Device profiles are read as strictly as recipes, and all that are shipped load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from edgedisp.core.errors import BadInput
from edgedisp.recipe.device_profile import Layout, load_target
from edgedisp.recipe.values import target_names

SHIPPED = ["browser", "laptop-x64", "phone-arm64", "raspberry-pi"]
GOOD = "name: box\ndescription: a box\narchitecture: arm64\ncontext: 512\n"


def refused(text: str, folder: Path) -> list[str]:
    """The problems of a profile, line by line, without their number."""
    (folder / "box.yaml").write_text(text)
    with pytest.raises(BadInput) as problem:
        load_target("box", folder)
    return [
        re.sub(r"^ *\d+\. ", "", line) for line in str(problem.value).replace(str(folder), "").splitlines()
    ]


def test_every_shipped_profile_loads_under_its_name_with_sources_for_its_figures() -> None:
    targets = {name: load_target(name) for name in target_names()}
    assert list(targets) == SHIPPED
    for name, target in targets.items():
        assert target.name == name and target.precision == "int4" and 2048 <= target.context <= 4096
        assert target.notes and target.sources
    assert [target.threads for target in targets.values()] == [1, None, 4, 4]
    assert targets["browser"].layouts == ("transformers.js",)
    assert targets["laptop-x64"].layouts == ("onnxruntime-genai", "optimum")


def test_the_layouts_of_profiles_are_those_that_are_written() -> None:
    from edgedisp.graph.runtime_layouts import LAYOUTS

    assert get_args(Layout) == LAYOUTS


def test_an_unknown_name_gets_the_closest_one_and_the_choices() -> None:
    with pytest.raises(BadInput, match="did you mean 'phone-arm64'") as problem:
        load_target("phone-arm")
    assert ", ".join(SHIPPED) in str(problem.value)


def test_a_new_device_is_a_new_file_and_ones_own_works_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "box.yaml").write_text(GOOD)
    target = load_target("box", tmp_path)
    assert target == load_target(str(tmp_path / "box.yaml"))
    assert (target.quantize.group, target.layouts) == (32, ("onnxruntime-genai",))
    with pytest.raises(BadInput, match="no such file"):
        load_target(str(tmp_path / "cup.yaml"))


def test_all_problems_of_a_profile_are_told_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = GOOD + "colour: red\nthreads: two\nlayouts: [optimun]\nquantize:\n  group: 33\n"
    keys = ("5: colour", "6: threads", "7: layouts.0", "9: quantize.group")
    first, *lines = refused(text, tmp_path)
    assert first == "/box.yaml: 4 problems"
    assert all(line.startswith(f"/box.yaml:{key}: ") for line, key in zip(lines, keys, strict=True))
    assert "did you mean 'optimum'?" in lines[2]


def test_a_profile_that_cannot_be_is_refused_with_place_and_reason(tmp_path: Path) -> None:
    for text, problem in {
        GOOD.replace("box\n", "cup\n", 1): "/box.yaml:1: name: 'cup', but the file is called box",
        GOOD + "layouts: [optimum, optimum]\n": "/box.yaml:5: layouts: 'optimum' is listed twice",
        GOOD
        + "precision: int8\nquantize:\n  head_bits: 4\n": "/box.yaml:7: quantize.head_bits: int8 weights",
        GOOD + "precision: fp32\nquantize: {group: 64}\n": "/box.yaml:6: quantize: precision fp32",
        GOOD + "notes: [it is fast]\n": "/box.yaml:5: notes: notes without sources",
        GOOD.replace("512", "16"): "/box.yaml:4: context: Input should be greater",
        GOOD.replace("description: a box\n", ""): "/box.yaml:1: description: missing",
        GOOD + "quantize: {head_group: 4}\n": "/box.yaml:5: quantize.head_group: removed; the head has",
        "- a\n": "/box.yaml:1: a device profile is a mapping with name",
        "a: [": "/box.yaml:1:",
    }.items():
        assert refused(text, tmp_path)[0].startswith(problem)
