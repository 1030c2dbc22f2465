"""The corpus of conversations: what is read how often, what is too long, and what an app is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedisp import models
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import silent
from edgedisp.data.packing import PADDING, START, TARGET
from edgedisp.pipeline import build_plan, prepare
from edgedisp.pipeline.stage import Inputs
from edgedisp.recipe import load

RECIPE = """\
name: chat
model: {{base: {base}, architecture: llama}}
data: {{train: [{{source: {rows}, messages: m}}, {{source: {texts}, weight: 2}}], heldout: 30%, {data}}}
train: {{epochs: 3, lr: 1e-3, batch: 2}}
"""


def corpus(base: Path, folder: Path, data: str) -> tuple[dict[str, Any], Path]:
    """The stage's results and folder: 40 short conversations, 10 of six turns, 6 texts of one word each."""
    turns = [("user", "say {0}"), ("assistant", "{0}!")]
    rows = [[(role, text.format(number)) for role, text in turns] for number in range(40)]
    rows += [row * 5 + [("user", "and <|im_end|>?"), ("assistant", "no")] for row in rows[:10]]
    lines = [json.dumps({"m": [{"role": role, "content": text} for role, text in row]}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    (folder / "texts.txt").write_text("\n\n".join("abcdef"))
    files = {"base": base, "rows": folder / "rows.jsonl", "texts": folder / "texts.txt"}
    (folder / "r.yaml").write_text(RECIPE.format(**files, data=data))
    stage, output = build_plan.corpus(load(folder / "r.yaml")), folder / "corpus"
    output.mkdir()
    return prepare.corpus(stage.options, Inputs(stage.files, base=base), output, silent), output


@pytest.mark.parametrize("rule", ["drop", "cut"])
def test_every_epoch_reads_all_rows_that_fit(tiny_folder: dict[str, Path], tmp_path: Path, rule: str) -> None:
    results, folder = corpus(tiny_folder["llama"], tmp_path, f"context: 96, too_long: {rule}")
    tokens, marks = (np.load(folder / f"{name}.npy") for name in ("tokens", "marks"))
    chat, tokenizer = results["chat"], models.load_tokenizer(tiny_folder["llama"])
    assert chat["too_long"] == {"dropped": 0, "cut": 10} if rule == "cut" else {"dropped": 10, "cut": 0}
    assert chat["special_tokens_escaped"] == 10 and results["notes"][1].startswith("chat: ")
    starts = np.flatnonzero((marks & START != 0) & (marks & PADDING == 0))
    text = [tokenizer.decode(part) for part in np.split(tokens.ravel(), starts[1:])]
    trained = [row for row in text if "assistant" in row]
    # Whole steps are read: about three times every conversation, and six times every text.
    assert len(trained) == pytest.approx(3 * chat["rows"], rel=0.1)
    heldout = [type(document).__name__ for document in prepare.heldout_documents(folder)]
    expected = 6 * (6 - heldout.count("Document"))  # first blocks have room for short rows of one more epoch
    assert 0.9 * expected <= len(text) - len(trained) <= 1.34 * expected
    assert "Conversation" in heldout
    learned = tokenizer.decode(tokens[marks & TARGET != 0])
    assert learned.count("!<|im_end|>") >= 60 and "say" not in learned
    example = json.loads((folder / "chat.json").read_text())["example"]
    assert models.prompt_ids(tokenizer, example["messages"]) == example["prompt_ids"]


def test_conversations_that_never_fit_are_refused(tiny_folder: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"every conversation is longer than data.context, which is 8 tokens"):
        corpus(tiny_folder["llama"], tmp_path, "context: 8")
