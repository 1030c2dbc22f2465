"""A data set of a hub, read by `datasets` from a server on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from local_hub import NOWHERE, run_client, serving

CLIENT = """
    import json, sys
    from edgedisp.core.errors import BadInput
    from edgedisp.data import read_documents
    from edgedisp.recipe import Source
    for name, options in json.loads(sys.argv[1]):
        try:
            documents = read_documents(name, Source(source=name, **options))
            print(json.dumps([document.text for document in documents]))
        except BadInput as problem:
            print(json.dumps(str(problem)))
"""
WIKITEXT = ["", " = First = \n", "", " One two . \n", " = Second = \n", "", " x = y \n"]
DOCUMENTS = ["= First = \n\n One two .", "= Second = \n\n x = y"]
READS = [  # data set, options, the documents or a part of the message
    ("some/lines", {}, DOCUMENTS),
    ("some/lines", {"limit": 1}, DOCUMENTS[:1]),  # streamed
    ("some/lines", {"split": "test"}, ["test"]),
    ("some/lines", {"split": "validation"}, "Should be one of ['train', 'test']"),
    ("some/lines", {"config": "row"}, "Available: ['raw']"),
    ("some/lines", {"text": "texts"}, "Did you mean 'text'?"),
    ("some/lines", {"revision": "v2"}, "no revision 'v2'"),
    ("some/thing-else", {}, "some/thing-else: the hub has no such data set"),
]


def test_a_hub_data_set_is_read_cached_and_its_errors_are_clear(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "hub" / "datasets" / "some" / "lines"
    (folder / "raw").mkdir(parents=True)
    for split, texts in (("train", WIKITEXT), ("test", ["test"])):
        table = pyarrow.table({"text": texts})
        parquet.write_table(table, folder / "raw" / f"{split}-00000-of-00001.parquet")
    config = "- config_name: raw\n  data_files:\n"
    config += "  - {split: train, path: raw/train-*}\n  - {split: test, path: raw/test-*}\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{config}---\n")
    reads = [(name, {"config": "raw", **options}) for name, options, _ in READS]

    def results(endpoint: str, reads: list[Any]) -> list[Any]:
        lines = run_client(CLIENT, endpoint, tmp_path / "home", json.dumps(reads))
        return [json.loads(line) for line in lines]

    with serving(tmp_path / "hub") as endpoint:
        for read, result in zip(READS, results(endpoint, reads), strict=True):
            assert result == read[2] if isinstance(read[2], list) else read[2] in result, read
    # The hub is gone: what was read before is in the cache, the rest is one clear error.
    documents, error = results(NOWHERE, [reads[0], reads[-1]])
    assert documents == DOCUMENTS
    assert error.startswith("some/thing-else: the hub cannot be reached (")
    assert "pypi:NAME==VERSION/PATH" in error and "\n" not in error
