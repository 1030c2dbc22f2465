"""Held-out tasks: items made from made text, scored by models whose answers are known beforehand."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from score_models import Bigram

from edgedisp.core.errors import BadInput
from edgedisp.core.files import from_json, to_json
from edgedisp.data import Document
from edgedisp.evaluate.comparison import Results
from edgedisp.evaluate.heldout_tasks import (
    CLOZE_CONTEXT,
    CONTINUATION_CONTEXT,
    CONTINUATION_SENTENCE,
    SuiteOptions,
    sentences,
)
from edgedisp.evaluate.loglikelihood import ScoreOptions
from edgedisp.evaluate.task_suite import TaskSuite, check_tasks, prepare

ALL = ["heldout_perplexity", "heldout_cloze", "heldout_continuation"]


class Words:
    """A tokenizer of words with the space before them; id 0 ends a document."""

    eos_token_id = 0
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}

    def __init__(self, texts: list[str]) -> None:
        pieces = {"a", *(piece for text in texts for piece in self._pieces(text))}
        # Every piece also with a space before it: the tasks put one before a sentence.
        pieces |= {" " + piece for piece in pieces if not piece.startswith(" ")}
        self.ids = {piece: number for number, piece in enumerate(["<end>", *sorted(pieces)])}
        self.pieces = [*self.ids]

    @staticmethod
    def _pieces(text: str) -> list[str]:
        return re.findall(r" ?\w+| ?[^\w\s]|\s", text)

    def get_vocab(self) -> dict[str, int]:
        return self.ids

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.ids[piece] for piece in self._pieces(text)]}

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(self.pieces[number] for number in ids)


class Characters(Words):
    """A token for each character with the marks on it."""

    @staticmethod
    def _pieces(text: str) -> list[str]:
        return re.findall(r"\w[^\w\s]*|\W", text)


WORDS = ["river", "stone", "mill", "hill", "road", "bridge", "field", "farm", "town", "gate", "wall", "ship"]


def made_text(number: int, sentences_each: int = 7) -> str:
    """Sentences of 6 to 12 words that go on using the words of their own document."""
    rng = np.random.default_rng([5, number])
    vocabulary = rng.choice(WORDS, 6, replace=False).tolist()
    parts = []
    for _ in range(sentences_each):
        words = [f"x{number}", *rng.choice(vocabulary, rng.integers(5, 11)).tolist()]
        parts.append(" ".join(words).capitalize() + ".")
    return " ".join(parts)


DOCUMENTS = [Document(f"doc{number}", made_text(number)) for number in range(24)]
TOKENIZER = Words([document.text for document in DOCUMENTS])


def suite(names: list[str] = ALL, documents: list[Document] = DOCUMENTS, **options: Any) -> TaskSuite:
    suite_options = SuiteOptions(tuple(names), **{"context": 96, "limit": 20, **options})
    return prepare(TOKENIZER, documents, suite_options)


def text_of(ids: Any) -> str:
    return TOKENIZER.decode(list(ids))


def bigrams() -> Bigram:
    """Bigram counts of the documents themselves."""
    counts = np.full((len(TOKENIZER.pieces),) * 2, 0.01)
    for document in DOCUMENTS:
        ids = [0, *TOKENIZER(document.text)["input_ids"]]
        for before, after in itertools.pairwise(ids):
            counts[before, after] += 1
    model = Bigram(len(counts), context=128)
    model.table = np.log(counts).astype(np.float32)
    return model


SENTENCES = (
    ["One ends here.", "Another follows!", "Does a third?", "Yes."],
    ["J. R. R. Tolkien wrote it.", "He lived in Oxford."],
    ["Dr. Smith met Mr. Jones in St. Louis.", "They spoke."],
    ["It was sold to Acme Inc. in 1990.", "The U.S. Army bought it.", "It cost 3.5 million."],
    ["It was No. 5 on the list.", "The answer was no.", "He left."],
    ["She said “no.”", "He left (at 5 p.m. sharp).", "“Why?”", "Nobody knows."],
    ["Some animals, e.g. Asian elephants, are large.", "Others are not."],
    ["Él nació en Lima.", "¿Dónde murió?", "Ångström war Schwede."],
    ["no capital at all"],
    ["The group Morning Musume (モーニング娘。) was big.", "It is."],
    ["नदी बहती है।", "शहर बड़ा है ॥", "वे चलते हैं।"],
    ["كيف حالك؟", "أنا بخير۔", "نعم."],
)
WITHOUT_SPACES = ("「今日は。」", "彼は言った！", "GPT是模型。", "“你好吗？”", "他说：不。")


def test_sentences_end_where_a_reader_would_end_them() -> None:
    for parts in SENTENCES:
        text = "  " + " \n".join(parts) + " "
        assert [text[start:end] for start, end in sentences(text)] == parts


def test_sentences_of_scripts_without_spaces_end_at_their_stops_and_thai_ones_by_length() -> None:
    text = "".join(WITHOUT_SPACES)
    assert tuple(text[start:end] for start, end in sentences(text)) == WITHOUT_SPACES
    for space in (" ", ""):
        thai = space.join(["แม่น้ำเมืองหินสะพานตลาดฤดูหนาวฤดูร้อนสวน"] * 8)
        parts = [thai[start:end] for start, end in sentences(thai)]
        assert "".join(parts) == thai.replace(" ", "") and all(40 <= len(part) <= 85 for part in parts[:-1])
        assert all(part[0].isalnum() for part in parts)  # no vowel sign is cut off


@pytest.mark.parametrize(
    ("words", "count", "space", "stop"),
    [
        ("河流 城市 石头 桥 市场 冬天 花园 信 音乐 安静 我们 喜欢 看见", 12, "", "。"),
        ("नदी शहर पत्थर पुल बाज़ार सर्दी बगीचा पत्र संगीत शांत देखते चलते", 6, " ", "।"),
        ("แม่น้ำ เมือง หิน สะพาน ตลาด ฤดูหนาว สวน จดหมาย ดนตรี ชอบ เห็น", 9, "", " "),
    ],
    ids=["Chinese", "Hindi", "Thai"],
)
def test_questions_are_made_of_text_in_other_scripts(words: str, count: int, space: str, stop: str) -> None:
    rng = np.random.default_rng(0)
    texts = [
        space.join(space.join(rng.choice(words.split(), count)) + stop for _ in range(12)) for _ in range(8)
    ]
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    prepared = prepare(Characters(texts), documents, SuiteOptions(tuple(ALL), 200, 8))
    sources = {document.id: document.text for document in documents}
    for name in ALL[1:]:
        assert len(prepared.questions[name]) == 8
        for question in prepared.questions[name]:
            context, target = question.requests[question.gold]
            read = prepared.tokenizer.decode([*context[1:], *target])
            assert read in sources[question.document]  # no space where the text has none


@given(st.text("ab .!?A\n1\"')", max_size=60))
def test_sentences_lose_nothing_but_white_space(text: str) -> None:
    spans = sentences(text)
    assert "".join("".join(text[a:b].split()) for a, b in spans) == "".join(text.split())
    assert all(text[a:b] == text[a:b].strip() != "" for a, b in spans)
    assert all(first[1] < second[0] for first, second in itertools.pairwise(spans))


def test_items_depend_on_documents_tokenizer_and_seed_alone() -> None:
    first, other = suite().questions, suite(seed=1).questions
    turned = suite(documents=DOCUMENTS[::-1]).questions
    assert first == suite().questions and first["heldout_perplexity"] != turned["heldout_perplexity"]
    assert all(other[name] != first[name] for name in ALL)
    assert suite([ALL[2]]).questions[ALL[2]] == first[ALL[2]]


def test_items_are_spread_over_the_documents_and_fit_the_context() -> None:
    for context in (24, 40, 96):
        for questions in suite(context=context).questions.values():
            longest = max(len(a) + len(b) - 1 for question in questions for a, b in question.requests)
            assert longest <= context and len({question.document for question in questions}) == 20
    few = suite(documents=DOCUMENTS[:6], limit=12).questions
    for name in ("heldout_cloze", "heldout_continuation"):
        assert max(Counter(question.document for question in few[name]).values()) == 2


def test_windows_predict_every_token_once_from_end_of_text_on_within_the_token_budget() -> None:
    questions = suite([ALL[0]], documents=DOCUMENTS[:3], context=20, limit=100).questions[ALL[0]]
    for document in DOCUMENTS[:3]:
        windows = [question for question in questions if question.document == document.id]
        assert len(windows) > 2 and windows[0].requests[0][0] == (0,)
        assert "".join(text_of(window.requests[0][1]) for window in windows) == document.text
        assert sum(window.sizes[0] for window in windows) == len(document.text.encode())
    for budget in (150, 300, 600):
        questions = suite([ALL[0]], perplexity_tokens=budget).questions[ALL[0]]
        assert budget - 96 < sum(len(question.requests[0][1]) for question in questions) <= budget
    assert len(suite([ALL[0]], perplexity_tokens=1).questions[ALL[0]]) == 2


def test_cloze_asks_for_the_last_word_of_a_sentence_after_thirty_words() -> None:
    sources = {document.id: document.text for document in DOCUMENTS}
    for question in suite().questions["heldout_cloze"]:
        ((context, word),) = question.requests
        passage = text_of(context[1:])
        assert re.fullmatch(r" [a-z]{3,}", text_of(word))
        assert passage + text_of(word) + "." in sources[question.document]
        assert len(passage.split()) >= 30 and context[0] == 0 and len(context) <= CLOZE_CONTEXT
        assert question.notes["seen"] == (text_of(word).strip() in passage.lower().split())
    # Words that occurred in the passage come first.
    start = "Here are thirty words of one passage " * 5
    known, new = (
        start + "and the name is lantern. They all call it lantern.",
        start + "None says anchor.",
    )
    documents = [Document(f"{text[-4]}{k}", text) for text in (known, new) for k in range(4)]
    tokenizer = Words([document.text for document in documents])
    prepared = prepare(tokenizer, documents, SuiteOptions(("heldout_cloze",), 96, 6))
    seen = [question.notes["seen"] for question in prepared.questions["heldout_cloze"]]
    assert seen == [True] * 4 + [False] * 2


def test_continuations_are_the_next_sentence_and_three_of_like_length_from_elsewhere() -> None:
    spans = {document.id: [document.text[a:b] for a, b in sentences(document.text)] for document in DOCUMENTS}
    golds = Counter()
    for question in suite().questions["heldout_continuation"]:
        (context,) = {context for context, _ in question.requests}
        choices = [text_of(target).strip() for _, target in question.requests]
        number = spans[question.document].index(choices[question.gold])
        passage = text_of(context[1:])
        assert number == int(question.id.split("#")[1]) > 0
        assert " ".join(spans[question.document][:number]).endswith(passage) and passage[0].isupper()
        homes = [next(name for name, parts in spans.items() if choice in parts) for choice in choices]
        assert len(set(homes)) == 4 and homes[question.gold] == question.document
        assert max(question.sizes) - min(question.sizes) <= 3 and len(context) <= CONTINUATION_CONTEXT
        assert all(len(target) <= CONTINUATION_SENTENCE for _, target in question.requests)
        golds[question.gold] += 1
    assert len(golds) == 4


def test_too_little_text_says_how_much_there_is_and_what_helps() -> None:
    for name, documents in (
        (ALL[0], [Document("a", "")]),
        (ALL[1], [Document("a", "Too short. To ask.")]),
        (ALL[2], DOCUMENTS[:3]),
    ):
        message = f"{name}: 0 questions .* of {len(documents)} held-out documents, need 2; .*data.heldout"
        with pytest.raises(BadInput, match=message):
            suite([name], documents=documents)


def test_a_bigram_table_has_its_perplexity_in_closed_form_and_the_words_that_it_likes() -> None:
    model, prepared = bigrams(), suite(limit=24)
    results = prepared.run(model)
    perplexity = results["heldout_perplexity"]
    estimate = perplexity.score.main.estimate
    texts = [TOKENIZER(document.text)["input_ids"] for document in DOCUMENTS]
    log_probs = [value for ids in texts for value in model.logprobs([0], ids)]
    assert estimate.n == 24 and estimate.value == pytest.approx(math.exp(-np.mean(log_probs)), rel=1e-6)
    size = sum(len(document.text) for document in DOCUMENTS)
    bits = perplexity.score.metrics["bits_per_byte"].estimate.value
    assert bits == pytest.approx(-sum(log_probs) / size / math.log(2), rel=1e-6)
    result = results["heldout_cloze"]
    for question, item in zip(prepared.questions["heldout_cloze"], result.items, strict=True):
        ((context, word),) = question.requests
        assert len(word) == 1 and item["accuracy"] == (model.table[context[-1]].argmax() == word[0])
    assert 0 < (result.score.main.estimate.value or 0) < 1


def test_results_survive_json_and_are_the_same_again() -> None:
    notes: list[str] = []
    options = ScoreOptions(progress=lambda done, total, note: notes.append(note))
    first = suite().run(bigrams(), options)
    assert first == suite().run(bigrams()) and list(first) == ALL
    assert from_json(Results, json.loads(json.dumps(to_json(first), allow_nan=False))) == first
    assert {note.split(":")[0] for note in notes} == set(ALL)


def test_names_that_are_no_tasks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    for names, folder, message in (
        (["arc_easy"], None, r'arc_easy: no such task.*pip install "edgedisp\[bench\]"'),
        (["heldout_clozes"], None, r"heldout_clozes.*did you mean heldout_cloze,"),
        (["heldout_cloze"], tmp_path / "nothing", r"evaluate\.tasks_path: .*nothing is no folder"),
    ):
        with pytest.raises(BadInput, match=message):
            check_tasks(names, folder)
