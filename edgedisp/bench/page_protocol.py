"""What the phone page is given (plan.json, items to score), what it may send, and the result of it.

A phone is not trusted: texts have a length and lose their control characters (they are printed on a
terminal), lists and numbers have bounds, unknown keys are errors, and an upload must fit the plan. Other than
with the runner, `peak_memory_bytes` is the size of the bundle's WebAssembly heap, `load_s` includes reading
the file from the browser's storage, and a page sees neither clocks nor other processes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic import ValidationError as SchemaError

from edgedisp import __version__
from edgedisp.bench import results
from edgedisp.bench.bundles import external_files, find_graph, read_graph
from edgedisp.bench.devices import MIB, BenchOptions
from edgedisp.bench.interleaved_timing import turns
from edgedisp.bench.page_server import file_resource, json_resource, page_resources
from edgedisp.bench.system import runner
from edgedisp.core.errors import BadInput
from edgedisp.core.files import MANIFEST, read_json
from edgedisp.core.progress import printable
from edgedisp.core.results import DeviceResult, Json, Timing

FORM = 2  # of the plan; the page refuses another
PAGE_BYTES = 150 * MIB  # of memory, for a page without weights
CONTEXT_CAP = 4096  # of a conversation on the page; the cache of SmolLM2-135M is then 190 MB
SETTINGS_FILES = (
    *("config.json", "generation_config.json", "genai_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "chat_template.jinja", "app.json"),
)

# Uploads

Text = Annotated[str, StringConstraints(max_length=500), AfterValidator(printable)]
Number = Annotated[float, Field(ge=0.0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=1 << 50)]
Score = tuple[Annotated[float, Field(ge=-1e9, le=0.01, allow_inf_nan=False)], bool]
"""Sum of log-probabilities (rounding may leave it above 0), and whether each token was the likeliest."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DeviceFacts(_Strict):
    """The browser and the phone, as the browser describes them; None: not known. device_memory_gb: rounded
    and capped at 8. isolated: threads are possible, the clock has its finest steps."""

    user_agent: Text
    model: Text | None
    platform: Text | None
    cores: Count | None
    device_memory_gb: Number | None
    simd: bool
    isolated: bool
    threads: Annotated[int, Field(ge=1, le=256)]
    clock_resolution_ms: Number
    runtime: Text


class Loaded(_Strict):
    """A bundle that was opened. load_s: one entry for each time."""

    label: Text
    load_s: Annotated[list[Number], Field(min_length=1)]
    kv_cache_bytes_per_position: Count


class Repetition(_Strict):
    """One prompt and its tokens, timed in the worker. hidden: the page was not in front meanwhile."""

    label: Text
    repetition: Count
    turn: Count
    ttft_ms: Annotated[float, Field(gt=0.0, le=1e9, allow_inf_nan=False)]
    token_ms: list[Number]
    tokens: list[Count]
    wall_s: Number
    heap_bytes: Count | None
    hidden: bool


class Upload(_Strict):
    """All that a page load (`run`) has measured so far; each sending replaces the one before.

    open_together: all bundles were open at the same time; else each was loaded again for its turn. answers:
    label -> the items scored so far. done, total, note: progress. trouble: why the page could not go on.
    """

    run: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
    complete: bool
    open_together: bool
    device: DeviceFacts | None
    loaded: list[Loaded]
    repetitions: list[Repetition]
    answers: dict[Text, list[list[Score]]]
    done: Count
    total: Count
    note: Text
    trouble: Text | None


# The plan


@dataclass(frozen=True)
class PageBundle:
    """One bundle as plan.json has it; nothing but `files` can be fetched.

    graph: such as `onnx/model_q4.onnx`. external: its weight files, as the graph names them. context: most
    tokens of prompt and answer. unfolded_bytes: what weights take that become fp32 when the graph is opened.
    packed: products unpack their weights at every token in WebAssembly. requests: address and number of the
    items to score.
    """

    label: str
    graph: str
    external: list[str]
    context: int
    files: dict[str, Json]
    weights_bytes: int
    download_bytes: int
    expected_memory_bytes: int
    unfolded_bytes: int
    packed: bool
    prompt_ids: list[int]
    requests: Json | None


