"""Device profiles are read strictly, and all that are shipped load."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgedisp import BadInput, data_folder
from edgedisp.bench.targets import load_target, names


def test_every_shipped_profile_loads_and_carries_its_file_name() -> None:
    shipped = sorted(path.stem for path in (data_folder("export") / "targets").iterdir())
    assert names() == shipped
    assert {"laptop-x64", "phone-arm64"} <= set(shipped)
    for name in shipped:
        target = load_target(name)
        assert target.name == name
        assert target.description
        assert target.precision == "int4"


def test_the_laptop_takes_the_cores_it_finds_and_the_phone_four() -> None:
    assert load_target("laptop-x64").threads is None
    assert load_target("phone-arm64").threads == 4


def test_an_unknown_name_gets_the_closest_one_and_the_choices() -> None:
    with pytest.raises(BadInput, match="Did you mean 'phone-arm64'") as found:
        load_target("phone-arm")
    assert "laptop-x64, phone-arm64" in str(found.value)


GOOD = "name: box\ndescription: a box\nruntime: onnxruntime-genai\narchitecture: arm64\ncontext: 512\n"


def test_a_new_device_is_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "box.yaml").write_text(GOOD)
    assert names(tmp_path) == ["box"]
    assert load_target("box", tmp_path).quantize.group == 32


def test_all_problems_of_a_profile_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "box.yaml").write_text(GOOD + "colour: red\nthreads: two\nquantize: {group: 33}\n")
    with pytest.raises(BadInput) as found:
        load_target("box", tmp_path)
    assert [key in str(found.value) for key in ("colour", "threads", "quantize.group")] == [True] * 3


@pytest.mark.parametrize(
    ("text", "reason"), [(GOOD.replace("box", "cup"), "file is called"), ("a: [", "YAML")]
)
def test_a_profile_under_a_false_name_or_of_broken_yaml_is_refused(
    tmp_path: Path, text: str, reason: str
) -> None:
    (tmp_path / "box.yaml").write_text(text)
    with pytest.raises(BadInput, match=reason):
        load_target("box", tmp_path)
