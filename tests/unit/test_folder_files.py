"""A damaged bundle is found before a runtime reads it: missing, truncated or changed files, or a bad list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgedisp.core.errors import BadInput
from edgedisp.core.stage_folder import MANIFEST, RECORD, check_files, list_files, write_json


@pytest.fixture(params=[MANIFEST, RECORD])
def bundle(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder of two files and the list of them, under either name."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "weights").write_bytes(bytes(1000))
    (tmp_path / "config.json").write_text("{}")
    write_json(tmp_path / request.param, {"files": list_files(tmp_path)})
    return tmp_path


def refused(bundle: Path) -> str:
    with pytest.raises(BadInput) as found:
        check_files(bundle)
    return str(found.value)


def test_a_whole_folder_passes_also_with_files_that_are_not_listed(bundle: Path) -> None:
    (bundle / "README.md").write_text("edited")
    assert check_files(bundle)


def test_a_folder_without_a_list_is_not_compared(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("graph")
    assert not check_files(tmp_path)


def test_a_truncated_file_is_told_by_its_size_and_the_one_expected(bundle: Path) -> None:
    (bundle / "onnx" / "weights").write_bytes(bytes(999))
    said = refused(bundle)
    assert said.startswith(f"{bundle / 'onnx' / 'weights'}: has 999 bytes,") and "says 1,000" in said


def test_a_flipped_bit_is_told_by_both_checksums(bundle: Path) -> None:
    (bundle / "onnx" / "weights").write_bytes(bytes(999) + b"\x01")
    said, name = refused(bundle), "onnx/weights"
    listed = next(path for path in (bundle / MANIFEST, bundle / RECORD) if path.is_file())
    expected = json.loads(listed.read_text())["files"][name]["sha256"]
    found = list_files(bundle)[name]["sha256"]
    assert said.startswith(f"{bundle / name}: is damaged: its SHA-256 is {found}") and expected in said


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "config.json").unlink()
    assert refused(bundle).startswith(f"{bundle / 'config.json'}: is missing")


def test_sizes_of_all_files_are_compared_before_any_content(bundle: Path) -> None:
    (bundle / "config.json").write_text("[]")  # same size, another content
    (bundle / "onnx" / "weights").write_bytes(b"")
    assert "weights" in refused(bundle)


@pytest.mark.parametrize("text", ["{", "[]", '{"files": []}', '{"files": {"a": {"size_bytes": 1}}}'])
def test_a_damaged_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    assert refused(tmp_path).startswith(f"{tmp_path / MANIFEST}: is damaged")
