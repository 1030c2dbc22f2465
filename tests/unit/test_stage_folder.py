"""Stage folders are whole or absent, and a run folder has one owner and one writer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from edgedisp.core.errors import BadInput
from edgedisp.core.files import (
    MANIFEST,
    RECORD,
    canonical,
    changed_files,
    check_files,
    file_digest,
    list_files,
    update_listing,
    write_json,
)
from edgedisp.core.stage_folder import finish, open_run, read, stage_output

WRONG_SHAPES = ["{", "{}", "[]", "null", '"text"', '{"files": []}', '{"files": {"a": {"size_bytes": 1}}}']


def make(folder: Path, key: dict[str, Any], text: str = "hello", *, resumable: bool = False) -> None:
    with stage_output(folder, key, resumable=resumable) as output_dir:
        (output_dir / "sub").mkdir(exist_ok=True)
        (output_dir / "sub" / "a.txt").write_text(text)
        finish(output_dir, folder, key, {"answer": 42}, 1.5)


def test_a_finished_stage_is_read_back(tmp_path: Path) -> None:
    make(tmp_path / "stage", {"lr": 1})
    record = read(tmp_path / "stage")
    assert record is not None and record.key == {"lr": 1} and record.results == {"answer": 42}
    assert record.sha256("sub/a.txt") == file_digest(tmp_path / "stage" / "sub" / "a.txt")
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["record.json", "sub"]
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]
    make(tmp_path / "same", {"lr": 2})
    make(tmp_path / "other", {"lr": 1}, "another text")
    same, other = read(tmp_path / "same"), read(tmp_path / "other")
    assert same and other and record.content == same.content != other.content  # of the files alone


@pytest.mark.parametrize("damage", ["remove", "shorten", *WRONG_SHAPES])
def test_a_stage_with_missing_or_cut_files_is_not_finished(tmp_path: Path, damage: str) -> None:
    make(tmp_path / "stage", {})
    file = tmp_path / "stage" / "sub" / "a.txt"
    if damage == "remove":
        file.unlink()
    elif damage == "shorten":
        file.write_text("h")
    else:
        (tmp_path / "stage" / RECORD).write_text(damage)
        assert changed_files(tmp_path / "stage", "*") == []
    assert read(tmp_path / "stage") is None
    make(tmp_path / "stage", {})
    assert read(tmp_path / "stage") is not None


def test_a_failed_stage_leaves_nothing_and_an_older_one_untouched(tmp_path: Path) -> None:
    make(tmp_path / "old", {"lr": 1})
    for name in ("new", "old"):
        with pytest.raises(RuntimeError), stage_output(tmp_path / name, {"lr": 2}) as output_dir:
            (output_dir / "half").write_text("x")
            raise RuntimeError
    record = read(tmp_path / "old")
    assert record is not None and record.key == {"lr": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_resumable_stage_keeps_its_work_only_for_the_same_key(tmp_path: Path) -> None:
    for key, expected in (({"lr": 1}, False), ({"lr": 1}, True), ({"lr": 2}, False)):
        with pytest.raises(RuntimeError), stage_output(tmp_path / "stage", key, resumable=True) as output_dir:
            assert (output_dir / "checkpoint").exists() == expected
            (output_dir / "checkpoint").write_text("x")
            raise RuntimeError
    for damage in WRONG_SHAPES:
        (tmp_path / "stage.partial").mkdir(exist_ok=True)
        (tmp_path / "stage.partial" / "key.json").write_text(damage)
        with pytest.raises(RuntimeError), stage_output(tmp_path / "stage", {"lr": 2}, resumable=True):
            raise RuntimeError
    assert read(tmp_path / "stage") is None


class Killed(BaseException):
    """The process ends here."""


STEPS = [(os, "replace"), (os, "rename"), (os, "fsync"), (os, "unlink"), (shutil, "rmtree")]


def die_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Before the `step`-th write, rename or removal; everything after it fails, too."""
    count = 0

    def dying(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > step:
                raise Killed
            return function(*arguments, **options)

        return call

    for module, name in STEPS:
        monkeypatch.setattr(module, name, dying(getattr(module, name)))


@pytest.mark.parametrize("earlier", [None, {"lr": 0}])
def test_a_build_killed_at_any_step_is_completed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: dict[str, int] | None
) -> None:
    def build(run: Path, key: dict[str, int]) -> None:
        with open_run(run, {}, "a"):
            for name in ("base", "arm/model"):
                (run / name).parent.mkdir(exist_ok=True)
                record = read(run / name)
                if record is None or record.key != key:
                    made.append(name)
                    make(run / name, key, f"{name} {key}", resumable=name != "base")

    made: list[str] = []
    build(tmp_path / "whole", {"lr": 1})
    expected = list_files(tmp_path / "whole", without=(".lock", "run.json"))
    files = [name for name in expected if not name.endswith(RECORD)]
    rounds = []
    for step in range(100):
        run = tmp_path / f"run{step}"
        if earlier is not None:
            build(run, earlier)
        with monkeypatch.context() as patch:
            die_at(patch, step)
            try:
                build(run, {"lr": 1})
                died = False
            except Killed:
                died = True
        records = [json.loads(path.read_text())["key"] for path in run.rglob(f"*.partial/{RECORD}")]
        made = []
        build(run, {"lr": 1})
        rounds.append(len(made))
        found = list_files(run, without=(".lock", "run.json"))
        assert {name: found[name] for name in files} == {name: expected[name] for name in files}, step
        assert found.keys() == expected.keys()
        assert len(made) <= 2 - len(records)  # what had a whole record was not made again
        if not died:
            break
    assert not died and rounds[0] == 2 and rounds[-1] == 0


