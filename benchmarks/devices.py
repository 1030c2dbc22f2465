"""One model on every kind of device that a single machine has. Writes results/devices.json and devices.html

    python benchmarks/devices.py --model FOLDER [--repetitions 5]

`--model` is a Hugging Face folder, such as <run>/dispersed/model. Three bundles are exported: `laptop` (int4,
--target laptop-x64), `browser` (int4, --target browser: unfolds to fp32 as it opens), and `fp32`, without
packed weights. Then `laptop` is timed on local and on ssh to this machine's loopback; `browser` and `fp32` in
headless Chromium and `fp32` on local with ONE thread each, which is what the browser costs; and `laptop` in
onnxruntime-genai with the threads of the physical cores, with one, and with none in its configuration.

Needs chromium, sshd (docs/devices.md) and an idle machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from _results_file import RESULTS, write
from other_runtimes import genai_command, time_in_turns

from edgedisp.bench.devices import BenchOptions
from edgedisp.bench.results import median_interval
from edgedisp.bench.system import physical_cores
from edgedisp.commands.devices import time_bundles
from edgedisp.commands.export import export_bundle
from edgedisp.core.files import to_json
from edgedisp.core.progress import Screen
from edgedisp.recipe import load_target
from edgedisp.report.render import devices_page

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
import sshd

DECODE = "decode_tokens_per_s"


def exported(model: Path, folder: Path, screen: Screen) -> dict[str, Path]:
    """The three bundles, made under `folder`."""
    plain = (
        "name: fp32\ndescription: fp32\narchitecture: x86_64\nprecision: fp32\nthreads: 1\n"
        f"context: {load_target('browser').context}\nlayouts: [onnxruntime-genai]\n"
    )
    (folder / "fp32.yaml").write_text(plain, encoding="utf-8")
    targets = {"laptop": "laptop-x64", "browser": "browser", "fp32": str(folder / "fp32.yaml")}
    for name, target in targets.items():
        export_bundle(model, target, folder / name, screen.progress)
    return {name: folder / name for name in targets}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    if sshd.MISSING:
        raise SystemExit(sshd.MISSING)
    usual = BenchOptions(repetitions=options.repetitions, pause_s=1.0, remote_python=sys.executable)
    single = BenchOptions(repetitions=options.repetitions, pause_s=1.0, threads=1)
    with tempfile.TemporaryDirectory() as scratch, Screen("devices") as screen:
        bundles = exported(options.model, Path(scratch), screen)
        laptop, browser, fp32 = bundles.values()
        counts = {"cores": physical_cores(), "one": 1, "unset": 0}
        commands = {name: genai_command(laptop, count) for name, count in counts.items()}
        speeds = time_in_turns(commands, options.repetitions)
        with sshd.running(Path(scratch) / "sshd") as server:
            os.environ["EDGEDISP_SSH"] = server.command
            native = time_bundles([laptop], ["local", server.device], usual, screen.progress)
            page = time_bundles([browser, fp32], ["browser"], single, screen.progress)
            plain = time_bundles([fp32], ["local"], single, screen.progress)
    devices = [device for part in (native, page, plain) for device in part["devices"]]
    names = ("local", "ssh, loopback", "browser", "local, 1 thread")
    devices = [replace(device, device=name) for device, name in zip(devices, names, strict=True)]
    (RESULTS / "devices.html").write_text(devices_page(devices), "utf-8")
    genai: list[dict[str, Any]] = []
    for name, values in speeds.items():
        intervals = {key: median_interval(each) for key, each in values.items()}
        genai.append({"name": f"genai/{name}", "threads": counts[name] or None, **intervals, "each": values})
    rows = {(device.device, row.label): row for device in devices for row in device.rows}
    speed = {name: row.decode_tokens_per_s.value for name, row in rows.items() if row.decode_tokens_per_s}
    one_thread, local = ("local, 1 thread", "fp32"), ("local", "laptop")
    ratios = [a / b for a, b in zip(speeds["cores"][DECODE], speeds["unset"][DECODE])]
    figures = {
        "browser_decode_tokens_per_s": speed["browser", "browser"],
        "browser_fp32_decode_tokens_per_s": speed["browser", "fp32"],
        "browser_ratio_to_native_fp32": speed["browser", "fp32"] / speed[one_thread],
        "browser_download_mb": (rows["browser", "browser"].download_bytes or 0) / 1e6,
        "local_decode_tokens_per_s": speed[local],
        "local_fp32_one_thread_decode_tokens_per_s": speed[one_thread],
        "local_fp32_one_thread_gb_per_s": rows[one_thread].bandwidth_gb_per_s,
        "ssh_decode_ratio_to_local": speed["ssh, loopback", "laptop"] / speed[local],
        "genai_default_threads_decode_ratio": statistics.median(ratios),
        "genai_cores_decode_tokens_per_s": statistics.median(speeds["cores"][DECODE]),
    }
    timings = [{"device": name, **to_json(row)} for (name, _), row in rows.items()]
    facts = [to_json(replace(device, rows=[], repetitions=[])) for device in devices]
    write("devices", figures, [*timings, *genai], devices=facts)


if __name__ == "__main__":
    main()
