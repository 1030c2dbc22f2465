"""Commands that work on one model or bundle, outside a run: export, bench, the plan's probe.

Like `stages/`, this is a place where rooms meet; what it does is short.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from edgedisp import data, models
from edgedisp.bench import devices
from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.results import label_bundles, twin_pairs
from edgedisp.bench.system import physical_cores
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import MANIFEST, changed_files, check_files, update_listing, write_json
from edgedisp.core.progress import Progress
from edgedisp.data import cache_folder
from edgedisp.dispersion.hooks import decoder_layers
from edgedisp.graph import genai_config
from edgedisp.graph.export import export as export_graph
from edgedisp.graph.runtime_layouts import LAYOUTS
from edgedisp.graph.session import OnnxModel
from edgedisp.graph.verify import check_bundle
from edgedisp.pipeline import Observer, as_computed
from edgedisp.quantize.onnx_rewrite import quantize_bundle
from edgedisp.recipe import BITS, Recipe, Target, load_target
from edgedisp.report import bundle_card
from edgedisp.stages import PackOptions, device_scores, fetch_base, pack, provenance_of
from edgedisp.stages.device_scores import Wish
from edgedisp.stages.packing import CARD


def export_for_target(
    folder: Path, target_name: str, out: Path, observer: Observer, layouts: Sequence[str] | None = None
) -> dict[str, Any]:
    """Export a Hugging Face folder to a bundle for a device profile; `out` appears whole or not at all.

    `layouts` None: the profile's. Raises BadInput for an unknown target or layout, a folder without a model
    or a tokenizer, or an `out` that exists.
    """
    target = load_target(target_name)
    chosen = _check_export(folder, out, layouts or target.layouts)
    threads = target.threads or physical_cores()
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.resolve().parent) as scratch:
        parent, packed = Path(scratch) / "fp32", Path(scratch) / "packed"
        parent.mkdir()
        packed.mkdir()
        bundle, grid = _checked_bundle(folder, target, threads, parent, observer)
        options = PackOptions(target, chosen, threads, grid, provenance_of(folder))
        record = pack(options, bundle, folder, packed)
        manifest = json.loads((packed / MANIFEST).read_text(encoding="utf-8"))
        (packed / CARD).write_text(bundle_card(manifest, out.name), encoding="utf-8")
        packed.rename(out)
    return {**record, "checked": grid["checked"]}


def _check_export(folder: Path, out: Path, layouts: Sequence[str]) -> list[str]:
    """Refuse what would fail later; returns the layouts, each once and in their usual order."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; `edgedisp build` leaves one under <run>/<arm>/model")
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: no model folder (config.json is missing); name a Hugging Face folder")
    if not (folder / "tokenizer.json").is_file():
        raise BadInput(f"{folder}: no tokenizer.json; a bundle needs the fast form of the tokenizer")
    if out.exists():
        raise BadInput(f"{out}: exists already; choose another --out")
    if changed := changed_files(folder, "*.safetensors"):
        raise BadInput(
            f"{folder}: {changed[0]} is not the file that record.json was written for (its SHA-256 differs): "
            "damaged, or changed since; if you changed it, remove record.json"
        )
    for name in layouts:
        if name not in LAYOUTS:
            guess = difflib.get_close_matches(name, LAYOUTS, n=1)
            meant = f"did you mean '{guess[0]}'? " if guess else ""
            raise BadInput(f"--layouts: '{name}' is not known; {meant}(choices: {', '.join(LAYOUTS)})")
    return [name for name in LAYOUTS if name in layouts]


def _checked_bundle(
    folder: Path, target: Target, threads: int, parent: Path, observer: Observer
) -> tuple[Path, dict[str, Any]]:
    """The bundle at the target's precision, opened and checked, and the record of its grid."""
    observer.progress(0, 3, "writing the graph")
    grid = export_graph(
        folder,
        parent,
        threads=threads,
        max_context=target.context,
        progress=observer.progress,
    )
    bundle = parent
    if target.precision != "fp32":
        bundle = parent.with_name(target.precision)
        bundle.mkdir()
        options = target.quantize.model_dump()
        bits = BITS[target.precision]
        grid = quantize_bundle(parent, bundle, bits=bits, **options, progress=observer.progress)
    text = data.synthetic_documents(1, seed=0)[0].text
    ids = models.encode(models.load_tokenizer(folder), text)
    checked = check_bundle(OnnxModel(bundle, threads), [ids[:8], ids[:24]], texts=[text])
    return bundle, {**grid, "checked": checked}