def test_a_record_that_came_with_copied_files_is_not_taken_for_the_stages_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_run(run, {}, "a"):
        make(run / "first", {})
        with (
            pytest.raises(RuntimeError),
            stage_output(run / "second", {"lr": 1}, resumable=True) as output_dir,
        ):
            shutil.copytree(run / "first", output_dir, dirs_exist_ok=True)
            raise RuntimeError
    with open_run(run, {}, "a"):
        assert read(run / "second") is None
        with stage_output(run / "second", {"lr": 1}, resumable=True) as output_dir:
            finish(output_dir, run / "second", {"lr": 1}, {"answer": 43}, 1.0)
    record = read(run / "second")
    assert record is not None and record.results == {"answer": 43} and list(record.files) == ["sub/a.txt"]


def test_json_is_never_half_written_and_never_holds_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert canonical({"b": 1, "a": [1, {"d": 2, "c": 3}]}) == canonical({"a": [1, {"c": 3, "d": 2}], "b": 1})


# --- the run folder --------------------------------------------------------------------------------------


def refused(path: Path, identity: dict[str, Any]) -> str:
    with pytest.raises(BadInput) as problem, open_run(path, identity, "a"):
        raise AssertionError("was opened")
    return str(problem.value)


def test_a_run_folder_of_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_run(run, {"train": {"lr": 1, "tokens": 5}}, "one"):
        make(run / "base", {})
    message = refused(run, {"train": {"lr": 2, "tokens": 5}})
    assert "belongs to another recipe (one), which differs in train.lr" in message
    for damage in WRONG_SHAPES:
        (run / "run.json").write_text(damage)
        assert "run.json: is damaged" in refused(run, {})
    assert read(run / "base") is not None


def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.partial").write_text('{"name": ')  # of a killed build: not something else
    with open_run(tmp_path / "run", {}, "a") as run:
        assert (run / "run.json").is_file()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "thesis.txt").write_text("x")
    assert "is not a run folder and not empty (thesis.txt" in refused(tmp_path, {})
    assert "is a file" in refused(tmp_path / "thesis.txt", {})
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == ["thesis.txt"]


def test_bad_input_removes_a_run_folder_that_was_just_made_unless_an_arm_is_trained(tmp_path: Path) -> None:
    trained = tmp_path / "runs" / "trained"
    with pytest.raises(BadInput, match="no text"), open_run(trained, {}, "a") as run:
        make(run / "baseline" / "model", {})
        raise BadInput("no text")
    assert (trained / "baseline" / "model" / RECORD).is_file()
    with pytest.raises(BadInput, match="no text"), open_run(tmp_path / "runs" / "new", {}, "a") as run:
        make(run / "base", {})
        raise BadInput("no text")
    assert not (tmp_path / "runs" / "new").exists()


def test_two_writers_of_one_run_folder_are_refused(tmp_path: Path) -> None:
    script = f"""
        import sys
        from pathlib import Path
        from edgedisp.core.stage_folder import open_run
        with open_run(Path({str(tmp_path / "run")!r}), {{}}, "a"):
            print("open", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        assert "another build is writing there" in refused(tmp_path / "run", {})
        assert (tmp_path / "run" / "run.json").exists()
    finally:
        other.communicate("")
    with open_run(tmp_path / "run", {}, "a"):
        assert (tmp_path / "run" / "run.json").exists()


# --- files of a bundle -----------------------------------------------------------------------------------


@pytest.fixture(params=[MANIFEST, RECORD])
def bundle(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder of two files and the list of them, under either name."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "weights").write_bytes(bytes(1000))
    (tmp_path / "config.json").write_text("{}")
    write_json(tmp_path / request.param, {"files": list_files(tmp_path)})
    return tmp_path


def damage_of(bundle: Path) -> str:
    with pytest.raises(BadInput) as problem:
        check_files(bundle)
    return str(problem.value).removeprefix(f"{bundle}/")


def test_a_whole_folder_passes_also_with_files_that_are_not_listed(bundle: Path) -> None:
    (bundle / "README.md").write_text("edited")
    assert check_files(bundle)
    assert not check_files(bundle / "onnx")  # has no list


def test_a_damaged_file_is_named_with_what_was_expected(bundle: Path) -> None:
    listing = next(path for path in (bundle / MANIFEST, bundle / RECORD) if path.is_file())
    (bundle / "onnx" / "weights").write_bytes(bytes(999) + b"\x01")
    expected = json.loads(listing.read_text())["files"]["onnx/weights"]["sha256"]
    actual = list_files(bundle)["onnx/weights"]["sha256"]
    message = damage_of(bundle)
    assert message.startswith(f"onnx/weights: is damaged: its SHA-256 is {actual}") and expected in message
    (bundle / "config.json").write_text("[]")  # same size, another content; sizes are compared first
    (bundle / "onnx" / "weights").write_bytes(bytes(999))
    assert damage_of(bundle).startswith("onnx/weights: has 999 bytes,")
    (bundle / "config.json").unlink()
    assert damage_of(bundle).startswith("config.json: is missing")


def test_a_file_changed_on_purpose_is_entered_anew(bundle: Path) -> None:
    (bundle / "config.json").write_text("[1]")
    assert "config.json: has 3 bytes" in damage_of(bundle)
    update_listing(bundle, ["config.json"])
    assert check_files(bundle)


@pytest.mark.parametrize("text", WRONG_SHAPES)
def test_a_damaged_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    assert damage_of(tmp_path).startswith("manifest.json: is damaged")
