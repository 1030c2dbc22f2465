"""`edgedisp init`: a commented recipe (recipe_of_rows.yaml) from a user's own chat rows, which it looks at.

What it suggests follows from the rows, how many and how long, and from the base, its width and its template.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np

from edgedisp import data
from edgedisp.core.errors import BadInput, NotAtHand
from edgedisp.core.hub import download_model
from edgedisp.core.progress import Progress
from edgedisp.data.chat import Conversation, conversation
from edgedisp.data.readers import Row, file_rows, local_files
from edgedisp.models import chat_format, examples, load_tokenizer
from edgedisp.models.loading import HUB_FILES
from edgedisp.models.tokenizer import read_config
from edgedisp.recipe import Source

LISTS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query", "input")
COMPLETIONS = ("completion", "response", "output", "answer")
WORKS = "`messages` (list of role, content), `conversations` (list of from, value), or prompt and completion"
UNSEEN = "# architecture: the model_type of the base's config.json, which --smoke needs; not seen here"
LOOKED_AT, MEASURED, FAULTS = 100, 2000, 5  # rows: for their form, for lengths (evenly chosen), with faults
LONGEST = 4096  # tokens of a suggested context
LETTERS = 3  # of a token, where there is no tokenizer: rather too long a context than too short
ROWS_PER_STEP, STEPS = 8, 400  # of a small set; a large one is read once


class Survey(NamedTuple):
    """What a file of chat rows holds, and what a base makes of it."""

    keys: dict[str, Any]
    fields: list[str]
    rows: list[Conversation]
    faults: list[str]
    notes: list[str]
    lengths: list[tuple[int, int]]  # tokens of a row, and how many of them are learned
    config: Any = None  # of the base; None: not at hand


def survey(path: Path, base: str, progress: Progress) -> Survey:
    """Read and measure the rows of a file or folder. Raises BadInput: no chat rows, none without a fault, a
    damaged file, a base that does not exist, has no template or one that fails on a row."""
    result = Survey(*_form(path), [], [], [], [])
    source = Source(source=str(path), **result.keys)
    for row in _rows(path, source):
        try:
            result.rows.append(conversation(row, source))
        except BadInput as fault:
            result.faults.append(str(fault))
    if result.rows:
        result = _measured(result, base, progress)
    if not result.lengths:
        raise BadInput(f"{result.faults[0]} No row is without a fault")
    return result


def _rows(path: Path, source: Source) -> Iterator[Row]:
    for file, prefix in local_files(path, source)[0].items():
        yield from file_rows(file, source, prefix)


def _form(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The keys of a recipe's source that read such rows, and the rows' fields."""
    fields: Counter[str] = Counter()
    for row in islice(_rows(path, Source(source=str(path), text="(any field)")), LOOKED_AT):
        record = row.value if isinstance(row.value, dict) else {}
        fields.update(record)
        lists = [name for name in (*LISTS, *record) if _is_chat(record.get(name))]
        pair = [[name for name in names if record.get(name)] for names in (PROMPTS, COMPLETIONS)]
        if lists and (lists[0] in LISTS or not all(pair)):
            return {"messages": lists[0]}, [*fields]
        if all(pair):
            return {"prompt": pair[0][0], "completion": pair[1][0]}, [*fields]
    raise BadInput(f"{path}: holds no chat rows (fields: {', '.join(fields) or 'none'}); what works: {WORKS}")


def _is_chat(value: Any) -> bool:
    """Whether a field holds turns, perhaps as JSON text."""
    with suppress(ValueError, TypeError):
        value = json.loads(value)
    turns = value if isinstance(value, list) else []
    return any(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in turns)


