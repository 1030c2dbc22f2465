"""What the phone page is asked to time, whether what it sends fits, and the rows that come of it.

The plan is fixed before anything is served: the bundles, one random prompt for each vocabulary (the runner's:
same seed, same ids), and the order of the turns, A B B A. The page times and sends back raw milliseconds;
`measured` makes of them what `timing.measure` returns, with the same formulas.

What differs from a measurement by the runner, and is said in the result: `peak_memory_bytes` is the size of
the bundle's WebAssembly heap, not of a process; clocks, temperature and other processes cannot be seen from a
page; `load_s` includes reading the kept file from the browser's storage, but not making the runtime ready.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgedisp import __version__
from edgedisp.bench import page_scores
from edgedisp.bench.graph_facts import read_graph, weight_traffic
from edgedisp.bench.page_bundle import PageBundle, prompt_ids
from edgedisp.bench.page_resources import Resource, json_resource
from edgedisp.bench.spread import percentile
from edgedisp.bench.summary import pair, row, warn_about_bits
from edgedisp.bench.timing import few, turns
from edgedisp.bench.uploads import Figures, Loaded, Repetition, Scores, Upload
from edgedisp.core.errors import BadInput

FORM = 1  # of the plan; the page refuses another
LONGEST_PAUSE_S = 600.0


@dataclass(frozen=True)
class PagePlan:
    """Bundles and options of one serving. `threads` None: the page's own choice, 1 unless told otherwise.

    Raises BadInput where the prompt and the new tokens do not fit into a bundle's context.
    """

    bundles: tuple[PageBundle, ...]
    prompt: int = 128
    generate: int = 128
    repetitions: int = 5
    threads: int | None = None
    seed: int = 0
    warmup: int = 1
    pause_s: float = 0.0
    memory_bytes: int | None = None
    """What the open bundles may take together; None: the page decides by what the phone tells."""
    requests: page_scores.Requests = field(default_factory=dict)
    """Items of each bundle to be scored after the timing."""

    def __post_init__(self) -> None:
        for bundle in self.bundles:
            if self.prompt + self.generate > bundle.context:
                raise BadInput(
                    f"{bundle.folder}: the run needs {self.prompt + self.generate} positions, its context is "
                    f"{bundle.context}; ask for less with --prompt and --generate"
                )

    def options(self) -> dict[str, Any]:
        """As in the other devices' results."""
        names = ("prompt", "generate", "threads", "seed", "warmup", "repetitions", "pause_s")
        return {name: getattr(self, name) for name in names}

    def order(self) -> list[tuple[int, str]]:
        """(repetition, label) of every turn."""
        return turns([bundle.label for bundle in self.bundles], self.repetitions)

    def resources(self) -> dict[str, Resource]:
        """The plan and the bundles' files, by address."""
        labels = [bundle.label for bundle in self.bundles]
        found = {"plan.json": json_resource(self._as_json()), **page_scores.resources(labels, self.requests)}
        for place, bundle in enumerate(self.bundles):
            for name, file in bundle.files.items():
                kind = "application/json" if name.endswith(".json") else "application/octet-stream"
                found[f"bundle/{place}/{name}"] = Resource(kind, file.size_bytes, file.sha256, file.path)
        return found

    def _as_json(self) -> dict[str, Any]:
        return {
            "form": FORM,
            "edgedisp": __version__,
            "options": self.options(),
            "turns": [list(turn) for turn in self.order()],
            "memory_bytes": self.memory_bytes,
            "bundles": [self._bundle_json(place, bundle) for place, bundle in enumerate(self.bundles)],
        }

    def _bundle_json(self, place: int, bundle: PageBundle) -> dict[str, Any]:
        return {
            "label": bundle.label,
            "graph": bundle.graph,
            "external": list(bundle.external),
            "files": {
                name: {"url": f"bundle/{place}/{name}", "size_bytes": file.size_bytes, "sha256": file.sha256}
                for name, file in bundle.files.items()
            },
            "download_bytes": bundle.download_bytes,
            "expected_memory_bytes": bundle.expected_memory_bytes,
            "context": bundle.context,
            "prompt_ids": prompt_ids(bundle.vocab_size, self.prompt, self.seed),
            "requests": page_scores.announced(place, bundle.label, self.requests),
        }

    def accepts(self, upload: Upload) -> str | None:
        """What is wrong with an upload that fits the schema but not this plan; None if nothing is."""
        if isinstance(upload, Scores):
            return page_scores.wrong(upload, self.requests)
        if not isinstance(upload, Figures):
            return None
        order, labels = self.order(), {bundle.label for bundle in self.bundles}
        for turn, found in enumerate(upload.repetitions):
            if turn >= len(order) or (found.repetition, found.label) != order[turn] or found.turn != turn:
                return f"turn {turn} is not the plan's"
            if len(found.token_ms) != self.generate - 1 or len(found.tokens) != self.generate:
                return f"turn {turn} has not {self.generate} tokens"
            if sum(found.token_ms) <= 0.0:
                return f"turn {turn} took no time"
        opened = [loaded.label for loaded in upload.loaded]
        if len(set(opened)) != len(opened) or not set(opened) <= labels:
            return "loaded names other bundles than the plan, or one twice"
        if not {found.label for found in upload.repetitions} <= set(opened):
            return "a bundle was timed that was not loaded"
        if upload.complete and len(upload.repetitions) != len(order):
            return "complete, but turns are missing"
        return None


