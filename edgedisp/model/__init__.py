"""Models as folders: open, save, count, score, and the tiny random twin of an architecture.

    model, tokenizer = open_base("Qwen/Qwen3-0.6B")       # hub id, folder, or .gguf file; always float32
    save(model, tokenizer, folder)                         # a plain Hugging Face folder, safetensors only
    model, tokenizer = load(folder), load_tokenizer(folder)

    opening.py     folder, .gguf or hub id -> torch model and tokenizer; save; checks of what may be opened
    hub.py         hub id -> local folder, with one clear error when the hub is out of reach
    text.py        text -> token ids; the token that ends a document
    twin.py        a 2-layer random model with its own small tokenizer, for proving a recipe in a minute
    scoring.py     `TorchModel`: token ids -> logits as numpy arrays, what every scorer takes
    licence.py     under which licence a base stands, taken along to what is made of it
    skeleton.py    a model without its weights, from config.json alone
    components.py  parameter counts: embedding, attention, mlp, norm, head

Left out on purpose: pickled weights (`pytorch_model.bin`), which can run any code when opened; models that
are already quantized, because training needs full-precision weights; encoder-decoder and masked models.
"""

from edgedisp.model.components import size_by_component
from edgedisp.model.licence import carry as carry_licence
from edgedisp.model.licence import licence_of
from edgedisp.model.opening import load, load_tokenizer, open_base, quiet, save
from edgedisp.model.scoring import TorchModel, context_length
from edgedisp.model.skeleton import skeleton
from edgedisp.model.text import Encoder, document_encoder, encode, end_of_text_id, lead_id
from edgedisp.model.twin import twin

__all__ = [
    "Encoder",
    "TorchModel",
    "carry_licence",
    "context_length",
    "document_encoder",
    "encode",
    "end_of_text_id",
    "lead_id",
    "licence_of",
    "load",
    "load_tokenizer",
    "open_base",
    "quiet",
    "save",
    "size_by_component",
    "skeleton",
    "twin",
]
