"""What every bundle of a recipe will weigh, from the base's configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgedisp import data, models
from edgedisp.core.progress import Progress
from edgedisp.graph.outline import cache_bytes, outline
from edgedisp.quantize.account import account, smallest_bytes
from edgedisp.quantize.grid import Grid
from edgedisp.quantize.mixed import out_of_reach
from edgedisp.recipe import Model, QuantizeBits
from edgedisp.stages.rounding import uniform_grids
from edgedisp.stages.start import fetch_base

SMOKE_CONTEXT = 512  # positions of the twin, as `start.twin_base` makes it


def size_account(
    opened: Any,
    quantized: Mapping[str, tuple[int, QuantizeBits]],
    positions: Mapping[str, int],
    grids: Mapping[str, Mapping[str, Grid]] | None = None,
) -> dict[str, Any]:
    """Bytes of the fp32 bundle and of each of `quantized` (precision -> bits and options), by component, and
    of the KV cache of one sequence at each of `positions` (target -> positions, capped by the model's).

    opened: a torch model, or one without weights (`models.empty_model`). grids: precision -> tensor -> its
    own grid, where a precision mixes them.

    Returns {exact, tied, context, precisions {name: {components {name: bytes}, data_bytes, graph_bytes,
    size_bytes}}, kv_cache {target: {positions, size_bytes}}}. BadInput where an export would be refused for
    the model's configuration.
    """
    shapes = outline(opened)
    precisions = {"fp32": account(shapes.model)}
    for name, (bits, section) in quantized.items():
        own = (grids or {}).get(name)
        precisions[name] = account(shapes.model, *uniform_grids(section, bits), own)
    capped = {target: min(most, shapes.context) for target, most in positions.items()}
    return {
        "exact": shapes.exact,
        "tied": precisions["fp32"].get("tied"),
        "context": shapes.context,
        "precisions": {
            name: {key: value for key, value in found.items() if key != "tied"}
            for name, found in precisions.items()
        },
        "kv_cache": {
            target: {"positions": most, "size_bytes": cache_bytes(shapes.model, most)}
            for target, most in capped.items()
        },
    }


def check_budget(budget: int, base_folder: Path) -> dict[str, Any]:
    """The size of the smallest bundle that a search could choose, {smallest_bytes}; null where another
    program writes the graph. BadInput for a budget below it."""
    shapes = outline(models.empty_model(base_folder))
    if not shapes.exact:
        return {"smallest_bytes": None}
    smallest = smallest_bytes(shapes.model)
    if smallest > budget:
        raise out_of_reach(budget, smallest)
    return {"smallest_bytes": smallest}


def base_skeleton(
    section: Model, beside: Path, made: Path | None, smoke: bool, progress: Progress, *, download: bool = True
) -> Any:
    """The base without its weights: from the stage folder `made` if there is one, else from the source.

    None where that would be a download and `download` is off. A smoke run's twin is opened: it is tiny.
    """
    if made is not None:
        return models.empty_model(made)
    if smoke:
        texts = [document.text for document in data.synthetic_documents(50, seed=0)]
        return models.tiny_model(section.architecture or "", texts, seed=0, context=SMOKE_CONTEXT)[0]
    hub = data.is_hub_id(section.base, beside)  # of a hub's model, config.json is enough
    if not (download or hub or data.is_local(section.base, beside)):
        return None
    where = section.base if hub else fetch_base(section, beside, progress)
    return models.empty_model(where, revision=section.revision, trust_remote_code=section.trust_remote_code)
