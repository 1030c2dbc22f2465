"""One model on every kind of device that a single machine has. Writes results/devices.json and devices.html

    python benchmarks/devices.py --model FOLDER [--repetitions 5]

`--model` is a Hugging Face folder, such as <run>/dispersed/model. Three bundles are exported of it: `laptop`
(int4, --target laptop-x64), `browser` (int4, --target browser: unfolds to fp32 as it opens), and `fp32`,
which has no packed weights. Then, as `edgedisp bench` does it:

- `laptop` on local and on ssh to this machine's loopback;
- `browser` and `fp32` in headless Chromium, `fp32` on local, with ONE thread each: what the browser costs;
- `laptop` in onnxruntime-genai, with the threads of the physical cores and with none named, in turns.

Needs chromium, sshd (docs/devices.md) and an idle machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import RESULTS, write
from turns import PROMPT, timed

from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.results import median_interval
from edgedisp.bench.system import physical_cores
from edgedisp.commands.bench import time_bundles
from edgedisp.commands.export import export_bundle
from edgedisp.core.progress import Screen
from edgedisp.pipeline.run_results import device_result
from edgedisp.recipe import load_target
from edgedisp.report.render import devices_page

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
import sshd

PAUSE_S = 1.0
RUNNER = Path(__file__).with_name("genai_runner.py")


class Quiet:
    """An observer that shows nothing."""

    def started(self, name: str, number: int, total: int) -> None: ...
    def progress(self, done: int, total: int, note: str) -> None: ...
    def finished(self, name: str, record: Any) -> None: ...
    def kept(self, name: str, record: Any) -> None: ...


def exported(model: Path, folder: Path) -> dict[str, Path]:
    """The three bundles, made under `folder`."""
    plain = (
        "name: fp32\ndescription: fp32\narchitecture: x86_64\nprecision: fp32\nthreads: 1\n"
        f"context: {load_target('browser').context}\nlayouts: [onnxruntime-genai]\n"
    )
    (folder / "fp32.yaml").write_text(plain, encoding="utf-8")
    targets = {"laptop": "laptop-x64", "browser": "browser", "fp32": str(folder / "fp32.yaml")}
    for name, target in targets.items():
        export_bundle(model, target, folder / name, Quiet())
    return {name: folder / name for name in targets}


def on_devices(bundles: dict[str, Path], repetitions: int, folder: Path) -> dict[str, Any]:
    """Everything that `edgedisp bench` measures, as one result of it."""
    usual = BenchOptions(repetitions=repetitions, pause_s=PAUSE_S, setup=True)
    single = BenchOptions(repetitions=repetitions, pause_s=PAUSE_S, threads=1)
    with sshd.running(folder / "sshd") as server, Screen("devices") as screen:
        os.environ["EDGEDISP_SSH"] = server.command
        kinds = ["local", server.device]
        native = time_bundles([bundles["laptop"]], kinds, usual, screen.progress)
        page = time_bundles([bundles["browser"], bundles["fp32"]], ["browser"], single, screen.progress)
        plain = time_bundles([bundles["fp32"]], ["local"], single, screen.progress)
    native["devices"][1]["device"] = "ssh, loopback"
    plain["devices"][0]["device"] = "local, 1 thread"
    return {"format": 1, "devices": [one for part in (native, page, plain) for one in part["devices"]]}


def in_genai(bundle: Path, rounds: int) -> list[dict[str, Any]]:
    """Decode and prefill speed in onnxruntime-genai with the cores' threads, with 1, and with none named."""
    counts = {"cores": physical_cores(), "one": 1, "unset": 0}
    base = [sys.executable, str(RUNNER), str(bundle), "--prompt", str(PROMPT), "--interactive"]
    commands = {name: [*base, "--threads", str(count)] for name, count in counts.items()}
    found = timed(commands, rounds)
    rows = []
    for name, one in found.items():
        spreads = {key: median_interval(values) for key, values in one.items()}
        rows.append({"name": f"genai/{name}", "threads": counts[name] or None, **spreads, "each": one})
    return rows


def figures(result: dict[str, Any], genai: list[dict[str, Any]]) -> dict[str, float]:
    """The numbers that the table's readers ask for."""
    rows = {(d["device"], r["label"]): r for d in result["devices"] for r in d.get("rows", ())}
    each = {row["name"]: row["each"]["decode_tokens_per_s"] for row in genai}
    browser, fp32 = rows["browser", "browser"], rows["browser", "fp32"]
    native, laptop = rows["local, 1 thread", "fp32"], rows["local", "laptop"]
    decode = "decode_tokens_per_s"
    return {
        "browser_decode_tokens_per_s": browser[decode],
        "browser_fp32_decode_tokens_per_s": fp32[decode],
        "browser_ratio_to_native_fp32": fp32[decode] / native[decode],
        "browser_download_mb": browser["download_bytes"] / 1e6,
        "local_decode_tokens_per_s": laptop[decode],
        "local_fp32_one_thread_decode_tokens_per_s": native[decode],
        "local_fp32_one_thread_gb_per_s": native["implied_bandwidth_gb_per_s"],
        "ssh_decode_ratio_to_local": rows["ssh, loopback", "laptop"][decode] / laptop[decode],
        "genai_default_threads_decode_ratio": statistics.median(
            a / b for a, b in zip(each["genai/cores"], each["genai/unset"])
        ),
        "genai_cores_decode_tokens_per_s": statistics.median(each["genai/cores"]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--repetitions", type=int, default=5)
    asked = parser.parse_args()
    if sshd.MISSING:
        raise SystemExit(sshd.MISSING)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundles = exported(asked.model, folder)
        genai = in_genai(bundles["laptop"], asked.repetitions)
        result = on_devices(bundles, asked.repetitions, folder)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "devices.html").write_text(
        devices_page([device_result(one) for one in result["devices"]]), encoding="utf-8"
    )
    rows = [{"device": one["device"], **row} for one in result["devices"] for row in one.get("rows", ())]
    write(
        "devices", figures(result, genai), [*rows, *genai], devices=[_facts(one) for one in result["devices"]]
    )


def _facts(device: dict[str, Any]) -> dict[str, Any]:
    """A device without its rows and single repetitions."""
    return {key: value for key, value in device.items() if key not in ("rows", "repetitions", "order")}


if __name__ == "__main__":
    main()
