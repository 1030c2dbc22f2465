"""How long the quickstart takes, stage by stage, and what it finds. Writes results/quickstart.json.

    python benchmarks/quickstart.py [--out FOLDER]

Builds the quickstart recipe with the installed command in a fresh folder (no finished stage is reused; the
downloaded wheels are, if the cache holds them) and takes the figures from its report.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results" / "quickstart.json"
KINDS = {"model": "training", "measure": "checks and scoring", "latency": "timing"}


def kind(stage: str) -> str:
    """Training, scoring, checks, timing, or the rest (download, corpus, export, quantization)."""
    last = stage.rsplit("/", 1)[-1]
    return KINDS.get(last.split("-")[0], "other")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep the run here; default: a temporary folder")
    kept = parser.parse_args().out
    with tempfile.TemporaryDirectory() as scratch:
        run = kept or Path(scratch) / "run"
        if run.exists():
            sys.exit(f"{run}: exists; a benchmark needs a fresh folder")
        command = [str(Path(sys.executable).parent / "edgedisp"), "build", "quickstart", "--out", str(run)]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result(report, seconds), indent=1) + "\n", encoding="utf-8")
    print(f"{seconds:.0f} s; wrote {RESULTS.name}")


def result(report: dict[str, Any], seconds: float) -> dict[str, Any]:
    summary = report["summary"]
    shares: dict[str, float] = {}
    for stage in summary["stages"]:
        shares[kind(stage["name"])] = shares.get(kind(stage["name"]), 0.0) + stage["seconds"]
    figures = {"total_s": seconds, **{f"{name}_s": value for name, value in shares.items()}}
    for arm in summary["arms"]:
        figures[f"{arm}_tokens_per_s"] = summary["midtrain"][arm]["tokens_per_s"]
        for precision, tasks in summary["accuracy"][arm].items():
            figures[f"{arm}_{precision}_perplexity"] = tasks["heldout_perplexity"]["value"]
    for row in summary["latency"]["rows"]:
        figures[f"{row['arm']}_{row['precision']}_decode_tokens_per_s"] = row["decode_tokens_per_s"]
    return {
        "machine": summary["machine"],
        "versions": summary["versions"],
        "commit": summary["git_commit"],
        "command": "python benchmarks/quickstart.py",
        "figures": figures,
        "rows": summary["stages"],
        "verdict": report["verdict"]["sentence"],
    }


if __name__ == "__main__":
    main()