def _measured(result: Survey, base: str, progress: Progress) -> Survey:
    """With notes, lengths and the base's configuration."""
    rows = result.rows[:: math.ceil(len(result.rows) / MEASURED)]
    try:
        path = data.fetch(base, progress=progress)
        if isinstance(path, str):
            names = [name for name in HUB_FILES if not name.startswith("model")]
            path = download_model(path, None, names, progress)
    except NotAtHand as error:
        notes = [f"not seen; tokens are guessed from characters ({error})"]
        guesses = [(len(row.text) // LETTERS, len(str(row.messages[-1])) // LETTERS) for row in rows]
        return result._replace(notes=notes, lengths=guesses)
    tokenizer = load_tokenizer(path)
    notes = chat_format(tokenizer).notes(rows) or ["it shows all that the rows hold"]
    progress(0, 0, f"rendering {len(rows):,} rows by the base's template")
    rendered = examples(tokenizer, rows)
    if escaped := sum(count for _, count in rendered):
        notes.append(f"{escaped} special tokens written in texts are read as characters")
    lengths = [max((len(part.ids), int(part.targets.sum())) for part in parts) for parts, _ in rendered]
    return result._replace(notes=notes, lengths=lengths, config=read_config(path))


def describe(result: Survey, values: Mapping[str, Any]) -> list[str]:
    """What was seen, and what is suggested (`suggest`), a line each."""
    messages = [message for row in result.rows for message in row.messages]
    calls = Counter(call["function"]["name"] for each in messages for call in each.get("tool_calls", ()))
    tools = {tool["function"]["name"] for row in result.rows for tool in row.tools or ()}
    lengths, learned = np.array(result.lengths).T
    low, middle, high, longest = np.quantile(lengths, (0, 0.5, 0.95, 1)).round().astype(int)
    keys = ", ".join(f"{key}: {name}" for key, name in result.keys.items())
    unread = ", ".join(name for name in result.fields if name not in (*result.keys.values(), "tools", "id"))
    names = ("context", "batch", "lr", "epochs", "heldout", "answer_tokens")
    return [
        f"rows      {len(result.rows):,}, different {values['rows']}; with faults {len(result.faults):,}",
        f"fields    {keys}; not read: {unread or 'none'}",
        f"roles     {_counted(message['role'] for message in messages)}",
        f"tools     {len(tools)} offered; called: {_counted(calls.elements()) or 'none'}",
        f"tokens    a row has {low} at least, {middle} median, {high} at 95 %, {longest} at most; "
        f"{learned.sum() / lengths.sum():.0%} are learned",
        *(f"template  {note}" for note in result.notes),
        *(f"fault     {fault}" for fault in result.faults[:FAULTS]),
        f"suggests  LoRA, {', '.join(f'{name} {values[name]}' for name in names)}",
    ]


def _counted(names: Iterator[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in Counter(names).most_common(12))


def suggest(result: Survey) -> dict[str, Any]:
    """Values for the recipe, and figures for its comments."""
    rows, (lengths, learned) = len({row.text for row in result.rows}), np.array(result.lengths).T
    sizes = result.config and result.config.get_text_config()
    usual, longest = np.quantile(lengths, 0.98, method="lower"), lengths.max()
    needed = longest if longest <= 2 * usual else usual  # an odd row makes no context
    most = min(LONGEST, getattr(sizes, "max_position_embeddings", LONGEST))
    context = min(max(256, 64 * math.ceil(needed / 64)), most)
    percent = max(1, min(20, round(100 * min(max(100, rows / 10), 400) / rows)))
    steps = max(1.0, rows * (1 - percent / 100) / ROWS_PER_STEP)  # of an epoch
    epochs = min(10, max(1, round(STEPS / steps)))
    return {
        "rows": f"{rows:,}",
        "architecture": f"architecture: {result.config.model_type}" if result.config else UNSEEN,
        "keys": "\n".join(f"      {key}: {json.dumps(name)}" for key, name in result.keys.items()),
        "heldout": f"{percent}%",
        "items": max(1, round(rows * percent / 100)),
        "context": context,
        "longest": longest,
        "longer": f"{(lengths > context).sum()} of {len(lengths):,}",
        "epochs": epochs,
        "steps": round(epochs * steps),
        "lr": f"{min(1e-3, 0.6 / getattr(sizes, 'hidden_size', 576)):.0e}".replace("e-0", "e-"),
        "batch": max(1, round(ROWS_PER_STEP * lengths.clip(max=context).mean() / context)),
        "answer_tokens": min(512, 32 * math.ceil(1.25 * learned.max() / 32)),
    }


def recipe_text(values: Mapping[str, Any], rows: Path, base: str, out: Path) -> str:
    """The recipe of the file `out`."""
    places = {"base": base, "source": str(rows)}
    for key, place in places.items():
        if Path(place).exists() and not (out.parent / place).exists():
            place = str(Path(place).absolute())
        places[key] = json.dumps(place, ensure_ascii=False)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", out.stem).lstrip("._-")[:100] or "recipe"
    title = f"{base.rpartition('/')[2]}, taught by {rows.name}"
    template = Path(__file__).with_name("recipe_of_rows.yaml").read_text(encoding="utf-8")
    return Template(template).substitute(values, **places, name=name, title=title, file=out)
