"""Stage folders are whole or absent, and a run folder has one owner and one writer."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from edgedisp.core.errors import BadInput
from edgedisp.core.stage_folder import canonical, file_digest, finish, making, open_run, read, write_json


def make(folder: Path, key: dict[str, object], text: str = "hello") -> None:
    with making(folder, key) as own:
        (own / "sub").mkdir()
        (own / "sub" / "a.txt").write_text(text)
        finish(own, folder, key, {"answer": 42}, 1.5)


def test_a_finished_stage_is_read_back(tmp_path: Path) -> None:
    make(tmp_path / "stage", {"lr": 1})
    record = read(tmp_path / "stage")
    assert record is not None and record.key == {"lr": 1} and record.results == {"answer": 42}
    assert record.sha256("sub/a.txt") == file_digest(tmp_path / "stage" / "sub" / "a.txt")
    assert sorted(path.name for path in (tmp_path / "stage").iterdir()) == ["record.json", "sub"]
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def test_content_depends_on_the_files_and_not_on_the_time(tmp_path: Path) -> None:
    make(tmp_path / "a", {}, "one")
    make(tmp_path / "b", {}, "one")
    make(tmp_path / "c", {}, "two")
    first, same, other = (read(tmp_path / name) for name in "abc")
    assert first and same and other
    assert first.content == same.content != other.content


@pytest.mark.parametrize("damage", ["remove", "shorten", "record"])
def test_a_stage_with_missing_or_cut_files_is_not_finished(tmp_path: Path, damage: str) -> None:
    make(tmp_path / "stage", {})
    file = tmp_path / "stage" / "sub" / "a.txt"
    if damage == "remove":
        file.unlink()
    elif damage == "shorten":
        file.write_text("h")
    else:
        (tmp_path / "stage" / "record.json").write_text('{"key": ')
    assert read(tmp_path / "stage") is None


def test_a_failed_stage_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), making(tmp_path / "stage", {}) as own:
        (own / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_failed_remake_keeps_the_old_stage(tmp_path: Path) -> None:
    make(tmp_path / "stage", {"lr": 1})
    with pytest.raises(RuntimeError), making(tmp_path / "stage", {"lr": 2}):
        raise RuntimeError
    record = read(tmp_path / "stage")
    assert record is not None and record.key == {"lr": 1}


def test_a_resumable_stage_keeps_its_work_only_for_the_same_key(tmp_path: Path) -> None:
    for key, expected in (({"lr": 1}, False), ({"lr": 1}, True), ({"lr": 2}, False)):
        with pytest.raises(RuntimeError), making(tmp_path / "stage", key, resumable=True) as own:
            assert (own / "checkpoint").exists() == expected
            (own / "checkpoint").write_text("x")
            raise RuntimeError
    assert read(tmp_path / "stage") is None


def test_a_process_killed_half_way_leaves_no_folder_that_looks_finished(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        from pathlib import Path
        from edgedisp.core.stage_folder import making
        with making(Path({str(tmp_path / "stage")!r}), {{}}) as own:
            (own / "big").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert read(tmp_path / "stage") is None
    make(tmp_path / "stage", {})
    assert read(tmp_path / "stage") is not None and not (tmp_path / "stage.partial").exists()


def test_a_record_that_came_with_copied_files_is_not_taken_for_the_stages_own(tmp_path: Path) -> None:
    make(tmp_path / "first", {})
    with making(tmp_path / "second", {}) as own:
        (own / "record.json").write_bytes((tmp_path / "first" / "record.json").read_bytes())
        finish(own, tmp_path / "second", {}, {"answer": 43}, 1.0)
    record = read(tmp_path / "second")
    assert record is not None and record.results == {"answer": 43} and record.files == {}


def test_json_is_never_half_written_and_never_holds_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_canonical_json_ignores_the_order_of_keys() -> None:
    assert canonical({"b": 1, "a": [1, {"d": 2, "c": 3}]}) == canonical({"a": [1, {"c": 3, "d": 2}], "b": 1})


def test_a_run_folder_of_another_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_run(run, {"train": {"lr": 1, "tokens": 5}}, "one"):
        make(run / "base", {})
    message = r"belongs to another recipe \(one\), which differs in train\.lr"
    with (
        pytest.raises(BadInput, match=message),
        open_run(run, {"train": {"lr": 2, "tokens": 5}}, "two"),
    ):
        raise AssertionError("was opened")
    assert read(run / "base") is not None


def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    message = r"is not a run folder and not empty \(thesis.txt"
    with pytest.raises(BadInput, match=message), open_run(tmp_path, {}, "a"):
        raise AssertionError("was opened")
    assert (tmp_path / "thesis.txt").exists() and not (tmp_path / "run.json").exists()


def test_a_file_in_the_place_of_the_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(BadInput, match="is a file"), open_run(tmp_path / "run", {}, "a"):
        raise AssertionError("was opened")


def test_bad_input_takes_back_a_run_folder_that_was_just_made(tmp_path: Path) -> None:
    trained = tmp_path / "runs" / "trained"
    with pytest.raises(BadInput, match="no text"), open_run(trained, {}, "a") as run:
        make(run / "baseline" / "model", {})
        raise BadInput("no text")
    assert (trained / "baseline" / "model" / "record.json").is_file()  # hours of work are never thrown away
    with pytest.raises(BadInput, match="no text"), open_run(tmp_path / "runs" / "new", {}, "a") as run:
        make(run / "base", {})
        raise BadInput("no text")
    assert not (tmp_path / "runs" / "new").exists()


def test_two_writers_of_one_run_folder_are_refused(tmp_path: Path) -> None:
    script = f"""
        import sys, time
        from pathlib import Path
        from edgedisp.core.stage_folder import open_run
        with open_run(Path({str(tmp_path / "run")!r}), {{}}, "a"):
            print("open", flush=True)
            sys.stdin.read()
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        with (
            pytest.raises(BadInput, match="another build is writing there"),
            open_run(tmp_path / "run", {}, "a"),
        ):
            raise AssertionError("was opened")
        assert (tmp_path / "run" / "run.json").exists()
    finally:
        other.communicate("")
    with open_run(tmp_path / "run", {}, "a"):
        assert (tmp_path / "run" / "run.json").exists()
