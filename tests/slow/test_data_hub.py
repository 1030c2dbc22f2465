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
    from edgedisp.data import read_documents
    for asked in json.loads(sys.argv[1]):
        try:
            print(json.dumps([document.text for document in read_documents(**asked)]))
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
    lines = {"path_or_id": "some/lines", "config": "raw"}
    asked = [
        lines,
        lines | {"limit": 1},  # streamed
        lines | {"split": "test"},
        lines | {"split": "validation"},
        lines | {"config": "row"},
        lines | {"text": "texts"},
        lines | {"revision": "v2"},
        {"path_or_id": "some/thing-else"},
    ]
    with serving(tmp_path / "hub") as endpoint:
        found = [
            json.loads(line) for line in run_client(CLIENT, endpoint, tmp_path / "home", json.dumps(asked))
        ]
    assert found[0] == ["= First = \n\n One two .", "= Second = \n\n x = y"]
    assert found[1] == found[0][:1]
    assert found[2] == ["test"]
    assert "Should be one of ['train', 'test']" in found[3]
    assert "Available: ['raw']" in found[4]
    assert "Did you mean 'text'?" in found[5]
    assert "no revision 'v2'" in found[6]
    assert found[7].startswith("some/thing-else: the hub has no such data set")

    # The hub is gone: what was read before is in the cache, the rest is one clear error.
    again = run_client(CLIENT, NOWHERE, tmp_path / "home", json.dumps([lines, asked[7]]))
    assert json.loads(again[0]) == found[0]
    said = json.loads(again[1])
    assert said.startswith("some/thing-else: the hub cannot be reached (")
    assert "pypi:NAME==VERSION/PATH" in said
    assert "\n" not in said
