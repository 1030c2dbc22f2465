"""What the phone page is given (plan.json, items to score), what it may send, and the result of it.

A phone is not trusted: texts have a length and lose their control characters (they are printed on a
terminal), lists and numbers have bounds, unknown keys are errors, and an upload must fit the plan. Other than
with the runner, `peak_memory_bytes` is the size of the bundle's WebAssembly heap, `load_s` includes reading
the file from the browser's storage, and a page sees neither clocks nor other processes.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter
from pydantic import ValidationError as SchemaError

from edgedisp import __version__
from edgedisp.bench import results
from edgedisp.bench.bundles import PageBundle
from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.interleaved_timing import turns
from edgedisp.bench.page_server import Resource, json_resource
from edgedisp.bench.system import runner
from edgedisp.core.errors import BadInput
from edgedisp.core.progress import printable
from edgedisp.core.results import DeviceResult, Json, Timing

FORM = 1  # of the plan; the page refuses another

# Uploads

Text = Annotated[str, StringConstraints(max_length=500), AfterValidator(printable)]
Number = Annotated[float, Field(ge=0.0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=1 << 50)]
Score = tuple[Annotated[float, Field(ge=-1e9, le=0.01, allow_inf_nan=False)], bool]
"""Sum of log-probabilities (rounding may leave it above 0), and whether each token was the likeliest."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DeviceFacts(_Strict):
    """The browser and the phone, as the browser describes them; None: not known."""

    user_agent: Text
    model: Text | None
    platform: Text | None
    cores: Count | None
    device_memory_gb: Number | None  # rounded and capped at 8 by the browser
    simd: bool
    isolated: bool  # cross-origin isolated: threads are possible, and the clock has its finest steps
    secure: bool
    threads: Annotated[int, Field(ge=1, le=256)]
    clock_resolution_ms: Number
    runtime: Text
    width: Count
    height: Count


class Loaded(_Strict):
    """A bundle that was opened. load_s: one entry for each time."""

    label: Text
    load_s: Annotated[list[Number], Field(min_length=1, max_length=2000)]
    layers: Count
    vocab_size: Count
    kv_cache_bytes_per_position: Count


class Repetition(_Strict):
    """One prompt and its tokens, timed in the worker. hidden: the page was not in front meanwhile."""

    label: Text
    repetition: Count
    turn: Count
    ttft_ms: Number
    token_ms: Annotated[list[Number], Field(min_length=1, max_length=8192)]
    tokens: Annotated[list[Count], Field(min_length=1, max_length=8192)]
    wall_s: Number
    heap_bytes: Count | None
    hidden: bool


class _Upload(_Strict):
    run: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]  # one page load


class Figures(_Upload):
    """All that was measured so far; each sending replaces the one before."""

    kind: Literal["figures"]
    complete: bool
    open_together: bool  # all bundles were open at the same time; else each was loaded again for its turn
    device: DeviceFacts
    loaded: Annotated[list[Loaded], Field(max_length=64)]
    repetitions: Annotated[list[Repetition], Field(max_length=2000)]


class Scores(_Upload):
    """Answers to some items that were to be scored. first: index of the first among the bundle's items."""

    kind: Literal["scores"]
    label: Text
    first: Count
    answers: Annotated[list[Annotated[list[Score], Field(max_length=1000)]], Field(max_length=100)]


class Step(_Upload):
    """A line of progress."""

    kind: Literal["step"]
    done: Count
    total: Count
    note: Text


class Trouble(_Upload):
    """The page could not go on."""

    kind: Literal["trouble"]
    message: Text


Upload = Figures | Scores | Step | Trouble
UPLOAD: TypeAdapter[Upload] = TypeAdapter(Annotated[Upload, Field(discriminator="kind")])


