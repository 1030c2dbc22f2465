"""A bundle as it is scored on this machine, whichever of its graphs it has.

model.onnx is taken where there is one. A bundle for browsers alone has another graph, in `onnx/`, and no
configuration of onnxruntime-genai: sizes come from config.json and the graph then. Its products are unfolded
to fp32, here as in a page.

A graph packed for a device gives the last token's logits alone. It reads a continuation token by token,
through its cache, as a device does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import onnx

from edgedisp.core.errors import BadInput
from edgedisp.graph.onnx_graph import GRAPH
from edgedisp.graph.session import OnnxModel, read_config

CONTEXT_CAP = 4096  # tokens; more is read nowhere, as the page for phones reads no more


class BrowserModel(OnnxModel):
    """The graph in `onnx/` of a bundle that has no other, as a language model."""

    def __init__(self, bundle: Path, threads: int) -> None:
        """BadInput where config.json lacks sizes, BuildFailed if onnxruntime cannot open the graph."""
        self.bundle, self.threads = bundle, threads
        path = graph_of(bundle)
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":  # as seen from the bundle's folder
                    entry.value = f"{path.parent.relative_to(bundle).as_posix()}/{entry.value}"
        self._graph = model.SerializeToString()
        config = _config(bundle)
        self.context, self.vocab_size = config["max_position_embeddings"], config["vocab_size"]
        self.end_ids = frozenset()
        self._open()
        sizes = {shape[3] for shape in self._caches.values() if isinstance(shape[3], int)}
        self._head_dim = max(sizes, default=config.get("head_dim", 0))


def scored_model(bundle: Path, threads: int) -> OnnxModel:
    """The bundle, ready to be scored in the context that `scored_size` gives."""
    model = OnnxModel(bundle, threads) if (bundle / GRAPH).is_file() else BrowserModel(bundle, threads)
    model.context = scored_size(bundle).context
    return model


@dataclass(frozen=True)
class Size:
    """What of a bundle decides how requests are cut. whole: `context` is all that the model reads."""

    context: int
    vocab_size: int
    whole: bool


def scored_size(bundle: Path) -> Size:
    """Most tokens of a request, here and on every device, and the size of the vocabulary."""
    if (bundle / GRAPH).is_file():
        config = read_config(bundle)
        told, vocab_size = int(config["context_length"]), int(config["vocab_size"])
    else:
        config = _config(bundle)
        told, vocab_size = config["max_position_embeddings"], config["vocab_size"]
    context = min(told, CONTEXT_CAP)
    return Size(context, vocab_size, context == told)


def graph_of(bundle: Path) -> Path:
    """The graph that is scored here. BadInput where there is none."""
    found = [bundle / GRAPH] if (bundle / GRAPH).is_file() else sorted(bundle.glob("onnx/model*.onnx"))
    if not found:
        raise BadInput(f"{bundle}: holds no model.onnx; a bundle is a folder such as <run>/<arm>/int4")
    return found[0]


def _config(bundle: Path) -> dict[str, int]:
    """config.json with the sizes that scoring needs, by one name each."""
    path = bundle / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        lengths = ("max_position_embeddings", "n_positions", "n_ctx")
        context = next(int(config[name]) for name in lengths if name in config)
        return {**config, "max_position_embeddings": context, "vocab_size": int(config["vocab_size"])}
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as problem:
        raise BadInput(
            f"{path}: tells no context or vocabulary ({type(problem).__name__}); export the bundle again"
        ) from None
