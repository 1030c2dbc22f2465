"""Size, loss and speed of SmolLM2-135M in few bits, by method. Writes results/quantization_frontier.*

    python benchmarks/quantization_frontier.py --work FOLDER [--wikitext FILE] [--trained] [--only NAME ...]

Every way to quantize the quickstart's base makes a bundle, in a process of its own, which tells its seconds
and its peak memory. Each bundle is then scored as it ships (int8 activations) on held-out text of the
quickstart and, where `--wikitext` names a file of plain text, on that: perplexity over 24 blocks of 256
tokens each, as a ratio to the fp32 bundle on the same tokens. In the end one bundle of each graph is timed,
in turns, with the default int4 bundle of onnxruntime-genai's model builder among them, and llama.cpp at Q4_0
where llama-cpp-python is installed. Sizes are those of bundles as packed for a laptop, 4,096 positions.

`--trained` also trains the base on 80k tokens of the quickstart's text, plainly and under rounding, and
quantizes that; ratios are to the plainly trained model in fp32.

What is done lies in FOLDER and is not done again, so the benchmark can be stopped and continued. Quantization
sees training text alone. The quickstart's base is a 4-bit GGUF expanded to fp32: its weights already lie on a
4-bit grid with other zero points, and the fp32 rows are the best that this model has.

The two ratios of a row are two texts; where a figure has to be one number it is the worse of both. Intervals
are over blocks of text, the bundles as they are: how a calibration happens to fall is not in them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import turns
from record import RESULTS, write
from scipy import stats

from edgedisp import models, stages
from edgedisp.bench.results import compare_speeds
from edgedisp.bench.system import physical_cores
from edgedisp.core.paths import data_folder
from edgedisp.core.progress import silent
from edgedisp.graph.device_graph import for_device
from edgedisp.graph.session import OnnxModel, at_accuracy_level
from edgedisp.pipeline.rounding import Trained, trained_roundings
from edgedisp.recipe import Recipe, load
from edgedisp.train.performance import peak_memory_bytes
from edgedisp.train.quantized_weights import round_weights

BLOCKS, CONTEXT, SMALL_MB = 24, 256, 100.0
POSITIONS = 4096
KEPT = ("seconds", "peak_memory_bytes", "as_trained")  # of what a cell found
PROMPTS, NEW_TOKENS = 20, 64  # decoded greedily, to compare a bundle with what was trained
TRAINED_TOKENS = "train.tokens=80k"
BUILDER = "genai builder, default int4"
LLAMA_CPP = "llama.cpp, Q4_0"
FP32 = "fp32"

# Name -> what the quickstart's recipe is changed in. All quantize to 4 bits but the first.
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
LATE = "aware={precision: int4, start: 0.85}"
TRAINED: dict[str, list[str]] = {
    "trained, rtn": [],
    "trained, gptq": ["method=gptq"],
    "trained, search 100 MB, gptq": ["budget=100MB", "method=gptq"],
    "aware, rtn": ["aware={precision: int4}"],
    "aware from half, gptq": ["aware={precision: int4, start: 0.5}", "method=gptq"],
    "aware late, gptq": [LATE, "method=gptq"],
}


def recipe_of(changes: list[str]) -> Recipe:
    """The quickstart with the changes of a row; to round to nearest, where it does not say otherwise."""
    written = [TRAINED_TOKENS, "arms=[baseline]", "quantize.int4={method: rtn}"]
    for change in changes:
        key, _, value = change.partition("=")
        place = {"budget": "quantize.budget", "aware": "train.quantization_aware"}.get(
            key, f"quantize.int4.{key}"
        )
        written.append(f"{place}={value}")
    return load(data_folder("recipes") / "quickstart.yaml", written)


class Workplace:
    """The folders of this benchmark; each is made when it is asked for, whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def made(self, name: str, make: Any) -> Path:
        done = self.folder / name
        if not done.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                own = Path(scratch) / "own"
                own.mkdir()
                make(own)
                own.rename(done)
        return done

    def base(self) -> Path:
        recipe = recipe_of([])
        return self.made("base", lambda own: stages.base(recipe.model, CONTEXT, recipe.folder, own, silent))

    def corpus(self) -> Path:
        recipe, base = recipe_of([]), self.base()
        blocks = recipe.steps * recipe.train.batch

        def make(own: Path) -> None:
            stages.tokens(recipe.data, recipe.seed, blocks, base, recipe.folder, False, own, silent)

        return self.made("corpus", make)

    def model(self, name: str) -> Path:
        """The base, or for a row of TRAINED the model after its training."""
        changes = TRAINED.get(name)
        if changes is None:
            return self.base()
        recipe, base, corpus = recipe_of(changes), self.base(), self.corpus()
        rounded = None if recipe.train.quantization_aware is None else recipe.quantize.int4
        called = "trained" if rounded is None else f"{slug(name)}-model"

        def make(own: Path) -> None:
            arm = recipe.arm_runs[0]
            stages.midtrain(
                recipe.train, recipe.steps, recipe.seed, arm, rounded, base, corpus, own, told(called)
            )

        return self.made(called, make)

    def fp32(self, source: Path) -> Path:
        """Its graph, and the seconds that it took."""

        def make(own: Path) -> None:
            started = time.perf_counter()
            stages.export(source, physical_cores(), own, silent)
            seconds = time.perf_counter() - started
            (self.folder / f"{source.name}-fp32.seconds.json").write_text(json.dumps(seconds))

        return self.made(f"{source.name}-fp32", make)


