"""The corpus: documents in, packed blocks of token ids out, held-out documents taken off first.

    documents = read_documents(Path("summaries.json"), text="extract")
    train, heldout = split(documents, heldout=0.05, seed=0)
    blocks, facts = blocks_for(train, encode, end_of_text, context=256, blocks=160, seed=0)

    document.py  what a document is, and a list of them that says what was left out
    files.py     local files and folders -> rows
    hub.py       a data set on the hub -> rows, through `datasets`
    read.py      rows -> documents: the named text field, empty ones dropped, lines joined at headings
    blocks.py    the held-out split and the packing, deterministic from the seed
    made.py      made English-like documents, for runs that only prove a recipe

Left out on purpose: cleaning, filtering and near-duplicate search. What the text should be is the user's
choice, made before; only exact duplicates are taken out, because a held-out document must not be trained on.
"""

from edgedisp.corpus.blocks import blocks_for, pack, split
from edgedisp.corpus.document import Document, Documents
from edgedisp.corpus.made import made_documents
from edgedisp.corpus.read import join_at_headings, read_documents

__all__ = [
    "Document",
    "Documents",
    "blocks_for",
    "join_at_headings",
    "made_documents",
    "pack",
    "read_documents",
    "split",
]
