"""What a graph says about the speed it should have: bytes read per token, bits per weight, same graph or not.

Decoding one token reads every weight matrix once, so on most devices it is bound by memory: tokens/s times
bytes per token is the bandwidth that was really used, and it cannot exceed what the memory (or a cache that
holds the whole model) gives. A figure far below the device's bandwidth says that something else is slow: a
missing kernel, one thread, heat.

Only model.onnx is read, never the weights. Counted as read in full are the initializers of all operators
except tables of which a token needs one row: the embedding (unless the output head multiplies with the same
tensor) and the rotary tables. What a kernel repacks when it loads may be somewhat larger or smaller, and a
cache with a sliding window is counted as if it were read in full; both are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgedisp.core.errors import BadInput

# Operators that hand a tensor on with another shape or type; the weight behind them is what counts.
HANDS_ON = {"Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze", "DequantizeLinear"}
# Operators that read one row of a table per token, and the inputs that are tables.
READS_ROWS = {
    "Gather": (0,),
    "GatherBlockQuantized": (0, 2, 3),
    "GroupQueryAttention": (7, 8),
    "RotaryEmbedding": (2, 3),
}

DIFFERENCES_SHOWN = 5


def find_graph(bundle: Path) -> Path:
    """model.onnx of a bundle, or where there is none the graph for browsers in `onnx/`. Raises BadInput."""
    path = bundle / "model.onnx"
    if path.is_file():
        return path
    for_browsers = sorted((bundle / "onnx").glob("model*.onnx"))
    if not for_browsers:
        raise BadInput(f"{bundle}: holds no model.onnx; give a bundle folder made by the export")
    return for_browsers[0]


def open_graph(bundle: Path) -> Any:
    """The graph of a bundle as an onnx ModelProto, without its external weights. Raises BadInput."""
    return read_graph(find_graph(bundle))


def read_graph(path: Path) -> Any:
    """A graph file as an onnx ModelProto, without its external weights. Raises BadInput."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise BadInput(f"{path}: not an ONNX graph ({error}); export the bundle again") from error


def needed_files(bundle: Path) -> dict[str, Path]:
    """What the runner opens, by its path in the bundle: the graph, its weights, genai_config.json.

    Raises BadInput where the graph names a file outside the bundle, or one that is not there.
    """
    names = ["model.onnx"]
    for tensor in open_graph(bundle).graph.initializer:
        names += [entry.value for entry in tensor.external_data if entry.key == "location"]
    names += ["genai_config.json"] if (bundle / "genai_config.json").is_file() else []
    found = {}
    for name in dict.fromkeys(names):
        path = bundle / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BadInput(f"{bundle}/model.onnx: names weights outside its folder ({name})")
        if not path.is_file():
            raise BadInput(f"{path}: is missing, but model.onnx names it; copy or export the bundle again")
        found[Path(name).as_posix()] = path
    return found


def weight_traffic(model: Any) -> dict[str, int]:
    """Of an onnx ModelProto: `weight_bytes_per_token` and `weight_bits`, the bits of most weights.

    `weight_bits` is 4 or 8 where MatMulNBits holds most of the weights, else the bits of the
    type that does. A tensor that is cast counts as what it is cast to: the runtime does so once, at load.
    """
    initializers = {i.name: i for i in model.graph.initializer}
    behind = _origins(model.graph, initializers)
    full, rows = _readers(model.graph, behind)
    cast = {behind[n.input[0]]: n.attribute[0].i for n in model.graph.node
            if n.op_type == "Cast" and n.input[0] in behind}  # fmt: skip
    per_token = 0
    for name, tensor in initializers.items():
        size = tensor_bytes(tensor, cast.get(name))
        if name in full:
            per_token += size
        elif name in rows and tensor.dims:
            per_token += size // max(tensor.dims)  # the longest side is the vocabulary or the positions
    bits = _weight_bits(model.graph, initializers, behind, full)
    return {"weight_bytes_per_token": per_token, "weight_bits": bits}


def tensor_bytes(tensor: Any, kind: int | None = None) -> int:
    """Bytes of an initializer, from its shape and type (or `kind`); 4-bit types are stored two to a byte."""
    import onnx

    count = 1
    for size in tensor.dims:
        count *= size
    kind = tensor.data_type if kind is None else kind
    if kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return (count + 1) // 2
    return count * int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)


def _origins(graph: Any, initializers: dict[str, Any]) -> dict[str, str]:
    """Tensor -> the initializer that it is, or is handed on from."""
    behind = {name: name for name in initializers}
    for node in graph.node:  # onnx keeps nodes in the order of computation
        if node.op_type in HANDS_ON and node.input[0] in behind:
            behind[node.output[0]] = behind[node.input[0]]
    return behind


