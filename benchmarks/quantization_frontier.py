"""Size, loss and speed of SmolLM2-135M in few bits, by method. Writes results/quantization_frontier.*

    python benchmarks/quantization_frontier.py --work FOLDER [--wikitext FILE] [--trained] [--only NAME ...]

Every row quantizes wikipedia's base in a process of its own, so that its peak memory is its own. Each
bundle is scored as it ships (int8 activations) on 24 blocks of 256 tokens of wikipedia's held-out text
and, where `--wikitext` names a file, of that: perplexity as a ratio to the fp32 bundle on the same tokens.
One bundle of each graph is timed, in turns, with the default int4 bundle of onnxruntime-genai's model
builder, and with llama.cpp at Q4_0 where llama-cpp-python is installed. Sizes are those of bundles as packed
for a laptop, 4,096 positions. `--trained` also trains the base on 80k tokens, plainly and under
rounding, and quantizes that; its ratios are to the plainly trained model in fp32.

Finished rows stay in FOLDER (5 GB), so the benchmark can be stopped and continued. Wikipedia's base is a
4-bit GGUF expanded to fp32: its weights lie on a 4-bit grid with other zero points. Of two texts a figure is
the worse. Intervals are over blocks of text: how a calibration happens to fall is not in them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _results_file import RESULTS, wikipedia, write
from matplotlib.figure import Figure
from other_runtimes import FIGURES, llama_cpp_command, onnxruntime_command, time_in_turns
from scipy import stats

from edgedisp import data, models
from edgedisp.bench.bundles import find_graph, graph_hash
from edgedisp.bench.results import compare_speeds
from edgedisp.bench.system import physical_cores, runner
from edgedisp.core.files import write_json
from edgedisp.core.progress import Screen
from edgedisp.graph.runtime_layouts import for_device
from edgedisp.graph.session import OnnxModel, at_accuracy_level
from edgedisp.pipeline import build_plan
from edgedisp.pipeline.options import BundleRounding
from edgedisp.pipeline.rounding import trained_roundings
from edgedisp.pipeline.stage import Stage, walk
from edgedisp.recipe import Recipe
from edgedisp.train.quantized_weights import round_weights

BLOCKS, CONTEXT, POSITIONS, SMALL_MB = 24, 256, 4096, 100.0
PROMPTS, NEW_TOKENS = 20, 64  # decoded greedily, to compare a bundle with what was trained
BUILDER, LLAMA_CPP = "genai builder, default int4", "llama.cpp, Q4_0"
FP32, TRAINED_FP32 = "fp32", "trained, fp32"
LATE = "aware={precision: int4, start: 0.85}"
# Name -> what the recipe wikipedia is changed in. All quantize to 4 bits but the first.
BASE: dict[str, list[str]] = {
    "int8": [],
    "rtn": [],
    "rtn, symmetric, 4-bit head": ["symmetric=true", "head_bits=4"],
    "k_quant": ["method=k_quant"],
    "gptq": ["method=gptq"],
    "gptq, 4k tokens": ["method=gptq", "calibration_tokens=4k"],
    "gptq, group 64": ["method=gptq", "group=64"],
    "gptq, symmetric, group 64, 4-bit head": ["method=gptq", "symmetric=true", "group=64", "head_bits=4"],
    "search 100 MB, gptq": ["budget=100MB", "method=gptq"],
}
# The same after training on 80k tokens; `aware` trains under the rounding.
TRAINED: dict[str, list[str]] = {
    "trained, rtn": [],
    "trained, gptq": ["method=gptq"],
    "trained, search 100 MB, gptq": ["budget=100MB", "method=gptq"],
    "aware, rtn": ["aware={precision: int4}"],
    "aware from half, gptq": ["aware={precision: int4, start: 0.5}", "method=gptq"],
    "aware late, gptq": [LATE, "method=gptq"],
}


def recipe_of(name: str) -> Recipe:
    """The recipe wikipedia with the changes of a row; rounding to nearest unless it says otherwise."""
    keys = {"budget": "quantize.budget", "aware": "train.quantization_aware"}
    changes = ["train.tokens=80k", "arms=[baseline]", "quantize.int4={method: rtn}"]
    for change in (BASE | TRAINED).get(name, []):
        key, _, value = change.partition("=")
        changes.append(f"{keys.get(key, f'quantize.int4.{key}')}={value}")
    return wikipedia(changes)


def row_folder(name: str) -> str:
    return "row-" + name.replace(",", "").replace(" ", "-")


def stages_of(name: str) -> list[Stage]:
    """The stages of a row, as a build has them; the last makes its bundle. All rows share one run folder."""
    recipe, threads, row = recipe_of(name), physical_cores(), row_folder(name)
    stages, model = [build_plan.base(recipe), build_plan.corpus(recipe)], "base"
    if name in TRAINED:
        model = "trained" if recipe.train.quantization_aware is None else f"{row}-model"
        stages.append(replace(build_plan.training(recipe, recipe.arm_runs[0]), name=model))
    fp32 = Stage(f"{model}-fp32", "edgedisp.pipeline.bundles:export", threads, {"model": model})
    if name in (FP32, TRAINED_FP32):
        return [*stages, fp32]
    bundle = build_plan.quantize(recipe, "baseline", "int8" if name == "int8" else "int4")
    inputs = {"bundle": fp32.name, "model": model, "corpus": "corpus"}
    return [*stages, fp32, replace(bundle, name=row, inputs={key: inputs[key] for key in bundle.inputs})]


def make(name: str, work: Path, stages: list[Stage] | None = None) -> Path:
    """The bundle of a row; its seconds and this process's peak memory are in a file beside it."""
    if name == BUILDER:
        folder, started = work / row_folder(name), time.perf_counter()
        if not (work / f"{folder.name}.usage.json").exists():
            from onnxruntime_genai.models.builder import create_model, parse_extra_options

            with tempfile.TemporaryDirectory() as cache:  # int4 on a CPU, with the builder's own defaults
                words = ("", str(work / "base"), str(folder), "int4", "cpu", cache)
                create_model(*words, **parse_extra_options(*words, []))
        seconds = time.perf_counter() - started
    else:
        with Screen("frontier") as screen:
            last = walk(stages or stages_of(name), work, screen)[-1]
        folder, seconds = work / last.name, last.record.seconds
    path, recipe = work / f"{folder.name}.usage.json", recipe_of(name)
    if not path.exists():
        usage = {"seconds": seconds, "peak_memory_bytes": runner().peak_memory_bytes()}
        if recipe.train.quantization_aware is not None:
            rounding = BundleRounding(4, recipe.quantize.int4)
            usage["as_trained"] = as_trained(rounding, work / f"{folder.name}-model", folder, work / "corpus")
        write_json(path, usage)
    return folder


