"""Stage folders are whole or absent, a run has one owner and one writer, lists of files are checked."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgedisp.core import files, stage_folder
from edgedisp.core.errors import BadInput
from edgedisp.core.files import MANIFEST, RECORD, check_files, list_files, write_json
from edgedisp.core.stage_folder import Record, finish, open_run, read, stage_output

WRONG_SHAPES = ["{", "{}", "[]", "null", '"text"', '{"files": []}', '{"files": {"a": {"size_bytes": 1}}}']
LEFT_OVER = ("*.partial", "*.outdated")


def make(folder: Path, key: dict[str, Any], text: str = "hello", *, resumable: bool = False) -> Record:
    with stage_output(folder, key, resumable=resumable) as output_dir:
        (output_dir / "sub").mkdir(exist_ok=True)
        (output_dir / "sub" / "a.txt").write_text(text)
        (output_dir / "empty").touch()
        if resumable:
            (output_dir / "checkpoints").mkdir(exist_ok=True)
            (output_dir / "checkpoints" / "state").write_text("all steps")
        return finish(output_dir, folder, key, {"answer": 42}, 1.5)


def interrupt(folder: Path, key: Any, work: Callable[[Path], object], resumable: bool = False) -> None:
    with pytest.raises(KeyError), stage_output(folder, key, resumable=resumable) as output_dir:
        work(output_dir)
        raise KeyError


def test_a_finished_stage_is_read_back(tmp_path: Path) -> None:
    written = make(tmp_path / "stage", {"lr": 1})
    record = read(tmp_path / "stage")
    assert record is not None
    assert record == written == Record(tmp_path / "stage", {"lr": 1}, {"answer": 42}, record.files, 1.5)
    assert record.files["sub/a.txt"] == {"size_bytes": 5, "sha256": record.sha256("sub/a.txt")}
    assert record.sha256("sub/a.txt") == files.file_digest(tmp_path / "stage" / "sub" / "a.txt")
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["empty", "record.json", "sub"]
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]
    same, other = make(tmp_path / "same", {"lr": 2}), make(tmp_path / "other", {"lr": 1}, "another text")
    content = files.digest({name: record.sha256(name) for name in ("empty", "sub/a.txt")})
    assert record.content == same.content == content != other.content  # of the files alone


def test_a_stage_with_missing_or_cut_files_is_not_finished(tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    damages: list[Callable[[], object]] = [
        (stage / "sub" / "a.txt").unlink,
        lambda: (stage / "sub" / "a.txt").write_text("h"),
        *(partial((stage / RECORD).write_text, text) for text in WRONG_SHAPES),
    ]
    for damage in damages:
        make(stage, {})
        assert read(stage) is not None
        damage()
        assert read(stage) is None


def test_a_failed_stage_leaves_nothing_and_an_older_one_untouched(tmp_path: Path) -> None:
    make(tmp_path / "old", {"lr": 1})
    for name in ("new", "old"):
        interrupt(tmp_path / name, {"lr": 2}, lambda out: (out / "half").write_text("x"))
    record = read(tmp_path / "old")
    assert record is not None and record.key == {"lr": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_resumable_stage_finds_its_work_only_for_the_same_key(tmp_path: Path) -> None:
    present: list[bool] = []

    def work(out: Path) -> None:
        present.append((out / "checkpoint").exists())
        (out / "checkpoint").write_text("x")

    for lr in (1, 1, 2):
        interrupt(tmp_path / "stage", {"lr": lr}, work, resumable=True)
    assert present == [False, True, False]
    assert stage_folder.is_started(tmp_path / "stage", {"lr": 2})
    for damage in WRONG_SHAPES:
        (tmp_path / "stage.partial" / "key.json").write_text(damage)
        assert not stage_folder.is_started(tmp_path / "stage", {"lr": 2})
        interrupt(tmp_path / "stage", {"lr": 2}, work, resumable=True)
        assert not present[-1]
    assert read(tmp_path / "stage") is None


# --- killed at any point


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def dying_at(step: int) -> Iterator[list[bool]]:
    """Killed before the `step`-th write, rename or removal; everything after it fails, too."""
    count, died = 0, []

    def dying(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > step:
                raise Killed
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "rename", "fsync", "unlink"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        try:
            yield died
        except Killed:
            died.append(True)


@pytest.mark.parametrize("earlier", [None, {"lr": 0}])
def test_a_build_killed_at_any_step_is_completed_by_the_next(tmp_path: Path, earlier: Any) -> None:
    runs: list[str] = []  # the stages that ran

    def build(run: Path, key: dict[str, int]) -> None:
        with open_run(run, {}, "a"):
            for name in ("base", "arm/model"):
                record = read(run / name)
                if record is None or record.key != key:
                    runs.append(name)
                    make(run / name, key, f"{name} {key}", resumable=name != "base")

    def contents(run: Path) -> dict[str, str]:
        return {name: (run / name).read_text() for name in list_files(run) if name.endswith(".txt")}

    build(tmp_path / "whole", {"lr": 1})
    expected = contents(tmp_path / "whole")
    counts = []
    for step in range(100):
        run = tmp_path / f"run{step}"
        if earlier is not None:
            build(run, earlier)
        with dying_at(step) as died:
            build(run, {"lr": 1})
        whole = [json.loads(path.read_text())["key"] for path in run.rglob(f"*.partial/{RECORD}")]
        for work in run.rglob("model.partial/sub"):  # of no training is the end lost before it has a record
            assert whole or (work.parent / "checkpoints" / "state").is_file()
        runs.clear()
        build(run, {"lr": 1})
        counts.append(len(runs))
        assert contents(run) == expected, step
        assert not [path for pattern in LEFT_OVER for path in run.rglob(pattern)]
        assert len(runs) <= 2 - len(whole)  # what had a whole record did not run again
        if not died:
            break
    assert not died and counts[0] == 2 and counts[-1] == 0


def test_a_record_that_came_with_copied_files_is_not_taken_for_the_stages_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_run(run, {}, "a"):
        make(run / "first", {})
        copy = shutil.copytree
        interrupt(run / "second", {"lr": 1}, lambda out: copy(run / "first", out, dirs_exist_ok=True), True)
    with open_run(run, {}, "a"):
        assert read(run / "second") is None
        with stage_output(run / "second", {"lr": 1}, resumable=True) as output_dir:
            finish(output_dir, run / "second", {"lr": 1}, {"answer": 43}, 1.0)
    record = read(run / "second")
    assert record is not None and record.results == {"answer": 43}
    assert list(record.files) == ["empty", "sub/a.txt"]


# --- the run folder


def refused(path: Path, identity: dict[str, Any]) -> str:
    with pytest.raises(BadInput) as problem, open_run(path, identity, "a"):
        raise AssertionError("was opened")
    return str(problem.value)


def test_a_run_folder_of_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = tmp_path / "run"
    identity = {"train": {"lr": 1, "tokens": 5, "adapter": {"rank": 2}}, "seed": (0, 1)}
    for _ in range(2):  # a tuple is a list in JSON
        with open_run(run, identity, "first"):
            make(run / "base", {})
    other = {"train": {"lr": 2, "tokens": 5, "adapter": None, "clip": 1}, "seed": [0, 1]}
    difference = "belongs to another recipe (first), which differs in train.adapter, train.clip, train.lr;"
    assert difference in refused(run, other)
    for damage in WRONG_SHAPES:
        (run / "run.json").write_text(damage)
        assert "run.json: is damaged" in refused(run, {})
    assert read(run / "base") is not None


def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.partial").write_text('{"name": ')  # of a killed build: not something else
    with open_run(tmp_path / "run", {"seed": 3}, "a") as run:
        assert json.loads((run / "run.json").read_text())["identity"] == {"seed": 3}
    shutil.rmtree(tmp_path / "run")
    for name in ("thesis.txt", "b", "c", "d"):
        (tmp_path / name).write_text("x")
    assert "is not a run folder and not empty (b, c, d, ...)" in refused(tmp_path, {})
    assert "cannot be made (File exists)" in refused(tmp_path / "thesis.txt", {})
    assert "cannot be made (Not a directory); choose another --out" in refused(tmp_path / "b" / "run", {})
    assert len([path for path in tmp_path.iterdir() if path.name != ".lock"]) == 4


def test_what_is_left_of_a_run_that_was_just_made(tmp_path: Path) -> None:
    def attempt(run: Path, stage: str | None, error: type[Exception]) -> bool:
        with pytest.raises(error), open_run(run, {}, "a"):
            if stage:
                make(run / stage, {})
            raise error("no text")
        return run.exists()

    runs = tmp_path / "runs"
    assert attempt(runs / "trained", "baseline/model", BadInput)  # a training may have taken hours
    assert not attempt(runs / "new", "base", BadInput)
    assert not attempt(runs / "empty", None, RuntimeError)
    assert attempt(runs / "begun", "base", RuntimeError)
    assert attempt(runs / "begun", None, BadInput)  # is not new
    with pytest.raises(KeyError), open_run(runs / "resumable", {}, "a") as run:
        interrupt(run / "model", {}, lambda output_dir: None, resumable=True)
        raise KeyError
    assert [path.name for path in run.glob("m*")] == ["model.partial"]


def test_two_writers_of_one_run_folder_are_refused(tmp_path: Path) -> None:
    for _ in range(2):
        with open_run(tmp_path / "run", {}, "a"):
            assert "another build is writing there" in refused(tmp_path / "run", {})
            assert (tmp_path / "run" / "run.json").exists()


# --- JSON and lists of files


@dataclass
class Figures:
    values: tuple[float, ...]
    by_name: dict[int, Any]


def test_json_is_plain_readable_and_never_half_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "ä": [1]})
    text = '{\n "b": 1,\n "ä": [\n  1\n ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"x": math.nan})
    assert path.read_text(encoding="utf-8") == text and list(tmp_path.iterdir()) == [path]
    assert files.read_json(path) == files.read_object(path) == {"b": 1, "ä": [1]}
    assert files.read_json(tmp_path / "absent") == files.read_object(tmp_path / "absent") == {}
    for damage in ("{", "[]"):
        path.write_text(damage)
        assert files.read_object(path) == {}
        with pytest.raises(BadInput, match="is no JSON object"):
            files.read_json(path)
    assert files.canonical({"b": 1, "ä": [1, {"d": 2, "c": 3}]}) == '{"b":1,"ä":[1,{"c":3,"d":2}]}'
    figures = Figures((1.0, math.nan), {1: [math.inf, "x", None], 2: Figures((), {})})
    plain = {"values": [1.0, None], "by_name": {"1": [None, "x", None], "2": {"values": [], "by_name": {}}}}
    assert files.to_json(figures) == plain
    assert files.from_json(Figures, {"values": [1], "by_name": {}}) == Figures((1.0,), {})
    with pytest.raises(ValueError, match=r"^values.0: .*; values.1: .*; values.2: .*; \.\.\.$"):
        files.from_json(Figures, {"values": ["a"] * 4, "by_name": {}})


@pytest.fixture(params=[MANIFEST, RECORD])
def bundle(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder of two files and the list of them, under either name."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "weights").write_bytes(bytes(1000))
    (tmp_path / "config.json").write_text("{}")
    write_json(tmp_path / request.param, {"files": list_files(tmp_path)})
    return tmp_path


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255))
def test_a_record_with_a_changed_byte_is_none(tmp_path: Path, share: float, bits: int) -> None:
    record = make(tmp_path / "stage", {"lr": 1})
    path = tmp_path / "stage" / RECORD
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= bits
    path.write_bytes(content)
    assert read(tmp_path / "stage") in (None, record)  # the same: white space, or the name of the hash


@pytest.mark.parametrize(("name", "value"), [
    ("config.json", {"eos_token_id": "2"}),
    ("config.json", {"vocab_size": [1]}),
    ("generation_config.json", {"eos_token_id": {"id": 2}}),
    ("tokenizer_config.json", {"chat_template": 5}),
    ("tokenizer.json", {"added_tokens": [{"id": 3}]}),
    ("genai_config.json", {"model": [1]}),
    ("model.safetensors.index.json", {"weight_map": {"a": None}}),
    (MANIFEST, {"layouts": ["optimum"]}),
])  # fmt: skip
def test_a_key_of_another_type_is_refused_by_its_name(tmp_path: Path, name: str, value: Any) -> None:
    write_json(tmp_path / name, value)
    with pytest.raises(BadInput, match=f"{name}: {next(iter(value))}.*: (Input|Field|Could|Unable)"):
        files.read_json(tmp_path / name)


def damage_of(bundle: Path, pattern: str = "*") -> str:
    with pytest.raises(BadInput) as problem:
        check_files(bundle, pattern)
    return str(problem.value).removeprefix(f"{bundle}/")


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 999), bits=st.integers(1, 255))
def test_a_flipped_byte_is_noticed_anywhere(bundle: Path, position: int, bits: int) -> None:
    (bundle / "onnx" / "weights").write_bytes(bytes(1000))
    check_files(bundle)
    content = bytearray(1000)
    content[position] ^= bits
    (bundle / "onnx" / "weights").write_bytes(content)
    actual, expected = (hashlib.sha256(text).hexdigest() for text in (content, bytes(1000)))
    assert damage_of(bundle).startswith(
        f"onnx/weights: is damaged or changed: its SHA-256 is {actual}, not {expected}"
    )
    check_files(bundle, "*.json")


def test_missing_and_cut_files_are_named_before_contents_are_read(bundle: Path) -> None:
    (bundle / "README.md").write_text("is not listed")
    (bundle / "config.json").write_text("[]")  # same size, another content
    (bundle / "onnx" / "weights").write_bytes(bytes(999))
    assert damage_of(bundle).startswith("onnx/weights: has 999 bytes instead of 1,000")
    (bundle / "config.json").unlink()
    assert damage_of(bundle).startswith("config.json: is missing; it had 2 bytes")


def test_a_damaged_list_is_refused_and_a_folder_without_one_passes(tmp_path: Path) -> None:
    check_files(tmp_path)
    for text in WRONG_SHAPES:
        (tmp_path / MANIFEST).write_text(text)
        assert damage_of(tmp_path).startswith("manifest.json: is damaged")


def test_packaged_data_and_the_commit_are_those_of_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PACKAGE", tmp_path / "edgedisp")
    assert files.data_folder("recipes") == tmp_path / "recipes" and files.git_commit() is None
    (tmp_path / "edgedisp" / "packaged" / "recipes").mkdir(parents=True)
    assert files.data_folder("recipes") == tmp_path / "edgedisp" / "packaged" / "recipes"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    clean = files.git_commit()
    assert clean is not None and len(clean) == 12 and int(clean, 16)
    (tmp_path / "file").write_text("2")
    assert files.git_commit() == f"{clean}+"
