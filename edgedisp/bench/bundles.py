"""A bundle's graph: its files, bytes read per token, bits per weight, and a hash without the weights.

Decoding one token reads every weight matrix once, so on most devices memory limits it: tokens/s times bytes
per token is the bandwidth that was used. Only model.onnx is read, never the weights. Counted in full are the
initializers of all operators except tables of which a token needs one row: the embedding (unless the output
head multiplies with the same tensor) and the rotary tables.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedisp.bench.page_server import Resource, file_resource
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
MIB = 1 << 20
PAGE_BYTES = 150 * MIB  # a page without weights
CONTEXT_CAP = 4096  # of a conversation on the page; the cache of SmolLM2-135M is then 190 MB
SETTINGS_FILES = (
    *("config.json", "generation_config.json", "genai_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "chat_template.jinja"),
)


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
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or not (bundle / name).is_file():
            raise BadInput(f"{bundle / name}: is missing or outside the bundle, and model.onnx names it")
    names += ["genai_config.json"] if (bundle / "genai_config.json").is_file() else []
    return {Path(name).as_posix(): bundle / name for name in names}


def weight_traffic(model: Any) -> tuple[int, int]:
    """(bytes of weights read per token, bits of most weights) of an onnx ModelProto.

    The bits are 4 or 8 where MatMulNBits holds most of the weights, else those of the type that does. A
    tensor that is cast counts as what it is cast to: the runtime does so once, at load.
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
    per_token = sum(tensor_bytes(initializers[name], cast.get(name)) for name in full)
    for tensor in (initializers[name] for name in rows - full if initializers[name].dims):
        # The longest side is the vocabulary or the positions.
        per_token += tensor_bytes(tensor, cast.get(tensor.name)) // max(tensor.dims)
    return per_token, _weight_bits(model.graph, initializers, origin, full)


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
        if len(tensor.dims) == 2 and (count := math.prod(tensor.dims)):
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


@dataclass(frozen=True)
class PageBundle:
    """One bundle as the page sees it; nothing but `files` can be fetched.

    graph: such as `onnx/model_q4.onnx`. external: weight files, as the graph names them. unfolded: its
    weights become fp32 when the graph is opened. packed: products unpack their weights at every token in
    WebAssembly.
    """

    label: str
    folder: Path
    graph: str
    external: tuple[str, ...]
    files: dict[str, Resource]
    weights_bytes: int
    expected_memory_bytes: int
    unfolded: bool
    packed: bool
    vocab_size: int
    context: int

    @property
    def download_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())


def read_bundle(label: str, folder: Path) -> PageBundle:
    """The bundle's files for the page. Raises BadInput for a folder that the page cannot use."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give a bundle such as <run>/<arm>/int4")
    config, genai = (read_json(folder / name) for name in ("config.json", "genai_config.json"))
    genai = genai.get("model", {})
    preferred = folder / "onnx" / f"model_{config.get('transformers.js_config', {}).get('dtype')}.onnx"
    for_browsers = [preferred] if preferred.is_file() else sorted((folder / "onnx").glob("model*.onnx"))
    graph = for_browsers[0] if for_browsers else find_graph(folder)
    model = read_graph(graph)
    external = tuple(sorted(external_files(model)))
    weights = [graph, *(graph.parent / name for name in external)]
    settings = [folder / name for name in SETTINGS_FILES if (folder / name).is_file()]
    paths = {path.relative_to(folder).as_posix(): path for path in [*weights, *settings]}
    files = {name: file_resource(path, folder) for name, path in paths.items()}
    weights_bytes = sum(files[name].size_bytes for name, path in paths.items() if path in weights)
    layouts = read_json(folder / MANIFEST).get("layouts", {})
    unfolded = int(layouts.get("transformers.js", {}).get("unfolded_bytes", 0))
    logits = [o.type.tensor_type.shape.dim[-1].dim_value for o in model.graph.output if o.name == "logits"]
    sizes = _positive(*logits, genai.get("vocab_size"), config.get("vocab_size"))
    if not sizes:
        raise BadInput(f"{folder}: neither the graph nor its configuration has the size of the vocabulary")
    contexts = _positive(genai.get("context_length"), config.get("max_position_embeddings"))
    return PageBundle(
        label=label,
        folder=folder,
        graph=graph.relative_to(folder).as_posix(),
        external=external,
        files=files,
        weights_bytes=weights_bytes,
        # Measured with SmolLM2-135M in Chromium 156 (resident size of the renderer): int4 as MatMulNBits
        # (86 MB) 616 MB, fp32 (540 MB) 1,608 MB.
        expected_memory_bytes=max(350 * MIB + int(2.3 * weights_bytes), PAGE_BYTES + unfolded),
        unfolded=unfolded > 0 and graph.name != "model.onnx",
        packed=any(node.op_type == "MatMulNBits" for node in model.graph.node),
        vocab_size=sizes[0],
        context=min([CONTEXT_CAP, *contexts]),
    )


def _positive(*values: Any) -> list[int]:
    return [value for value in values if isinstance(value, int) and value > 0]
