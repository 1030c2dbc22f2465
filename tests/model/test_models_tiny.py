"""The tiny random models, and parameter counts."""

from __future__ import annotations

import pytest
import torch

from edgedisp.core.errors import BadInput
from edgedisp.data import synthetic_documents
from edgedisp.models import context_length, count_parameters, encode, tiny_model

TEXTS = [document.text for document in synthetic_documents(120, seed=0)]
FAMILIES = ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "opt", "gpt_neox"]
OTHER_FAMILIES = ["bloom", "mamba"]


@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
def test_a_tiny_model_is_small_and_its_components_add_up(family: str) -> None:
    model, tokenizer = tiny_model(family, TEXTS[:40], vocab_size=400, context=128)
    sizes, parameters = count_parameters(model), list(model.parameters())
    parts = [sizes[part] for part in ("embedding", "attention", "mlp", "norm", "head", "other")]
    assert sum(parts) == sizes["total"] == sum(parameter.numel() for parameter in parameters) < 200_000
    assert sizes["tied"] == (family != "gpt_neox")  # as Pythia and the small models of the others are
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    config = model.config
    assert len(tokenizer) <= config.vocab_size == 400
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    if family in FAMILIES:
        assert config.num_hidden_layers == 2 and context_length(config) == 128
        assert min(sizes["attention"], sizes["mlp"], sizes["norm"]) > 0 == sizes["other"]


def test_the_same_seed_gives_the_same_model_and_leaves_the_random_state_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, tokenizer = tiny_model("qwen3", TEXTS, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second, other_tokenizer = tiny_model("qwen3", TEXTS, seed=3)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    assert tokenizer.get_vocab() == other_tokenizer.get_vocab()
    other = tiny_model("qwen3", TEXTS, seed=4)[0]
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_its_tokenizer_is_lossless_and_knows_its_special_tokens() -> None:
    _, tokenizer = tiny_model("llama", TEXTS)
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2]
    for text in (*TEXTS[:5], " two  spaces\n\ttab", "na\u00efve \u65e5\u672c \U0001f600", "it 's . done ?"):
        assert tokenizer.decode(encode(tokenizer, text)) == text
    assert encode(tokenizer, "a<|im_end|>")[-1] == 2
    learned = sum(len(encode(tokenizer, text)) for text in TEXTS) / sum(len(text) for text in TEXTS)
    assert learned < 0.6  # tokens a character: it has merged
    turns = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_family_that_cannot_be_made_small_lists_those_that_can() -> None:
    for family in ("nonsense", "bert", "qwen3_moe"):
        with pytest.raises(BadInput, match=rf"{family!r}: .*llama, qwen2, qwen3, gemma3_text, opt, gpt2"):
            tiny_model(family, TEXTS[:10])


def test_an_untied_head_is_counted_as_head() -> None:
    from transformers import AutoModelForCausalLM

    config = tiny_model("llama", TEXTS[:20])[0].config
    config.tie_word_embeddings = False
    sizes = count_parameters(AutoModelForCausalLM.from_config(config))
    assert sizes["tied"] is False
    assert sizes["head"] == sizes["embedding"] == config.vocab_size * config.hidden_size