def as_trained(rounding: BundleRounding, source: Path, bundle: Path, corpus: Path) -> dict[str, float]:
    """The bundle in fp32 arithmetic against the torch model, rounded as it was trained: largest difference of
    a logit, and the share of greedily decoded tokens that agree before the first difference of a text."""
    model = models.load(source)
    round_weights(model, *trained_roundings(rounding, source))
    reference = models.TorchModel(model)
    exact = OnnxModel(bundle, physical_cores(), graph=at_accuracy_level(bundle, 0))
    blocks = np.load(corpus / "heldout.npy", allow_pickle=False)[:PROMPTS].astype(np.int64)
    largest, same = 0.0, 0
    for number, block in enumerate(blocks):
        ids, mask = block[None], np.ones_like(block[None])
        largest = max(largest, float(np.abs(reference(ids, mask) - exact(ids, mask)).max()))
        prompt = block[: 8 + 4 * number].tolist()
        texts = [runner.greedy(prompt, NEW_TOKENS, frozenset()) for runner in (reference, exact)]
        same += next((i for i, pair in enumerate(zip(*texts)) if pair[0] != pair[1]), NEW_TOKENS)
    return {"max_abs_difference": largest, "greedy_agreement": same / (len(blocks) * NEW_TOKENS)}


def text_blocks(work: Path, wikitext: Path | None) -> dict[str, np.ndarray]:
    """Token blocks to score on, int64 [BLOCKS, CONTEXT]."""
    heldout = np.load(work / "corpus" / "heldout.npy", allow_pickle=False)[:BLOCKS].astype(np.int64)
    if wikitext is None:
        return {"heldout": heldout}
    text = wikitext.read_text(encoding="utf-8")[: 40 * BLOCKS * CONTEXT]
    ids = models.encode(models.load_tokenizer(work / "base"), text)[: BLOCKS * CONTEXT]
    return {"heldout": heldout, "wikitext": np.array(ids, np.int64).reshape(BLOCKS, CONTEXT)}


