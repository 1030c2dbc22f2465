"""The files beside the graph with which onnxruntime-genai, transformers.js and optimum open a bundle.

`genai_config.json` has shapes, names, end ids, search defaults and the number of threads. The chat template
is written twice, as transformers.js reads tokenizer_config.json alone.

A chat turn may end with another token than a text (`<|im_end|>`), and a chat model may name the turn's end
alone (SmolLM2-135M-Instruct). So an answer ends with every configured id, the special tokens that end a text,
and those that end a turn where the chat template writes them. Scoring does not read these ids.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgedisp import models
from edgedisp.core.errors import BadInput
from edgedisp.core.files import GENAI_CONFIG as GENAI_CONFIG
from edgedisp.core.files import check_options, read_json, write_json
from edgedisp.graph.decoder_graph import Decoder
from edgedisp.graph.onnx_graph import GRAPH

PLAIN = ("gpt2", "opt", "gpt_neox")  # genai has them as `decoder`; its `gpt2` has key and value in one tensor
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # as special tokens: Gemma has </s> as HTML
TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>")
TOKENIZER_FILES = (
    *("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    "tokenizer.model",
)
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx")  # names of the context in config.json


def copy_files(model_folder: Path, output_dir: Path) -> None:
    """Copy configuration and tokenizer, with the chat template in both places where it is looked for, and
    every id that ends an answer in generation_config.json. BadInput without a fast tokenizer."""
    if not (model_folder / "tokenizer.json").is_file():
        raise BadInput(f"{model_folder}: no tokenizer.json; a bundle needs the fast form of the tokenizer")
    for name in ("config.json", "generation_config.json", *TOKENIZER_FILES):
        if (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, output_dir / name)
    settings = read_json(model_folder / "tokenizer_config.json")
    template = chat_template(model_folder)
    if template is not None:
        settings["chat_template"] = template
        (output_dir / "chat_template.jinja").write_text(template, encoding="utf-8")
    # Without this list, transformers 4 hands a graph token_type_ids that it has no input for.
    settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    write_json(output_dir / "tokenizer_config.json", settings)
    config = read_json(output_dir / "config.json")
    generation = read_json(output_dir / "generation_config.json")
    generation = generation or {key: ids for key, ids in config.items() if key.endswith("_token_id")}
    tokenizer, ids = models.load_tokenizer(output_dir), end_ids(output_dir)
    with suppress(models.TemplateError):
        ids = [*dict.fromkeys([*ids, *models.end_of_turn_ids(tokenizer)])]
    write_json(output_dir / "generation_config.json", {**generation, "eos_token_id": ids})


def chat_template(folder: Path) -> str | None:
    """The folder's chat template, from either place; of several named ones the default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template


def end_ids(folder: Path) -> list[int]:
    """Ids after which an answer ends: the configured ones, then what ends a text, then what ends a turn in
    the chat template. A folder without a template does not stop at the end of a turn.

    BadInput where there is none at all.
    """
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        configured = read_json(folder / name).get("eos_token_id")
        ids += configured if isinstance(configured, list) else [] if configured is None else [configured]
    vocabulary, special, template = _added_tokens(folder), _added_tokens(folder, True), chat_template(folder)
    if (eos := _special_token(folder, "eos")) in vocabulary:
        ids.append(vocabulary[eos])
    ids += [special[token] for token in TEXT_ENDS if token in special]
    ids += [vocabulary[token] for token in TURN_ENDS if token in vocabulary and token in (template or "")]
    if not ids:
        raise BadInput(f"{folder}: no eos_token_id in config.json, and the tokenizer names no end of text")
    return list(dict.fromkeys(ids))


def read_config(bundle: Path) -> dict[str, Any]:
    """The `model` part of a bundle's genai_config.json. BadInput if the folder has none, and as
    `check_options`."""
    path = bundle / GENAI_CONFIG
    if not path.is_file():
        raise BadInput(f"{bundle}: no bundle ({GENAI_CONFIG} is missing); `edgedisp export` makes one")
    check_options(bundle)
    model = read_json(path).get("model", {})
    if missing := {"context_length", "vocab_size", "eos_token_id", "decoder"} - model.keys():
        words = f"without {', '.join(sorted(missing))}"
        raise BadInput(f"{path}: is no configuration of onnxruntime-genai, {words}; export it again")
    return dict(model)


def context_length(bundle: Path) -> int:
    """Most tokens in one sequence, as written in the bundle."""
    return int(read_config(bundle)["context_length"])


def set_threads(bundle: Path, threads: int) -> None:
    """Write the number of threads that onnxruntime-genai starts for this bundle."""
    if threads < 1:
        raise BadInput(f"threads is {threads}; at least 1 is needed")
    model = read_config(bundle)
    model["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = threads
    write_json(bundle / GENAI_CONFIG, {**read_json(bundle / GENAI_CONFIG), "model": model})


def genai_config(decoder: Decoder, folder: Path) -> dict[str, Any]:
    """The configuration of onnxruntime-genai for a bundle with tokenizer and config.json in `folder`."""
    config, vocabulary, eos = read_json(folder / "config.json"), _added_tokens(folder), end_ids(folder)

    def special_id(kind: str) -> int:
        configured = config.get(f"{kind}_token_id")
        ids = (configured, vocabulary.get(_special_token(folder, kind)), eos[0])
        return int(next(token_id for token_id in ids if token_id is not None))

    def names(prefix: str, past: str) -> dict[str, str]:
        return {f"{past}_{part}_names": f"{prefix}.%d.{part}" for part in ("key", "value")}

    model = {
        "type": "decoder" if decoder.architecture in PLAIN else decoder.architecture,
        "bos_token_id": special_id("bos"),
        "eos_token_id": eos,
        "pad_token_id": special_id("pad"),
        "context_length": decoder.context,
        "vocab_size": decoder.vocab_size,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": GRAPH,
            "head_size": decoder.head_dim,
            "hidden_size": decoder.hidden,
            "num_attention_heads": decoder.heads,
            "num_hidden_layers": len(decoder.layers),
            "num_key_value_heads": decoder.kv_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                **names("past_key_values", "past"),
            },
            "outputs": {"logits": "logits", **names("present", "present")},
        },
    }
    search = {"do_sample": False, "max_length": decoder.context, "past_present_share_buffer": True}
    return {"model": model, "search": search}


def _special_token(folder: Path, kind: str) -> str:
    """Text of the special token `kind`, "" without one; old files wrap it in a dictionary."""
    token = read_json(folder / "tokenizer_config.json").get(f"{kind}_token")
    return str((token.get("content") if isinstance(token, dict) else token) or "")


def _added_tokens(folder: Path, only_special: bool = False) -> dict[str, int]:
    """Text -> id of the tokens beside the vocabulary proper."""
    tokens = read_json(folder / "tokenizer.json").get("added_tokens", [])
    return {token["content"]: token["id"] for token in tokens if token.get("special") or not only_special}
