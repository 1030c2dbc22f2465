"""The study: does dispersion help, at which precision, and does it survive quantization?

    python benchmarks/before_after.py [--tokens 80k] [--seeds 3] [--limit 200] [--work FOLDER] [--hours H]

SmolLM2-135M on Wikipedia summaries, as in the quickstart. Five arms: baseline and dispersion at two weights
(the paper's 0.1, and 1.0, the largest of its ablation), and baseline and dispersed once more, trained under
the int4 bundle's own rounding. Each with every seed, each scored in fp32, int8 and int4 on the same items.

Continues where it was stopped, cell by cell (cells.py); `--hours` stops it before a cell that would not fit.
Every call ends with tables and plots of what is there: results/before_after.{json,md,svg}.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import cells
import study
from record import write

from edgedisp.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="80k", help="training tokens of each arm; raise it on a GPU")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=200, help="items of each task")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="where weights lie for a while")
    parser.add_argument("--hours", type=float, help="start no cell that would end later")
    parser.add_argument("--smoke", action="store_true", help="a tiny twin, to see that all works")
    asked = parser.parse_args()
    chosen = cells.recipes(asked.tokens, asked.seeds, asked.limit, asked.smoke)
    path = asked.work / "before_after_smoke.json" if asked.smoke else cells.CELLS
    made = cells.opened(chosen, path)
    ends = None if asked.hours is None else time.monotonic() + 3600 * asked.hours
    for name, recipe, run in cells.todo(chosen, made):
        took = max((one["seconds"] for one in made["cells"].values()), default=0.0)
        if ends is not None and time.monotonic() + took > ends:
            print(f"no time left for {name}; the same command continues", file=sys.stderr)
            break
        cells.make(name, recipe, run, asked.work / recipe.name, made)
        cells.save(made, path)
        print(f"{name}: {made['cells'][name]['seconds']:.0f} s", file=sys.stderr)
    publish(chosen, made, asked.work if asked.smoke else cells.RESULTS)


def publish(chosen: dict[str, Recipe], made: dict[str, Any], folder: Path) -> None:
    """The tables and the picture of all cells so far."""
    found = study.results(made)
    rows = study.rows_of(found, made)
    said = study.said_of(found, made)
    planned = sum(len(recipe.arm_runs) for recipe in chosen.values())
    tokens, seeds = chosen[cells.PLAIN].train.tokens, sorted({seed for *_, seed in found})
    hours = sum(cell["seconds"] for cell in made["cells"].values()) / 3600
    machines = sorted({cell["machine"] for cell in made["cells"].values()})
    about = (
        f"{len(found)} of {planned} cells: {tokens:,} training tokens each, seeds {seeds}, {hours:.1f} "
        f"hours on {', '.join(machines)}. Made by `benchmarks/before_after.py`."
    )
    text = study.markdown(rows, said, about)
    (folder / "before_after.md").write_text(text, encoding="utf-8")
    study.draw(rows, folder / "before_after.svg")
    print(text)
    if folder == cells.RESULTS:
        write("before_after", study.figures_of(rows), rows, verdicts=said, about=about)


if __name__ == "__main__":
    main()
