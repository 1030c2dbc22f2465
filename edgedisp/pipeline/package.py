"""The bundle that ships: made ready for a kind of device, laid out for its runtimes, with a manifest.

What was measured is what ships: weights and products are those of the bundle that it is made from, and every
graph in it must give that bundle's logits bit for bit before the stage is done. The graph for a browser is
the exception: WebAssembly has fp32 products alone, so its logits are those of the bundle in fp32 arithmetic.

`manifest.json` says all that someone needs who has nothing but the folder: every file with its size and
SHA-256, the grid of the weights, the base and its licence, how each runtime opens it, and where it comes
from. README.md is the one file that it does not list: the card may be written, and edited, later.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedisp import __version__, data, models
from edgedisp.bench.system import installed_version
from edgedisp.core.files import MANIFEST, file_digest, git_commit, list_files, write_json
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import read
from edgedisp.graph import runtime_layouts
from edgedisp.graph.device_graph import for_device
from edgedisp.pipeline.options import PackageOptions
from edgedisp.pipeline.prepare import weights_digest
from edgedisp.recipe import Target
from edgedisp.recipe.recipe import hash8

CARD = "README.md"
GRID = ("bits", "group", "symmetric", "head_bits", "method", "accuracy_level")
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai")
COMPARED_TOKENS = 24


@dataclass(frozen=True)
class BundlePlan:
    """A bundle for a device. layouts: runtimes that must open it. grid: the record of its quantization.
    provenance: where it comes from, for the manifest."""

    target: Target
    layouts: Sequence[str]
    threads: int
    grid: dict[str, Any]
    provenance: dict[str, Any]


def package(
    options: PackageOptions,
    *,
    bundle: Path,
    model: Path,
    base: Path,
    corpus: Path,
    output_dir: Path,
    progress: Progress,
) -> dict[str, Any]:
    """What was measured, for a device: the stage of a build."""
    record, text = read(bundle), read(corpus)
    provenance = {
        **options.origin,
        "data_sha256": text.results.get("tokens_sha256") if text else None,
        "weights_sha256": weights_digest(model),
    }
    grid = record.results if record else {}
    plan = BundlePlan(options.target, options.target.layouts, options.threads, grid, provenance)
    return write_package(plan, bundle, base, output_dir)


def write_package(options: BundlePlan, bundle: Path, licence_dir: Path, output_dir: Path) -> dict[str, Any]:
    """Write `bundle` for a device into the empty folder `output_dir`; the licence lies in `licence_dir`.

    Returns {target, layouts, threads, context, precision, size_bytes, files}; size_bytes counts every file.
    """
    target = options.target
    device = for_device(
        bundle,
        output_dir,
        threads=options.threads,
        context=target.context,
        last_logits=target.logits == "last",
    )
    is_browser = target.architecture == "wasm32"
    layouts = runtime_layouts.arrange(output_dir, options.layouts, target.precision, browser=is_browser)
    tokenizer = models.load_tokenizer(bundle)
    ids = models.encode(tokenizer, data.synthetic_documents(1, seed=0)[0].text)[:COMPARED_TOKENS]
    runtime_layouts.check_same(output_dir, runtime_layouts.graphs(layouts), bundle, ids, options.threads)
    licence = models.copy_licence(licence_dir, output_dir)
    grid = options.grid
    files = list_files(output_dir, without=(MANIFEST, CARD, "key.json"))
    manifest = {
        "format": 1,
        "target": target.name,
        "architecture": target.architecture,
        "precision": target.precision,
        "grid": None if target.precision == "fp32" else {key: grid.get(key) for key in GRID},
        "threads": device["threads"],
        "context": device["context"],
        "logits": target.logits,
        "size_bytes": sum(entry["size_bytes"] for entry in files.values()),
        "layouts": layouts,
        "tokenizer_sha256": file_digest(output_dir / "tokenizer.json"),
        "base": licence,
        "provenance": {**options.provenance, **_versions()},
        "files": files,
    }
    write_json(output_dir / MANIFEST, manifest)
    kept = ("target", "threads", "context", "precision", "size_bytes")
    return {**{key: manifest[key] for key in kept}, "layouts": list(layouts), "files": len(files)}


def _versions() -> dict[str, Any]:
    versions = {name: version for name in PACKAGES if (version := installed_version(name))}
    return {"edgedisp": __version__, "git_commit": git_commit(), "versions": versions}


def provenance_of(model_folder: Path) -> dict[str, Any]:
    """What a model folder on its own tells of where it comes from; inside a run, what the run's records say.

    {recipe: {name, hash8} | None, data_sha256, seed, arm, weights_sha256}, None for what is not known.
    """
    found: dict[str, Any] = {"recipe": None, "data_sha256": None, "seed": None, "arm": None}
    found["weights_sha256"] = weights_digest(model_folder)
    record = read(model_folder)
    if record is None:
        return found
    arm, _, kind = str(record.key.get("stage", "")).rpartition("/")
    run = model_folder.resolve().parent.parent
    try:
        owner = json.loads((run / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return found  # copied out of its run
    corpus_record = read(run / "corpus")
    if kind == "model" and corpus_record is not None:
        found["recipe"] = {"name": owner["name"], "hash8": hash8(owner["identity"])}
        found["data_sha256"] = corpus_record.results.get("tokens_sha256")
        found |= {"arm": arm, "seed": record.results.get("settings", {}).get("seed")}
    return found
