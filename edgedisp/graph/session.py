"""Runs a bundle with onnxruntime on the CPU, behind the same interface that the torch model offers.

`OnnxModel(bundle, threads)` gives the logits of single sequences (scoring) and of right-padded batches, and
decodes greedily with the KV cache. Whatever it does, it runs the graph that ships, as it ships.
Greedy decoding binds one buffer per layer as past AND present: attention then appends in place, as
onnxruntime-genai does, instead of copying the cache at every token.

Threads wait without spinning. SmolLM2-135M at 4 bits, 2 threads: on 2 cores that others use too, scoring is
1.3 times and decoding 1.7 times as fast as with spinning; on an idle machine scoring is equal and decoding
0.8 times as fast. Scoring is what this class is for. What a report times runs in a program of its own.

Left out: sampling and beams (genai does that), other devices.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto

from edgedisp.core.errors import BadInput, BuildFailed

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]
Cache = dict[str, NDArray[np.float32]]
"""`past_key_values.N.key/value` -> [batch, kv heads, tokens, head_dim]."""


class OnnxModel:
    """A bundle as a language model. BadInput if it is none, BuildFailed if onnxruntime cannot open it."""

    def __init__(
        self, bundle: Path, threads: int, graph: bytes | None = None, profile: Path | None = None
    ) -> None:
        """`graph`: another graph than the bundle's model.onnx over the same weights. `profile`: the start of
        the path to which onnxruntime writes what each kernel did."""
        if threads < 1:
            raise BadInput(f"threads is {threads}; at least 1 is needed")
        self.bundle, self.threads, self._graph = bundle, threads, graph
        config = read_config(bundle)
        self.context = int(config["context_length"])
        self.vocab_size = int(config["vocab_size"])
        ends = config["eos_token_id"]
        self.end_ids = frozenset(ends if isinstance(ends, list) else [ends])
        self._open(profile)
        # The genai builder leaves the head dimension symbolic in the graph; genai_config.json knows it.
        self._head_dim = int(config["decoder"]["head_size"])

    def _open(self, profile: Path | None = None) -> None:
        self.session = open_session(self.bundle, self.threads, self._graph, profile)
        self._lock = threading.Lock()
        self._single = self.session if self.threads == 1 else None
        shapes = {value.name: value.shape for value in self.session.get_inputs()}
        self._caches = {name: shape for name, shape in shapes.items() if name.startswith("past_key_values.")}
        self.last_only = self.session.get_outputs()[0].shape[1] == 1

    def __call__(self, ids: Ids, mask: Ids) -> Logits:
        """ids, mask int64 [batch, tokens] (0: padding, on the right) -> float32 [batch, tokens, vocab].

        Logits at padding mean nothing. ValueError for left padding, empty rows, more tokens than the context.
        """
        self._refuse(ids, mask)
        feed = {"input_ids": ids, "attention_mask": mask, **self._empty(len(ids))}
        logits: Logits = self.session.run(["logits"], feed)[0]
        return logits

    def prefill(self, ids: Ids, mask: Ids) -> tuple[Logits, Cache]:
        """The same as a call, and the cache to decode from."""
        self._refuse(ids, mask)
        return self._step(ids, mask, self._empty(len(ids)))

    def decode(self, ids: Ids, mask: Ids, cache: Cache) -> tuple[Logits, Cache]:
        """One more token a row: ids [batch, 1], mask [batch, cached + 1] summing to each row's length now.

        Rows may have different lengths: a row's token goes to the place after its last real one.
        """
        return self._step(ids, mask, cache)

    @property
    def parallel(self) -> int:
        """How many calls of `logits` may run at once: each takes one thread.

        Small products gain little from a second thread: on 2 cores two sequences side by side are 1.25 times
        as fast as one after the other (33 tokens, int4), with the same logits to the bit.
        """
        return self.threads

    def logits(self, ids: Ids, last: int) -> Logits:
        """ids int64 [tokens] -> logits float32 [last, vocab] at its `last` positions.

        A graph that gives the last token's logits alone reads these positions one by one, through its cache.
        """
        session, row = self._one_thread(), np.asarray(ids, np.int64)[None]
        names = ["logits"] if not self.last_only else ["logits", *(_present(name) for name in self._caches)]
        read = row.shape[1] - (last - 1 if self.last_only else 0)
        cache, rows = self._empty(1), []
        for start, end in [(0, read), *((place, place + 1) for place in range(read, row.shape[1]))]:
            feed = {"input_ids": row[:, start:end], "attention_mask": np.ones((1, end), np.int64), **cache}
            logits, *present = session.run(names, feed)
            cache = dict(zip(self._caches, present))
            rows.append(logits[0])
        found: Logits = np.concatenate(rows) if self.last_only else rows[0][-last:]
        return found

    def _one_thread(self) -> Any:
        """A session of one thread over the same graph."""
        with self._lock:
            if self._single is None:
                self._single = open_session(self.bundle, 1, self._graph)
            return self._single

    def greedy(self, ids: list[int], max_new_tokens: int, stop_ids: frozenset[int]) -> list[int]:
        """The most likely next tokens after `ids`, at most `max_new_tokens` or what the context leaves.

        A stop token ends it and is the last of the result.
        """
        if not 0 < len(ids) <= self.context:
            raise ValueError(
                f"{len(ids)} tokens given; between 1 and the context of {self.context} are possible"
            )
        total = min(len(ids) + max_new_tokens, self.context)
        buffers = self._buffers(total)
        new: list[int] = []
        step = np.array([ids], np.int64)
        while len(ids) + len(new) < total:
            logits = self._in_place(step, len(ids) + len(new), buffers)
            new.append(int(logits[0, -1].argmax()))
            if new[-1] in stop_ids:
                break
            step = np.array([new[-1:]], np.int64)
        return new

    def _step(self, ids: Ids, mask: Ids, cache: Cache) -> tuple[Logits, Cache]:
        names = ["logits", *(_present(name) for name in self._caches)]
        logits, *present = self.session.run(names, {"input_ids": ids, "attention_mask": mask, **cache})
        return logits, dict(zip(self._caches, present))

    def _in_place(self, ids: Ids, total: int, buffers: dict[str, Any]) -> Logits:
        """One run at batch 1 over `total` tokens, whose keys and values go into `buffers`."""
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        binding.bind_output("logits")
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(_present(name), buffer)
        self.session.run_with_iobinding(binding)
        logits: Logits = binding.get_outputs()[0].numpy()
        return logits

    def _shape(self, name: str, batch: int, tokens: int) -> tuple[int, int, int, int]:
        return batch, int(self._caches[name][1]), tokens, self._head_dim

    def _empty(self, batch: int) -> Cache:
        return {name: np.zeros(self._shape(name, batch, 0), np.float32) for name in self._caches}

    def _buffers(self, tokens: int) -> dict[str, Any]:
        make = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        return {name: make(self._shape(name, 1, tokens), np.float32, "cpu") for name in self._caches}

    def _refuse(self, ids: Ids, mask: Ids) -> None:
        """ValueError for what the graph would compute silently wrong."""
        if ids.shape != mask.shape or ids.ndim != 2:
            raise ValueError(f"ids {ids.shape} and mask {mask.shape} must both be [batch, tokens]")
        if ids.shape[1] > self.context:
            raise ValueError(f"{ids.shape[1]} tokens do not fit the context of {self.context}")
        if not mask[:, :1].all() or (np.diff(mask, axis=1) > 0).any():
            raise ValueError("rows must start with a real token and be padded on the right")


def _present(past: str) -> str:
    return past.replace("past_key_values", "present")


def read_config(bundle: Path) -> dict[str, Any]:
    """The `model` part of a bundle's genai_config.json. BadInput if the folder has none."""
    path = bundle / "genai_config.json"
    if not path.is_file():
        raise BadInput(f"{bundle}: no bundle (genai_config.json is missing); `edgedisp export` makes one")
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        int(model["context_length"])
    except (ValueError, KeyError, TypeError) as problem:
        raise BadInput(
            f"{path}: is damaged or no configuration of onnxruntime-genai ({type(problem).__name__}: "
            f"{problem}); export the bundle again"
        ) from None
    return dict(model)


def _graph_of(bundle: Path) -> ModelProto:
    return onnx.load(bundle / "model.onnx", load_external_data=False)


def at_accuracy_level(bundle: Path, level: int) -> bytes:
    """The bundle's graph with another arithmetic in its products: 0 is fp32, 4 rounds activations to int8."""
    model = _graph_of(bundle)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = level
    changed: bytes = model.SerializeToString()
    return changed


def open_session(
    bundle: Path,
    threads: int,
    graph: bytes | None = None,
    profile: Path | None = None,
    name: str = "model.onnx",
) -> Any:
    """An onnxruntime session on the CPU over the graph file `name` of a bundle, or over `graph` with the
    weights that lie in that folder.

    BuildFailed with the runtime's reason if it does not open.
    """
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; they also come as exceptions
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if graph is not None:
        folder = str(bundle.resolve())  # where the weights of a graph that is no file are looked for
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        return onnxruntime.InferenceSession(
            graph or str(bundle / name), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime has no common base class for its errors
        raise BuildFailed(f"{bundle}: onnxruntime cannot open {name}: {error}") from error
