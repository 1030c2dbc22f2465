"""What the phone page is to time, and the rows from what it sends.

The plan is fixed before anything is served: the bundles with size and SHA-256 of each file, one random prompt
for each vocabulary (the runner's), and the order of the turns, A B B A. Other than with the runner,
`peak_memory_bytes` is the size of the bundle's WebAssembly heap, `load_s` includes reading the file from the
browser's storage, and a page sees neither clocks nor other processes.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedisp import __version__
from edgedisp.bench import results
from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.graph_stats import external_files, find_graph, read_graph, tensor_bytes
from edgedisp.bench.interleaved_timing import turns
from edgedisp.bench.page_protocol import DeviceFacts, Figures, Repetition, Scores, Upload
from edgedisp.bench.system import runner
from edgedisp.core.errors import BadInput
from edgedisp.core.files import MANIFEST, file_digest, read_json
from edgedisp.core.results import DeviceResult, Timing

FORM = 1  # of the plan; the page refuses another
MIB = 1 << 20
PAGE_BYTES = 150 * MIB  # a page without weights
CONTEXT_CAP = 4096  # of a conversation on the page; the cache of SmolLM2-135M is then 190 MB
SETTINGS_FILES = (
    *("config.json", "generation_config.json", "genai_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "chat_template.jinja"),
)


@dataclass(frozen=True)
class Resource:
    """What one address of the server gives: a file, or bytes made beforehand. `tag` is its SHA-256."""

    content_type: str
    size_bytes: int
    tag: str
    path: Path | None = None
    body: bytes = b""
    revalidated: bool = False
    """The browser may keep it and ask whether it changed; bundles are kept by the page itself."""


def json_resource(content: Any) -> Resource:
    """A JSON answer made beforehand."""
    body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    return Resource("application/json", len(body), hashlib.sha256(body).hexdigest(), body=body)


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
    files = {path.relative_to(folder).as_posix(): _file(folder, path) for path in [*weights, *settings]}
    weights_bytes = sum(files[path.relative_to(folder).as_posix()].size_bytes for path in weights)
    layouts = read_json(folder / MANIFEST).get("layouts", {})
    unfolded = int(layouts.get("transformers.js", {}).get("unfolded_bytes", 0))
    logits = [o.type.tensor_type.shape.dim[-1].dim_value for o in model.graph.output if o.name == "logits"]
    sizes = _positive(*logits, genai.get("vocab_size"), config.get("vocab_size"))
    if not sizes:
        raise BadInput(f"{folder}: neither the graph nor its configuration has the size of the vocabulary")
    memory = PAGE_BYTES + unfolded if unfolded else 0
    return PageBundle(
        label=label,
        folder=folder,
        graph=graph.relative_to(folder).as_posix(),
        external=external,
        files=files,
        weights_bytes=weights_bytes,
        expected_memory_bytes=max(expected_memory_bytes(weights_bytes, model), memory),
        unfolded=unfolded > 0 and graph.name != "model.onnx",
        packed=any(node.op_type == "MatMulNBits" for node in model.graph.node),
        vocab_size=sizes[0],
        context=min(
            CONTEXT_CAP, *_positive(genai.get("context_length"), config.get("max_position_embeddings"))
        ),
    )


def _positive(*values: Any) -> list[int]:
    return [value for value in values if isinstance(value, int) and value > 0]


def expected_memory_bytes(weights_bytes: int, model: Any) -> int:
    """Rough memory of a page that has the bundle open: 350 MiB, and 2.3 times the weights as they are used.

    Measured with SmolLM2-135M in Chromium 156 (resident size of the renderer): int4 as MatMulNBits (86 MB)
    616 MB, fp32 (540 MB) 1,608 MB, weights that are unfolded to fp32 as they load 1,413 MB.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    float32 = 1  # onnx.TensorProto.FLOAT
    grown = sum(tensor_bytes(tensors[n], float32) - tensor_bytes(tensors[n]) for n in inputs & set(tensors))
    return 350 * MIB + int(2.3 * (weights_bytes + grown))


