"""`edgedisp condensation`: the condensation profile of a model or a bundle, alone or beside another.

A model is whatever `models.open_base` opens, or a bundle, whose graph is measured as it ships. Two are
measured on the same sequences, so their difference has paired intervals.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgedisp import data, models
from edgedisp.bench.results import label_bundles
from edgedisp.bench.system import physical_cores
from edgedisp.core.errors import BadInput
from edgedisp.core.files import check_files
from edgedisp.core.progress import Progress, labelled
from edgedisp.core.results import Condensation
from edgedisp.dispersion.condensation import Profile, measure_model, summary
from edgedisp.graph.genai_config import context_length
from edgedisp.pipeline.measure import measure_bundle

TOKENS_PER_DOCUMENT = 50  # or more, of synthetic text


def measure(
    names: list[str], text: Path | None, sequences: int, context: int, progress: Progress
) -> dict[str, Condensation]:
    """Name -> profile of one model or two; the second has `change`, itself less the first.

    text: a file or folder of documents; None takes synthetic text. Raises BadInput for what is no model, a
    bundle whose hidden states cannot be found, too little text, more tokens than a model takes, and
    tokenizers that differ on the text.
    """
    profiles: list[Profile] = []
    blocks: Tensor | None = None
    for name in names:  # one model in memory at a time
        bar = labelled(progress, name)
        path = data.fetch(name, progress=bar)
        model, folder = None, Path(path)
        if folder.is_dir():
            check_files(folder)
        if (folder / "model.onnx").is_file():
            longest = context_length(folder)  # says what is missing before the tokenizer does
            tokenizer = models.load_tokenizer(folder)
        else:
            model, tokenizer = models.open_base(path, progress=bar)
            longest = models.context_length(model.config)
        if context > longest:
            raise BadInput(
                f"{name}: takes {longest} tokens at most, --context is {context}; give --context {longest} "
                "or less"
            )
        first, blocks = blocks, _blocks(tokenizer, text, sequences, context)
        if first is not None and not torch.equal(first, blocks):
            raise BadInput(
                f"{name}: its tokenizer makes other tokens of the text than the first model's; vectors of "
                "different tokens cannot be compared. Compare models with the same tokenizer"
            )
        if model is None:
            profiles.append(measure_bundle(folder, blocks, physical_cores(), bar))
        else:
            profiles.append(measure_model(model, blocks, bar))
    results = [summary(profile, profiles[0] if index else None) for index, profile in enumerate(profiles)]
    return dict(zip(label_bundles([Path(name) for name in names]), results))


def _blocks(tokenizer: Any, text: Path | None, sequences: int, context: int) -> Tensor:
    """Token ids int64 [sequences, context] of the text, as the model's own tokenizer cuts it."""
    if text is None:
        documents = data.synthetic_documents(sequences * context // TOKENS_PER_DOCUMENT + 20, seed=0)
    else:
        documents = data.read_documents(text)
    name = str(text or "the synthetic text")
    blocks = data.pack(documents, models.document_encoder(tokenizer), context, sequences, name=name)
    if len(blocks) < sequences:
        raise BadInput(f"{name}: holds {len(blocks)} blocks of {context} tokens, not {sequences}")
    return torch.from_numpy(blocks.astype(np.int64))