def told(name: str) -> Any:
    """Progress of a long step on stderr, a line each ten steps."""

    def progress(done: int, total: int, note: str) -> None:
        if done % 10 == 0:
            print(f"  {name}: {done} of {total} {note}", file=sys.stderr)

    return progress


def cell(work: Workplace, name: str) -> None:
    """Make the bundle of one row, and leave its record beside it. Runs in a process of its own."""
    source = work.model(name)
    parent, corpus = work.fp32(source), work.corpus()
    recipe = recipe_of(BASE.get(name) or TRAINED.get(name) or [])
    is_trained = recipe.train.quantization_aware is not None
    seconds = time.perf_counter()

    def make(own: Path) -> None:
        progress = told(name)
        if recipe.quantize.searched:
            record = stages.quantize_searched(
                recipe.quantize, recipe.seed, parent, source, corpus, own, progress
            )
        else:
            bits = 8 if name == "int8" else 4
            section = recipe.quantize.int8 if bits == 8 else recipe.quantize.int4
            record = stages.quantize(section, bits, parent, source, corpus, own, progress, is_trained)
        kept = {key: record[key] for key in ("search",) if key in record}
        result = {"seconds": time.perf_counter() - seconds, "peak_memory_bytes": peak_memory_bytes(), **kept}
        if is_trained:
            rounding = Trained(recipe.quantize.int4, 4)
            result["as_trained"] = as_trained(rounding, source, own, corpus)
        (own / "result.json").write_text(json.dumps(result))

    work.made(slug(name), make)


def as_trained(rounding: Trained, source: Path, bundle: Path, corpus: Path) -> dict[str, float]:
    """The bundle in fp32 arithmetic against the torch model, rounded as it was trained: largest difference of
    a logit, and the share of greedily decoded tokens that agree before the first difference of a text."""
    opened = models.load(source)
    round_weights(opened, *trained_roundings(rounding, source))
    reference = models.TorchModel(opened)
    exact = OnnxModel(bundle, physical_cores(), graph=at_accuracy_level(bundle, 0))
    held = np.load(corpus / "heldout.npy", allow_pickle=False)[:PROMPTS].astype(np.int64)
    largest, same = 0.0, 0
    for number, block in enumerate(held):
        ids, mask = block[None], np.ones_like(block[None])
        largest = max(largest, float(np.abs(reference(ids, mask) - exact(ids, mask)).max()))
        prompt = block[: 8 + 4 * number].tolist()
        texts = [one.greedy(prompt, NEW_TOKENS, frozenset()) for one in (reference, exact)]
        same += next((i for i, pair in enumerate(zip(*texts)) if pair[0] != pair[1]), NEW_TOKENS)
    return {"max_abs_difference": largest, "greedy_agreement": same / (len(held) * NEW_TOKENS)}


