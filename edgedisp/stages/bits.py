"""Bits by weight for a training under rounding: a search on the base, before any arm is trained.

What training sees has to be what ships, so the grids must be known first. They are searched for on the base's
weights, where no arm has been favoured; every arm then trains under them and ships on them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from edgedisp import models
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import write_json
from edgedisp.graph.export import export as export_graph
from edgedisp.quantize.grid import Grid
from edgedisp.quantize.units import parameters_of
from edgedisp.recipe import Quantize
from edgedisp.stages.calibration import opened_search

BITS_FILE = "bits.json"


def choose_bits(
    section: Quantize,
    seed: int,
    base_folder: Path,
    corpus_folder: Path,
    threads: int,
    own: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Leave bits.json: {search: what was found, as of the base; weights: a row for each weight of the graph,
    {name, bits, group, symmetric, method, parameters (names in the model)}}. Returns its `search`.

    BadInput says what the smallest bundle is where none fits the budget.
    """
    if section.budget is None:
        raise ValueError("training under a search needs a budget")
    with tempfile.TemporaryDirectory(dir=own) as scratch:
        parent = Path(scratch)
        export_graph(base_folder, parent, threads=threads, load=models.load, progress=progress)
        search = opened_search(section, seed, parent, base_folder, corpus_folder, ("rtn",), progress)
        chosen = search.within(section.budget)
        found = {"perplexity_increase": search.increase(chosen), **search.record(chosen), "trials": []}
        size = search.size_bytes(chosen)
        picked = search.assignment(chosen)
    rows = []
    for one in search.candidates:
        choice = picked[one.unit.name]
        grid = {"bits": choice.grid.bits, "group": choice.grid.group, "symmetric": choice.grid.symmetric}
        parameters = parameters_of(search.model, one.unit)
        rows.append({"name": one.unit.name, **grid, "method": choice.method, "parameters": parameters})
    results = {"search": {"size_bytes": size, **found}}
    write_json(own / BITS_FILE, {**results, "weights": rows})
    return results


def chosen_bits(folder: Path) -> dict[str, Any]:
    """What `choose_bits` left."""
    found: dict[str, Any] = json.loads((folder / BITS_FILE).read_text(encoding="utf-8"))
    return found


def chosen_grids(folder: Path | None) -> dict[str, Grid] | None:
    """Parameter of the model -> its grid; None where nothing was searched for."""
    if folder is None:
        return None
    return {
        name: Grid(row["bits"], row["group"], row["symmetric"])
        for row in chosen_bits(folder)["weights"]
        for name in row["parameters"]
    }