def _readers(graph: Any, behind: dict[str, str]) -> tuple[set[str], set[str]]:
    """Names of the initializers that some operator reads in full, and of those read row by row."""
    full: set[str] = set()
    rows: set[str] = set()
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name not in behind or (node.op_type in HANDS_ON and index == 0):
                continue
            source = behind[name]
            if index in READS_ROWS.get(node.op_type, ()):
                rows.add(source)
            else:
                full.add(source)
    return full, rows


def _weight_bits(graph: Any, initializers: dict[str, Any], behind: dict[str, str], full: set[str]) -> int:
    """Bits that most weights of the matrix products have, counted by number of weights."""
    counts: dict[int, int] = {}
    packed: set[str] = set()
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            size = {a.name: a.i for a in node.attribute}
            bits = size.get("bits", 4)
            counts[bits] = counts.get(bits, 0) + size["K"] * size["N"]
            packed.update(behind.get(name, name) for name in node.input[1:])
    for name in full - packed:
        tensor = initializers[name]
        if len(tensor.dims) == 2:
            count = max(1, tensor.dims[0] * tensor.dims[1])
            bits = round(8 * tensor_bytes(tensor) / count)
            counts[bits] = counts.get(bits, 0) + count
    return max(counts, key=lambda bits: counts[bits]) if counts else 32


def same_graph(bundle_a: Path, bundle_b: Path) -> dict[str, Any]:
    """Do two bundles compute the same thing on different weights? {same, nodes, differences, weight_files}.

    Compared are the operators in order with their attributes, inputs and outputs, the initializers with
    shapes and types, and the sizes of the weight files. Two arms of one recipe must agree in all of it:
    mid-training changes values alone, and then their latencies cannot truly differ. The size of model.onnx
    itself is left out where the weights lie in a file of their own: it may hold names and paths.
    """
    a, b = open_graph(bundle_a), open_graph(bundle_b)
    sizes = [_weight_files(bundle) for bundle in (bundle_a, bundle_b)]
    differences = list(_differences(_signature(a.graph), _signature(b.graph)))
    if sizes[0] != sizes[1]:
        differences.append(f"weight files: {sizes[0]} against {sizes[1]}")
    return {
        "same": not differences,
        "nodes": len(a.graph.node),
        "differences": differences[:DIFFERENCES_SHOWN],
        "weight_files": sizes[0],
    }


def _weight_files(bundle: Path) -> dict[str, int]:
    """Bytes by name of the files that hold the weights: those beside the graph, else the graph itself."""
    graph = find_graph(bundle)
    found = {f.name: f.stat().st_size for f in sorted(graph.parent.glob(f"{graph.name}*"))}
    return {name: size for name, size in found.items() if name != graph.name} or found


def _signature(graph: Any) -> dict[str, list[Any]]:
    """All of a graph except the values of its weights, in comparable form."""
    import onnx

    plain = {onnx.AttributeProto.INT: "i", onnx.AttributeProto.FLOAT: "f", onnx.AttributeProto.STRING: "s"}
    many = {
        onnx.AttributeProto.INTS: "ints",
        onnx.AttributeProto.FLOATS: "floats",
        onnx.AttributeProto.STRINGS: "strings",
    }

    def value(attribute: Any) -> Any:
        if attribute.type in plain:
            return getattr(attribute, plain[attribute.type])
        if attribute.type in many:
            return tuple(getattr(attribute, many[attribute.type]))
        return f"type {attribute.type}"

    def shape(info: Any) -> tuple[Any, ...]:
        tensor = info.type.tensor_type
        return (info.name, tensor.elem_type, tuple(d.dim_param or d.dim_value for d in tensor.shape.dim))

    return {
        "input": [shape(i) for i in graph.input],
        "output": [shape(o) for o in graph.output],
        "initializer": [(i.name, i.data_type, tuple(i.dims)) for i in graph.initializer],
        "node": [
            (
                n.domain,
                n.op_type,
                tuple(n.input),
                tuple(n.output),
                tuple((a.name, value(a)) for a in n.attribute),
            )
            for n in graph.node
        ],
    }


def _differences(a: dict[str, list[Any]], b: dict[str, list[Any]]) -> Iterator[str]:
    """One line for each kind of part that differs: how many, or the first place where they do."""
    for kind, ours in a.items():
        theirs = b[kind]
        if len(ours) != len(theirs):
            yield f"{len(ours)} {kind}s against {len(theirs)}"
            continue
        for place, (left, right) in enumerate(zip(ours, theirs)):
            if left != right:
                yield f"{kind} {place}: {left} against {right}"
                break
