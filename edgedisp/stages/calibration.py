"""Weights rounded, and choices about them made, on the recipe's own training text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedisp import models
from edgedisp.core.progress import Progress
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.quantize.calibrate import CORRECTION
from edgedisp.quantize.calibrated import gptq_model
from edgedisp.quantize.candidates import USUAL
from edgedisp.quantize.grid import Grid
from edgedisp.quantize.made import Made
from edgedisp.quantize.mixed import Search
from edgedisp.recipe import Quantize, QuantizeBits
from edgedisp.stages.texts import blocks_of, pieces_of


def calibration_text(section: QuantizeBits, corpus_folder: Path) -> Any:
    """Tokens [blocks, context], of the text that every arm is trained on."""
    tokens = np.load(corpus_folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
    return tokens[: -(-section.calibration_tokens // tokens.shape[1])]


def by_gptq(
    grid: Grid | dict[str, Grid],
    opened: Any,
    text: Any,
    progress: Progress,
    head: Grid | None = None,
    correction: float = CORRECTION,
) -> Made:
    """The layers of `opened` rounded in place by gptq, on one grid or on one for each linear map."""
    layers = decoder_layers(opened)
    return gptq_model(opened, layers, text, grid, head=head, correction=correction, progress=progress)


def opened_search(
    section: Quantize,
    seed: int,
    parent: Path,
    model_folder: Path,
    corpus_folder: Path,
    methods: Sequence[str],
    progress: Progress,
) -> Search:
    """Of the weights of the graph `parent`; `methods` may round them, unless gptq does in the end."""
    int4, calibrated = section.int4, None
    if int4.method == "gptq":
        methods, calibrated = ("k_quant",), _usual_by_gptq(int4, model_folder, corpus_folder, progress)
    tokens = np.load(corpus_folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
    opened = models.load(model_folder)
    return Search(
        parent,
        opened,
        pieces_of(tokens, opened),
        blocks_of(tokens),
        methods=methods,
        accuracy_level=int4.accuracy_level,
        calibrated=calibrated,
        seed=seed,
        progress=progress,
    )


def _usual_by_gptq(
    section: QuantizeBits, model_folder: Path, corpus_folder: Path, progress: Progress
) -> Made:
    """What gptq makes of the layers on the grid that a search measures them on (quantize/sensitivity.py).

    Without correction: each weight is looked at alone, too, and then there is nothing to make up for.
    """
    text = calibration_text(section, corpus_folder)
    return by_gptq(USUAL.grid, models.load(model_folder), text, progress, correction=0.0)
