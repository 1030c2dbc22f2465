"""What a graph says about its speed: bytes read per token, bits per weight, and a hash without the weights.

Decoding one token reads every weight matrix once, so on most devices it is bound by memory: tokens/s times
bytes per token is the bandwidth that was really used. Only model.onnx is read, never the weights. Counted in
full are the initializers of all operators except tables of which a token needs one row: the embedding (unless
the output head multiplies with the same tensor) and the rotary tables.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput
from edgedisp.core.files import read_json

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
    """model.onnx of a bundle, or where there is none the graph for browsers in `onnx/`. Raises BadInput."""
    path = bundle / "model.onnx"
    if path.is_file():
        return path
    for_browsers = sorted((bundle / "onnx").glob("model*.onnx"))
    if not for_browsers:
        raise BadInput(f"{bundle}: holds no model.onnx; give a bundle folder made by the export")
    return for_browsers[0]


def read_graph(path: Path) -> Any:
    """A graph file as an onnx ModelProto, without its external weights. Raises BadInput."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise BadInput(f"{path}: not an ONNX graph ({error}); export the bundle again") from error


def written_threads(bundle: Path) -> int | None:
    """The thread count in the bundle's genai_config.json; None where there is none. Raises BadInput."""
    section: Any = read_json(bundle / "genai_config.json")
    for name in ("model", "decoder", "session_options", "intra_op_num_threads"):
        section = section.get(name) if isinstance(section, dict) else None
    return section if isinstance(section, int) and section > 0 else None


def external_files(model: Any) -> list[str]:
    """Names of the weight files of a graph, as it has them."""
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    return list(dict.fromkeys(entry.value for entry in entries if entry.key == "location"))


def needed_files(bundle: Path) -> dict[str, Path]:
    """What the runner opens, by its path in the bundle: the graph, its weights, genai_config.json.

    Raises BadInput where the graph names a file outside the bundle, or one that is not there.
    """
    names = ["model.onnx", *external_files(read_graph(find_graph(bundle)))]
    names += ["genai_config.json"] if (bundle / "genai_config.json").is_file() else []
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BadInput(f"{bundle}/model.onnx: names weights outside its folder ({name})")
        if not (bundle / name).is_file():
            raise BadInput(f"{bundle / name}: is missing, but model.onnx names it; export the bundle again")
    return {Path(name).as_posix(): bundle / name for name in names}


def weight_traffic(model: Any) -> dict[str, int]:
    """Of an onnx ModelProto: `weight_bytes_per_token` and `weight_bits`, the bits of most weights.

    `weight_bits` is 4 or 8 where MatMulNBits holds most of the weights, else the bits of the type that does.
    A tensor that is cast counts as what it is cast to: the runtime does so once, at load.
    """
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
    per_token = 0
    for name, tensor in initializers.items():
        size = tensor_bytes(tensor, cast.get(name))
        if name in full:
            per_token += size
        elif name in rows and tensor.dims:
            per_token += size // max(tensor.dims)  # the longest side is the vocabulary or the positions
    return {
        "weight_bytes_per_token": per_token,
        "weight_bits": _weight_bits(model.graph, initializers, origin, full),
    }


def tensor_bytes(tensor: Any, kind: int | None = None) -> int:
    """Bytes of an initializer, from its shape and type (or `kind`); 4-bit types are stored two to a byte."""
    import onnx

    count = math.prod(tensor.dims)
    kind = tensor.data_type if kind is None else kind
    if kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return (count + 1) // 2
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)


def _weight_bits(graph: Any, initializers: dict[str, Any], origin: dict[str, str], full: set[str]) -> int:
    """Bits that most weights of the matrix products have, counted by number of weights."""
    counts: Counter[int] = Counter()
    packed: set[str] = set()
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            size = {a.name: a.i for a in node.attribute}
            counts[size.get("bits", 4)] += size["K"] * size["N"]
            packed.update(origin.get(name, name) for name in node.input[1:])
    for tensor in (initializers[name] for name in full - packed):
        if len(tensor.dims) == 2:
            count = max(1, math.prod(tensor.dims))
            counts[round(8 * tensor_bytes(tensor) / count)] += count
    return max(counts, key=lambda bits: counts[bits]) if counts else 32


def graph_hash(path: Path) -> str:
    """SHA-256 of a graph without the values of its weights.

    Hashed are the operators in order with attributes, the graph's inputs and outputs, and the initializers'
    names, shapes and types. Two arms of one recipe agree in it, as training changes values alone.
    """
    graph = read_graph(path).graph
    digest = hashlib.sha256()
    for part in (*graph.input, *graph.output, *graph.node):
        digest.update(part.SerializeToString(deterministic=True))
    weights = [(tensor.name, tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer]
    digest.update(repr(weights).encode())
    return digest.hexdigest()
