"""Tiny random llama bundles made by onnxruntime-genai's builder, for the tests of what runs on a device."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from graph_twins import ASCII, SPECIALS, bpe_tokenizer, save_tokenizer
from graph_twins import make as make_twin
from shared_store import SharedStore
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from edgedisp.core.results import DeviceResult

Bundles = dict[str, Path]
LINES = """{% for m in messages %}
    {% if m['role'] == 'user' %}
{{ '<|user|>' + m['content'] }}
    {% else %}
{{ m['role'] + m['content'] }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
"""
WITH_BOS = "{{ bos_token }}{% for m in messages %}{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
CONVERSATIONS = [
    [{"role": "user", "content": "the cat"}],
    [
        {"role": "system", "content": "be a\n dog "},
        {"role": "user", "content": "  the <|im_end|>"},
        {"role": "assistant", "content": "log"},
        {"role": "user", "content": "on\n\nthe mat"},
    ],
]
RUNNER = Path(__file__).resolve().parents[2] / "export" / "runner" / "runner.py"


def tiny_bundles(store: SharedStore) -> Bundles:
    """Bundles `fp32`, `twin` (fp32, other weights) and `int4`, made once, in folders of these names: a
    bundle's label is the name of its folder."""

    def make(root: Path) -> None:
        for seed in (1, 2):
            folder = root / f"model-{seed}"
            tokenizer = bpe_tokenizer(["the cat sat on the mat and the dog sat on the log"] * 5, 160, ASCII)
            changes = {"vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 256}
            changes |= {"intermediate_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
            # Weights are large enough for greedy tokens to vary.
            make_twin(folder, "llama", seed, noise=0.0, initializer_range=0.5, **changes)
            save_tokenizer(folder, tokenizer, bos_token=SPECIALS[1], eos_token=SPECIALS[2])
        for seed, name, precision in ((1, "fp32", "fp32"), (2, "twin", "fp32"), (1, "int4", "int4")):
            _build(root / f"model-{seed}", root / name, precision, root / "cache")

    root = store.folder("tiny_bundles", make)
    return {name: root / name for name in ("fp32", "twin", "int4")}


def write_sentences(path: Path, documents: int = 40) -> Path:
    """JSONL of documents of 12 short sentences, in words that the tokenizer of the bundles knows."""
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "mat", "and", "dog", "log"]
    rows = []
    for _ in range(documents):
        sentences = [" ".join(rng.choice(words, rng.integers(5, 9))).capitalize() for _ in range(12)]
        rows.append(json.dumps({"text": ". ".join(sentences) + "."}))
    path.write_text("\n".join(rows))
    return path


def order(result: DeviceResult) -> list[str]:
    """The labels of the timed repetitions, in the order of timing."""
    return [turn["label"] for turn in result.repetitions]


def _build(source: Path, out: Path, precision: str, cache: Path) -> None:
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    options = [] if precision == "fp32" else ["accuracy_level=4"]
    level = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            extra = parse_extra_options("", str(source), str(out), precision, "cpu", str(cache), options)
            create_model("", str(source), str(out), precision, "cpu", str(cache), **extra)
    finally:
        logging.disable(level)


def copy_with(bundle: Path, out: Path, **changes: Any) -> Path:
    """A copy of a bundle whose genai_config.json has `changes`: keys are dotted paths with __ for dots."""
    shutil.copytree(bundle, out)
    path = out / "genai_config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        section = functools.reduce(dict.__getitem__, parents, config)
        section[last] = value
        if value is None:
            del section[last]
    path.write_text(json.dumps(config))
    return out


def with_template(bundle: Path, out: Path, template: str, adds_bos: bool) -> Path:
    """A copy of a bundle with another chat template ("": none); adds_bos: its tokenizer puts BOS first."""
    copy_with(bundle, out)
    (out / "chat_template.jinja").write_text(template)
    if not template:
        (out / "chat_template.jinja").unlink()
        settings = json.loads((out / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (out / "tokenizer_config.json").write_text(json.dumps(settings))
    if adds_bos:
        inner = Tokenizer.from_file(str(out / "tokenizer.json"))
        inner.post_processor = TemplateProcessing(f"{SPECIALS[1]} $A", None, [(SPECIALS[1], 1)])
        inner.save(str(out / "tokenizer.json"))
    return out


def recompute(bundle: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens the plain way: no cache, the whole sequence through onnxruntime for every token."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    caches = [value for value in session.get_inputs() if value.name.startswith("past")]
    empty = {cache.name: np.zeros((1, cache.shape[1], 0, 16), np.float32) for cache in caches}
    ids = list(prompt)
    for _ in range(count):
        feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        ids.append(int(session.run(["logits"], {**feed, **empty})[0][0, -1].argmax()))
    return ids[len(prompt) :]