def _file(folder: Path, path: Path) -> Resource:
    """Hash one file; it must be a regular file inside the bundle, also when links are followed."""
    real = path.resolve()
    if not real.is_relative_to(folder.resolve()):
        raise BadInput(f"{path}: lies outside the bundle ({real}); copy the bundle without links")
    if not real.is_file():
        raise BadInput(f"{path}: is missing, and the graph needs it; export the bundle again")
    kind = "application/json" if path.suffix == ".json" else "application/octet-stream"
    return Resource(kind, real.stat().st_size, file_digest(real), real)


@dataclass(frozen=True)
class PagePlan:
    """Bundles and options of one serving. `options.threads` None: the page's own choice, 1 unless changed.

    Raises BadInput where the prompt and the new tokens do not fit into a bundle's context.
    """

    bundles: tuple[PageBundle, ...]
    options: BenchOptions

    def __post_init__(self) -> None:
        needed = self.options.prompt + self.options.generate
        for bundle in self.bundles:
            if needed > bundle.context:
                raise BadInput(
                    f"{bundle.folder}: the run needs {needed} positions, its context is {bundle.context}; "
                    "ask for less with --prompt and --generate"
                )

    def options_json(self) -> dict[str, Any]:
        """As in the other devices' results."""
        names = ("prompt", "generate", "threads", "seed", "warmup", "repetitions", "pause_s")
        return {name: getattr(self.options, name) for name in names}

    def order(self) -> list[tuple[int, str]]:
        """(repetition, label) of every turn."""
        return turns([bundle.label for bundle in self.bundles], self.options.repetitions)

    def resources(self) -> dict[str, Resource]:
        """The plan, the items to score and the bundles' files, by address."""
        resources, shown = {}, []
        for place, bundle in enumerate(self.bundles):
            requests = None
            if items := self.options.requests.get(bundle.label):
                requests = {"url": f"requests/{place}.json", "items": len(items)}
                resources[f"requests/{place}.json"] = json_resource(items)
            resources |= {f"bundle/{place}/{name}": file for name, file in bundle.files.items()}
            prompt = runner().prompt_ids(bundle.vocab_size, self.options.prompt, self.options.seed)
            shown.append(
                {
                    "label": bundle.label,
                    "graph": bundle.graph,
                    "external": list(bundle.external),
                    "files": {
                        name: {
                            "url": f"bundle/{place}/{name}",
                            "size_bytes": file.size_bytes,
                            "sha256": file.tag,
                        }
                        for name, file in bundle.files.items()
                    },
                    "download_bytes": bundle.download_bytes,
                    "expected_memory_bytes": bundle.expected_memory_bytes,
                    "context": bundle.context,
                    "prompt_ids": prompt[0].tolist(),
                    "requests": requests,
                }
            )
        plan = {
            "form": FORM,
            "edgedisp": __version__,
            "options": self.options_json(),
            "turns": [list(turn) for turn in self.order()],
            "memory_bytes": self.options.memory_bytes,
            "bundles": shown,
        }
        return {"plan.json": json_resource(plan), **resources}

    def refusal(self, upload: Upload) -> str | None:
        """What is wrong with an upload that fits the schema but not this plan; None if nothing is."""
        if isinstance(upload, Scores):
            items = self.options.requests.get(upload.label, ())
            if upload.first + len(upload.answers) > len(items):
                return "scores of items that were not asked for"
            if any(len(one) != len(items[upload.first + at]) for at, one in enumerate(upload.answers)):
                return "an item has more or fewer scores than it has requests"
        if not isinstance(upload, Figures):
            return None
        order, labels = self.order(), {bundle.label for bundle in self.bundles}
        generate = self.options.generate
        for turn, timed in enumerate(upload.repetitions):
            if turn >= len(order) or (timed.repetition, timed.label) != order[turn] or timed.turn != turn:
                return f"turn {turn} is not the plan's"
            if len(timed.token_ms) != generate - 1 or len(timed.tokens) != generate:
                return f"turn {turn} has not {generate} tokens"
            if timed.ttft_ms <= 0.0 or sum(timed.token_ms) <= 0.0:
                return f"turn {turn} took no time"
        loaded = [bundle.label for bundle in upload.loaded]
        if len(set(loaded)) != len(loaded) or not set(loaded) <= labels:
            return "loaded names other bundles than the plan, or one twice"
        if not {timed.label for timed in upload.repetitions} <= set(loaded):
            return "a bundle was timed that was not loaded"
        if upload.complete and len(upload.repetitions) != len(order):
            return "complete, but turns are missing"
        return None