def build_default(source: Path, own: Path) -> None:
    """What onnxruntime-genai's model builder makes of int4 on a CPU without being told anything else."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    said, started = io.StringIO(), time.perf_counter()
    logging.disable(logging.WARNING)
    with (
        tempfile.TemporaryDirectory() as cache,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        place = ("", str(source), str(own), "int4", "cpu", cache)
        create_model(*place, **parse_extra_options(*place, []))
    logging.disable(logging.NOTSET)
    result = {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory_bytes()}
    (own / "result.json").write_text(json.dumps(result))


def slug(name: str) -> str:
    return "row-" + name.replace(",", "").replace(" ", "-")


def texts(work: Workplace, wikitext: Path | None) -> dict[str, np.ndarray]:
    """Token blocks to score on, int64 [BLOCKS, CONTEXT]."""
    held = np.load(work.corpus() / "heldout.npy", allow_pickle=False)[:BLOCKS].astype(np.int64)
    found = {"heldout": held}
    if wikitext is not None:
        tokenizer = models.load_tokenizer(work.base())
        ids = models.encode(tokenizer, wikitext.read_text(encoding="utf-8")[: 40 * BLOCKS * CONTEXT])
        found["wikitext"] = np.array(ids[: BLOCKS * CONTEXT], np.int64).reshape(BLOCKS, CONTEXT)
    return found


def losses(bundle: Path, blocks: np.ndarray) -> list[float]:
    """Nats per token of each block on its own, in the bundle's own arithmetic."""
    shipped, found = OnnxModel(bundle, physical_cores()), []
    for block in blocks:
        logits = shipped(block[None], np.ones_like(block[None]))[0, :-1].astype(np.float64)
        top = logits.max(-1, keepdims=True)
        normaliser = top[:, 0] + np.log(np.exp(logits - top).sum(-1))
        found.append(float((normaliser - logits[np.arange(len(logits)), block[1:]]).mean()))
    return found