def measured(
    plan: PagePlan,
    figures: Figures,
    *,
    device: str,
    pairs: Sequence[tuple[str, str]] = (),
    readings: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """What `timing.measure` returns, of a page's figures: rows, repetitions, pairs, machine, order, options.

    Bundles without a timed turn have no row. `readings`: for each turn what was seen of the machine meanwhile
    (browsers on this machine); a phone gives none.
    """
    timed = [_timed(plan, found) for found in figures.repetitions]
    for found, seen in zip(timed, readings):
        found |= seen
    loaded = {entry.label: entry for entry in figures.loaded}
    done = {found["label"] for found in timed}
    told = [bundle for bundle in plan.bundles if bundle.label in done]
    machine = _machine(figures)
    rows = [_row(plan, figures, bundle, loaded[bundle.label], timed, machine) for bundle in told]
    warn_about_bits(rows, machine)
    folders = {bundle.label: bundle.folder for bundle in told}
    held = [bundle.label for bundle in plan.bundles]
    return {
        "device": device,
        "complete": figures.complete,
        "rows": rows,
        "repetitions": timed,
        "pairs": [pair(a, b, folders, timed) for a, b in pairs] if figures.complete else [],
        "machine": machine,
        "load_average": {"before": None, "after": None},
        "order": [found["label"] for found in timed],
        "groups": [held] if figures.held_open else [[label] for label in held],
        "warnings": few(plan.repetitions),
        "options": {**plan.options(), "threads": figures.device.threads},
    }


def _machine(figures: Figures) -> dict[str, Any]:
    """The keys of `machine.describe`, as far as a page can tell, and `browser` with all that it told."""
    device = figures.device
    cores = device.cores or device.threads
    return {
        "cpu": device.model,
        "architecture": None,
        "features": [],
        "physical_cores": cores,
        "logical_cpus": cores,
        "memory_bytes": None,
        "memory_available_bytes": None,
        "system": device.platform,
        "browser": {**device.model_dump(), "peak_memory_is": "the WebAssembly heap of the bundle"},
    }


def _timed(plan: PagePlan, found: Repetition) -> dict[str, Any]:
    """One repetition with the speeds that follow from its times."""
    return {
        "label": found.label,
        "repetition": found.repetition,
        "turn": found.turn,
        "ttft_ms": found.ttft_ms,
        "prefill_tokens_per_s": plan.prompt / found.ttft_ms * 1000.0,
        "decode_tokens_per_s": len(found.token_ms) / sum(found.token_ms) * 1000.0,
        "token_ms": found.token_ms,
        "tokens": found.tokens,
        "wall_s": found.wall_s,
        "cpu_s": None,
        "peak_memory_bytes": found.heap_bytes,
        "proportional_memory_bytes": None,
        "token_ms_p50": percentile(found.token_ms, 0.5),
        "token_ms_p90": percentile(found.token_ms, 0.9),
        "load_average_1m": None,
        "clock_mhz": None,
        "temperature_c": None,
        "other_cpus": None,
        "energy_j": None,
        "battery_j": None,
        "hidden": found.hidden,
    }


def _row(
    plan: PagePlan,
    figures: Figures,
    bundle: PageBundle,
    loaded: Loaded,
    timed: Sequence[dict[str, Any]],
    machine: dict[str, Any],
) -> dict[str, Any]:
    """The row of `summary.row`, and what only a page has: download, runtime, times in the background."""
    facts = {
        "prompt": plan.prompt,
        "generate": plan.generate,
        "threads": figures.device.threads,
        "load_s": statistics.median(loaded.load_s),
        "weights_bytes": bundle.weights_bytes,
        "layers": loaded.layers,
        "vocab_size": loaded.vocab_size,
        "kv_cache_bytes_per_position": loaded.kv_cache_bytes_per_position,
    }
    made = row(bundle.label, bundle.folder, facts, timed, machine)
    if bundle.graph != "model.onnx":
        made |= _traffic(bundle, facts, made["decode_tokens_per_s"])
    if bundle.packed:
        made["warnings"].append(
            "packed weights are unpacked at every token in WebAssembly, which is slow; `edgedisp export "
            "--target browser` makes a bundle that unpacks them once, at load"
        )
    hidden = sum(1 for found in timed if found["label"] == bundle.label and found["hidden"])
    if hidden:
        made["warnings"].append(f"the page was in the background during {hidden} repetitions")
    return {
        **made,
        "runtime_load_s": loaded.runtime_load_s,
        "download_s": loaded.download_s,
        "download_bytes": bundle.download_bytes,
    }


def _traffic(bundle: PageBundle, facts: dict[str, Any], decode_tokens_per_s: float) -> dict[str, Any]:
    """Bytes read per token of the graph that the page opens, where the bundle has another one for others.

    None where its weights are unfolded to fp32: the graph does not tell their sizes.
    """
    traffic = weight_traffic(read_graph(bundle.folder / bundle.graph))
    positions = facts["prompt"] + facts["generate"] / 2
    read = traffic["weight_bytes_per_token"] + int(facts["kv_cache_bytes_per_position"] * positions)
    if bundle.unfolded:
        unknown = {"bytes_read_per_token": None, "implied_bandwidth_gb_per_s": None}
        return {"weight_bits": traffic["weight_bits"], **unknown}
    return {
        "weight_bits": traffic["weight_bits"],
        "bytes_read_per_token": read,
        "implied_bandwidth_gb_per_s": read * decode_tokens_per_s / 1e9,
    }
