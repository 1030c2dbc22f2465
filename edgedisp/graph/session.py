"""Runs a bundle with onnxruntime on the CPU, behind the same interface that the torch model offers.

Left out: sampling, beams, other devices.

Threads wait without spinning: on 2 cores that others use too, SmolLM2-135M at 4 bits decodes 1.7 times as
fast as with spinning, on an idle machine 0.8 times.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import read_json
from edgedisp.core.greedy_decoding import GreedyDecoding, greedy_batch
from edgedisp.core.progress import Progress, silent
from edgedisp.graph.genai_config import GENAI_CONFIG, LENGTHS, read_config
from edgedisp.graph.onnx_graph import ATTENTION, GRAPH, hidden_states, read_graph, to_bytes

TOKENS_AT_ONCE = 32  # with fewer, a product takes as long for one sequence as for many
CONTEXT_CAP = 4096  # tokens of a scored request; the page for phones reads no more

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
Cache = dict[str, NDArray[np.float32]]
"""`past_key_values.N.key/value` -> [batch, kv heads, tokens, head_dim]."""


class OnnxModel(GreedyDecoding):
    """A bundle as a language model. BadInput if it is none, BuildFailed if onnxruntime cannot open it."""

    def __init__(self, bundle: Path, threads: int, graph: bytes | str | None = None) -> None:
        """`graph`: another graph file of the bundle, or the content of one over the same weights."""
        if threads < 1:
            raise BadInput(f"threads is {threads}; at least 1 is needed")
        self.bundle, self.threads = bundle, threads
        config = _sizes(bundle)
        self.context, self.vocab_size = int(config["context_length"]), int(config["vocab_size"])
        ids = config["eos_token_id"]
        self.end_ids = frozenset(ids if isinstance(ids, list) else [ids])
        self._path = bundle / graph if isinstance(graph, str) else graph_path(bundle)
        self._content = graph if isinstance(graph, bytes) else None
        self.session = open_session(self._path, threads, self._content)
        self._lock = threading.Lock()
        self._single = self.session if threads == 1 else None
        self._caches: dict[str, tuple[int, int]] = {}  # kv heads and head dimension
        for value in self.session.get_inputs():
            if value.name.startswith("past_key_values."):
                _, heads, _, head_dim = value.shape  # the dimension is a symbol in a graph of genai's builder
                is_number = isinstance(head_dim, int)
                self._caches[value.name] = heads, head_dim if is_number else config["decoder"]["head_size"]
        outputs = self.session.get_outputs()
        self.last_only = any(value.name == "logits" and value.shape[1] == 1 for value in outputs)

    def __call__(self, ids: Ids, mask: Ids) -> Logits:
        """ids, mask int64 [batch, tokens] (0: padding, on the right) -> float32 [batch, tokens, vocab].

        Logits at padding mean nothing. ValueError for left padding, empty rows, more tokens than the context.
        """
        self._check(ids, mask)
        return self.run(["logits"], ids, mask)[0]

    def run(self, names: list[str], ids: Ids, mask: Ids, session: Any = None) -> list[NDArray[np.float32]]:
        """The graph's outputs `names` with an empty cache; ids and mask as of a call."""
        feed = {"input_ids": ids, "attention_mask": mask, **self._empty(len(ids))}
        try:
            outputs: list[NDArray[np.float32]] = (session or self.session).run(names, feed)
        except Exception as error:  # onnxruntime has no common base class for its errors
            raise BuildFailed(f"{self._path}: onnxruntime cannot run it: {error}") from error
        return outputs

    def decode(
        self, ids: Ids, mask: Ids, cache: Cache | None = None, session: Any = None
    ) -> tuple[Logits, Cache]:
        """One more token a row: ids [batch, 1], mask [batch, cached + 1] summing to each row's length now.

        Rows may have different lengths: a row's token goes to the position after its last real one. Without a
        cache the same as a call, and the cache to decode from.
        """
        names = ["logits", *(_present(name) for name in self._caches)]
        feed = {"input_ids": ids, "attention_mask": mask, **(cache or self._empty(len(ids)))}
        logits, *present = (session or self.session).run(names, feed)
        return logits, dict(zip(self._caches, present))

    @property
    def parallel(self) -> int:
        """How many calls of `logits` may run at once: each takes one thread.

        Two sequences side by side are 1.25 times as fast on 2 cores as one after the other (33 tokens, int4).
        """
        return self.threads

    def logits(self, ids: Ids, last: int) -> Logits:
        """ids int64 [tokens] -> logits float32 [last, vocab] at its `last` positions.

        A graph that gives the last token's logits alone reads these positions one by one, through its cache.
        """
        with self._lock:
            if self._single is None:
                self._single = open_session(self._path, 1, self._content)
        session, row = self._single, np.asarray(ids, np.int64)[None]
        if not self.last_only:
            return self.run(["logits"], row, np.ones_like(row), session)[0][0, -last:]
        return self.step_by_step(row[0], row.shape[1] - last + 1, session)

    def step_by_step(self, ids: Ids, first: int, session: Any = None) -> Logits:
        """Logits float32 [rows, vocab] of ids int64 [tokens], read through the cache: `first` tokens at once,
        then one by one."""
        cache: Cache | None = None
        rows = []
        for start, end in [(0, first), *((index, index + 1) for index in range(first, len(ids)))]:
            logits, cache = self.decode(ids[None, start:end], np.ones((1, end), np.int64), cache, session)
            rows.append(logits[0])
        return np.concatenate(rows)

    def greedy_batch(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        stop_ids: frozenset[int],
        progress: Progress = silent,
    ) -> list[list[int]]:
        for ids in prompts:
            _check_length(len(ids), self.context)
        limits = [min(max_new_tokens, self.context - len(ids)) for ids in prompts]
        token_bytes = sum(4 * heads * head_dim for heads, head_dim in self._caches.values())
        return greedy_batch(partial(_Reader, self), prompts, limits, stop_ids, token_bytes, progress)

    def read_in_place(self, ids: Ids, total: int, buffers: Cache) -> Logits:
        """One run over `total` tokens a row, of which `ids` are new; keys and values go into `buffers`."""
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((len(ids), total), np.int64))
        binding.bind_output("logits")
        for name, array in buffers.items():
            buffer = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(_present(name), buffer)
        self.session.run_with_iobinding(binding)
        logits: Logits = binding.get_outputs()[0].numpy()
        return logits

    def buffers(self, total: int) -> Cache:
        """Of one row, for the keys and values of `total` tokens."""
        shapes = self._caches.items()
        return {name: np.empty((1, heads, total, head_dim), np.float32) for name, (heads, head_dim) in shapes}

    def _empty(self, batch: int) -> Cache:
        shapes = self._caches.items()
        return {name: np.zeros((batch, heads, 0, head_dim), np.float32) for name, (heads, head_dim) in shapes}

    def _check(self, ids: Ids, mask: Ids) -> None:
        """ValueError for what the graph would compute silently wrong."""
        is_batch = ids.shape == mask.shape and ids.ndim == 2 and ids.shape[1] <= self.context
        if not is_batch or not mask[:, :1].all() or (np.diff(mask, axis=1) > 0).any():
            raise ValueError(
                f"ids {ids.shape} and mask {mask.shape} must be [batch, tokens], every row padded on the "
                f"right and within the context of {self.context}"
            )


