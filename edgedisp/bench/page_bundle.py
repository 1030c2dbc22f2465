"""What of a bundle the phone page gets: its graph, that graph's weights, configuration and tokenizer.

The list is made once, before anything is served, and nothing else of the folder can be asked for. Each file
goes with its size and SHA-256, by which the page recognises what it holds already and what arrived damaged.

A bundle may hold two graphs over one file of weights; the one in `onnx/` is for browsers and is taken first.
Everything else the page reads as any web app would: shapes from the session, ends of text from the
configuration, the chat template from tokenizer_config.json.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedisp.bench.graph_facts import find_graph, read_graph, tensor_bytes
from edgedisp.core.errors import BadInput

MIB = 1 << 20
PAGE_BYTES = 150 * MIB  # a page without weights
CONTEXT_CAP = 4096  # of a conversation on the page; the cache of SmolLM2-135M is then 190 MB
PACKED = ("MatMulNBits",)
BESIDE = (
    "config.json",
    "generation_config.json",
    "genai_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class PageFile:
    """One file that may be fetched: where it lies, and what the page checks it by."""

    path: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class PageBundle:
    """One bundle as the page sees it."""

    label: str
    folder: Path
    graph: str
    """Its place in the bundle, such as `onnx/model_q4.onnx`."""
    external: tuple[str, ...]
    """Files of weights, as the graph names them: paths from the graph's own folder."""
    files: dict[str, PageFile]
    """By their place in the bundle."""
    weights_bytes: int
    expected_memory_bytes: int
    unfolded: bool
    """Its weights become fp32 when the graph is opened: what is read per token is not what is stored."""
    packed: bool
    """Its products read their weights packed, which WebAssembly unpacks at every token."""
    vocab_size: int
    context: int

    @property
    def download_bytes(self) -> int:
        """All that the page fetches of this bundle."""
        return sum(file.size_bytes for file in self.files.values())


def read_bundle(label: str, folder: Path) -> PageBundle:
    """The bundle's files for the page. Raises BadInput for a folder that the page cannot use."""
    graph = _page_graph(folder)
    model = read_graph(graph)
    external = tuple(sorted({e.value for i in model.graph.initializer for e in i.external_data
                             if e.key == "location"}))  # fmt: skip
    weights = [graph, *(graph.parent / name for name in external)]
    beside = [folder / name for name in BESIDE if (folder / name).is_file()]
    files = {path.relative_to(folder).as_posix(): _page_file(folder, path) for path in [*weights, *beside]}
    config, genai = (_read_json(folder / name) for name in ("config.json", "genai_config.json"))
    weights_bytes = sum(files[path.relative_to(folder).as_posix()].size_bytes for path in weights)
    return PageBundle(
        label=label,
        folder=folder,
        graph=graph.relative_to(folder).as_posix(),
        external=external,
        files=files,
        weights_bytes=weights_bytes,
        expected_memory_bytes=max(expected_memory_bytes(weights_bytes, model), _told_memory(folder)),
        unfolded=_told_memory(folder) > 0 and graph.name != "model.onnx",
        packed=any(node.op_type in PACKED for node in model.graph.node),
        vocab_size=_vocab_size(folder, model, config, genai),
        context=_context(config, genai),
    )


def read_bundles(bundles: Mapping[str, Path]) -> tuple[PageBundle, ...]:
    """What the page gets of each bundle, every file hashed. Raises BadInput for one that it cannot use."""
    return tuple(read_bundle(label, folder) for label, folder in bundles.items())


def expected_memory_bytes(weights_bytes: int, model: Any) -> int:
    """Rough memory of a page that has the bundle open: 350 MiB, and 2.3 times the weights as they are used.

    Measured with SmolLM2-135M in Chromium 156 (resident size of the renderer): int4 as MatMulNBits (86 MB)
    616 MB, fp32 (540 MB) 1,608 MB, weights that are unfolded to fp32 as they load 1,413 MB.
    """
    shapes = {tensor.name: tensor for tensor in model.graph.initializer}
    unfolded = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"} & set(
        shapes
    )
    grown = sum(tensor_bytes(shapes[name], 1) - tensor_bytes(shapes[name]) for name in unfolded)  # 1: float32
    return 350 * MIB + int(2.3 * (weights_bytes + grown))


def _told_memory(folder: Path) -> int:
    """What the manifest says that opening the graph takes, and 150 MiB for the page; 0 if it says nothing."""
    layouts = _read_json(folder / "manifest.json").get("layouts", {})
    told = layouts.get("transformers.js", {}).get("unfolded_bytes", 0)
    return PAGE_BYTES + int(told) if told else 0


def prompt_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    """The random prompt of `export/runner/edgedisp_runner.py`: same seed, same ids, on every device."""
    import numpy as np

    return [int(i) for i in np.random.default_rng(seed).integers(0, vocab_size, count, dtype=np.int64)]


def _page_graph(folder: Path) -> Path:
    """The graph for browsers, else model.onnx."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give a bundle such as <run>/<arm>/int4")
    dtype = _read_json(folder / "config.json").get("transformers.js_config", {}).get("dtype")
    preferred = folder / "onnx" / f"model_{dtype}.onnx"
    for_browsers = [preferred] if preferred.is_file() else sorted((folder / "onnx").glob("model*.onnx"))
    return for_browsers[0] if for_browsers else find_graph(folder)


def _page_file(folder: Path, path: Path) -> PageFile:
    """Hash one file; it must be a regular file inside the bundle, also when links are followed."""
    real = path.resolve()
    if not real.is_relative_to(folder.resolve()):
        raise BadInput(f"{path}: lies outside the bundle ({real}); copy the bundle without links")
    if not real.is_file():
        raise BadInput(f"{path}: is missing, and the graph needs it; export the bundle again")
    with real.open("rb") as file:
        return PageFile(real, real.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} where there is no file. Raises BadInput for a damaged one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: not readable as JSON ({error}); export the bundle again") from error
    if not isinstance(content, dict):
        raise BadInput(f"{path}: expected a JSON object; export the bundle again")
    return content


def _vocab_size(folder: Path, model: Any, config: dict[str, Any], genai: dict[str, Any]) -> int:
    """Columns of the logits: from the graph, else from the configuration, as the runner does it."""
    logits = next((o for o in model.graph.output if o.name == "logits"), None)
    last = logits.type.tensor_type.shape.dim[-1].dim_value if logits is not None else 0
    found = last or genai.get("model", {}).get("vocab_size") or config.get("vocab_size")
    if not isinstance(found, int) or found < 1:
        raise BadInput(f"{folder}: neither the graph nor its configuration tells the size of the vocabulary")
    return found


def _context(config: dict[str, Any], genai: dict[str, Any]) -> int:
    """Most tokens in a conversation."""
    told = [genai.get("model", {}).get("context_length"), config.get("max_position_embeddings")]
    return min([CONTEXT_CAP, *(number for number in told if isinstance(number, int) and number > 0)])
