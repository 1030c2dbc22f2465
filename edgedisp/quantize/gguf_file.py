"""`model.gguf` for llama.cpp and its kin, from the integers of an ONNX bundle.

A group of `MatMulNBits` is one or more blocks of 32 of a GGUF type; nothing is quantized again:

    4 bits, symmetric    Q4_0   d * (q - 8)       d = scale
    4 bits, zero points  Q4_1   d * q + m         m = -scale * zero point, as fp16 (within 2^-11 of itself)
    8 bits, symmetric    Q8_0   d * q             q - 128 of the bundle

No type has zero points at 8 bits, or blocks of 16. All else is fp32. Names of tensors and keys are those of
llama.cpp's converter (package gguf).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from edgedisp import __version__, models
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.graph.genai_config import chat_template, end_ids
from edgedisp.graph.onnx_graph import GRAPH, read_graph
from edgedisp.quantize.grid import Blocks, Grid, dequantize
from edgedisp.quantize.onnx_weights import read_blocks, read_weight_map

BLOCK = 32
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
BUFFERS = (".attn.bias", ".attn.masked_bias", ".inv_freq")  # of older files; no weights
GEMMA_PATTERN = 6  # llama.cpp: every sixth layer attends to all
CLOSE = 1e-3  # of a weight's largest value, by which a file may differ: the minimum of Q4_1 is rounded

# What cuts a text before byte pairs are merged, as tokenizer.json says it -> llama.cpp's name for it.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def write_gguf(
    model_folder: Path, bundle: Path, by_tensor: Sequence[Mapping[str, Any]], path: Path, context: int
) -> None:
    """Write the model of `model_folder` to `path`, its weights as the bundle holds them.

    by_tensor: how the bundle stores its packed weights (`quantize_assigned`); none: all is fp32. BadInput for
    what llama.cpp cannot run as the model is trained: a family, a grid, rotary scaling, a tokenizer.
    BuildFailed if the file holds other weights than the bundle.
    """
    config, tokenizer = models.read_config(model_folder), models.load_tokenizer(model_folder)
    family = _check(config)
    tensors = {
        name: _as_read(name, tensor, family) for name, tensor in models.load_weights(model_folder).items()
    }
    blocks = _blocks_by_parameter(bundle, by_tensor, tensors)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[family]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_quantized_by(f"edgedisp {__version__}")
    _add_sizes(writer, config, context)
    _add_tokenizer(writer, tokenizer, model_folder, config.vocab_size)
    written: dict[str, Tensor] = {}
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], config.num_hidden_layers)
    for parameter, tensor in tensors.items():
        name = names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        if parameter.endswith(BUFFERS) or (name == "output.weight" and config.tie_word_embeddings):
            continue
        if name is None:
            raise BadInput(f"layout gguf: llama.cpp has no place for {parameter}")
        order = _row_order(parameter, config)
        if (part := blocks.get(parameter)) is not None:
            rounded, grid = part
            rounded = rounded if order is None else rounded.rows(order)
            written[name] = dequantize(rounded, grid)
            data, kind = ggml_blocks(rounded, grid)
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            written[name] = values = (tensor if order is None else tensor[order]).contiguous()
            writer.add_tensor(name, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _check_file(path, written)


def ggml_blocks(blocks: Blocks, grid: Grid) -> tuple[NDArray[np.uint8], Type]:
    """A weight as llama.cpp stores it: bytes [out, bytes of a row], and their type. ValueError for a grid
    that no type has (`unfit`)."""
    if reason := unfit(grid, blocks.columns):
        raise ValueError(reason)
    rows, per_group = len(blocks.q), grid.group // BLOCK
    count = blocks.columns // BLOCK  # a last group may be partly padding
    q = blocks.q.reshape(rows, -1, BLOCK)[:, :count].numpy()
    d = blocks.scales.repeat_interleave(per_group, dim=1)[:, :count, None]
    parts = [d.half().numpy().view(np.uint8)]
    if grid.bits == 8:
        return _joined(*parts, (q ^ np.uint8(128))), Type.Q8_0
    if not grid.symmetric:
        zeros = blocks.zero_points.repeat_interleave(per_group, dim=1)[:, :count, None].float()  # type: ignore[union-attr]
        parts.append((-d * zeros).half().numpy().view(np.uint8))
    nibbles = q[..., : BLOCK // 2] | q[..., BLOCK // 2 :] << 4
    return _joined(*parts, nibbles), Type.Q4_0 if grid.symmetric else Type.Q4_1


def _joined(*parts: NDArray[np.uint8]) -> NDArray[np.uint8]:
    joined = np.concatenate(parts, axis=-1)
    return joined.reshape(len(joined), -1)


def unfit(grid: Grid, columns: int) -> str:
    """Why no GGUF type stores a weight of a grid; empty where one does."""
    if grid.group % BLOCK:
        return f"its groups have {grid.group} values; GGUF has blocks of {BLOCK}: group: {BLOCK}"
    if columns % BLOCK:
        return f"its rows have {columns} values, which are no whole blocks of {BLOCK}"
    if grid.bits == 8 and not grid.symmetric:
        return "it has zero points at 8 bits, and no GGUF type has: symmetric: true"
    return ""


def _blocks_by_parameter(
    bundle: Path, by_tensor: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[Blocks, Grid]]:
    """Torch parameter -> its blocks in the bundle, and their grid."""
    if not by_tensor:
        return {}
    origins, stored = read_weight_map(bundle), read_graph(bundle / GRAPH).graph.initializers
    result = dict[str, tuple[Blocks, Grid]]()
    for row in by_tensor:
        origin, grid = origins[row["name"]], Grid(row["bits"], row["group"], row["symmetric"])
        sizes, columns = zip(*(tensors[name].shape for name in origin.parameters))
        if reason := unfit(grid, columns[0]):
            raise BadInput(f"layout gguf: {row['name']} does not fit: {reason}")
        blocks = read_blocks(stored, row["name"], grid, columns[0])
        result |= {name: (part, grid) for name, part in origin.split(blocks, sizes).items()}
    return result


def _as_read(parameter: str, tensor: Tensor, family: str) -> Tensor:
    """A tensor as llama.cpp reads it: matrices [out, in], and what Gemma's norms multiply by, 1 + weight."""
    if family == "gpt2" and tensor.dim() == 2 and ".h." in f".{parameter}":
        return tensor.T  # Conv1D
    return tensor + 1.0 if family == "gemma3_text" and parameter.endswith("norm.weight") else tensor


