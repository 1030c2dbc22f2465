"""A bundle made ready for one kind of device: its threads, its context, and the logits that it needs.

What was measured is what ships, so nothing here changes a logit within the device's context. Three things are
set:

- threads: onnxruntime-genai takes their number from the bundle alone, and starts ONE without it.
- context: rotary tables, or learned positions, are cut to as many rows as the device will use, and the
  configuration says so. With 8,192 positions the tables of SmolLM2-135M are 2 MB of a 104 MB bundle, and the
  cache that a runtime allocates at once is 380 MB.

- logits: of each row's last token alone (last_logits.py). Scoring needs all positions, a device the last.

Left out: a context longer than the bundle's, whose tables would have to be computed from the model again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, TensorProto, numpy_helper

from edgedisp.core.errors import BadInput
from edgedisp.graph import layout
from edgedisp.graph.last_logits import keep_last
from edgedisp.graph.weight_map import WEIGHT_MAP
from edgedisp.graph.writer import DATA, GRAPH, PAGE

# Inputs of an operator that are tables of positions, one row each.
TABLES = {"GroupQueryAttention": (7, 8), "RotaryEmbedding": (2, 3), "MultiHeadAttention": ()}
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx")
NOT_COPIED = ("record.json", "manifest.json", "README.md", WEIGHT_MAP, GRAPH, DATA)


def for_device(
    bundle: Path, out: Path, *, threads: int, context: int | None = None, last_logits: bool = True
) -> dict[str, Any]:
    """Write `bundle` (graph and weights at its top) into the empty folder `out`, made ready for a device.

    `context` None: the bundle's own. Returns {threads, context, size_bytes}: the context is the smaller of
    `context` and the bundle's own; size_bytes counts graph and weights. BadInput for less than one thread or
    position, or where there is no bundle.
    """
    if context is not None and context < 1:
        raise BadInput(f"context is {context}; at least 1 position is needed")
    if not (bundle / GRAPH).is_file():
        raise BadInput(f"{bundle}: no bundle (model.onnx is missing); `edgedisp export` makes one")
    own = layout.context_of(bundle)
    positions = own if context is None else min(context, own)
    for path in sorted(bundle.iterdir()):
        if path.is_file() and path.name not in NOT_COPIED:
            shutil.copyfile(path, out / path.name)
    model = onnx.load(bundle / GRAPH, load_external_data=False)
    if positions < own:
        _move_weights(model.graph, bundle, out, dropped_rows=own - positions)
    elif (bundle / DATA).is_file():
        shutil.copyfile(bundle / DATA, out / DATA)
    if last_logits:
        keep_last(model)
    (out / GRAPH).write_bytes(model.SerializeToString())
    layout.set_threads(out, threads)
    _set_context(out, positions)
    size = sum((out / name).stat().st_size for name in (GRAPH, DATA) if (out / name).is_file())
    return {"threads": threads, "context": positions, "size_bytes": size}


def _set_context(bundle: Path, positions: int) -> None:
    """Write the number of positions wherever a runtime looks for it."""
    path = bundle / "genai_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["context_length"] = positions
    config.setdefault("search", {})["max_length"] = positions
    layout.dump(path, config)
    path = bundle / "config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        held = {name: min(positions, config[name]) for name in LENGTHS if isinstance(config.get(name), int)}
        layout.dump(path, {**config, **held})


def position_tables(graph: GraphProto) -> set[str]:
    """Names of the initializers that have one row for each position."""
    stored = {tensor.name for tensor in graph.initializer}
    found = set()
    for node in graph.node:
        places = TABLES.get(node.op_type, ())
        found |= {node.input[place] for place in places if place < len(node.input)}
        if node.op_type == "Gather" and "position" in node.input[0]:  # learned ones
            found.add(node.input[0])
    return found & stored


def _move_weights(graph: GraphProto, bundle: Path, out: Path, dropped_rows: int) -> None:
    """Copy the weights file tensor by tensor, the tables of positions without their last rows.

    Rows are dropped at the end, so that a family whose first position has another row than 0 keeps it.
    """
    tables = position_tables(graph)
    placed: dict[tuple[int, int], int] = {}  # two tensors may be views of the same bytes
    with (out / DATA).open("wb") as file:
        for tensor in graph.initializer:
            rows = dropped_rows if tensor.name in tables else 0
            if tensor.data_location != TensorProto.EXTERNAL:
                if rows:
                    values = numpy_helper.to_array(tensor)[:-rows]
                    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
                continue
            values = _bytes_of(tensor, bundle)
            if rows:
                values = values[: len(values) // tensor.dims[0] * (tensor.dims[0] - rows)]
                tensor.dims[0] -= rows
            offset, length = int(_entry(tensor, "offset") or 0), len(values)
            if (offset, length) not in placed:
                file.write(bytes(-file.tell() % PAGE))
                placed[offset, length] = file.tell()
                values.tofile(file)
            del tensor.external_data[:]
            place = (("location", DATA), ("offset", placed[offset, length]), ("length", length))
            for key, value in place:
                tensor.external_data.add(key=key, value=str(value))


def _bytes_of(tensor: TensorProto, bundle: Path) -> NDArray[np.uint8]:
    """The tensor's bytes in the file beside the graph, mapped."""
    place = bundle / (_entry(tensor, "location") or DATA)
    if place.parent.resolve() != bundle.resolve():
        raise BadInput(f"{bundle}: tensor {tensor.name} points outside the bundle, to {place}")
    offset = int(_entry(tensor, "offset") or 0)
    length = int(_entry(tensor, "length") or place.stat().st_size - offset)
    return np.memmap(place, np.uint8, "r", offset, (length,))


def _entry(tensor: TensorProto, key: str) -> str | None:
    return next((entry.value for entry in tensor.external_data if entry.key == key), None)
