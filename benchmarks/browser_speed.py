"""Decoding in a browser: a bundle of the browser's profile, the same weights left packed, and fp32.
Writes results/browser_speed.json

    python benchmarks/browser_speed.py --model FOLDER [--rounds 3] [--tokens 64]

`--model` is a Hugging Face folder, such as <run>/baseline/model. Three bundles are exported of it: `unfolded`
is `--target browser` as it is; `packed` has the very same weights behind MatMulNBits; `fp32` has no packed
weights. transformers.js loads each in headless Chromium with one thread, a page of its own for every round,
and in node. Order A B C C B A ... Prompt of 128 tokens, no tokenizer and no sampling in the timed part.

- ttft_ms: from the call to the first token; decode_tokens_per_s: tokens after the first, over their time;
- load_s: from the call that fetches the bundle (over loopback) to the session;
- renderer_peak_bytes: most resident memory of the page's process (Linux counts it), load included;
- download_bytes: all that the page fetched of the bundle's folder.

A figure is the median over rounds; its interval stands in the row. Needs `make runtimes` and Debian's
chromium (`--chromium` names another program).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from record import write

from edgedisp.bench.spread import spread
from edgedisp.bench.timing import turns
from edgedisp.core.paths import data_folder
from edgedisp.recipe import load_target
from edgedisp.single import export_for_target

TOP = Path(__file__).resolve().parent.parent
NODE_MODULES = TOP / ".runtimes" / "node" / "node_modules"
DRIVER = TOP / "tests" / "in_chromium.mjs"
PROMPT = 128
SECONDS = 600
MEASURED = ("decode_tokens_per_s", "prefill_tokens_per_s", "ttft_ms", "load_s", "renderer_peak_bytes")

PAGE = """
import { AutoModelForCausalLM, Tensor, env } from "@huggingface/transformers";
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = $PARENT;
const ids = BigInt64Array.from($IDS, BigInt);
const opened = performance.now();
const model = await AutoModelForCausalLM.from_pretrained($NAME, { dtype: $DTYPE, device: $DEVICE });
const load_s = (performance.now() - opened) / 1000;
async function decode(tokens) {
  const times = [];
  const streamer = { put: () => times.push(performance.now()), end: () => {} };
  const inputs = new Tensor("int64", ids, [1, ids.length]);
  const attention_mask = new Tensor("int64", ids.map(() => 1n), [1, ids.length]);
  const count = { max_new_tokens: tokens, min_new_tokens: tokens, do_sample: false };
  const found = await model.generate({ inputs, attention_mask, streamer, ...count });
  const [called, first, ...later] = times;
  return {
    ttft_ms: first - called,
    prefill_tokens_per_s: (1000 * ids.length) / (first - called),
    decode_tokens_per_s: (1000 * later.length) / (later.at(-1) - first),
    tokens: Array.from(found.data, Number).slice(ids.length),
  };
}
await decode(4); // a warm-up
const found = { load_s, ...(await decode($TOKENS)) };
"""


def bundles(model: Path, folder: Path) -> dict[str, Path]:
    """The three bundles, exported under `folder`."""
    profile = (data_folder("export") / "targets" / "browser.yaml").read_text(encoding="utf-8")
    packed = profile.replace("name: browser", "name: packed").replace("wasm32", "arm64")
    context = load_target("browser").context
    plain = (
        f"name: fp32\ndescription: fp32\narchitecture: wasm32\nprecision: fp32\nthreads: 1\n"
        f"context: {context}\nlayouts: [transformers.js]\n"
    )
    (folder / "packed.yaml").write_text(packed, encoding="utf-8")
    (folder / "fp32.yaml").write_text(plain, encoding="utf-8")
    targets = {
        "unfolded": "browser",
        "packed": str(folder / "packed.yaml"),
        "fp32": str(folder / "fp32.yaml"),
    }
    for name, target in targets.items():
        export_for_target(model, target, folder / name, Quiet())
    return {name: folder / name for name in targets}


class Quiet:
    """An observer that looks away."""

    def started(self, name: str, number: int, total: int) -> None: ...
    def progress(self, done: int, total: int, note: str) -> None: ...
    def finished(self, name: str, record: Any) -> None: ...
    def kept(self, name: str, record: Any) -> None: ...


def page(bundle: Path, parent: str, device: str, tokens: int) -> str:
    """The module that loads a bundle and times it."""
    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    ids = np.random.default_rng(0).integers(100, config["vocab_size"] - 100, PROMPT).tolist()
    given = {
        "PARENT": parent,
        "NAME": bundle.name,
        "IDS": ids,
        "DTYPE": config["transformers.js_config"]["dtype"],
        "DEVICE": device,
        "TOKENS": tokens,
    }
    text = PAGE
    for key, value in given.items():
        text = text.replace(f"${key}", json.dumps(value))
    return text


def said(command: list[str | Path], folder: Path) -> dict[str, Any]:
    """The last line that a program prints, as JSON."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} failed: {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def in_browser(bundle: Path, chromium: str, tokens: int, folder: Path) -> dict[str, Any]:
    """What one page measured."""
    text = page(bundle, "/models/", "wasm", tokens)
    (folder / "page.mjs").write_text(f"{text}\nexport default found;\n", encoding="utf-8")
    found = said(["node", DRIVER, chromium, NODE_MODULES, bundle.parent, folder / "page.mjs"], folder)
    fetched = sum(size for path, size in found["served"].items() if path.startswith("/models/"))
    peak = found["renderer_peak_bytes"]
    return {**found["result"], "renderer_peak_bytes": peak, "download_bytes": fetched}


