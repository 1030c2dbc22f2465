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
from edgedisp.bench.system import physical_cores
from edgedisp.core.errors import BadInput
from edgedisp.core.files import check_files
from edgedisp.core.progress import Progress
from edgedisp.core.results import Condensation
from edgedisp.dispersion.condensation import Profile, measure_model, summary
from edgedisp.graph.genai_config import context_length, read_config
from edgedisp.pipeline.measure import measure_bundle
from edgedisp.report.layout import Grid, grid_text
from edgedisp.report.result_sections import layer_grid, model_grid

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
    measured: list[Profile] = []
    tokens: list[Tensor] = []
    for name in names:  # one model in memory at a time
        profile, blocks = _measure(name, options, tokens, progress)
        measured.append(profile)
        tokens.append(blocks)
    results = [summary(profile, measured[0] if index else None) for index, profile in enumerate(measured)]
    return dict(zip(_distinct(names), results))


def _measure(
    name: str, options: CondensationOptions, before: list[Tensor], progress: Progress
) -> tuple[Profile, Tensor]:
    where = data.fetch(name, base_dir=Path.cwd(), progress=progress)
    named = _named(progress, name)
    if isinstance(where, Path) and _is_bundle(where):
        read_config(where)  # says what is missing before the tokenizer does
        check_files(where)
        blocks = _blocks(name, models.load_tokenizer(where), context_length(where), options)
        _check_same_tokens(name, blocks, before)
        return measure_bundle(where, blocks, physical_cores(), named), blocks
    model, tokenizer = models.open_base(where, progress=progress)
    blocks = _blocks(name, tokenizer, models.context_length(model.config), options)
    _check_same_tokens(name, blocks, before)
    return measure_model(model, blocks, named), blocks


def _is_bundle(folder: Path) -> bool:
    """A folder with a graph; one that also has weights for torch counts as a model folder."""
    weights = any((folder / name).is_file() for name in SAFETENSORS)
    return (folder / "model.onnx").is_file() and not weights


def _blocks(name: str, tokenizer: Any, longest: int, options: CondensationOptions) -> Tensor:
    """Token ids int64 [sequences, context] of the text, as the model's own tokenizer cuts it."""
    sequences, context = options.sequences, options.context
    if context > longest:
        raise BadInput(
            f"{name}: takes {longest} tokens at most, --context is {context}; "
            f"give --context {longest} or less"
        )
    if options.text is None:
        documents = data.synthetic_documents(sequences * context // TOKENS_PER_DOCUMENT + 20, seed=0)
    else:
        documents = data.read_documents(options.text)
    text = str(options.text or "the synthetic text")
    blocks = data.pack(documents, models.document_encoder(tokenizer), context, sequences, name=text)
    if len(blocks) < sequences:
        raise BadInput(f"{text}: holds {len(blocks)} blocks of {context} tokens, not {sequences}")
    return torch.from_numpy(blocks.astype(np.int64))


def _check_same_tokens(name: str, blocks: Tensor, before: list[Tensor]) -> None:
    if before and not torch.equal(before[0], blocks):
        place = int((before[0] != blocks).flatten().int().argmax())
        raise BadInput(
            f"{name}: its tokenizer makes other tokens of the text than the first model's, from token "
            f"{place} on; vectors of different tokens cannot be compared. "
            "Compare models with the same tokenizer"
        )


def check_out(folder: Path) -> None:
    """BadInput if there is a file in the folder's place."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--out {folder}: is a file; name a folder, or one that does not exist yet")


def write(profiles: dict[str, Condensation], folder: Path) -> list[Path]:
    """Write condensation.html, condensation.json and the pictures into `folder`; returns the files."""
    from edgedisp.report import render  # brings matplotlib

    check_out(folder)
    return render.write_condensation(profiles, folder)


def text(profiles: dict[str, Condensation], width: int) -> str:
    """The tables for a terminal: all layers of each model, then what differs."""
    names = list(profiles)
    last = profiles[names[-1]].change
    grids: list[Grid] = [model_grid(profiles), *(layer_grid(name, one) for name, one in profiles.items())]
    if last is not None:
        grids.append(layer_grid(f"{names[-1]} - {names[0]}, paired over sequences", last, signs=True))
    return "\n\n".join(grid_text(grid, width) for grid in grids if grid.rows)


def _distinct(names: list[str]) -> list[str]:
    """The shortest endings of the paths that tell the models apart; equal names are numbered."""
    if len(set(names)) < len(names):
        return [f"{name} ({place})" for place, name in enumerate(names, start=1)]
    parts = [Path(name).parts for name in names]
    for depth in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-depth:]) for part in parts]
        if len(set(short)) == len(names):
            return short
    return names


def _named(progress: Progress, name: str) -> Progress:
    return lambda done, total, note: progress(done, total, name)