def _row_order(parameter: str, config: Any) -> Tensor | None:
    """llama.cpp turns neighbouring values of a Llama head, transformers values half a head apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
    count = heads.get(parameter.split(".")[-2]) if config.model_type == "llama" else None
    if count is None:
        return None
    rows = torch.arange(count * config.head_dim).reshape(count, 2, -1)
    return rows.transpose(1, 2).reshape(-1)


# ---------------------------------------------------------------- keys


def _check(config: Any) -> str:
    """The family. BadInput for what llama.cpp would compute otherwise, or not at all."""
    family, layers = str(config.model_type), list(getattr(config, "layer_types", None) or [])
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    scaling = {part.get("rope_type", "default") for part in parts} - {"default"}
    windows = [index % GEMMA_PATTERN != 0 for index in range(1, len(layers) + 1)]
    reason = ""
    if family not in ARCHITECTURES:
        reason = f"family {family!r} is not written; possible: {', '.join(ARCHITECTURES)}"
    elif scaling:
        reason = f"rotary scaling {', '.join(scaling)} is not written"
    elif family == "gpt2":
        if config.activation_function != "gelu_new" or config.scale_attn_by_inverse_layer_idx:
            reason = "llama.cpp runs a gpt2 with gelu_new and plain attention scales alone"
    elif family == "gemma3_text":
        is_usual = [kind == "sliding_attention" for kind in layers] == windows
        if not is_usual or config.query_pre_attn_scalar != config.head_dim:
            reason = (
                "llama.cpp runs a Gemma 3 with full attention in every sixth layer, scaled by head_dim, alone"
            )
    elif "sliding_attention" in layers:
        reason = f"sliding windows of {family} are not written"
    if reason:
        raise BadInput(f"layout gguf: {reason}")
    return family


def _add_sizes(writer: gguf.GGUFWriter, config: Any, context: int) -> None:
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(float(rope.get("full_attention", rope)["rope_theta"]))
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        local = float(rope["sliding_attention"]["rope_theta"])
        writer.add_float32("gemma3.rope.freq_base_swa", local)  # gguf 0.17 has no method for it


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, folder: Path, rows: int) -> None:
    """Tokens, merges, special tokens and chat template. BadInput for a tokenizer that llama.cpp has not."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())  # a family's class may cut as no file says
    model, added = settings["model"], {token["id"]: token for token in settings.get("added_tokens", [])}
    pieces = {index: text for text, index in model["vocab"].items()}
    pieces |= {index: token["content"] for index, token in added.items()}
    tokens = [pieces.get(index, f"[PAD{index}]") for index in range(rows)]

    def kind(index: int) -> gguf.TokenType:
        if index not in pieces:
            return gguf.TokenType.UNUSED
        if index in added:
            return gguf.TokenType.CONTROL if added[index]["special"] else gguf.TokenType.USER_DEFINED
        is_byte = bool(model.get("byte_fallback")) and _is_byte(tokens[index])
        return gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL

    if model.get("byte_fallback"):  # sentencepiece's: the earlier a piece is merged, the likelier it is
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(model["merges"]):
            ranks.setdefault("".join(merge), rank)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
        writer.add_add_space_prefix(False)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(settings))
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    writer.add_token_list(tokens)
    writer.add_token_types([kind(index) for index in range(rows)])
    first, *others = end_ids(folder)
    writer.add_eos_token_id(first)
    if others:
        writer.add_eot_token_id(others[0])
    begins, bos = models.encode(tokenizer, "a")[:1], models.bos_id(tokenizer)
    if bos is not None:
        writer.add_bos_token_id(bos)
    writer.add_add_bos_token(bos is not None and begins == [bos])
    if template := chat_template(folder):
        writer.add_chat_template(template)


def _is_byte(token: str) -> bool:
    """Whether a piece stands for one byte, such as <0x0A>."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _pre_tokenizer(settings: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a text is cut before byte pairs are merged."""
    steps = settings.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    patterns = [step.get("pattern", {}).get("Regex") for step in steps if step.get("type") == "Split"]
    if settings["model"]["type"] == "BPE" and kinds[-1:] == ["ByteLevel"]:
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        if patterns == [QWEN2]:
            return "qwen2"
    raise BadInput(
        f"layout gguf: llama.cpp has no name for this tokenizer ({settings['model']['type']}, cut by "
        f"{', '.join(map(str, kinds))}); written are those of GPT-2, SmolLM, Qwen 2 and 3, and Gemma"
    )


def _check_file(path: Path, expected: Mapping[str, Tensor]) -> None:
    """BuildFailed unless the file, read back, has the expected weights."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, values in expected.items():
        tensor = tensors[name]
        read = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        worst = (read.reshape(values.shape) - values).abs().max().item()
        if not worst <= CLOSE * values.abs().max().item():
            raise BuildFailed(f"{path}: {name} differs from the bundle by {worst:.3g}")
