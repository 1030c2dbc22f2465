"""A bundle's graph: its files, bytes read per token, and a hash without the weights.

Decoding one token reads every weight matrix once, so on most devices memory limits it: tokens/s times bytes
per token is the bandwidth that was used. Only model.onnx is read, never the weights. Counted in full are the
initializers of all operators except tables of which a token needs one row: the embedding (unless the output
head multiplies with the same tensor) and the rotary tables.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

from edgedisp.bench.system import runner
from edgedisp.core.errors import BadInput
from edgedisp.core.files import MANIFEST, read_json

# Operators that hand a tensor on with another shape or type; the weight behind them is what counts.
PASS_THROUGH = {"Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze", "DequantizeLinear"}
# Operators that read one row of a table per token, and the inputs that are tables.
READS_ROWS = {
    "Gather": (0,),
    "GatherBlockQuantized": (0, 2, 3),
    "GroupQueryAttention": (7, 8),
    "RotaryEmbedding": (2, 3),
}


def find_graph(bundle: Path) -> Path:
    """The graph for browsers in `onnx/`, else model.onnx. Raises BadInput where there is neither."""
    graphs = [*sorted(bundle.glob("onnx/model*.onnx")), *bundle.glob("model.onnx")]
    if not graphs:
        raise BadInput(f"{bundle}: holds no model.onnx; give a bundle folder made by the export")
    return graphs[0]


def read_graph(path: Path) -> Any:
    """A graph file as an onnx ModelProto, without its external weights. Raises BadInput."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise BadInput(f"{path}: not an ONNX graph ({error}); export the bundle again") from error


def external_files(model: Any) -> list[str]:
    """Names of the weight files of a graph, as it has them."""
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    return list(dict.fromkeys(entry.value for entry in entries if entry.key == "location"))


def needed_files(bundle: Path) -> dict[str, Path]:
    """What the runner opens, by its path in the bundle: the graph, its weights, genai_config.json."""
    config = bundle / "genai_config.json"
    paths = [*runner().graph_files(bundle / "model.onnx"), *([config] if config.is_file() else [])]
    return {path.relative_to(bundle).as_posix(): path for path in paths}


def checked_runtime(bundle: Path) -> str | None:
    """The version of onnxruntime that checked the bundle when it was made."""
    version = runner().value_of(read_json(bundle / MANIFEST), "provenance.versions.onnxruntime")
    return None if version is None else str(version)


def _gguf_tensors(path: Path) -> list[Any]:
    import gguf

    return list(gguf.GGUFReader(path).tensors)


def weight_traffic(path: Path) -> int:
    """Bytes of weights read per token, of a graph file or model.gguf."""
    if path.suffix != ".gguf":
        return graph_traffic(read_graph(path))
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in _gguf_tensors(path)}
    rows = {"position_embd.weight", *(["token_embd.weight"] if "output.weight" in sizes else [])}
    return sum(size for name, size in sizes.items() if name not in rows)


def graph_traffic(model: Any) -> int:
    """The same of an onnx ModelProto. A tensor that is cast counts as what it is cast to: the runtime does so
    once, at load."""
    initializers = {i.name: i for i in model.graph.initializer}
    origin = {name: name for name in initializers}  # tensor -> the initializer that it is, or comes from
    cast: dict[str, int] = {}
    full: set[str] = set()
    rows: set[str] = set()
    for node in model.graph.node:  # onnx keeps nodes in the order of computation
        passes = node.op_type in PASS_THROUGH and node.input[0] in origin
        if passes:
            origin[node.output[0]] = origin[node.input[0]]
            if node.op_type == "Cast":
                cast[origin[node.input[0]]] = next(a.i for a in node.attribute if a.name == "to")
        for index, name in enumerate(node.input):
            if name in origin and not (passes and index == 0):
                (rows if index in READS_ROWS.get(node.op_type, ()) else full).add(origin[name])
    per_token = sum(tensor_bytes(initializers[name], cast.get(name)) for name in full)
    for tensor in (initializers[name] for name in rows - full if initializers[name].dims):
        # The longest side is the vocabulary or the positions.
        per_token += tensor_bytes(tensor, cast.get(tensor.name)) // max(tensor.dims)
    return per_token


def tensor_bytes(tensor: Any, kind: int | None = None) -> int:
    """Bytes of an initializer, from its shape and type (or `kind`); 4-bit types are stored two to a byte."""
    import onnx_ir

    return math.ceil(math.prod(tensor.dims) * onnx_ir.DataType(kind or tensor.data_type).itemsize)


def graph_hash(path: Path) -> str:
    """SHA-256 of a graph without the values of its weights.

    Hashed are the operators in order with attributes, the graph's inputs and outputs, and the initializers'
    names, shapes and types. Two arms of one recipe agree in it, as training changes values alone.
    """
    if path.suffix == ".gguf":
        tensors = _gguf_tensors(path)
        shapes = [(each.name, int(each.tensor_type), each.shape.tolist()) for each in tensors]
        return hashlib.sha256(repr(shapes).encode()).hexdigest()
    graph, digest = read_graph(path).graph, hashlib.sha256()
    for part in (*graph.input, *graph.output, *graph.node):
        digest.update(part.SerializeToString(deterministic=True))
    weights = [(tensor.name, tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer]
    digest.update(repr(weights).encode())
    return digest.hexdigest()
