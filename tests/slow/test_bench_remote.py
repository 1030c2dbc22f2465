"""Hosts at the other end of a pipe: a shell stands for the connection, all behind it is real."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny_bundle import RUNNER, tiny_bundles

from edgedisp.bench import machine, remote
from edgedisp.bench.devices import DeviceLost, Wanted
from edgedisp.bench.graph_facts import needed_files
from edgedisp.bench.timing import measure
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.progress import silent

FAR = RUNNER.parent / "edgedisp_far.py"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_bundles(tmp_path_factory.getbasetemp())


def wanted(**changes: Any) -> Wanted:
    options = {"runner": RUNNER, "cache": Path("unused"), "ids": lambda _: [], "python": sys.executable}
    return Wanted(**{**options, **changes})


def shell(home: Path, **environment: str) -> Callable[[str], list[str]]:
    """A connection: a shell with a home folder of its own."""
    # pip asks rustc for its version, and where that is rustup's it makes a folder in HOME.
    variables = {"HOME": str(home), "XDG_CACHE_HOME": "", "RUSTUP_HOME": "/tmp/rustup", **environment}
    words = [f"{name}={value}" for name, value in variables.items()]
    return lambda command: ["env", *words, "sh", "-c", command]


@contextmanager
def host(home: Path, bundles: dict[str, Path], **changes: Any) -> Iterator[remote.Remote]:
    home.mkdir(exist_ok=True)
    reach = changes.pop("reach", shell(home))
    with remote.opened("box", reach, lambda code, said: said, bundles, wanted(**changes)) as found:
        yield found


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def quick(bundles: dict[str, Path], there: remote.Remote, **options: Any) -> dict[str, Any]:
    chosen = {"prompt": 6, "generate": 5, "repetitions": 2, "threads": 1, **options}
    return measure(bundles, there, **chosen)


def test_a_remote_measurement_is_that_of_the_runner_there_and_leaves_nothing(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    during: list[str] = []
    with host(tmp_path / "home", bundles) as there:
        timed = quick(bundles, there, progress=lambda *_: during.extend(tree(tmp_path / "home")))
    assert [row["label"] for row in timed["rows"]] == ["fp32", "twin", "int4"]
    assert timed["order"] == ["fp32", "twin", "int4", "int4", "twin", "fp32"]
    assert timed["device"] == "box" and json.dumps(timed, allow_nan=False)
    assert any(path.endswith("/edgedisp_runner.py") for path in during)
    assert tree(tmp_path / "home") == []


def test_the_machine_is_read_from_its_own_files(bundles: dict[str, Path], tmp_path: Path) -> None:
    with host(tmp_path / "home", {"a": bundles["fp32"]}) as there:
        found, here = there.describe(), machine.describe()
        reading, own = there.readings(), machine.readings()
    # One machine, read over two roads.
    same = ("cpu", "architecture", "features", "physical_cores", "logical_cpus", "cpu_quota", "memory_bytes")
    assert {key: found[key] for key in same} == {key: here[key] for key in same}
    assert found["memory_limit_bytes"] == here["memory_limit_bytes"]
    assert found["packages"]["onnxruntime"] == here["packages"]["onnxruntime"]
    assert set(reading) == set(own)
    assert reading["busy_cpu_s"] == pytest.approx(own["busy_cpu_s"], abs=30)
    assert reading["load_average_1m"] == pytest.approx(own["load_average_1m"], abs=1)


def test_what_is_kept_is_not_copied_again(bundles: dict[str, Path], tmp_path: Path) -> None:
    one = {"a": bundles["fp32"]}
    copied: list[str] = []

    def note(done: int, total: int, text: str) -> None:
        copied.append(text)

    with host(tmp_path / "home", one, keep=True) as there:
        there.place({**one, "same": bundles["fp32"]}, note)
    assert {text.partition(":")[0] for text in copied} == {"runner", "a"}  # equal folders go once
    kept = [path for path in tree(tmp_path / "home") if path.count("/") > 2]
    assert sorted(Path(path).name for path in kept if "." in Path(path).name) == sorted(
        ["edgedisp_runner.py", *needed_files(bundles["fp32"])]
    )
    copied.clear()
    with host(tmp_path / "home", one, keep=True) as there:
        there.place(one, note)
        assert quick(one, there)["rows"]
    assert copied == []
    assert [path for path in tree(tmp_path / "home") if path.count("/") > 2] == kept


def test_only_what_the_runner_opens_is_copied(bundles: dict[str, Path]) -> None:
    assert set(needed_files(bundles["fp32"])) == {"model.onnx", "model.onnx.data", "genai_config.json"}


def far(home: Path, *lines: bytes) -> tuple[list[dict[str, Any]], int]:
    """The far end by itself, fed with exactly these bytes."""
    done = subprocess.run(
        [sys.executable, str(FAR)], input=b"".join(lines), capture_output=True, timeout=60,
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode


def put(content: bytes, **changes: Any) -> tuple[bytes, bytes]:
    entry = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), **changes}
    return json.dumps({"put": "box", "files": {"sub/a": entry}, "keep": True}).encode() + b"\n", content


def test_files_arrive_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    answers, code = far(tmp_path, *put(content))
    assert code == 0 and (Path(answers[1]["path"]) / "sub/a").read_bytes() == content


def test_a_transfer_cut_in_the_middle_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    request, content = put(bytes(2_000_000))
    answers, code = far(tmp_path, request, content[:1_500_000])
    assert code == 1 and len(answers) == 1
    assert [path for path in tree(tmp_path) if "box" in path] == []


def test_damaged_files_are_refused_and_the_connection_lives_on(tmp_path: Path) -> None:
    request, content = put(b"abc", sha256="0" * 64)
    answers, code = far(tmp_path, request, content, b'{"look": 1}\n')
    assert answers[1] == {"failed": "sub/a: arrived damaged"} and answers[2]["kept"] == [] and code == 0


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "a/../../b", ""])
def test_no_path_leaves_its_folder(tmp_path: Path, name: str) -> None:
    entry = {"size_bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    request = json.dumps({"put": "box", "files": {name: entry}}).encode() + b"\n"
    answers, _ = far(tmp_path, request)
    assert "not a name below a folder" in answers[1]["failed"]
    assert tree(tmp_path) == []


def test_a_connection_that_breaks_leaves_nothing_behind(bundles: dict[str, Path], tmp_path: Path) -> None:
    """The far end removes its folder when its input ends, whether or not it was told to quit."""
    with host(tmp_path / "home", {"a": bundles["fp32"]}) as there:
        there.place({"a": bundles["fp32"]}, silent)
        assert tree(tmp_path / "home")
        stdin = there._far._process.stdin
        assert stdin is not None
        stdin.close()
        deadline = time.monotonic() + 10
        while tree(tmp_path / "home") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert tree(tmp_path / "home") == []


def test_a_host_that_goes_away_keeps_what_was_measured(bundles: dict[str, Path], tmp_path: Path) -> None:
    with host(tmp_path / "home", bundles) as there:

        def cut(done: int, total: int, note: str) -> None:
            if "tokens/s" in note and done == 3 + 4:  # all are loaded, four turns are done
                there._far._process.kill()

        with pytest.raises(DeviceLost, match="box: lost in the middle") as caught:
            quick(bundles, there, progress=cut)
    partial = caught.value.partial
    assert "lost" in partial and partial["order"] == ["fp32", "twin", "int4", "int4"]
    assert {row["label"]: row["repetitions"] for row in partial["rows"]} == {"fp32": 1, "twin": 1, "int4": 2}


def refused(tmp_path: Path, bundles: dict[str, Path], **changes: Any) -> str:
    with (
        pytest.raises((BadInput, BuildFailed)) as caught,
        host(tmp_path / "home", {"a": bundles["fp32"]}, **changes),
    ):
        pass
    assert tree(tmp_path / "home") == []
    assert "\n" not in str(caught.value)
    return f"{type(caught.value).__name__} {caught.value}"


def bare_python(folder: Path) -> str:
    """A Python that finds no package."""
    program = folder / "bare"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    program.chmod(0o755)
    return str(program)


def test_a_host_without_python_is_told(bundles: dict[str, Path], tmp_path: Path) -> None:
    said = refused(tmp_path, bundles, python="/no/such/python")
    assert said.startswith("BadInput box: no Python 3.9 or newer there (tried /no/such/python); install")


def test_a_python_without_modules_is_told_with_what_would_help(
    bundles: dict[str, Path], tmp_path: Path
) -> None:
    said = refused(tmp_path, bundles, python=bare_python(tmp_path))
    assert "has no numpy and no onnxruntime; --setup fetches it" in said


def test_too_little_memory_or_disk_is_told_before_anything_is_copied(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PROGRAM_BYTES", 1 << 50)
    assert "MiB of memory are free there, and a takes at least" in refused(tmp_path, bundles)
    monkeypatch.undo()
    monkeypatch.setattr(remote, "SPARE_DISK_BYTES", 1 << 60)
    assert "MiB of disk are free in" in refused(tmp_path, bundles)


def test_a_shell_that_talks_is_told(bundles: dict[str, Path], tmp_path: Path) -> None:
    quiet = shell(tmp_path / "home")
    said = refused(tmp_path, bundles, reach=lambda command: quiet("echo Welcome; " + command))
    assert "'Welcome'" in said and "prints text before a command runs" in said


def test_setup_that_fails_says_why_and_leaves_nothing(bundles: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    closed = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "empty")}
    reach = shell(tmp_path / "home", **closed)
    said = refused(tmp_path, bundles, python=bare_python(tmp_path), setup=True, reach=reach)
    assert said.startswith("BuildFailed box: `") and "failed there" in said