def losses(bundle: Path, blocks: np.ndarray) -> np.ndarray:
    """Nats per token of each block on its own, in the bundle's own arithmetic."""
    session, values = OnnxModel(bundle, physical_cores()), []
    for block in blocks:
        logits = session(block[None], np.ones_like(block[None]))[0, :-1].astype(np.float64)
        log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        values.append(-log_probs[np.arange(len(logits)), block[1:]].mean())
    return np.array(values)


def perplexity_ratio(ours: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """With its 95 % interval: blocks are paired, their differences taken as normal."""
    change = ours - reference
    half = stats.t.ppf(0.975, len(change) - 1) * change.std(ddof=1) / np.sqrt(len(change))
    low, middle, high = np.exp(change.mean() + np.array([-half, 0.0, half]))
    return {"ratio": float(middle), "low": float(low), "high": float(high)}


def speeds(bundles: dict[str, Path], repetitions: int, work: Path) -> dict[str, dict[str, Any]]:
    """Name -> medians, and ratios to the builder's bundle and llama.cpp; one timing for each graph."""
    first: dict[str, str] = {}
    timed_as = {name: first.setdefault(graph_hash(find_graph(path)), name) for name, path in bundles.items()}
    commands = {name: onnxruntime_command(bundles[name]) for name in first.values()}
    model = recipe_of("").model
    if command := llama_cpp_command(data.fetch(model.base, sha256=model.sha256), work):
        commands[LLAMA_CPP] = command
        timed_as[LLAMA_CPP] = LLAMA_CPP
    values = time_in_turns(commands, repetitions)
    rows: dict[str, dict[str, Any]] = {}
    for name, same in timed_as.items():
        rows[name] = {"timed_as": same, **{key: float(np.median(values[same][key])) for key in FIGURES}}
        for key in FIGURES:
            for other, short in ((BUILDER, "builder"), (LLAMA_CPP, "llama_cpp")):
                ratio = compare_speeds(values[other][key], values[same][key]) if other in values else None
                rows[name][key.replace("tokens_per_s", f"ratio_{short}")] = ratio
    return rows


def figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The named ones; those without a row to come from are null."""
    by_name = {row["name"]: row for row in rows}

    def of(names: Iterable[str], value: Callable[[dict[str, Any]], Any], choose: Any) -> Any:
        values = [value(by_name[name]) for name in names if name in by_name]
        return choose((value for value in values if value is not None), default=None)

    def best(names: Iterable[str]) -> Any:
        return of(names, lambda row: row["ratio"] if row["size_mb"] <= SMALL_MB else None, min)

    def fastest(key: str) -> Any:
        return of([*BASE][1:], lambda row: row["speed"][key] and row["speed"][key]["ratio"], max)

    def memory(searched: bool) -> Any:
        names = [name for name in (*BASE, *TRAINED) if ("search" in name) == searched]
        peak, size = of(names, lambda row: row["peak_memory_bytes"], max), by_name[FP32]["size_mb"] * 1e6
        return peak and peak / size

    def trained(key: str, choose: Any) -> Any:
        return of(TRAINED, lambda row: (row.get("as_trained") or {}).get(key), choose)

    seconds = {name: of([name], lambda row: row["seconds"], max) for name in (FP32, "rtn", "gptq")}
    ratios = [f"{part}_ratio_{other}" for other in ("builder", "llama_cpp") for part in ("decode", "prefill")]
    return {
        "ptq_perplexity_ratio_100mb": best(BASE),
        "qat_perplexity_ratio_100mb": best(name for name in TRAINED if name.startswith("aware")),
        "trained_ptq_perplexity_ratio_100mb": best(name for name in TRAINED if name.startswith("trained")),
        **{key: fastest(key) for key in ratios},
        "rtn_seconds": seconds["rtn"] and seconds["rtn"] + seconds[FP32],
        "gptq_seconds": seconds["gptq"],
        "peak_memory_ratio": memory(False),
        "peak_memory_ratio_search": memory(True),
        "as_trained_max_abs_difference": trained("max_abs_difference", max),
        "as_trained_greedy_agreement": trained("greedy_agreement", min),
    }


def draw(rows: list[dict[str, Any]]) -> None:
    """Loss by row, best last, with what it takes in size and speed; beside the JSON."""
    rows = [row for row in rows if row["name"] not in (FP32, TRAINED_FP32)]
    rows.sort(key=lambda row: (row["name"] in TRAINED, -row["ratio"]))
    figure = Figure(figsize=(9, 0.6 + 0.29 * len(rows)), layout="constrained")
    axes = figure.subplots()
    least = 0.1  # %, where the axis ends
    for y, row in enumerate(rows):
        color = "tab:orange" if row["name"] in TRAINED else "black" if row["name"] == BUILDER else "tab:blue"
        low, middle, high = (max(least, 100 * (row[key] - 1)) for key in ("low", "ratio", "high"))
        axes.errorbar(middle, y, xerr=[[middle - low], [high - middle]], fmt="o", color=color, lw=1.2)
        text = f"{row['size_mb']:.1f} MB   {row['speed']['decode_tokens_per_s']:.0f} tokens/s"
        axes.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), fontsize=8, va="center")
    axes.axvline(8, color="tab:blue", linewidth=0.8, linestyle="--")
    axes.axvline(5, color="tab:orange", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
    axes.set(xscale="log", xlim=(least, 300), ylim=(len(rows) - 0.4, -0.6),
             xlabel="perplexity above fp32, % (the worse of two texts, 95 % interval)",
             title="SmolLM2-135M in few bits: the base (blue), trained on 80k tokens (orange)")  # fmt: skip
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    figure.savefig(RESULTS / "quantization_frontier.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of finished rows; some 5 GB")
    parser.add_argument("--wikitext", type=Path, help="plain text to score on, beside the held-out text")
    parser.add_argument("--trained", action="store_true", help="also train: some 20 minutes more")
    parser.add_argument("--only", nargs="*", help="rows to make; default: all")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    work: Path = options.work
    if options.row:
        make(options.row, work)
        return
    work.mkdir(parents=True, exist_ok=True)
    names = [BUILDER, *BASE, *(TRAINED if options.trained else ())]
    names = [name for name in names if options.only is None or name in options.only]
    bundles = {FP32: make(FP32, work)}
    if any(name in TRAINED for name in names):
        bundles[TRAINED_FP32] = make(TRAINED_FP32, work, stages_of("trained, rtn")[:-1])
    for name in names:
        print(f"making {name}", file=sys.stderr)
        if name in TRAINED:  # trained here, so that the row's peak memory is quantization's
            with Screen("frontier") as screen:
                walk(stages_of(name)[:-1], work, screen)
        subprocess.run([sys.executable, __file__, "--work", str(work), "--row", name], check=True)
        bundles[name] = work / row_folder(name)
    blocks = text_blocks(work, options.wikitext)
    scores = {name: {t: losses(path, ids) for t, ids in blocks.items()} for name, path in bundles.items()}
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        packed = dict(bundles)
        for name in bundles.keys() - {BUILDER}:
            packed[name] = Path(scratch) / row_folder(name)
            packed[name].mkdir()
            for_device(bundles[name], packed[name], threads=physical_cores(), context=POSITIONS)
        files = {name: path.glob("model.onnx*") for name, path in packed.items()}
        sizes = {name: sum(file.stat().st_size for file in files[name]) / 1e6 for name in packed}
        speed = speeds(packed, options.repetitions, work)
    rows: list[dict[str, Any]] = []
    for name, path in bundles.items():
        reference = scores[TRAINED_FP32 if name in TRAINED else FP32]
        ratios = {text: perplexity_ratio(scores[name][text], reference[text]) for text in blocks}
        row = {"name": name, "size_mb": sizes[name], **max(ratios.values(), key=lambda ratio: ratio["ratio"])}
        row |= {"ratios": ratios, "perplexity": {t: float(np.exp(v.mean())) for t, v in scores[name].items()}}
        usage = json.loads((work / f"{path.name}.usage.json").read_text())
        rows.append({**row, "speed": speed[name], "as_trained": None, **usage})
        print(f"{name:38} {row['size_mb']:6.1f} MB x{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]")
    draw(rows)
    if LLAMA_CPP in speed:
        rows.append({"name": LLAMA_CPP, "speed": speed[LLAMA_CPP]})
    write("quantization_frontier", figures(rows[: len(bundles)]), rows)


if __name__ == "__main__":
    main()