def page_result(
    plan: PagePlan, figures: Figures, device: str, sensors: Mapping[int, dict[str, Any]] | None = None
) -> DeviceResult:
    """The result of a page's figures. sensors: turn -> readings of the machine after it."""
    turns = [
        _timed(plan, repetition) | (sensors or {}).get(repetition.turn, {})
        for repetition in figures.repetitions
    ]
    bundles = {bundle.label: bundle for bundle in plan.bundles}
    opened = {
        label: (bundle.folder / bundle.graph, _facts(plan, figures, bundle))
        for label, bundle in bundles.items()
        if label in {turn["label"] for turn in turns}
    }
    result = results.device_result(device, _machine(figures.device), turns, opened, plan.options)
    hidden = Counter(turn["label"] for turn in turns if turn["hidden"])
    rows = [_row(row, bundles[row.label], hidden[row.label]) for row in result.rows]
    groups = [[*bundles]] if figures.held_open else [[label] for label in bundles]
    return replace(result, rows=rows, options={**result.options, "groups": groups})


def _machine(device: DeviceFacts) -> dict[str, Any]:
    """The keys of the runner's description, as far as a page knows them, and `browser`."""
    cores = device.cores or device.threads
    return {
        **dict.fromkeys(("architecture", "memory_bytes", "memory_available_bytes")),
        "cpu": device.model,
        "features": [],
        "physical_cores": cores,
        "logical_cpus": cores,
        "system": device.platform,
        "browser": device.model_dump(),
    }


def _timed(plan: PagePlan, repetition: Repetition) -> dict[str, Any]:
    """One repetition with the speeds that follow from its times."""
    unknown = ("cpu_s", "load_average_1m", "clock_mhz", "temperature_c", "other_cpus")
    return {
        **repetition.model_dump(exclude={"heap_bytes"}),
        **dict.fromkeys(unknown),
        "prefill_tokens_per_s": plan.options.prompt / repetition.ttft_ms * 1000.0,
        "decode_tokens_per_s": len(repetition.token_ms) / sum(repetition.token_ms) * 1000.0,
        "peak_memory_bytes": repetition.heap_bytes,
    }


def _facts(plan: PagePlan, figures: Figures, bundle: PageBundle) -> dict[str, Any]:
    """As the runner gives them."""
    loaded = next(entry for entry in figures.loaded if entry.label == bundle.label)
    return {
        "prompt": plan.options.prompt,
        "generate": plan.options.generate,
        "threads": figures.device.threads,
        "weights_bytes": bundle.weights_bytes,
        **loaded.model_dump(include=set(results.SHAPE)),
        "load_s": statistics.median(loaded.load_s),
    }


def _row(row: Timing, bundle: PageBundle, hidden: int) -> Timing:
    """The row with what only a page has. hidden: repetitions in the background."""
    warnings = [*row.warnings]
    if bundle.unfolded:  # the graph does not hold the sizes of what is read
        row = replace(row, bytes_read_per_token=None, bandwidth_gb_per_s=None)
    if bundle.packed:
        warnings.append(
            "packed weights are unpacked at every token in WebAssembly, which is slow; `edgedisp export "
            "--target browser` makes a bundle that unpacks them once, at load"
        )
    if hidden:
        warnings.append(f"the page was in the background during {hidden} repetitions")
    return replace(row, download_bytes=bundle.download_bytes, warnings=tuple(warnings))
