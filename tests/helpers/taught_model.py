"""A tiny model that answers one request with a tool call, as a trained one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from graph_twins import ASCII, SPECIALS, bpe_tokenizer
from shared_store import SharedStore
from transformers import PreTrainedTokenizerFast

from edgedisp import models
from edgedisp.commands.export import export_bundle
from edgedisp.core.files import write_json
from edgedisp.core.progress import silent
from edgedisp.graph.runtime_layouts import LAYOUTS
from edgedisp.models.tiny_model import CHAT_TEMPLATE, tiny_model

REQUEST = "turn on the desk lamp"
CALL = {"name": "turn_on", "arguments": {"device": "desk lamp", "brightness": 70}}
ANSWER = json.dumps(CALL, separators=(",", ":"))
SYSTEM = "You control a home."
STEPS = 60


def taught_bundle(store: SharedStore) -> Path:
    """The model as a bundle, made once."""

    def make(root: Path) -> None:
        (root / "model").mkdir()
        app = {"system": SYSTEM, "example": taught_model(root / "model")}
        write_json(root / "model" / "app.json", app)
        export_bundle(root / "model", "browser", root / "taught", silent, LAYOUTS)

    return store.folder("taught", make) / "taught"


def taught_model(folder: Path) -> dict[str, Any]:
    """Write a llama with the template ChatML into `folder`; returns the example that it has learnt."""
    texts = [f"{SYSTEM} {REQUEST} {ANSWER}"] * 40
    inner = bpe_tokenizer(texts, 256, ASCII)
    model, _ = tiny_model("llama", texts, vocab_size=inner.get_vocab_size(), seed=0, context=256)
    names = {"bos_token": SPECIALS[1], "eos_token": SPECIALS[2], "pad_token": SPECIALS[0]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=CHAT_TEMPLATE, **names)
    model.resize_token_embeddings(len(tokenizer))
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": REQUEST}]
    prompt = models.render_conversation(tokenizer, messages)
    prompt_ids = models.encode(tokenizer, prompt)
    answer_ids = models.encode(tokenizer, f"{ANSWER}{SPECIALS[2]}")
    ids = torch.tensor([prompt_ids + answer_ids])
    labels = ids.clone()
    labels[:, : len(prompt_ids)] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    models.save(model, tokenizer, folder)
    example = {"messages": messages, "tools": None, "prompt": prompt, "prompt_ids": prompt_ids}
    return {**example, "answer": ANSWER, "answer_ids": answer_ids}