def time_bundles(
    bundles: list[Path],
    device_names: list[str],
    options: BenchOptions,
    progress: Progress,
    wish: Wish | None = None,
    *,
    write_threads: bool = False,
) -> dict[str, Any]:
    """Time bundles on every device, those of one device interleaved.

    Returns {format, devices [one result each, see bench/devices.py]}, and with `write_threads`, which writes
    the best counts of a sweep into the bundles, `written` {label: threads}. All devices are reached before
    anything is timed. One that is lost in the middle has `lost` in its result; the others are timed all the
    same. `wish`: score items of tasks there too; devices then have `scores`, and `scored` says what these
    have in common.

    Raises BadInput for a device that is not known or cannot be used, or a bundle that cannot be timed.
    """
    addresses = devices.parse_all(device_names)
    if write_threads:
        _check_write_threads(addresses, options)
    labels = _labels(bundles)
    questions = None if wish is None else device_scores.prepared(wish, labels, cache_folder())
    options = replace(
        options,
        pairs=twin_pairs(list(labels)),
        requests={} if questions is None else questions.requests,
    )
    results = []
    with ExitStack() as stack:
        connected = [stack.enter_context(devices.connect(address, labels, options)) for address in addresses]
        for address, device in zip(addresses, connected):
            try:
                result = device.measure(progress)
            except devices.DeviceLost as error:
                result = error.partial
            results.append({**result, "device": address.name, "kind": address.kind})
    timed: dict[str, Any] = {"format": 1, "devices": results}
    if questions is not None:
        try:
            timed |= device_scores.with_scores(questions, results, physical_cores(), progress)
        except BuildFailed as error:  # what the devices gave is shown before it ends the command
            timed["unscored"] = str(error)
    if write_threads and "lost" not in results[0]:
        best = {label: sweep["best"] for label, sweep in results[0]["threads"].items()}
        for label, threads in best.items():
            write_bundle_threads(labels[label], threads)
        timed["written"] = best
    return timed


def _check_write_threads(addresses: Sequence[devices.Address], options: BenchOptions) -> None:
    if options.threads != "sweep":
        raise BadInput("--write-threads: writes what a sweep has found; give --threads sweep too")
    if len(addresses) > 1:
        raise BadInput("--write-threads: a bundle holds the threads of one device; name one --device")


def lost_devices(timed: Mapping[str, Any]) -> list[str]:
    """`device: why` for each device that was lost in the middle, and why scores here are missing."""
    lost = [f"{found['device']}: {found['lost']}" for found in timed["devices"] if "lost" in found]
    return lost + ([f"scores: {timed['unscored']}"] if "unscored" in timed else [])


def write_bundle_threads(bundle: Path, threads: int) -> None:
    """Write the thread count into a packed bundle, and keep its manifest (and a run's record) true.

    Raises BadInput for a bundle without a manifest: inside a run, later stages were made from it as it is.
    """
    if not (bundle / MANIFEST).is_file():
        raise BadInput(
            f"{bundle}: --write-threads needs a bundle for a device (with {MANIFEST}); `edgedisp export` and "
            "the `targets` of a build make them"
        )
    genai_config.set_threads(bundle, threads)
    manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    write_json(bundle / MANIFEST, {**manifest, "threads": threads})
    update_listing(bundle, ("genai_config.json",))


def _labels(bundles: list[Path]) -> dict[str, Path]:
    """Every bundle by a short name, once it is known to be one, whole and as it was made."""
    for bundle in bundles:
        if not (bundle / "model.onnx").is_file() and not any(bundle.glob("onnx/*.onnx")):
            raise BadInput(f"{bundle}: holds no model.onnx; a bundle is a folder such as <run>/<arm>/int4")
        check_files(bundle)
    return label_bundles(bundles)


def probe_base(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Open the base and time a few training steps; see `time_steps`."""
    from edgedisp.train.lora import adapter_size
    from edgedisp.train.performance import time_steps

    opened: Any
    if recipe.is_smoke:
        texts = [document.text for document in data.synthetic_documents(50, seed=0)]
        opened, _ = models.tiny_model(
            recipe.model.architecture or "", texts, seed=0, context=recipe.data.context
        )
    else:
        where = fetch_base(recipe.model, recipe.folder, progress)
        opened, _ = models.open_base(
            where,
            revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
            architecture=recipe.model.architecture,
        )
    parameters = models.count_parameters(opened)["total"]
    chosen = recipe.train.adapter
    facts = {
        "parameters": parameters,
        "trainable": parameters
        if chosen is None
        else adapter_size(decoder_layers(opened), chosen.rank, chosen.targets),
        "memory_bytes": psutil.virtual_memory().total,
    }
    train = as_computed(recipe.train)
    return {**facts, **time_steps(opened, train, recipe.data.context, recipe.seed, progress)}
