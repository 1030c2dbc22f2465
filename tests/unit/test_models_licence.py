"""The base's licence is found where it stands, and taken along; nothing is guessed."""

from __future__ import annotations

from pathlib import Path

from edgedisp.models.licence import copy_licence, read_licence

NOTHING = {"license": None, "license_name": None, "license_link": None, "found_in": None, "files": []}


def readme(folder: Path, front: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(f"---\n{front}\n---\n# A model\nlicense: not this line\n")
    return folder


def test_the_front_matter_of_a_readme_says_it(tmp_path: Path) -> None:
    front = "license: other\nlicense_name: box-terms\nbase_model: a/b"
    expected = {"base": "a/b", "license": "other", "license_name": "box-terms", "found_in": "README.md"}
    assert read_licence(readme(tmp_path / "m", front)) == NOTHING | expected
    several = read_licence(readme(tmp_path / "m", "license: [mit, apache-2.0]\nbase_model: a/b"), "org/model")
    assert (several["license"], several["base"]) == ("mit, apache-2.0", "org/model")


def test_where_nothing_is_said_nothing_is_claimed(tmp_path: Path) -> None:
    for front in ("tags: [x]", "license: [", "license:"):
        assert read_licence(readme(tmp_path / "m", front)) == {"base": None, **NOTHING}
    (tmp_path / "README.md").write_text("# A model\nlicense: mit\n")  # no front matter
    assert read_licence(tmp_path) == {"base": None, **NOTHING}
    (tmp_path / "license.json").write_text('{"MIT": "a text of somebody else"}')
    assert read_licence(readme(tmp_path, "license: mit"))["license"] == "mit"


def test_texts_are_copied_and_still_known_two_folders_on(tmp_path: Path) -> None:
    source = readme(tmp_path / "source", "license: apache-2.0")
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "weights.bin"):
        (source / name).write_text(name)
    (source / "LICENSES").mkdir()
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    facts = copy_licence(source, first, "org/model")
    assert facts["files"] == ["LICENSE", "NOTICE.txt", "USE_POLICY.md"]
    (first / "README.md").write_text("---\nlicense: mit\n---\nour own card")
    assert copy_licence(first, second) == facts
    assert {path.name for path in second.iterdir()} == {*facts["files"], "license.json"}
    assert (second / "NOTICE.txt").read_text() == "NOTICE.txt"


def test_a_gguf_file_says_it_in_its_metadata(tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFWriter

    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_string("general.license", "gemma")
    writer.add_string("general.license.link", "https://example.org/gemma")
    writer.add_tensor("a", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = {"base": "b", "license": "gemma", "license_link": "https://example.org/gemma"}
    assert read_licence(path, "b") == NOTHING | expected | {"found_in": "general.license"}
