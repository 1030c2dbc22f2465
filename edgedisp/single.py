"""Commands that work on one model or bundle, outside a run: export, bench, the plan's probe.

Like `stages/`, this is a place where rooms meet; what it does is short.
"""

from __future__ import annotations

import difflib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from edgedisp import BadInput, Progress, corpus, data_folder, model
from edgedisp.bench import local
from edgedisp.bench.machine import physical_cores
from edgedisp.dispersion.collect import decoder_layers
from edgedisp.folder import MANIFEST, changed_files, check_files
from edgedisp.graph import check
from edgedisp.graph.export import export as export_graph
from edgedisp.graph.layouts import LAYOUTS
from edgedisp.pipeline import Observer, as_computed
from edgedisp.quantize.rewrite import quantize_bundle
from edgedisp.recipe import BITS, Recipe, Target, load_target
from edgedisp.report import bundle_card
from edgedisp.stages import fetch_base, pack, provenance_of
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
        record = pack(target, chosen, threads, bundle, folder, grid, provenance_of(folder), packed)
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
        load=model.load,
        progress=observer.progress,
    )
    bundle = parent
    if target.precision != "fp32":
        bundle = parent.with_name(target.precision)
        bundle.mkdir()
        options = target.quantize.model_dump()
        bits = BITS[target.precision]
        grid = quantize_bundle(parent, bundle, bits=bits, **options, progress=observer.progress)
    text = corpus.made_documents(1, seed=0)[0].text
    ids = model.encode(model.load_tokenizer(folder), text)
    checked = check.check(bundle, [ids[:8], ids[:24]], texts=[text], threads=threads)
    return bundle, {**grid, "checked": checked}


def time_bundles(
    bundles: list[Path],
    device: str,
    prompt: int,
    generate: int,
    repetitions: int,
    threads: int | None,
    progress: Progress,
) -> dict[str, Any]:
    """Time bundles on a device, interleaved. Raises BadInput for an unknown device or no bundle."""
    if device != "local":
        raise BadInput(f"--device {device}: is not known; there is `local`")
    labels = _labels(bundles)
    runner = data_folder("export") / "runner" / "edgedisp_runner.py"
    return local.measure(
        labels,
        runner=runner,
        prompt=prompt,
        generate=generate,
        repetitions=repetitions,
        threads=threads or physical_cores(),
        seed=0,
        pause_s=0.0,
        progress=progress,
    )


def _labels(bundles: list[Path]) -> dict[str, Path]:
    """The shortest distinct endings of the paths: `baseline/int4`."""
    for bundle in bundles:
        if not (bundle / "model.onnx").is_file():
            raise BadInput(f"{bundle}: holds no model.onnx; a bundle is a folder such as <run>/<arm>/int4")
        check_files(bundle)
    for depth in range(1, 12):
        labels = {"/".join(bundle.resolve().parts[-depth:]): bundle for bundle in bundles}
        if len(labels) == len(bundles):
            return labels
    raise BadInput("the same bundle is named twice")


def render_bench(timed: dict[str, Any]) -> str:
    lines = [
        f"{'bundle':28} {'ttft ms':>9} {'prefill t/s':>12} {'decode t/s':>11}"
        f" {'load s':>7} {'peak MB':>8} {'MB':>6}"
    ]
    for row in timed["rows"]:
        lines.append(
            f"{row['label']:28} {row['ttft_ms']:9.1f} {row['prefill_tokens_per_s']:12.0f}"
            f" {row['decode_tokens_per_s']:11.1f} {row['load_s']:7.2f} {row['peak_memory_bytes'] / 1e6:8.0f}"
            f" {row['weights_bytes'] / 1e6:6.0f}"
        )
    return "\n".join([*lines, *(f"note: {warning}" for warning in timed.get("warnings", []))])


def probe_base(recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Open the base and time a few training steps; see `edgedisp.train.probe`."""
    from edgedisp.stages import train_settings  # these load the Trainer, which no other command here needs
    from edgedisp.train.adapter import adapter_size
    from edgedisp.train.probe import time_steps

    opened: Any
    if recipe.is_smoke:
        texts = [document.text for document in corpus.made_documents(50, seed=0)]
        opened, _ = model.twin(recipe.model.architecture or "", texts, seed=0, context=recipe.data.context)
    else:
        where = fetch_base(recipe.model, recipe.folder, progress)
        opened, _ = model.open_base(
            where,
            revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
            architecture=recipe.model.architecture,
        )
    parameters = model.size_by_component(opened)["total"]
    chosen = recipe.train.adapter
    facts = {
        "parameters": parameters,
        "trainable": parameters
        if chosen is None
        else adapter_size(decoder_layers(opened), chosen.rank, chosen.targets),
        "memory_bytes": psutil.virtual_memory().total,
    }
    settings = train_settings(as_computed(recipe.train), recipe.steps, recipe.seed)
    vocabulary = opened.config.vocab_size
    return {
        **facts,
        **time_steps(opened, settings, recipe.data.context, vocabulary=vocabulary, progress=progress),
    }
