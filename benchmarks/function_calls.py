"""Function calls from real requests: base, baseline and dispersed at every precision, with several seeds.

    python benchmarks/function_calls.py --train rows.jsonl --answers rows.jsonl [--seeds 3] [--out FOLDER]

Builds the recipe home_commands_smollm2_135m on chat rows of your own (an ordinary build: an interrupted one
continues) and writes the share of exact calls, in percent, to results/function_calls<suffix>.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from _results_file import RESULTS, write

from edgedisp.commands.plan import threads_for
from edgedisp.core.files import data_folder
from edgedisp.core.progress import Screen
from edgedisp.core.results import BASELINE, Estimate
from edgedisp.pipeline.build_plan import build
from edgedisp.pipeline.run_results import publish
from edgedisp.recipe import load
from edgedisp.report.verdict import verdict

TASK = "heldout_answers"
BASE = "base"


def percent(estimate: Estimate) -> dict[str, float | None]:
    values = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: None if value is None else round(100 * value, 2) for name, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="chat rows to train on")
    parser.add_argument("--answers", type=Path, required=True, help="chat rows to answer")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/function_calls"))
    parser.add_argument("--set", action="append", default=[], help="any other key of the recipe")
    parser.add_argument("--suffix", default="", help="of the results' name, for another model: _gemma3_270m")
    options = parser.parse_args()
    settings = [
        "name=function_calls",
        f"data.train=[{{source: {options.train.resolve()}, messages: messages}}]",
        f"evaluate.answers={options.answers.resolve()}",
        f"seeds={options.seeds}",
        *options.set,
    ]
    recipe = load(data_folder("recipes") / "home_commands_smollm2_135m.yaml", settings)
    with Screen(f"{recipe.name} -> {options.out}") as screen:
        run = publish(recipe, build(recipe, options.out, threads_for(recipe), screen), options.out)
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for model in (BASE, *run.arms):
        for precision in run.precisions:
            scores = run.measured(model, precision).scores
            if TASK not in scores:
                continue
            row: dict[str, Any] = {"model": model, "precision": precision, "items": None}
            for name, score in scores[TASK].metrics.items():
                row[name] = percent(score.estimate) if score.is_share else score.estimate.value
                row["items"] = score.estimate.n
            rows.append(row)
            figures[f"exact_{model}_{precision}"] = row["exact"]["value"]
    differences = {
        f"{arm}-{BASELINE} {precision}": percent(tasks[TASK].main.estimate)
        for arm, by_precision in run.comparisons.items()
        for precision, tasks in by_precision.items()
    }
    rate = "generate_rate_ratio_transformers"  # measured by generate_rate.py, on the quickstart's commands
    figures[rate] = json.loads((RESULTS / "generate_rate.json").read_text())["figures"][rate]
    details = {"seeds": run.seeds, "tokens": run.training[run.arms[0]].tokens, "differences": differences}
    write("function_calls", figures, rows, suffix=options.suffix, **details, verdict=verdict(run).sentence)


if __name__ == "__main__":
    main()
