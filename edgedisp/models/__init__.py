"""Models as folders: open, save, count, score, and the tiny random twin of an architecture.

    model, tokenizer = open_base("Qwen/Qwen3-0.6B")       # hub id, folder, or .gguf file; always float32
    save(model, tokenizer, folder)                         # a plain Hugging Face folder, safetensors only
    model, tokenizer = load(folder), load_tokenizer(folder)

    loading.py     folder, .gguf or hub id -> torch model and tokenizer; save; checks of what may be opened
    hub.py         hub id -> local folder, with one clear error when the hub is out of reach
    tokenizer.py   text -> token ids; the token that ends a document
    tiny_model.py  a 2-layer random model with its own small tokenizer, for proving a recipe in a minute
    torch_model.py `TorchModel`: token ids -> logits as numpy arrays, what every scorer takes
    licence.py     under which licence a base stands, taken along to what is made of it
    skeleton.py    a model without its weights, from config.json alone
    components.py  parameter counts: embedding, attention, mlp, norm, head

Left out on purpose: pickled weights (`pytorch_model.bin`), which can run any code when opened; models that
are already quantized, because training needs full-precision weights; encoder-decoder and masked models.
"""

from edgedisp.models.components import count_parameters
from edgedisp.models.licence import copy_licence, read_licence
from edgedisp.models.loading import load, load_tokenizer, open_base, quiet, save
from edgedisp.models.skeleton import empty_model
from edgedisp.models.tiny_model import tiny_model
from edgedisp.models.tokenizer import Encoder, bos_id, document_encoder, encode, end_of_text_id
from edgedisp.models.torch_model import TorchModel, context_length

__all__ = [
    "Encoder",
    "TorchModel",
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
