"""Weights rounded on the recipe's own training text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgedisp import Progress, model
from edgedisp.dispersion.collect import decoder_layers
from edgedisp.quantize.calibrated import gptq_model
from edgedisp.quantize.candidates import USUAL
from edgedisp.quantize.grid import Grid
from edgedisp.quantize.made import Made
from edgedisp.recipe import QuantizeBits


def calibration_text(section: QuantizeBits, corpus_folder: Path) -> Any:
    """Tokens [blocks, context], of the text that every arm is trained on."""
    tokens = np.load(corpus_folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
    return tokens[: -(-section.calibration_tokens // tokens.shape[1])]


def by_gptq(
    section: QuantizeBits,
    grid: Grid | dict[str, Grid],
    opened: Any,
    text: Any,
    progress: Progress,
    head: Grid | None = None,
) -> Made:
    """The layers of `opened` rounded in place by gptq, on one grid or on one for each linear map."""
    return gptq_model(
        opened,
        decoder_layers(opened),
        text,
        grid,
        head=head,
        damping=section.damping,
        act_order=section.act_order,
        correction=section.correction,
        progress=progress,
    )


def usual_by_gptq(section: QuantizeBits, model_folder: Path, corpus_folder: Path, progress: Progress) -> Made:
    """What gptq makes of the layers on the grid that a search measures weights on (quantize/sensitivity.py).

    Without correction: each weight is looked at alone, too, and then there is nothing to make up for.
    """
    alone = section.model_copy(update={"correction": 0.0})
    text = calibration_text(section, corpus_folder)
    return by_gptq(alone, USUAL.grid, model.load(model_folder), text, progress)
