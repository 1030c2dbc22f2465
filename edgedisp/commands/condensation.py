"""`edgedisp condensation`: the condensation profile of a model or a bundle, alone or beside another.

A model is whatever `models.open_base` opens, or a bundle, whose graph is measured as it ships. Two are
measured on the same sequences, so their difference has paired intervals.
"""

from __future__ import annotations

from dataclasses import dataclass
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
from edgedisp.report.layout import grid_text
from edgedisp.report.result_sections import profile_grids

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
TOKENS_PER_DOCUMENT = 50  # or more, of synthetic text


@dataclass(frozen=True)
class CondensationOptions:
    """text: a file or folder of documents; None takes synthetic text."""

    text: Path | None = None
    sequences: int = 16
    context: int = 256


def measure(names: list[str], options: CondensationOptions, progress: Progress) -> dict[str, Condensation]:
    """Name -> profile of one model or two; the second has `change`, itself less the first.

    Raises BadInput for what is no model, a bundle whose hidden states cannot be found, too little text, more
    tokens than a model takes, and tokenizers that differ on the text.
    """
    profiles: list[Profile] = []
    first: Tensor | None = None
    for name in names:  # one model in memory at a time
        profile, first = _measure(name, options, first, labelled(progress, name))
        profiles.append(profile)
    results = [summary(profile, profiles[0] if index else None) for index, profile in enumerate(profiles)]
    return dict(zip(label_bundles([Path(name) for name in names]), results))


def _measure(
    name: str, options: CondensationOptions, first: Tensor | None, progress: Progress
) -> tuple[Profile, Tensor]:
    """The profile, and the token blocks, which must be those of the first model."""
    path = data.fetch(name, base_dir=Path.cwd(), progress=progress)
    model: Any = None
    if isinstance(path, Path) and _is_bundle(path):
        longest = context_length(path)  # says what is missing before the tokenizer does
        check_files(path)
        tokenizer = models.load_tokenizer(path)
    else:
        model, tokenizer = models.open_base(path, progress=progress)
        longest = models.context_length(model.config)
    if options.context > longest:
        raise BadInput(
            f"{name}: takes {longest} tokens at most, --context is {options.context}; "
            f"give --context {longest} or less"
        )
    blocks = _blocks(tokenizer, options)
    if first is not None and not torch.equal(first, blocks):
        index = int((first != blocks).flatten().int().argmax())
        raise BadInput(
            f"{name}: its tokenizer makes other tokens of the text than the first model's, from token "
            f"{index} on; vectors of different tokens cannot be compared. "
            "Compare models with the same tokenizer"
        )
    if model is None:
        return measure_bundle(Path(path), blocks, physical_cores(), progress), blocks
    return measure_model(model, blocks, progress), blocks


def _is_bundle(folder: Path) -> bool:
    """A folder with a graph; one that also has weights for torch counts as a model folder."""
    weights = any((folder / name).is_file() for name in SAFETENSORS)
    return (folder / "model.onnx").is_file() and not weights


def _blocks(tokenizer: Any, options: CondensationOptions) -> Tensor:
    """Token ids int64 [sequences, context] of the text, as the model's own tokenizer cuts it."""
    sequences, context = options.sequences, options.context
    if options.text is None:
        documents = data.synthetic_documents(sequences * context // TOKENS_PER_DOCUMENT + 20, seed=0)
    else:
        documents = data.read_documents(options.text)
    text = str(options.text or "the synthetic text")
    blocks = data.pack(documents, models.document_encoder(tokenizer), context, sequences, name=text)
    if len(blocks) < sequences:
        raise BadInput(f"{text}: holds {len(blocks)} blocks of {context} tokens, not {sequences}")
    return torch.from_numpy(blocks.astype(np.int64))


def text(profiles: dict[str, Condensation], width: int) -> str:
    """The tables for a terminal: all layers of each model, then what differs."""
    return "\n\n".join(grid_text(grid, width) for grid in profile_grids(profiles) if grid.rows)
