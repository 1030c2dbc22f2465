"""Models as folders: open, save, count, score, and the tiny random model of an architecture.

    model, tokenizer = open_base("Qwen/Qwen3-0.6B")       # hub id, folder, or .gguf file; always float32
    save(model, tokenizer, folder)                         # a plain Hugging Face folder, safetensors only

Refused: pickled weights, which can run any code; quantized, encoder-decoder and masked models.
"""

from edgedisp.models.chat_template import RENDERER as RENDERER
from edgedisp.models.conversation import chat_format as chat_format
from edgedisp.models.conversation import end_of_turn_ids as end_of_turn_ids
from edgedisp.models.conversation import example as example
from edgedisp.models.conversation import examples as examples
from edgedisp.models.conversation import last_answers as last_answers
from edgedisp.models.conversation import prompt_ids as prompt_ids
from edgedisp.models.licence import copy_licence as copy_licence
from edgedisp.models.loading import empty_model as empty_model
from edgedisp.models.loading import gguf_read_once as gguf_read_once
from edgedisp.models.loading import load as load
from edgedisp.models.loading import load_weights as load_weights
from edgedisp.models.loading import open_base as open_base
from edgedisp.models.loading import save as save
from edgedisp.models.tiny_model import tiny_model as tiny_model
from edgedisp.models.tokenizer import Message as Message
from edgedisp.models.tokenizer import TemplateError as TemplateError
from edgedisp.models.tokenizer import bos_id as bos_id
from edgedisp.models.tokenizer import document_encoder as document_encoder
from edgedisp.models.tokenizer import encode as encode
from edgedisp.models.tokenizer import end_of_text_id as end_of_text_id
from edgedisp.models.tokenizer import load_tokenizer as load_tokenizer
from edgedisp.models.tokenizer import read_config as read_config
from edgedisp.models.tokenizer import render_conversation as render_conversation
from edgedisp.models.tokenizer import rendered_by as rendered_by
from edgedisp.models.tokenizer import special_tokens as special_tokens
from edgedisp.models.torch_model import TorchModel as TorchModel
from edgedisp.models.torch_model import context_length as context_length
from edgedisp.models.torch_model import count_parameters as count_parameters
