"""How much of what training changed is still there in a quantized bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedisp.core.files import write_json
from edgedisp.core.progress import Progress
from edgedisp.models import Weights
from edgedisp.quantize.delta_survival import survival as measure


def survival(
    base: Path,
    model_folder: Path,
    parent: Path,
    bundle: Path,
    baseline: Path | None,
    own: Path,
    progress: Progress,
) -> dict[str, Any]:
    """The change of every packed weight since the base, and against the baseline's model where there is one,
    under the steps of the bundle; see `edgedisp.quantize.delta_survival`. `parent` is the arm's fp32
    bundle."""
    references = {"base": Weights(base)}
    if baseline is not None:
        references["baseline"] = Weights(baseline)
    results = measure(bundle, parent, Weights(model_folder), references, progress)
    write_json(own / "survival.json", results)
    return results