def in_node(bundle: Path, tokens: int, folder: Path) -> dict[str, Any]:
    """The same in node, with its native runtime (it takes all cores that it finds)."""
    text = page(bundle, f"{bundle.parent}/", "cpu", tokens)
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(NODE_MODULES)
    (folder / "node.mjs").write_text(
        f"{text}\nfound.renderer_peak_bytes = process.resourceUsage().maxRSS * 1024;\n"
        "console.log(JSON.stringify(found));\n",
        encoding="utf-8",
    )
    return said(["node", folder / "node.mjs"], folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="decoded in each round")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser's program")
    asked = parser.parse_args()
    if asked.chromium is None or not NODE_MODULES.is_dir():
        raise SystemExit("needs chromium, and `make runtimes`")
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = bundles(asked.model, folder)
        for number, name in turns(list(made), asked.rounds):
            for where in ("browser", "node"):
                if where == "browser":
                    one = in_browser(made[name], asked.chromium, asked.tokens, folder)
                else:
                    one = in_node(made[name], asked.tokens, folder)
                found.setdefault(f"{where}/{name}", []).append(one)
                speed = one["decode_tokens_per_s"]
                print(f"round {number + 1}: {where}/{name} {speed:.1f} tokens/s", file=sys.stderr)
    rows = []
    for name, rounds in found.items():
        measured = {key: spread([one[key] for one in rounds]) for key in MEASURED}
        rows.append({"name": name, **measured, "download_bytes": rounds[0].get("download_bytes"),
                     "tokens": rounds[0]["tokens"][:16]})  # fmt: skip
    write("browser_speed", figures(rows), rows)


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    by_name = {row["name"]: row for row in rows}
    decode = {name: row["decode_tokens_per_s"]["median"] for name, row in by_name.items()}
    unfolded = by_name["browser/unfolded"]
    return {
        "browser_decode_tokens_per_s": decode["browser/unfolded"],
        "browser_packed_decode_tokens_per_s": decode["browser/packed"],
        "browser_fp32_decode_tokens_per_s": decode["browser/fp32"],
        "browser_decode_ratio_to_packed": decode["browser/unfolded"] / decode["browser/packed"],
        "browser_decode_ratio_to_fp32": decode["browser/unfolded"] / decode["browser/fp32"],
        "browser_download_mb": unfolded["download_bytes"] / 1e6,
        "browser_peak_mb": unfolded["renderer_peak_bytes"]["median"] / 1e6,
        "browser_packed_peak_mb": by_name["browser/packed"]["renderer_peak_bytes"]["median"] / 1e6,
        "browser_fp32_peak_mb": by_name["browser/fp32"]["renderer_peak_bytes"]["median"] / 1e6,
        "browser_load_s": unfolded["load_s"]["median"],
        "node_decode_tokens_per_s": decode["node/unfolded"],
        "node_packed_decode_tokens_per_s": decode["node/packed"],
    }


if __name__ == "__main__":
    main()