class PagePlan:
    """Bundles (label -> folder) and options of one serving, and `resources`: all that the page may fetch.

    `options.threads` None is the page's own choice, 1 unless changed. Raises BadInput for a folder that the
    page cannot use or whose context is too short, and without the page's libraries.
    """

    def __init__(self, folders: Mapping[str, Path], options: BenchOptions) -> None:
        self.folders, self.options = folders, options
        self.order = turns([*folders], options.repetitions)  # (repetition, label) of every turn
        self.resources = page_resources()
        self.bundles = {label: self._bundle(f"{index}", label) for index, label in enumerate(folders)}
        names = ("prompt", "generate", "threads", "seed", "warmup", "repetitions", "pause_s")
        plan = {
            "form": FORM,
            "edgedisp": __version__,
            "options": {name: getattr(options, name) for name in names},
            "turns": self.order,
            "memory_bytes": options.memory_bytes,
            "bundles": [asdict(bundle) for bundle in self.bundles.values()],
        }
        self.resources["plan.json"] = json_resource(plan)

    def _bundle(self, index: str, label: str) -> PageBundle:
        """Read a bundle; its files and items join the resources."""
        folder, options = self.folders[label], self.options
        config, genai = (read_json(folder / name) for name in ("config.json", "genai_config.json"))
        genai = genai.get("model", {})
        preferred = folder / "onnx" / f"model_{config.get('transformers.js_config', {}).get('dtype')}.onnx"
        graph = preferred if preferred.is_file() else find_graph(folder)
        model = read_graph(graph)
        needed = options.prompt + options.generate
        contexts = _sizes(genai.get("context_length"), config.get("max_position_embeddings"))
        context = min([CONTEXT_CAP, *contexts])
        if needed > context:
            raise BadInput(
                f"{folder}: the run needs {needed} positions, its context is {context}; ask for less with "
                "--prompt and --generate"
            )
        shapes = [out.type.tensor_type.shape for out in model.graph.output if out.name == "logits"]
        logits = [shape.dim[-1].dim_value for shape in shapes]
        sizes = _sizes(*logits, genai.get("vocab_size"), config.get("vocab_size"))
        if not sizes:
            raise BadInput(f"{folder}: neither the graph nor its configuration has the vocabulary's size")
        external = external_files(model)
        weights = [graph, *(graph.parent / name for name in external)]
        settings = [folder / name for name in SETTINGS_FILES if (folder / name).is_file()]
        files: dict[str, Json] = {}
        for path in [*weights, *settings]:
            name, file = path.relative_to(folder).as_posix(), file_resource(path, folder)
            files[name] = {"url": f"bundle/{index}/{name}", "size_bytes": file.size_bytes, "sha256": file.tag}
            self.resources[files[name]["url"]] = file
        requests = None
        if items := options.requests.get(label):
            requests = {"url": f"requests/{index}.json", "items": len(items)}
            self.resources[f"requests/{index}.json"] = json_resource(items)
        weights_bytes = sum(path.stat().st_size for path in weights)
        layouts = read_json(folder / MANIFEST).get("layouts", {})
        unfolded = int(layouts.get("transformers.js", {}).get("unfolded_bytes", 0))
        return PageBundle(
            label=label,
            graph=graph.relative_to(folder).as_posix(),
            external=external,
            context=context,
            files=files,
            weights_bytes=weights_bytes,
            download_bytes=sum(file["size_bytes"] for file in files.values()),
            # Measured with SmolLM2-135M in Chromium 156 (resident size of the renderer): int4 as MatMulNBits
            # (86 MB) 616 MB, fp32 (540 MB) 1,608 MB.
            expected_memory_bytes=max(350 * MIB + int(2.3 * weights_bytes), PAGE_BYTES + unfolded),
            unfolded_bytes=unfolded,
            packed=any(node.op_type == "MatMulNBits" for node in model.graph.node),
            prompt_ids=runner().prompt_ids(sizes[0], options.prompt, options.seed)[0].tolist(),
            requests=requests,
        )

    def read_upload(self, body: bytes) -> Upload:
        """An upload that fits the schema and this plan. Raises ValueError that says what does not."""
        try:
            upload = Upload.model_validate_json(body)
        except SchemaError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}") from None
        timed, generate, requests = upload.repetitions, self.options.generate, self.options.requests
        turns = [(turn, *entry) for turn, entry in enumerate(self.order)]
        if [(entry.turn, entry.repetition, entry.label) for entry in timed] != turns[: len(timed)]:
            raise ValueError("the turns are not the plan's")
        if any(len(entry.tokens) != generate or len(entry.token_ms) != generate - 1 for entry in timed):
            raise ValueError(f"a turn has not {generate} tokens")
        if any(sum(entry.token_ms) <= 0.0 for entry in timed):
            raise ValueError("a turn took no time")
        loaded, used = [entry.label for entry in upload.loaded], {entry.label for entry in timed}
        if len({*loaded}) < len(loaded) or not used <= {*loaded} <= {*self.bundles}:
            raise ValueError("the bundles that were loaded are not the plan's")
        for label, answers in upload.answers.items():
            items = requests.get(label, ())
            if [len(answer) for answer in answers] != [len(item) for item in items[: len(answers)]]:
                raise ValueError("scores that do not answer the items to score")
        answered = all(len(upload.answers.get(label, ())) == len(items) for label, items in requests.items())
        if upload.complete and not (answered and len(timed) == len(turns)):
            raise ValueError("complete, but something is missing")
        if timed and upload.device is None:
            raise ValueError("figures without a device")
        return upload


