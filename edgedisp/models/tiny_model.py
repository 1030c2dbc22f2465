"""The tiny random model of an architecture, with a byte-level BPE tokenizer trained on given text.

A smoke run uses it instead of the real model, so that every stage runs in a minute. It has the family's own
modules (grouped heads, query norms, sliding windows, tied embeddings), special tokens and a chat template,
but width 64, two layers and a vocabulary of some hundred tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from edgedisp.core.errors import BadInput
from edgedisp.core.hub import one_line, quiet
from edgedisp.models.loading import is_causal_family

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = [END_OF_TEXT, TURN_START, TURN_END]  # ids 0, 1, 2
CHAT_TEMPLATE = (  # ChatML
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Widths are multiples of 32, the group of the quantizers. Weights start with a standard deviation of 0.1,
# about 1/sqrt(64): the usual 0.02 is meant for wide models and would leave all logits nearly equal here.
NEOX: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.1,
}  # fmt: skip
COMMON = NEOX | {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
GEMMA = {
    "num_key_value_heads": 1, "query_pre_attn_scalar": 16, "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
OPT = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "init_std": 0.1}
SIZES: dict[str, dict[str, Any]] = {
    "llama": COMMON,
    "qwen2": COMMON,
    "qwen3": COMMON,
    "gemma3_text": COMMON | GEMMA,
    "opt": OPT,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
    "gpt_neox": NEOX,
}
LARGEST_PARAMETERS = 2_000_000  # a family that does not know our field names keeps its own, large sizes


def tiny_model(
    architecture: str, texts: Iterable[str], vocab_size: int = 512, seed: int = 0, context: int = 512
) -> tuple[Any, Any]:
    """(random model in float32, tokenizer). Same arguments, same weights; global random state untouched.

    architecture: transformers' `model_type`. vocab_size: at most so many tokens; the model's is the
    tokenizer's, rounded up to 16. Raises BadInput for a family that cannot be made small.
    """
    with quiet():
        try:
            if not is_causal_family(architecture):
                raise ValueError("not a family of causal language models that transformers knows")
            tokenizer = _tokenizer(texts, vocab_size, context, architecture)
            return _random_model(architecture, context, len(tokenizer), seed), tokenizer
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as problem:
            reason = one_line(problem).partition(". ")[0].rstrip(".")
            raise BadInput(
                f"no tiny model of the architecture {architecture!r}: {reason}. Those that were tried: "
                f"{', '.join(SIZES)}."
            ) from problem


def _random_model(architecture: str, context: int, tokens: int, seed: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    positions = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
    options = SIZES.get(architecture, COMMON) | {positions: context, "vocab_size": -(-tokens // 16) * 16}
    options |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
    config = AutoConfig.for_model(architecture, **options)
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):  # shapes only: a family that ignored our sizes may be huge
            count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if count > LARGEST_PARAMETERS:
            raise ValueError(f"it would have {count:,} parameters")
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.inference_mode():  # sizes that do not fit together show in the first step
        model(input_ids=torch.arange(8).reshape(2, 4))
    model.config.architectures = [type(model).__name__]
    return model


def _tokenizer(texts: Iterable[str], vocab_size: int, context: int, architecture: str) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if architecture == "qwen2":
        # transformers splits words by its own rules in every folder of this family, whatever tokenizer.json
        # says, so the tokenizer is trained with these rules.
        family = Qwen2Tokenizer().backend_tokenizer
        inner.normalizer, inner.pre_tokenizer = family.normalizer, family.pre_tokenizer
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # every byte: no text is unknown
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=TURN_END,
        additional_special_tokens=[TURN_START],
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