def _present(past: str) -> str:
    return past.replace("past_key_values", "present")


def _check_length(count: int, context: int) -> None:
    if not 0 < count <= context:
        raise ValueError(f"{count} tokens given; 1 to the context of {context} are possible")


class _Reader:
    """Reads with one buffer per layer as past AND present, to which attention appends in place.

    GroupQueryAttention takes several tokens after others for a single sequence alone. So many tokens are read
    sequence by sequence, and few of all sequences, token by token.
    """

    def __init__(self, model: OnnxModel, most: int) -> None:
        self.model, self.position, self.buffers = model, 0, model.buffers(most)

    def read(self, ids: Ids) -> Ids:
        rows, tokens = ids.shape
        if rows > 1 and tokens < TOKENS_AT_ONCE:
            for index in range(tokens):
                likeliest = self._read(ids[:, index : index + 1], slice(rows), self.position + index + 1)
        else:
            places = [slice(row, row + 1) for row in range(rows)]
            likeliest = np.concatenate([self._read(ids[at], at, self.position + tokens) for at in places])
        self.position += tokens
        return likeliest

    def _read(self, ids: Ids, rows: slice, total: int) -> Ids:
        buffers = {name: buffer[rows] for name, buffer in self.buffers.items()}
        logits = self.model.read_in_place(np.ascontiguousarray(ids), total, buffers)
        return np.asarray(logits[:, -1].argmax(axis=-1))

    def select(self, sequences: Ids) -> None:
        for name, buffer in self.buffers.items():
            if (count := len(sequences)) > len(buffer):
                self.buffers[name] = np.empty((count, *buffer.shape[1:]), np.float32)
                moved = np.arange(count)
            else:
                self.buffers[name] = buffer[:count]
                moved = np.flatnonzero(sequences != np.arange(count))
            self.buffers[name][moved, :, : self.position] = buffer[sequences[moved], :, : self.position]