def _sizes(*values: Any) -> list[int]:
    return [value for value in values if isinstance(value, int) and value > 0]


# Results


def page_result(
    plan: PagePlan, upload: Upload, name: str, sensors: Mapping[int, Json] | None = None
) -> DeviceResult:
    """The result of an upload with at least one turn. sensors: turn -> readings of the machine after it."""
    device, bundles, options = upload.device, plan.bundles, plan.options
    if device is None:
        raise ValueError("no figures")
    graphs = {}
    for loaded in upload.loaded:
        bundle = bundles[loaded.label]
        facts = {
            **loaded.model_dump(),
            "prompt": options.prompt,
            "generate": options.generate,
            "threads": device.threads,
            "load_s": statistics.median(loaded.load_s),
            "weights_bytes": bundle.weights_bytes,
        }
        graphs[loaded.label] = plan.folders[loaded.label] / bundle.graph, facts
    timed = [
        {
            **entry.model_dump(exclude={"heap_bytes"}),
            "prefill_tokens_per_s": options.prompt / entry.ttft_ms * 1000.0,
            "decode_tokens_per_s": len(entry.token_ms) / sum(entry.token_ms) * 1000.0,
            "peak_memory_bytes": entry.heap_bytes,
            **(sensors or {}).get(entry.turn, {}),
        }
        for entry in upload.repetitions
    ]
    machine = {
        "cpu": device.model,
        "physical_cores": device.cores or device.threads,
        "logical_cpus": device.cores or device.threads,
        "system": device.platform,
        "browser": device.model_dump(),
    }
    result = results.device_result(name, machine, timed, graphs, options)
    rows = [_row(row, bundles[row.label], timed) for row in result.rows]
    groups = [[*bundles]] if upload.open_together else [[label] for label in bundles]
    settings = {**result.options, "groups": groups}
    return replace(result, rows=rows, options=settings, answers=dict(upload.answers))


def _row(row: Timing, bundle: PageBundle, timed: list[Json]) -> Timing:
    """The row with what only a page has."""
    warnings = [*row.warnings]
    if bundle.unfolded_bytes:  # the graph does not hold the sizes of what is read
        row = replace(row, bytes_read_per_token=None, bandwidth_gb_per_s=None, bandwidth_share=None)
    if bundle.packed:
        warnings.append(
            "packed weights are unpacked at every token in WebAssembly, which is slow; `edgedisp export "
            "--target browser` makes a bundle that unpacks them once, at load"
        )
    if hidden := sum(turn["hidden"] for turn in timed if turn["label"] == row.label):
        warnings.append(f"the page was in the background during {hidden} repetitions")
    return replace(row, download_bytes=bundle.download_bytes, warnings=tuple(warnings))
