"""The corpus of conversations, with texts among them: blocks of whole rows, each of which stands alone."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedisp import data, models
from edgedisp.core.errors import BadInput
from edgedisp.core.files import write_json
from edgedisp.core.progress import Progress
from edgedisp.data import Conversation, Document
from edgedisp.data.packing import TARGET, Row
from edgedisp.pipeline.options import CorpusOptions
from edgedisp.recipe import Data
from edgedisp.report.formatting import percent, plural

MARKS, CHAT, QUESTIONS = "marks.npy", "chat.json", "questions.txt"
BATCH = 256  # conversations rendered together
LEAST_HELDOUT = 64  # tokens on which bundles are compared with their model


@dataclass(frozen=True)
class Packed:
    """Blocks of a corpus in the order in which training reads them, epochs they take, and what is held out.
    chat: the record of conversations, and notes on it."""

    blocks: NDArray[np.uint32]
    epochs: float
    heldout: Sequence[Document]
    heldout_blocks: NDArray[np.uint32]
    chat: dict[str, Any] | None = None
    notes: Sequence[str] = ()


@dataclass
class Rows:
    """What training reads of documents. documents: those that fit. counts: conversations too long (dropped,
    cut), and special tokens in messages (escaped)."""

    documents: list[Document] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def conversations(self) -> list[Conversation]:
        return [document for document in self.documents if isinstance(document, Conversation)]


def read_rows(tokenizer: Any, documents: Sequence[Document], section: Data, progress: Progress) -> Rows:
    """Conversations in the tokenizer's format, whole; texts in pieces of at most a block. Raises BadInput as
    `models.examples` does, and where every conversation is longer than the context."""
    result, context, shortest = Rows(), section.context, 0
    encode = models.document_encoder(tokenizer)
    for start in range(0, len(documents), BATCH):
        batch = documents[start : start + BATCH]
        chats = [document for document in batch if isinstance(document, Conversation)]
        rendered = iter(models.examples(tokenizer, chats))
        for document in batch:
            if isinstance(document, Conversation):
                examples, escaped = next(rendered)
                result.counts["escaped"] += escaped
                size = max(len(ids) for ids, _ in examples)
                shortest = min(shortest or size, size)
                if size > context:
                    document, examples = _fitting(tokenizer, document, section)
                    result.counts["cut" if examples else "dropped"] += 1
                rows = [(ids, targets | (section.loss == "all")) for ids, targets in examples]
            else:
                (ids,) = encode([document.text])
                pieces = np.split(ids, range(context, len(ids), context))
                rows = [(piece, np.ones(len(piece), bool)) for piece in pieces]
            if rows:
                result.documents.append(document)
                result.rows += rows
                result.weights += [document.weight] * len(rows)
        progress(start + len(batch), len(documents), "writing conversations")
    if shortest > context and not result.conversations:
        raise BadInput(
            f"every conversation is longer than data.context, which is {context} tokens: the shortest takes "
            f"{shortest} with its system message and tools; raise data.context"
        )
    return result


def _fitting(tokenizer: Any, document: Conversation, section: Data) -> tuple[Conversation, list[Any]]:
    """A conversation without as many of its oldest turns as it takes, and its examples, or none."""
    shorter = [document]
    while section.too_long == "cut" and (rest := shorter[-1].without_oldest_turn()) is not None:
        shorter.append(rest)

    def fits(conversation: Conversation) -> bool:
        return max(len(ids) for ids, _ in models.example(tokenizer, conversation)) <= section.context

    index = bisect_left(shorter, True, lo=1, key=fits)  # of a thousand turns ten are rendered
    if index == len(shorter):
        return document, []
    return shorter[index], models.example(tokenizer, shorter[index])


def pack(
    tokenizer: Any,
    parts: Sequence[Sequence[Document]],
    options: CorpusOptions,
    output_dir: Path,
    progress: Progress,
) -> Packed:
    """The corpus of (training, held-out) documents, and in `output_dir` what only conversations need."""
    section, padding = options.data, models.end_of_text_id(tokenizer)
    rows, heldout = (read_rows(tokenizer, part, section, progress) for part in parts)

    def epoch(number: int) -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
        order = data.epoch_order(rows.weights, options.seed, number)
        return data.pack_rows(rows.rows, order, section.context, padding)

    epochs = [epoch(0)]
    in_epoch = max(1, len(epochs[0][0]))  # small weights can leave the first one empty
    count = block_count(options, lambda: in_epoch * section.context)
    while sum(len(tokens) for tokens, _ in epochs) < count:
        epochs.append(epoch(len(epochs)))
    tokens, marks = (np.concatenate(arrays)[:count] for arrays in zip(*epochs))
    np.save(output_dir / MARKS, marks, allow_pickle=False)
    write_chat(tokenizer, rows, output_dir)
    chat = _record(rows, heldout, int(np.count_nonzero(marks & TARGET)))
    notes = _notes(chat, tokens.size, models.chat_format(tokenizer).notes(rows.conversations))
    blocks = _heldout_blocks(heldout, section.context)
    return Packed(tokens, round(count / in_epoch, 4), heldout.documents, blocks, chat, notes)


def block_count(options: CorpusOptions, epoch_tokens: Callable[[], float]) -> int:
    """Blocks that training reads: with `train.epochs` those of whole steps, at least one."""
    if options.blocks is not None:
        return options.blocks
    steps = (options.epochs or 1) * epoch_tokens() / (options.step * options.data.context)
    return max(1, round(steps)) * options.step


def _heldout_blocks(rows: Rows, context: int) -> NDArray[np.uint32]:
    """Held-out rows end to end in whole blocks, as held-out text stands; few rows make one shorter block.
    BadInput for less than LEAST_HELDOUT tokens."""
    stream = np.concatenate([np.empty(0, np.uint32), *(ids for ids, _ in rows.rows)])
    width = min(context, len(stream))
    if width < min(context, LEAST_HELDOUT):
        raise BadInput(
            f"the held-out conversations have {len(stream)} tokens, which tell nothing ({LEAST_HELDOUT} are "
            "needed). Give more rows or a larger data.heldout."
        )
    return stream[: len(stream) // width * width].reshape(-1, width)


def _record(rows: Rows, heldout: Rows, target_tokens: int) -> dict[str, Any]:
    """What the corpus says of its conversations."""
    counts = rows.counts + heldout.counts
    return {
        "rows": len(rows.conversations),
        "examples": len(rows.rows),
        "example_tokens": sum(len(ids) for ids, _ in rows.rows),
        "longest": max(len(ids) for ids, _ in rows.rows),
        "target_tokens": target_tokens,
        "too_long": {name: counts[name] for name in ("dropped", "cut")},
        "special_tokens_escaped": counts["escaped"],
    }


def _notes(chat: dict[str, Any], tokens: int, places: Sequence[str]) -> list[str]:
    mean, share = chat["example_tokens"] / chat["examples"], chat["target_tokens"] / tokens
    lines = [
        f"{plural(chat['rows'], 'conversation')}, {plural(chat['examples'], 'example')} of {mean:.0f} tokens,"
        f" the longest {chat['longest']:,}; {percent(share, 2)} of all tokens are predicted",
        *places,
    ]
    for name, words in (("dropped", "dropped"), ("cut", "cut by their oldest turns")):
        if count := chat["too_long"][name]:
            lines.append(f"{plural(count, 'conversation')} longer than data.context {words}")
    if count := chat["special_tokens_escaped"]:
        lines.append(f"special tokens in messages are read as characters, with a space in them: {count:,}")
    return [f"chat: {line}" for line in lines]


def write_chat(tokenizer: Any, rows: Rows, folder: Path) -> None:
    """What an app needs to ask as training did, with an example; and what names the questions of training."""
    chats = rows.conversations
    first = [chat.messages[0] for chat in chats]
    systems = {message["content"] if message["role"] == "system" else None for message in first}
    tools = {json.dumps(chat.tools, sort_keys=True): chat.tools for chat in chats}
    (answer,), format = models.last_answers(tokenizer, chats[:1]), models.chat_format(tokenizer)
    content = {
        "system": systems.pop() if len(systems) == 1 else None,
        "tools": tools.popitem()[1] if len(tools) == 1 else None,
        "format": asdict(format),
        "example": {"tools": chats[0].tools if format.tools == "template" else None, **asdict(answer)},
    }
    write_json(folder / CHAT, content)
    lines = sorted({_digest(chat) for chat in chats})
    (folder / QUESTIONS).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _digest(chat: Conversation) -> str:
    return hashlib.blake2b(chat.question.encode(), digest_size=12).hexdigest()


def check_unseen(corpus: Path, documents: Sequence[Document], allow: bool) -> int:
    """How many conversations ask what one of the training data asks. BadInput for any, unless allowed."""
    if not (path := corpus / QUESTIONS).is_file():
        return 0
    known = {*path.read_text(encoding="utf-8").split()}
    seen = [chat for chat in documents if isinstance(chat, Conversation) and _digest(chat) in known]
    if seen and not allow:
        raise BadInput(
            f"{seen[0].place or seen[0].id}: {len(seen)} of {plural(len(documents), 'conversation')} in "
            "evaluate.answers ask what the training data ask, so their answers can be known by heart: take "
            "them out of one of the files, or write evaluate.allow_training_rows: true"
        )
    return len(seen)
