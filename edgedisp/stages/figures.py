"""The speed of every bundle on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.interleaved_timing import measure
from edgedisp.bench.local import Local
from edgedisp.bench.results import twin_pairs
from edgedisp.core.files import write_json
from edgedisp.core.progress import Progress
from edgedisp.graph.device_graph import for_device
from edgedisp.recipe import Latency


def latency(
    section: Latency, seed: int, threads: int, bundles: dict[str, Path], own: Path, progress: Progress
) -> dict[str, Any]:
    """Time every bundle on this machine, the arms interleaved; each must have the baseline's graph.

    What is timed is what a device gets: the same weights under a graph for the last token's logits.
    """
    scratch = own / "timed"
    shipped = {}
    for label, bundle in bundles.items():
        shipped[label] = scratch / label.replace("/", "-")
        shipped[label].mkdir(parents=True)
        for_device(bundle, shipped[label], threads=threads)
    options = BenchOptions(
        prompt=section.prompt,
        generate=section.generate,
        repetitions=section.repetitions,
        threads=threads,
        seed=seed,
        pause_s=section.pause_s,
        pairs=twin_pairs(list(bundles)),
    )
    results = measure(shipped, Local(), options, progress)
    shutil.rmtree(scratch)
    write_json(own / "latency.json", results)
    return results
