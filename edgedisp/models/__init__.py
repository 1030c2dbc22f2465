"""Models as folders: open, save, count, score, and the tiny random model of an architecture.

    model, tokenizer = open_base("Qwen/Qwen3-0.6B")       # hub id, folder, or .gguf file; always float32
    save(model, tokenizer, folder)                         # a plain Hugging Face folder, safetensors only
    model, tokenizer = load(folder), load_tokenizer(folder)

Left out on purpose: pickled weights (`pytorch_model.bin`), which can run any code when opened; models that
are already quantized, because training needs full-precision weights; encoder-decoder and masked models.
"""

from edgedisp.models.licence import copy_licence, read_licence
from edgedisp.models.loading import empty_model, load, load_tokenizer, open_base, quiet, save
from edgedisp.models.parameters import Weights, count_parameters
from edgedisp.models.tiny_model import tiny_model
from edgedisp.models.tokenizer import bos_id, document_encoder, encode, end_of_text_id
from edgedisp.models.torch_model import TorchModel, context_length

__all__ = [
    "TorchModel",
    "Weights",
    "bos_id",
    "context_length",
    "copy_licence",
    "count_parameters",
    "document_encoder",
    "empty_model",
    "encode",
    "end_of_text_id",
    "load",
    "load_tokenizer",
    "open_base",
    "quiet",
    "read_licence",
    "save",
    "tiny_model",
]
