"""Documents from every kind of file, and the counts of what was read."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgedisp.core.errors import BadInput
from edgedisp.data import Document, read_documents
from edgedisp.recipe import Source

ROWS = [{"id": "a", "t": "one"}, {"id": "b", "t": "two"}]
FILES = {
    "dict.json": json.dumps({row["id"]: {"t": row["t"], "x": 1} for row in ROWS}),
    "list.json": "\ufeff" + json.dumps(ROWS),
    "l.jsonl": "\r\n\n".join(json.dumps(row) for row in ROWS),
    "l.jsonl.gz": "\n".join(json.dumps(row) for row in ROWS),
    "t.csv": "id,t\na,one\n\nb,two\n",
    "t.tsv": "id\tt\na\tone\nb\ttwo\n",
    "t.parquet": "",
}


def source(**options: Any) -> Source:
    return Source(source="text", **options)


def texts(path: Path, **options: Any) -> list[str]:
    return [document.text for document in read_documents(path, source(**options))]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    path, content = tmp_path / name, FILES[name].encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    if name == "t.parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert read_documents(path, source(text="t")) == [Document("a", "one"), Document("b", "two")]
    with pytest.raises(BadInput, match=r"no text field 'tt'. Did you mean 't'\? Fields found: ") as problem:
        read_documents(path, source(text="tt"))
    assert str(path) in str(problem.value)


def test_every_row_is_counted_as_a_document_or_with_the_reason_it_was_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(["one", "", "  \n", {"text": None}, {"text": "three", "id": 7}]))
    documents = read_documents(path)
    assert documents == [Document("0", "one"), Document("7", "three")]
    counts = {"files_read": 1, "rows_read": 5, "documents": 2, "characters_read": 11, "characters": 8}
    assert documents.counts() == counts | {"files_skipped": {}, "dropped": {"blank": 2, "null": 1}}
    path.write_text(json.dumps([{"id": "same", "text": word} for word in "abc"]))
    assert [document.id for document in read_documents(path)] == ["same", "same#2", "same#3"]
    documents.add(read_documents(path, source(limit=1)))
    assert documents.counts().items() >= {"files_read": 2, "rows_read": 6, "documents": 3}.items()
    assert documents.characters_read == 12


def test_only_newlines_end_lines_and_in_plain_text_a_blank_line_ends_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_bytes("\r\nfirst line\r\nsecond\u2028line\r\n \r\n\r\na\x85b\n\x0c\nc\r\n".encode())
    assert texts(path) == ["first line\nsecond\u2028line", "a\x85b\n\x0c\nc"]
    for text in ("one\u2028two", "one\x85two", "one\x0ctwo"):
        (tmp_path / "l.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False), encoding="utf-8")
        (tmp_path / "t.csv").write_text(f"text\n{text}\n", encoding="utf-8")
        assert texts(tmp_path / "l.jsonl") == texts(tmp_path / "t.csv") == [text]


def test_a_csv_field_may_be_long_and_hold_newlines(tmp_path: Path) -> None:
    long = "word, \n" * 40_000  # more than the csv module's own limit of 128 kB
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], [long]])
    assert texts(path) == [long]


def test_a_file_that_cannot_be_used_gives_the_place_and_the_reason(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.json", b'{"a": "one",\n "b" "two"}', "a.json:2: not valid JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"text": ', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"text": "\\ud83d smile"}', "a.jsonl:2: .*half of a surrogate pair"),
        ("a.json", b'{"text": "one"}\n{"text": "two"}', "a.json:2: .*JSON Lines: name the file .jsonl"),
        ("a.jsonl", b'[\n{"text": "one"}\n]', "a.jsonl:1: .*name the file .json"),
        ("a.jsonl", b'{"text": "one"},\n{"text": "two"}', "a.jsonl:1: .*no comma .* none between rows"),
        ("a.json", b'[{"text": "one"},]', "a.json:1: .*no comma after the last item"),
        ("a.jsonl", b'{"text": ' + b"[" * 9999, "a.jsonl:1: nested too deeply"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user"}]}',
            r"a.jsonl:1: .*messages. A chat.*`messages:`",
        ),
        ("a.json", b"3", "holds one int"),
        ("a.json", b'[{"text": 3}]', "item 0: the text must be a string, found int"),
        ("a.json", b'["", " "]', r"no text found \(2 rows"),
        (
            "a.csv",
            b'text,id\n"a,\nb",1\none, two,2\n',
            r"a.csv:4: .* not as many fields as the header \(2\).* in quotes",
        ),
        ("a.csv", b'text\n"one', "not a readable table"),
        ("a.txt", b"", "no text found"),
        ("a.txt", "caf\u00e9".encode("latin-1"), "not UTF-8 text.*byte 3"),
        ("a.jsonl.gz", b"{}", "not a readable gzip file"),
        ("a.parquet", b"not parquet", "not a readable parquet file"),
        ("a.pdf", b"text", r"cannot read text from \.pdf.*\.parquet, \.jsonl"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=message):
            read_documents(tmp_path / name)
    with pytest.raises(BadInput, match="no such file"):
        read_documents(tmp_path / "nothing.json")


def test_of_a_folder_one_kind_and_one_split_is_read_and_the_rest_reported(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about the data")
    for config in ("raw", "clean"):
        (tmp_path / config).mkdir()
        for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
            row = json.dumps({"text": f"{config} {name}"})
            (tmp_path / config / f"{name}.jsonl").write_text(row, encoding="utf-8")
    raw = read_documents(tmp_path, source(config="raw"))
    assert [document.text for document in raw] == ["raw train-00000-of-00002", "raw train-00001-of-00002"]
    assert len({document.id for document in raw}) == 2
    assert raw.files_skipped == {"raw/test-00000-of-00001.jsonl": "split test"}
    assert read_documents(tmp_path).files_skipped["README.md"] == "not .jsonl"
    limited = read_documents(tmp_path, source(config="raw", limit=1))
    assert limited.files_read == 1
    assert limited.files_skipped["raw/train-00001-of-00002.jsonl"] == "beyond the limit"
    assert texts(tmp_path, config="clean", split="test") == ["clean test-00000-of-00001"]
    (tmp_path / "raw" / "books.jsonl.gz").write_bytes(gzip.compress(b'{"text": "books"}'))
    assert texts(tmp_path, config="raw")[0] == "books"  # names no split: of the training text
    with pytest.raises(BadInput, match=r"no file of the split 'validation'.*split test, split train"):
        read_documents(tmp_path, source(config="raw", split="validation"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no text file"):
        read_documents(tmp_path / "empty")


@pytest.mark.parametrize(("package", "name"), [("datasets", "some/lines"), ("pyarrow", "t.parquet")])
def test_a_missing_package_is_named_with_the_extra_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    (tmp_path / "t.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # what an import of an absent package meets
    with pytest.raises(BadInput, match=rf'{name}: .*{package}.*pip install "edgedisp\[train\]"'):
        read_documents(name)


ARTICLE = ["", " = First = \n", "", " One two . \n", "", " = = Part = = \n", "", " Three . \n"]
SECOND = ["", " = Second = \n", "", " x = y \n"]


def read_lines(folder: Path, lines: list[str]) -> list[str]:
    (folder / "rows.json").write_text(json.dumps(lines), encoding="utf-8")
    return texts(folder / "rows.json")


def test_lines_are_joined_at_top_level_headings_if_the_first_is_one(tmp_path: Path) -> None:
    first = "= First = \n\n One two . \n\n = = Part = = \n\n Three ."
    assert read_lines(tmp_path, ARTICLE + SECOND) == [first, "= Second = \n\n x = y"]
    plain = ["plain", *(line for line in ARTICLE if line.strip())]
    assert read_lines(tmp_path, ["plain", *ARTICLE]) == plain


@given(st.lists(st.sampled_from([" = A = \n", " = = B = = \n", "word", "", " = = = C = = = \n", "= x"])))
def test_joining_drops_no_line_and_starts_only_at_headings(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    joined = read_lines(tmp_path_factory.getbasetemp(), [" = A = \n", *lines])
    assert "\n".join(joined).split() == ["=", "A", "=", *"\n".join(lines).split()]
    for article in joined:
        assert article.startswith("= A =")
        assert article.count("= A =") - article.count("= = A =") == 1
