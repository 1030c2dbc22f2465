"""What stands beside the graph so that the runtimes open a bundle: onnxruntime-genai, transformers.js,
optimum.

- `genai_config.json`: shapes, names, end-of-text ids, search defaults, and the number of threads (without it,
  genai takes half of the hardware threads: one, on two).
- tokenizer files. The chat template is written both as `chat_template.jinja` and inside
  `tokenizer_config.json`: transformers.js reads the second alone.
- `config.json` and `generation_config.json`, without which optimum and transformers.js do not know the
  family.

What ends an answer is more than a model's `eos_token_id`. A turn may end with another token than a text: chat
templates in ChatML style close it with `<|im_end|>`. And a chat model may name the turn's end alone:
SmolLM2-135M-Instruct has 2 (`<|im_end|>`) everywhere, but it was pre-trained, and is mid-trained here, on
documents that `<|endoftext|>`, its id 0, separates. After that token it begins another text. transformers and
genai's builder stop at the configured ids and the tokenizer's eos alone; llama.cpp goes by the tokens' texts.
Here both count: every configured id, the special tokens that end a text, and those that end a turn where the
chat template writes them. The list goes into `genai_config.json`, and into `generation_config.json`, where
transformers.js and optimum look. Scoring reads neither: it stops as lm-evaluation-harness does.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.graph.description import Decoder

# Family -> genai's model type. Its type `gpt2` wants key and value in one tensor; `decoder` is the plain one.
GENAI_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3_text": "gemma3_text",
    "gpt2": "decoder",
    "opt": "decoder",
    "gpt_neox": "decoder",
}
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # as special tokens: Gemma has </s> as HTML
TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>")
COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def write_layout(decoder: Decoder, model_folder: Path, out: Path, threads: int) -> None:
    """Write every file of a bundle but the graph. BadInput if the model folder has no fast tokenizer."""
    copy_files(model_folder, out)
    config = _genai_config(decoder, end_ids(out), _special_ids(out))
    dump(out / "genai_config.json", config)
    set_threads(out, threads)


def copy_files(model_folder: Path, out: Path) -> None:
    """Copy configuration and tokenizer, with the chat template in both places where it is looked for, and
    every id that ends an answer in generation_config.json."""
    if not (model_folder / "tokenizer.json").is_file():
        raise BadInput(f"{model_folder}: no tokenizer.json; a bundle needs the fast form of the tokenizer")
    for name in COPIED:
        if (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, out / name)
    settings = _load(model_folder / "tokenizer_config.json")
    template = chat_template(model_folder)
    if template is not None:
        settings["chat_template"] = template
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    # Without this list, transformers 4 hands a graph token_type_ids that it has no input for.
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    dump(out / "tokenizer_config.json", settings)
    generation = _load(out / "generation_config.json")
    if not generation:
        generation = {k: v for k, v in _load(out / "config.json").items() if k.endswith("_token_id")}
    dump(out / "generation_config.json", {**generation, "eos_token_id": end_ids(out)})


def chat_template(folder: Path) -> str | None:
    """The folder's chat template, from either place; of several named ones the default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _load(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def end_ids(folder: Path) -> list[int]:
    """Ids after which an answer ends: the configured ones first, then what ends a text, then what ends a turn
    in the chat template. A folder without a template does not stop at the end of a turn.

    BadInput where there is none at all.
    """
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        found = _load(folder / name).get("eos_token_id")
        ids += found if isinstance(found, list) else [] if found is None else [found]
    vocabulary, template = _added_tokens(folder), chat_template(folder) or ""
    special = _added_tokens(folder, special=True)
    eos = _content(_load(folder / "tokenizer_config.json").get("eos_token"))
    ids += [vocabulary[token] for token in (eos,) if token in vocabulary]
    ids += [special[token] for token in TEXT_ENDS if token in special]
    ids += [vocabulary[token] for token in TURN_ENDS if token in vocabulary and token in template]
    if not ids:
        raise BadInput(f"{folder}: no eos_token_id in config.json, and the tokenizer names no end of text")
    return list(dict.fromkeys(ids))


def set_threads(bundle: Path, threads: int) -> None:
    """Write the number of threads that onnxruntime-genai starts for this bundle."""
    if threads < 1:
        raise BadInput(f"threads is {threads}; at least 1 is needed")
    path = bundle / "genai_config.json"
    config = _load(path)
    if "model" not in config:
        raise BadInput(f"{bundle}: no bundle (genai_config.json is missing); `edgedisp export` makes one")
    config["model"]["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = threads
    dump(path, config)


def set_end_ids(bundle: Path) -> None:
    """Write every id that ends an answer into a genai_config.json that others wrote."""
    path = bundle / "genai_config.json"
    config = _load(path)
    config["model"]["eos_token_id"] = end_ids(bundle)
    dump(path, config)


def context_of(bundle: Path) -> int:
    """Most tokens in one sequence, as written in the bundle."""
    return int(_load(bundle / "genai_config.json")["model"]["context_length"])


def _special_ids(folder: Path) -> dict[str, int]:
    """bos and pad ids, as far as they are known."""
    config, vocabulary = _load(folder / "config.json"), _added_tokens(folder)
    settings = _load(folder / "tokenizer_config.json")
    ids = {}
    for kind in ("bos", "pad"):
        found = config.get(f"{kind}_token_id")
        if found is None:
            found = vocabulary.get(_content(settings.get(f"{kind}_token")) or "")
        if found is not None:
            ids[kind] = int(found)
    return ids


def _genai_config(decoder: Decoder, ends: list[int], special: dict[str, int]) -> dict[str, Any]:
    return {
        "model": {
            "type": GENAI_TYPES[decoder.family],
            "bos_token_id": special.get("bos", ends[0]),
            "eos_token_id": ends,
            "pad_token_id": special.get("pad", ends[0]),
            "context_length": decoder.context,
            "vocab_size": decoder.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": decoder.head_dim,
                "hidden_size": decoder.hidden,
                "num_attention_heads": decoder.heads,
                "num_hidden_layers": len(decoder.layers),
                "num_key_value_heads": decoder.kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": decoder.context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }


def _content(token: Any) -> str | None:
    """A special token's text; old files wrap it in a dictionary."""
    return token.get("content") if isinstance(token, dict) else token


def _added_tokens(folder: Path, special: bool = False) -> dict[str, int]:
    """Text -> id of the tokens beside the vocabulary proper; `special`: only those that are no text."""
    added = _load(folder / "tokenizer.json").get("added_tokens", [])
    return {token["content"]: token["id"] for token in added if not special or token.get("special")}


def _load(path: Path) -> dict[str, Any]:
    """The content of a JSON file, nothing if there is none. BadInput if it is damaged."""
    if not path.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: not readable as JSON: {error}") from error
    return content


def dump(path: Path, content: dict[str, Any]) -> None:
    """Write JSON as the other files of a bundle are written."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