def scored(work: Workplace, name: str, bundle: Path, blocks: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Losses by text; kept beside the bundle, not in it: what lies there goes along into its offspring."""
    path = work.folder / f"{bundle.name}.losses.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    for text in blocks:
        if text not in found:
            print(f"scoring {name} on {text}", file=sys.stderr)
            found[text] = losses(bundle, blocks[text])
            path.write_text(json.dumps(found))
    return {text: found[text] for text in blocks}


def ratio(ours: list[float], against: list[float]) -> dict[str, float]:
    """Of perplexities, with its 95 % interval: blocks are paired, their differences taken as normal."""
    difference = np.subtract(ours, against)
    middle = difference.mean()
    reach = stats.t.ppf(0.975, len(difference) - 1) * difference.std(ddof=1) / np.sqrt(len(difference))
    low, high = np.exp([middle - reach, middle + reach])
    return {"ratio": float(np.exp(middle)), "low": float(low), "high": float(high)}


def packed(bundles: dict[str, Path], scratch: Path) -> tuple[dict[str, Path], dict[str, float]]:
    """Bundles as a laptop gets them, and their MB; the builder's stays as it is."""
    ready, sizes = {}, {}
    for name, bundle in bundles.items():
        ready[name] = bundle
        if name != BUILDER:
            ready[name] = scratch / slug(name)
            ready[name].mkdir()
            for_device(bundle, ready[name], threads=physical_cores(), context=POSITIONS)
        files = [file for file in ready[name].iterdir() if file.name.startswith("model.onnx")]
        sizes[name] = sum(file.stat().st_size for file in files) / 1e6
    return ready, sizes


def speeds(ready: dict[str, Path], repetitions: int, gguf: Path, folder: Path) -> dict[str, Any]:
    """Name -> its medians and its ratios to the builder's bundle, paired by round; one timing a graph."""
    same = turns.graphs(ready)
    commands = {name: turns.runner(ready[name]) for name in dict.fromkeys(same.values())}
    if (command := turns.llama_cpp(gguf, folder)) is not None:
        commands[LLAMA_CPP] = command
    values = turns.timed(commands, repetitions)
    found: dict[str, Any] = {}
    for name, timed_as in {**same, **({LLAMA_CPP: LLAMA_CPP} if LLAMA_CPP in values else {})}.items():
        mine, row = values[timed_as], {"timed_as": timed_as}
        for figure in turns.FIGURES:
            row[figure] = float(np.median(mine[figure]))
            for other, short in ((BUILDER, "builder"), (LLAMA_CPP, "llama_cpp")):
                name_of_ratio = figure.replace("tokens_per_s", f"ratio_{short}")
                row[name_of_ratio] = (
                    compare_speeds(values[other][figure], mine[figure]) if other in values else None
                )
        found[name] = row
    return found


def figures(rows: list[dict[str, Any]], fp32_bytes: float) -> dict[str, Any]:
    """The named ones; those without a row to come from are null."""
    by_name = {row["name"]: row for row in rows}

    def best(names: Any) -> float | None:
        fit = [by_name[n]["ratio"] for n in names if n in by_name and by_name[n]["size_mb"] <= SMALL_MB]
        return min(fit, default=None)

    def fastest(key: str) -> float | None:
        ours = [by_name[name]["speed"][key] for name in BASE if name in by_name and name != "int8"]
        return max((found["ratio"] for found in ours if found is not None), default=None)

    def of(name: str, key: str) -> Any:
        return by_name.get(name, {}).get(key)

    rtn = of("rtn", "seconds")
    peaks = {name: found for name in [*BASE, *TRAINED] if (found := of(name, "peak_memory_bytes"))}
    searched = [found for name, found in peaks.items() if "search" in name]
    plain = [found for name, found in peaks.items() if "search" not in name]
    trained = [found for name in TRAINED if (found := of(name, "as_trained"))]
    return {
        "ptq_perplexity_ratio_100mb": best(BASE),
        "qat_perplexity_ratio_100mb": best(name for name in TRAINED if name.startswith("aware")),
        "trained_ptq_perplexity_ratio_100mb": best(n for n in TRAINED if n.startswith("trained")),
        "decode_ratio_builder": fastest("decode_ratio_builder"),
        "prefill_ratio_builder": fastest("prefill_ratio_builder"),
        "decode_ratio_llama_cpp": fastest("decode_ratio_llama_cpp"),
        "prefill_ratio_llama_cpp": fastest("prefill_ratio_llama_cpp"),
        "rtn_seconds": None if rtn is None else rtn + of(FP32, "seconds"),
        "gptq_seconds": of("gptq", "seconds"),
        "peak_memory_ratio": max(plain) / fp32_bytes if plain else None,
        "peak_memory_ratio_search": max(searched) / fp32_bytes if searched else None,
        "as_trained_max_abs_difference": max((one["max_abs_difference"] for one in trained), default=None),
        "as_trained_greedy_agreement": min((one["greedy_agreement"] for one in trained), default=None),
    }


def draw(rows: list[dict[str, Any]]) -> None:
    """Loss by row, best last, with what it takes in size and speed; beside the JSON."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["name"] not in (FP32, "trained, fp32")]
    shown.sort(key=lambda row: (row["name"] in TRAINED, -row["ratio"]))
    figure = Figure(figsize=(9, 0.6 + 0.29 * len(shown)), layout="constrained")
    axes = figure.subplots()
    least = 0.1  # %, where the axis ends
    for place, row in enumerate(shown):
        kind = "tab:orange" if row["name"] in TRAINED else "black" if row["name"] == BUILDER else "tab:blue"
        low, middle, high = (max(least, 100 * (row[key] - 1)) for key in ("low", "ratio", "high"))
        axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color=kind, lw=1.2)
        took = f"{row['size_mb']:.1f} MB   {row['speed']['decode_tokens_per_s']:.0f} tokens/s"
        axes.annotate(took, (1.01, place), xycoords=("axes fraction", "data"), fontsize=8, va="center")
    axes.axvline(8, color="tab:blue", linewidth=0.8, linestyle="--")
    axes.axvline(5, color="tab:orange", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(shown)), [row["name"] for row in shown], fontsize=8)
    axes.set(xscale="log", xlim=(least, 300), ylim=(len(shown) - 0.4, -0.6),
             xlabel="perplexity above fp32, % (the worse of two texts, 95 % interval)",
             title="SmolLM2-135M in few bits: the base (blue), trained on 80k tokens (orange)")  # fmt: skip
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.grid(axis="x", linewidth=0.4, alpha=0.6)
    figure.savefig(RESULTS / "quantization_frontier.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of what is done; some 5 GB")
    parser.add_argument("--wikitext", type=Path, help="plain text to score on, beside the held-out text")
    parser.add_argument("--trained", action="store_true", help="also train: some 20 minutes more")
    parser.add_argument("--only", nargs="*", help="rows to make; default: all")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    parser.add_argument("--train", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    work = Workplace(asked.work)
    if asked.cell == BUILDER:
        work.made(slug(BUILDER), lambda own: build_default(work.base(), own))
        return
    if asked.train:
        work.fp32(work.model(asked.train))
        return
    if asked.cell:
        cell(work, asked.cell)
        return
    names = [name for name in [BUILDER, *BASE, *(TRAINED if asked.trained else ())]
             if asked.only is None or name in asked.only]  # fmt: skip
    work.corpus()
    for name in names:  # in a process each, so that its memory is its own
        if not (work.folder / slug(name)).exists():
            print(f"making {name}", file=sys.stderr)
            command = [sys.executable, __file__, "--work", str(asked.work)]
            if name in TRAINED:
                subprocess.run([*command, "--train", name], check=True)
            subprocess.run([*command, "--cell", name], check=True)
    parents = {FP32: work.fp32(work.base())}
    if any(name in TRAINED for name in names):
        parents["trained, fp32"] = work.fp32(work.model("trained, rtn"))
    bundles = {**parents, **{name: work.folder / slug(name) for name in names}}
    blocks = texts(work, asked.wikitext)
    scores = {name: scored(work, name, bundle, blocks) for name, bundle in bundles.items()}
    with tempfile.TemporaryDirectory(dir=asked.work) as scratch:
        ready, sizes = packed(bundles, Path(scratch))
        gguf = stages.fetch_base(recipe_of([]).model, recipe_of([]).folder, silent)
        speed = speeds(ready, asked.repetitions, gguf, asked.work)
    rows = []
    for name, bundle in bundles.items():
        against = scores["trained, fp32" if name in TRAINED else FP32]
        ratios = {text: ratio(scores[name][text], against[text]) for text in blocks}
        worst = max(ratios.values(), key=lambda found: found["ratio"])
        result = bundle / "result.json"
        made = json.loads(result.read_text()) if result.is_file() else {}
        if name == FP32:
            made = {"seconds": json.loads((work.folder / f"{bundle.name}.seconds.json").read_text())}
        perplexities = {text: float(np.exp(np.mean(found))) for text, found in scores[name].items()}
        rows.append({"name": name, "size_mb": sizes[name], **worst, "ratios": ratios,
                     "perplexity": perplexities, "speed": speed[name],
                     **{key: made.get(key) for key in KEPT}})  # fmt: skip
    found = figures(rows, sizes[FP32] * 1e6)
    draw(rows)
    for row in rows:
        print(f"{row['name']:38} {row['size_mb']:6.1f} MB  x{row['ratio']:.3f} "
              f"[{row['low']:.3f}, {row['high']:.3f}]  "
              f"decode {row['speed']['decode_tokens_per_s']:6.1f}  "
              f"prefill {row['speed']['prefill_tokens_per_s']:6.0f}")  # fmt: skip
    if LLAMA_CPP in speed:
        rows.append({"name": LLAMA_CPP, "speed": speed[LLAMA_CPP]})
    write("quantization_frontier", found, rows)


if __name__ == "__main__":
    main()