# The plan


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

    def order(self) -> list[tuple[int, str]]:
        """(repetition, label) of every turn."""
        return turns([bundle.label for bundle in self.bundles], self.options.repetitions)

    def resources(self) -> dict[str, Resource]:
        """The plan, the items to score and the bundles' files, by address."""
        resources: dict[str, Resource] = {}
        bundles = []
        for index, bundle in enumerate(self.bundles):
            requests, urls = None, {name: f"bundle/{index}/{name}" for name in bundle.files}
            if items := self.options.requests.get(bundle.label):
                requests = {"url": f"requests/{index}.json", "items": len(items)}
                resources[f"requests/{index}.json"] = json_resource(items)
            resources |= {urls[name]: file for name, file in bundle.files.items()}
            prompt = runner().prompt_ids(bundle.vocab_size, self.options.prompt, self.options.seed)
            bundles.append(
                {
                    **{key: getattr(bundle, key) for key in ("label", "graph", "external", "context")},
                    "files": {
                        name: {"url": urls[name], "size_bytes": file.size_bytes, "sha256": file.tag}
                        for name, file in bundle.files.items()
                    },
                    "download_bytes": bundle.download_bytes,
                    "expected_memory_bytes": bundle.expected_memory_bytes,
                    "prompt_ids": prompt[0].tolist(),
                    "requests": requests,
                }
            )
        names = ("prompt", "generate", "threads", "seed", "warmup", "repetitions", "pause_s")
        plan = {
            "form": FORM,
            "edgedisp": __version__,
            "options": {name: getattr(self.options, name) for name in names},
            "turns": self.order(),
            "memory_bytes": self.options.memory_bytes,
            "bundles": bundles,
        }
        return {"plan.json": json_resource(plan), **resources}

    def read_upload(self, body: bytes) -> Upload:
        """An upload that fits the schema and this plan. Raises ValueError that says what does not."""
        try:
            upload = UPLOAD.validate_json(body)
        except SchemaError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValueError(f"{'.'.join(map(str, first['loc'])) or 'the body'}: {first['msg']}") from None
        if fault := self.fault(upload):
            raise ValueError(fault)
        return upload

    def fault(self, upload: Upload) -> str | None:
        """What is wrong with an upload that fits the schema but not this plan; None if nothing is."""
        if isinstance(upload, Scores):
            items = self.options.requests.get(upload.label, ())
            if upload.first + len(upload.answers) > len(items):
                return "scores of items that were not asked for"
            sizes = map(len, items[upload.first : upload.first + len(upload.answers)])
            if list(sizes) != [len(answer) for answer in upload.answers]:
                return "an item has more or fewer scores than it has requests"
        if not isinstance(upload, Figures):
            return None
        order, generate = self.order(), self.options.generate
        for turn, timed in enumerate(upload.repetitions):
            if turn >= len(order) or (timed.repetition, timed.label) != order[turn] or timed.turn != turn:
                return f"turn {turn} is not the plan's"
            if len(timed.token_ms) != generate - 1 or len(timed.tokens) != generate:
                return f"turn {turn} has not {generate} tokens"
            if timed.ttft_ms <= 0.0 or sum(timed.token_ms) <= 0.0:
                return f"turn {turn} took no time"
        loaded = [bundle.label for bundle in upload.loaded]
        if len(set(loaded)) != len(loaded) or not set(loaded) <= {bundle.label for bundle in self.bundles}:
            return "loaded names other bundles than the plan, or one twice"
        if not {timed.label for timed in upload.repetitions} <= set(loaded):
            return "a bundle was timed that was not loaded"
        if upload.complete and len(upload.repetitions) != len(order):
            return "complete, but turns are missing"
        return None


class PageRun:
    """What one page load has sent so far. sensors: turn -> readings of the machine after it."""

    def __init__(self, plan: PagePlan) -> None:
        self.plan = plan
        self.figures: Figures | None = None
        self.answers: dict[str, list[Any]] = {label: [] for label in plan.options.requests}
        self.sensors: dict[int, Json] = {}

    def add(self, upload: Figures | Scores) -> None:
        """Figures replace those before. Scores may be sent again, and those after a gap are left out."""
        if isinstance(upload, Figures):
            self.figures = upload
            return
        answers = self.answers.get(upload.label)
        if answers is not None and upload.first <= len(answers):
            answers += upload.answers[len(answers) - upload.first :]

    @property
    def turns(self) -> int:
        """How many turns were timed."""
        return len(self.figures.repetitions) if self.figures else 0

    @property
    def complete(self) -> bool:
        """Whether every turn was timed and every item is answered."""
        requests = self.plan.options.requests
        answered = all(len(self.answers[label]) == len(items) for label, items in requests.items())
        return self.figures is not None and self.figures.complete and answered

    def result(self, device: str) -> DeviceResult:
        """The result of the figures and answers so far; there must be figures."""
        plan, figures = self.plan, self.figures
        if figures is None:
            raise ValueError("no figures")
        timed = [_timed(plan, turn) | self.sensors.get(turn.turn, {}) for turn in figures.repetitions]
        bundles = {bundle.label: bundle for bundle in plan.bundles}
        loaded = {entry.label: entry for entry in figures.loaded}
        graphs = {
            label: (bundle.folder / bundle.graph, _facts(plan, figures.device, bundle, loaded[label]))
            for label, bundle in bundles.items()
            if label in loaded
        }
        result = results.device_result(device, _machine(figures.device), timed, graphs, plan.options)
        hidden = Counter(turn["label"] for turn in timed if turn["hidden"])
        rows = [_row(row, bundles[row.label], hidden[row.label]) for row in result.rows]
        groups = [[*bundles]] if figures.open_together else [[label] for label in bundles]
        options = {**result.options, "groups": groups}
        return replace(result, rows=rows, options=options, answers=self.answers)


def _machine(device: DeviceFacts) -> Json:
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


def _timed(plan: PagePlan, repetition: Repetition) -> Json:
    """One repetition as the runner gives it: with speeds, and None for what a page does not see."""
    unknown = ("cpu_s", "load_average_1m", "clock_mhz", "temperature_c", "other_cpus")
    return {
        **repetition.model_dump(exclude={"heap_bytes"}),
        **dict.fromkeys(unknown),
        "prefill_tokens_per_s": plan.options.prompt / repetition.ttft_ms * 1000.0,
        "decode_tokens_per_s": len(repetition.token_ms) / sum(repetition.token_ms) * 1000.0,
        "peak_memory_bytes": repetition.heap_bytes,
    }


def _facts(plan: PagePlan, device: DeviceFacts, bundle: PageBundle, loaded: Loaded) -> Json:
    """The facts of a bundle as the runner gives them."""
    return {
        "prompt": plan.options.prompt,
        "generate": plan.options.generate,
        "threads": device.threads,
        "weights_bytes": bundle.weights_bytes,
        "load_s": statistics.median(loaded.load_s),
        **loaded.model_dump(include=set(results.SHAPE)),
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
