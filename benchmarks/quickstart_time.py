"""How long the quickstart takes, stage by stage, and what it finds. Writes results/quickstart_time.json

    python benchmarks/quickstart_time.py [--out FOLDER]

Builds the quickstart recipe with the installed command in a fresh folder (no finished stage is reused; the
downloaded wheels are, if the cache has them) and takes the figures from its report.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _results_file import write

from edgedisp.core.files import to_json
from edgedisp.pipeline.run_results import load
from edgedisp.report.verdict import verdict

RECIPE = "home_commands_smollm2_135m"
KINDS = {"adapter": "training", "model": "merging", "measure": "checks and scoring", "latency": "timing"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="the run's folder; default: a temporary one")
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as scratch:
        folder = out or Path(scratch) / "run"
        if folder.exists():
            sys.exit(f"{folder}: exists; a benchmark needs a fresh folder")
        command = [str(Path(sys.executable).parent / "edgedisp"), "build", RECIPE, "--out", str(folder)]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        figures = {"total_s": time.perf_counter() - started}
        run = load(folder)
    for stage in run.stages:
        kind = KINDS.get(stage.name.rsplit("/", 1)[-1].split("-")[0], "other")
        figures[f"{kind}_s"] = figures.get(f"{kind}_s", 0.0) + stage.seconds
    for arm in run.arms:
        for precision, measurement in run.measurements[arm].items():
            for task, score in measurement.scores.items():
                figures[f"{arm}_{precision}_{task}"] = score.main.estimate.value or 0.0
    write("quickstart_time", figures, to_json(run.stages), verdict=verdict(run).sentence)


if __name__ == "__main__":
    main()
