"""ONNX bundles: exported, quantized (with or without a search for the bits), compared, packaged for devices.

What was measured is what ships: a package has the weights and products of the bundle that it is made from,
and every graph in it must give that bundle's logits bit for bit. The graph for a browser is the exception:
WebAssembly has fp32 products alone, so its logits are those of the bundle in fp32 arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgedisp import __version__, data, models
from edgedisp.bench.system import installed_version
from edgedisp.core.errors import BuildFailed
from edgedisp.core.files import MANIFEST, file_digest, git_commit, list_files, read_json, sealed, write_json
from edgedisp.core.progress import Progress
from edgedisp.core.stage_folder import RUN, read
from edgedisp.graph.export import export as export_graph
from edgedisp.graph.runtime_layouts import GGUF, arrange, for_device
from edgedisp.graph.verify import check_layouts
from edgedisp.pipeline.options import PackageOptions, QuantizeOptions, SearchOptions
from edgedisp.pipeline.prepare import training_text, weights_digest
from edgedisp.pipeline.rounding import gptq_blocks, outer_method, trained_blocks
from edgedisp.pipeline.stage import Inputs, results_of
from edgedisp.quantize.delta_survival import survival
from edgedisp.quantize.gguf_file import write_gguf
from edgedisp.quantize.mixed_precision import MixedPrecision, Search, assignment_of
from edgedisp.quantize.onnx_rewrite import quantize_assigned, quantize_bundle
from edgedisp.recipe.recipe import hash8

CARD = "README.md"
GRID = ("bits", "group", "symmetric", "head_bits", "method", "accuracy_level")
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai")
COMPARED_TOKENS = 24


def export(threads: int, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """The fp32 ONNX bundle."""
    return export_graph(inputs["model"], output_dir, threads=threads, progress=progress)


def quantize(
    options: QuantizeOptions, inputs: Inputs, output_dir: Path, progress: Progress
) -> dict[str, Any]:
    """A quantized bundle from the fp32 one; gptq also reads the model and calibrates it on the training text.
    Where the model was trained under gptq's rounding, its scales lie in the model's folder."""
    rounding, section, blocks = options.rounding, options.rounding.section, None
    if (folder := inputs.get("model")) is not None:
        model = models.load(folder)
        if options.is_trained:
            blocks = trained_blocks(rounding, model, folder)
        else:
            blocks = gptq_blocks(rounding, model, inputs["corpus"], progress)
        del model
    grid = section.model_dump(include={"group", "symmetric", "accuracy_level", "head_bits"})
    grid |= {"bits": rounding.bits, "method": "rtn" if options.is_trained else outer_method(section)}
    record = quantize_bundle(inputs["bundle"], output_dir, **grid, blocks=blocks, progress=progress)
    return {**record, "method": section.method, "is_trained": options.is_trained}


def quantize_searched(
    options: SearchOptions, inputs: Inputs, output_dir: Path, progress: Progress
) -> dict[str, Any]:
    """The int4 bundle whose weights' bits, groups and methods are searched for under the recipe's budget.

    Inputs: bundle (fp32), model, corpus; decider: the bundle of the arm whose assignment this one takes. The
    search sees training text, never what is scored later. The record is that of `quantize_assigned`, with
    `search`: {goal, size_bytes, tokens, measured_kl, perplexity_increase} and what `Search.record` returns,
    or decided_by. BadInput when the goal is out of reach, saying what is not.
    """
    int4, bundle, decider = options.int4, inputs["bundle"], inputs.get("decider")
    is_gptq, corpus = int4.method == "gptq", inputs["corpus"]
    text = training_text(corpus)
    calibration = text.first(int4.calibration_tokens) if is_gptq else None
    arguments = bundle, models.load(inputs["model"]), text.tokens, calibration, progress
    goal = {"budget": options.budget, "max_perplexity_increase": options.max_perplexity_increase}
    rounding: MixedPrecision
    if decider is None:
        rounding = searched = Search(*arguments)
        if options.budget is not None:
            solution = searched.within(options.budget)
            rounded = searched.round(solution.assignment)
        else:
            solution, rounded = searched.below(options.max_perplexity_increase or 0.0)
        assignment, search = solution.assignment, searched.record(solution, rounded)
    else:
        rounding, search = MixedPrecision(*arguments), {"decided_by": decider.parent.name}
        assignment = assignment_of(results_of(decider)["by_tensor"])
        rounded = rounding.round(assignment)
    search |= {"goal": goal, "tokens": rounding.tokens, "measured_kl": rounded.measured_kl}
    search["perplexity_increase"] = rounded.perplexity_increase
    level, blocks = int4.accuracy_level, rounded.blocks
    record = quantize_assigned(
        bundle, output_dir, assignment, accuracy_level=level, blocks=blocks, progress=progress
    )
    search["size_bytes"] = size = record["size_bytes"]
    if options.budget is not None and size > options.budget:
        raise BuildFailed(f"the bundle takes {size} bytes, the budget is {options.budget}")
    for row in record["by_tensor"] if is_gptq else ():
        if row["component"] not in ("embedding", "head"):
            row["method"] = "gptq"
    grid = {"bits": 4, "method": "gptq" if is_gptq else "search", "accuracy_level": level}
    return {**grid, **record, "search": search}


def delta_survival(options: None, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """What is left of the packed weights' change since the base, and from the baseline's model where there is
    one, on the steps of the bundle (quantize/delta_survival.py); of each weight in survival.json."""
    folders = {name: inputs[name] for name in ("base", "baseline") if name in inputs}
    folders["trained"] = inputs["model"]
    weights = {name: models.load_weights(folder) for name, folder in folders.items()}
    by_tensor = results_of(inputs["bundle"])["by_tensor"]
    results = survival(inputs["bundle"], inputs["parent"], by_tensor, weights, progress)
    write_json(output_dir / "survival.json", results)
    for reference in results["references"].values():
        del reference["tensors"]
    return results


# Packages for devices


def package(options: PackageOptions, inputs: Inputs, output_dir: Path, progress: Progress) -> dict[str, Any]:
    """What was measured, for a device: the stage of a build."""
    digests = {"data_sha256": results_of(inputs["corpus"])["tokens_sha256"]}
    digests["weights_sha256"] = weights_digest(inputs["model"])
    options = replace(options, origin={**options.origin, **digests})
    folders = {"model": inputs["model"], "licence_dir": inputs["base"], "output_dir": output_dir}
    return write_package(options, results_of(inputs["bundle"]), inputs["bundle"], **folders)


def write_package(
    options: PackageOptions,
    grid: Mapping[str, Any],
    bundle: Path,
    *,
    model: Path,
    licence_dir: Path,
    output_dir: Path,
) -> dict[str, Any]:
    """Write `bundle`, made from `model`, for a device into the empty folder `output_dir`; the licence lies in
    `licence_dir`.

    grid: the record of its quantization. `manifest.json` says all that someone needs who has nothing but the
    folder: every file with its size and SHA-256 (but README.md, the card, which may be written later), the
    grid of the weights, the base and its licence, how each runtime opens it, and where it comes from.
    Returns {target, layouts, threads, context, precision, size_bytes, files}; size_bytes counts every file.
    """
    target, threads = options.target, options.threads
    last = target.logits == "last"
    device = for_device(bundle, output_dir, threads=threads, context=target.context, last_logits=last)
    is_browser = target.architecture == "wasm32"
    layouts = arrange(output_dir, target.layouts, target.precision, browser=is_browser)
    if GGUF in layouts:
        path = output_dir / layouts[GGUF]["graph"]
        write_gguf(model, bundle, grid.get("by_tensor", ()), path, device["context"])
    ids = models.encode(models.load_tokenizer(bundle), data.synthetic_documents(1, seed=0)[0].text)
    check_layouts(output_dir, layouts, bundle, ids[: min(COMPARED_TOKENS, device["context"])], threads)
    licence = models.copy_licence(licence_dir, output_dir)
    files = list_files(output_dir, without=(MANIFEST, CARD, "key.json"))
    summary = {
        "target": target.name,
        **device,
        "precision": target.precision,
        "size_bytes": sum(entry["size_bytes"] for entry in files.values()),
    }
    versions = {name: version for name in PACKAGES if (version := installed_version(name))}
    tools = {"edgedisp": __version__, "git_commit": git_commit(), "versions": versions}
    manifest = {
        "format": 1,
        **summary,
        "architecture": target.architecture,
        "grid": None if target.precision == "fp32" else {key: grid.get(key) for key in GRID},
        "logits": target.logits,
        "layouts": layouts,
        "tokenizer_sha256": file_digest(output_dir / "tokenizer.json"),
        "base": licence,
        "provenance": {**options.origin, **tools},
        "files": files,
    }
    write_json(output_dir / MANIFEST, sealed(manifest))
    return {**summary, "layouts": list(layouts), "files": len(files)}


def provenance_of(model: Path) -> dict[str, Any]:
    """Where a model folder comes from, by the records of its run: {recipe: {name, hash8}, data_sha256, seed,
    arm, weights_sha256}; None for what is not known."""
    origin: dict[str, Any] = dict.fromkeys(("recipe", "data_sha256", "seed", "arm"))
    origin["weights_sha256"] = weights_digest(model)
    run, record = model.resolve().parent.parent, read(model)
    owner, corpus = read_json(run / RUN), read(run / "corpus")
    arm, _, kind = str(record.key.get("stage", "") if record else "").rpartition("/")
    if record and corpus and kind == "model" and "identity" in owner:  # not copied out of its run
        origin["recipe"] = {"name": owner.get("name"), "hash8": hash8(owner["identity"])}
        origin["data_sha256"] = corpus.results.get("tokens_sha256")
        origin |= {"arm": arm, "seed": record.results.get("settings", {}).get("seed")}
    return origin
