"""Tiny random llama bundles made by onnxruntime-genai's builder, for the tests of what runs on a device."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from shared_store import SharedStore

from edgedisp.core.results import DeviceResult

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Bundles = dict[str, Path]
RUNNER = Path(__file__).resolve().parents[2] / "export" / "runner" / "runner.py"


def tiny_bundles(store: SharedStore) -> Bundles:
    """Bundles `fp32`, `twin` (fp32, other weights) and `int4`, made once, in folders of these names: a
    bundle's label is the name of its folder."""

    def make(root: Path) -> None:
        for seed in (1, 2):
            _model(root / f"model-{seed}", seed)
        for seed, name, precision in ((1, "fp32", "fp32"), (2, "twin", "fp32"), (1, "int4", "int4")):
            _build(root / f"model-{seed}", root / name, precision, root / "cache")

    root = store.folder("tiny_bundles", make)
    return {name: root / name for name in ("fp32", "twin", "int4")}


def order(result: DeviceResult) -> list[str]:
    """The labels of the timed repetitions, in the order of timing."""
    return [turn["label"] for turn in result.repetitions]


def _model(folder: Path, seed: int) -> None:
    """A 2-layer llama whose weights are large enough for its greedy tokens to vary."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    # ASCII alone (with the byte alphabet's letters for space and line end): whatever tokens a random model
    # picks, their bytes are text, so that decoding piece by piece and all at once must agree.
    alphabet = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a"]
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=SPECIALS, initial_alphabet=alphabet)
    bpe.train_from_iterator(["the cat sat on the mat and the dog sat on the log"] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)


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
        *folders, last = key.split("__")
        section = config
        for part in folders:
            section = section[part]
        if value is None:
            del section[last]
        else:
            section[last] = value
    path.write_text(json.dumps(config))
    return out


def recompute(bundle: Path, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens the plain way: no cache, the whole sequence through onnxruntime for every token."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    empty = {
        i.name: np.zeros((1, i.shape[1], 0, 16), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }
    ids = list(prompt)
    for _ in range(count):
        feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        ids.append(int(session.run(["logits"], {**feed, **empty})[0][0, -1].argmax()))
    return ids[len(prompt) :]