class HiddenStates:
    """A bundle as a source of hidden states: `HiddenStates(bundle, threads)(ids)`, by a copy of its graph in
    memory that has them as outputs. BadInput if the folder is no bundle or its graph shows no hidden states,
    BuildFailed if onnxruntime cannot open it.
    """

    def __init__(self, bundle: Path, threads: int) -> None:
        layers, path = int(read_config(bundle)["decoder"]["num_hidden_layers"]), graph_path(bundle)
        model = read_graph(path)
        states = hidden_states(model.graph)
        if len(states) != layers + 1:
            raise BadInput(
                f"{path}: hidden states of {max(0, len(states) - 1)} layers are found of {layers}; a graph "
                f"needs {ATTENTION}, as `edgedisp export` and onnxruntime-genai's builder write it"
            )
        self.names = [str(state.name) for state in states]
        model.graph.outputs.clear()
        model.graph.outputs.extend(states)
        for state in states:
            state.type, state.shape = ir.TensorType(ir.DataType.FLOAT), None
        self._model = OnnxModel(bundle, threads, graph=to_bytes(model))
        self.context = self._model.context

    def __call__(self, ids: Ids) -> list[NDArray[np.float32]]:
        """ids int64 [tokens] -> layers + 1 arrays float32 [tokens, features]: transformers' `hidden_states`.

        ValueError for no tokens, or more than the context. BuildFailed if onnxruntime cannot run the graph.
        """
        _check_length(len(ids), self.context)
        row = np.asarray(ids, np.int64)[None]
        return [state[0] for state in self._model.run(self.names, row, np.ones_like(row))]


class Size(NamedTuple):
    """What decides how requests are cut."""

    context: int
    vocab_size: int


def scored_size(bundle: Path) -> Size:
    """Most tokens of a request, here and on every device, and the size of the vocabulary."""
    config = _sizes(bundle)
    return Size(min(int(config["context_length"]), CONTEXT_CAP), int(config["vocab_size"]))


def scored_model(bundle: Path, threads: int) -> OnnxModel:
    """The bundle, ready to be scored in the context that `scored_size` gives."""
    model = OnnxModel(bundle, threads)
    model.context = scored_size(bundle).context
    return model


def graph_path(bundle: Path) -> Path:
    """The bundle's model.onnx, else the graph of transformers.js. BadInput where there is none."""
    paths = [bundle / GRAPH] if (bundle / GRAPH).is_file() else sorted(bundle.glob("onnx/model*.onnx"))
    if not paths:
        raise BadInput(f"{bundle}: holds no {GRAPH}; a bundle is a folder such as <run>/<arm>/int4")
    return paths[0]


def _sizes(bundle: Path) -> dict[str, Any]:
    """`read_config`; of a bundle for other runtimes alone the same sizes out of config.json."""
    path = bundle / "config.json"
    if (bundle / GENAI_CONFIG).is_file() or not path.is_file():
        return read_config(bundle)
    config = read_json(path)
    lengths = [int(config[name]) for name in LENGTHS if name in config]
    if not lengths or "vocab_size" not in config:
        raise BadInput(f"{path}: tells no context or vocabulary; export the bundle again")
    return {"context_length": lengths[0], "vocab_size": config["vocab_size"], "eos_token_id": []}


def at_accuracy_level(bundle: Path, level: int) -> bytes:
    """The bundle's graph with another arithmetic in its products: 0 is fp32, 4 rounds activations to int8."""
    model = read_graph(bundle / GRAPH)
    for node in model.graph:
        if "accuracy_level" in node.attributes:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    return to_bytes(model)


def open_session(path: Path, threads: int, graph: bytes | None = None) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU over the graph file `path`, or over `graph` with the same weights.

    BuildFailed with the runtime's reason if it does not open.
    """
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; they also come as exceptions
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if graph is not None:
        folder = str(path.parent.resolve())  # where the weights of a graph that is no file are looked for
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        return onnxruntime.InferenceSession(graph or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common base class for its errors
        raise BuildFailed(f"{path}: onnxruntime cannot open {path.name}: {error}") from error
