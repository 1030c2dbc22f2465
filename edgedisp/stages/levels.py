"""Accuracy level by node: the finished bundle is run on training text, at one level and at another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgedisp.core.progress import Progress
from edgedisp.graph.session import OnnxModel, open_session
from edgedisp.quantize.levels import choose_levels, levels_by_node, levels_by_weight, with_levels
from edgedisp.recipe import QuantizeBits

LEVEL_TOKENS = 1024  # on which flips are counted
LOGITS_BYTES = 1 << 29  # of their logits, which are kept


def first_level(section: QuantizeBits) -> int:
    """The level that is written before any is measured."""
    return 4 if section.accuracy_level == "auto" else section.accuracy_level


def measured_levels(
    section: QuantizeBits,
    record: dict[str, Any],
    bundle: Path,
    corpus_folder: Path | None,
    threads: int,
    progress: Progress,
    decided: Path | None = None,
) -> dict[str, Any]:
    """The record of a bundle just written, with each node's level measured where the recipe says `auto`.

    `decided`: the bundle of the arm that decides for this one too, so that twins have one graph; what its
    levels come to here is measured.
    Only the small graph file changes; every variant that is tried lives in memory and reads the same weights.
    """
    record |= {"accuracy_level": section.accuracy_level}
    if section.accuracy_level != "auto":
        return record
    if corpus_folder is None:
        raise ValueError("accuracy level auto needs the corpus")
    path = bundle / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    opened = OnnxModel(bundle, threads)
    tokens = np.load(corpus_folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
    most = max(tokens.shape[1], LOGITS_BYTES // (4 * opened.vocab_size))

    def run(variant: bytes, count: int) -> np.ndarray:
        opened.session = open_session(bundle, threads, variant)
        found: list[np.ndarray] = []
        for block in tokens[::-1]:  # from the end: other calibration reads the beginning
            ids = np.asarray(block[None, : count - sum(map(len, found))], np.int64)
            found.append(opened(ids, np.ones_like(ids))[0])
            if sum(map(len, found)) == count:
                break
        return np.concatenate(found)

    count = min(LEVEL_TOKENS, most, tokens.size)
    given = None
    if decided is not None:
        there = levels_by_node(onnx.load(decided / "model.onnx", load_external_data=False))
        given = [name for name, level in there.items() if level == 0]
    levels = choose_levels(graph, run, count, limit=section.max_flips, given=given, progress=progress)
    rounding = [node.name for node in graph.graph.node if node.name not in levels.exact]
    path.write_bytes(with_levels(graph, rounding))
    by_weight = levels_by_weight(onnx.load(path, load_external_data=False))
    rows = [row | {"accuracy_level": by_weight.get(row["name"], 4)} for row in record["by_tensor"]]
    size = sum((bundle / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    return record | {"accuracy_levels": levels.record, "by_tensor": rows, "size_bytes": size}
