"""A data set of a hub, read by `datasets` from a server on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from local_hub import NOWHERE, run_client, serving

WIKITEXT = ["", " = First = \n", "", " One two . \n", " = Second = \n", "", " x = y \n"]

CLIENT = """
    import json, sys
    from edgedisp.core.errors import BadInput
    from edgedisp.data import ReadOptions, read_documents
    for name, options in json.loads(sys.argv[1]):
        try:
            documents = read_documents(name, ReadOptions(**options))
            print(json.dumps([document.text for document in documents]))
        except BadInput as problem:
            print(json.dumps(str(problem)))
"""


def test_a_hub_data_set_is_read_cached_and_its_errors_are_clear(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "hub" / "datasets" / "some" / "lines"
    (folder / "raw").mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": WIKITEXT}), folder / "raw" / "train-00000-of-00001.parquet")
    parquet.write_table(pyarrow.table({"text": ["test"]}), folder / "raw" / "test-00000-of-00001.parquet")
    config = "- config_name: raw\n  data_files:\n"
    config += "  - {split: train, path: raw/train-*}\n  - {split: test, path: raw/test-*}\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{config}---\n")
    name, raw = "some/lines", {"config": "raw"}
    reads = [
        (name, raw),
        (name, raw | {"limit": 1}),  # streamed
        (name, raw | {"split": "test"}),
        (name, raw | {"split": "validation"}),
        (name, {"config": "row"}),
        (name, raw | {"text": "texts"}),
        (name, raw | {"revision": "v2"}),
        ("some/thing-else", {}),
    ]
    with serving(tmp_path / "hub") as endpoint:
        lines = run_client(CLIENT, endpoint, tmp_path / "home", json.dumps(reads))
    results = [json.loads(line) for line in lines]
    assert results[0] == ["= First = \n\n One two .", "= Second = \n\n x = y"]
    assert results[1] == results[0][:1]
    assert results[2] == ["test"]
    assert "Should be one of ['train', 'test']" in results[3]
    assert "Available: ['raw']" in results[4]
    assert "Did you mean 'text'?" in results[5]
    assert "no revision 'v2'" in results[6]
    assert results[7].startswith("some/thing-else: the hub has no such data set")

    # The hub is gone: what was read before is in the cache, the rest is one clear error.
    again = run_client(CLIENT, NOWHERE, tmp_path / "home", json.dumps([reads[0], reads[7]]))
    assert json.loads(again[0]) == results[0]
    error = json.loads(again[1])
    assert error.startswith("some/thing-else: the hub cannot be reached (")
    assert "pypi:NAME==VERSION/PATH" in error and "\n" not in error
