"""Tiny random models for the tests of `graph` and `quantize`: every family, and forms of it that differ.

Weights are large and norms uneven, so that attention is sharp and a mistake in a scale, a norm, a window or a
position shows in the logits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared_store import SharedStore
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 320
CONTEXT = 128
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The letters of space and line end too. Of tokens that are text, the pieces decode as the whole does.
ASCII = [chr(code) for code in range(33, 127)] + ["\u0120", "\u010a"]

TEXTS = (
    "The quick brown fox jumps over the lazy dog. ",
    "Numbers 12345 and 67, dots... and\n\nnew lines.\tTabs too. ",
    "naïve café, 中文 and 🙂 are more than one byte each. ",
    "They don't know it's a test; we'll see who's right. ",
)
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# fmt: off
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
SHAPE = {
    **IDS, "pad_token_id": 0, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    "initializer_range": 0.15, "tie_word_embeddings": True,
}
GPT2_SHAPE = {**IDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
GPT2_SHAPE |= {"initializer_range": 0.15}
OPT_SHAPE = {
    **IDS, "pad_token_id": 0, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": CONTEXT, "init_std": 0.25,
}
PHI3_SHAPE = {**SHAPE, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096}
SHAPES = {"gpt2": GPT2_SHAPE, "opt": OPT_SHAPE, "phi3": PHI3_SHAPE}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 16, "num_key_value_heads": 1}
UNTIE = {"tie_word_embeddings": False}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}

# name -> (architecture, what differs from SHAPE)
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, untied, biases, wide heads": (
        "llama", {**UNTIE, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama, yarn rope": ("llama", {"rope_parameters": YARN}),
    "mistral, window": ("mistral", {"sliding_window": 16}),
    "qwen2, window in one layer": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma3_text": ("gemma3_text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3_text, capped logits, biases, long rope": ("gemma3_text", {
        **GEMMA, "layer_types": ["full_attention", "sliding_attention"], "final_logit_softcapping": 4.0,
        "rope_parameters": {"full_attention": LINEAR, "sliding_attention": ROPE}, "attention_bias": True,
    }),
    "gpt2": ("gpt2", {}),
    "gpt2, scaled by layer, exact gelu": (
        "gpt2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "gelu", "n_inner": 80},
    ),
    "opt": ("opt", {}),
    "opt, plain norms, no biases, untied": ("opt", {
        "layer_norm_elementwise_affine": False, "enable_bias": False, "activation_function": "gelu", **UNTIE,
    }),
    "gpt_neox": ("gpt_neox", {
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25}, "hidden_act": "gelu", **UNTIE,
    }),
    "gpt_neox, one part after the other, a third of each head rotated": ("gpt_neox", {
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.32}, "use_parallel_residual": False,
        "num_attention_heads": 2,
    }),
    "gpt_neox, no attention biases, untied, yarn rope": ("gpt_neox", {
        "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}, "attention_bias": False, **UNTIE,
    }),
}
# fmt: on
FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2", "opt", "gpt_neox")
UNTIED = "llama, untied, biases, wide heads"


class TwinStore:
    """Twins by their form (a key of FORMS, or an architecture), each made once and never changed."""

    def __init__(self, store: SharedStore) -> None:
        self.store = store

    def model_dir(self, form: str) -> Path:
        return self.store.folder(f"model-{_key(form)}", lambda path: make(path, form))

    def model(self, form: str) -> Any:
        """The torch model."""
        from edgedisp.models import load

        return load(self.model_dir(form))

    def fp32(self, form: str = "llama") -> Path:
        """The fp32 bundle."""
        from edgedisp.graph.export import export

        source = self.model_dir(form)
        return self.store.folder(f"fp32-{_key(form)}", lambda path: export(source, path, threads=1))

    def quantized(self, form: str = "llama", bits: int = 4, **options: Any) -> Path:
        """A bundle rounded to nearest; options as of `quantize_bundle`."""
        from edgedisp.quantize.onnx_rewrite import quantize_bundle

        source, name = self.fp32(form), f"int{bits}-{_key(form + str(sorted(options.items())))}"
        return self.store.folder(name, lambda path: quantize_bundle(source, path, bits=bits, **options))


def _key(text: str) -> str:
    return "".join(character if character.isalnum() else "_" for character in text)


def make(folder: Path, form: str, seed: int = 1, noise: float = 0.3, **changes: Any) -> Any:
    """Save the twin `form` (a key of FORMS, or an architecture) with a tokenizer; return the torch model.
    noise: of norms and biases."""
    from transformers import AutoConfig, AutoModelForCausalLM

    architecture, differs = FORMS.get(form, (form, {}))
    shape = SHAPES.get(architecture, SHAPE)
    config = AutoConfig.for_model(architecture, **(shape | differs | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += noise * torch.randn_like(parameter)
        if architecture == "gemma3_text":  # it scales embeddings up, and would only repeat its last token
            model.model.embed_tokens.weight.data /= config.hidden_size**0.5
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def bpe_tokenizer(texts: Iterable[str], size: int, alphabet: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer with SPECIALS, ids 0..size-1 at most."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@cache
def twin_tokenizer() -> Tokenizer:
    return bpe_tokenizer(TEXTS, VOCABULARY, pre_tokenizers.ByteLevel.alphabet())


def save_tokenizer(folder: Path, tokenizer: Tokenizer | None = None, **names: str) -> None:
    """names: of the special tokens, where they differ."""
    (folder / "tokenizer.json").write_text((tokenizer or twin_tokenizer()).to_str(), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    settings = dict.fromkeys(("bos_token", "eos_token", "pad_token"), SPECIALS[0]) | names
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def ragged(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random prompts of the given lengths, without the special tokens 0 to 2."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCABULARY, length).tolist() for length in lengths]


def padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """ids and mask [batch, longest], padded on the right with noise that must not matter."""
    width = max(map(len, rows))
    mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in rows], np.int64)
    ids = np.array([row + [7] * (width - len(row)) for row in rows], np.int64)
    return ids, mask


def torch_logits(model: Any, row: list[int]) -> np.ndarray:
    """Logits [tokens, vocab] of an unpadded row by the torch model."""
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([row])).logits[0].numpy()
    return logits


def torch_greedy(model: Any, row: list[int], new: int) -> list[int]:
    """Greedy continuation, recomputed in full at every step: no cache, no generation settings."""
    ids = list(row)
    for _ in range(new):
        ids.append(int(torch_logits(model, ids)[-1].argmax()))
    return ids[len(row) :]
