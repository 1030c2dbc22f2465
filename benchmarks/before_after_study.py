"""Before and after: what dispersion does to SmolLM2-135M, and what quantization leaves of it.

Builds the quickstart's model and text with several arms and seeds, twice: plain, and trained under int4
rounding. Both are ordinary builds (`edgedisp build`), so an interrupted study continues; the baselines of the
two are compared by `edgedisp compare`. Figures, table and picture go to results/before_after.*.

    python benchmarks/before_after_study.py --tokens 80k --seeds 3 --out study
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _results_file import RESULTS, write
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from edgedisp.commands.compare import join_runs
from edgedisp.commands.plan import threads_for
from edgedisp.commands.run_report import publish
from edgedisp.core.files import data_folder
from edgedisp.core.progress import Screen
from edgedisp.core.results import BASELINE
from edgedisp.core.run import Run
from edgedisp.pipeline.build_plan import build
from edgedisp.recipe import load, smoke
from edgedisp.report import verdict
from edgedisp.report.comparisons import LOSS, Comparison, comparisons
from edgedisp.report.formatting import fixed, megabytes, signed, significant
from edgedisp.report.layout import Grid, grid_markdown

PRECISIONS = ("fp32", "int8", "int4")
WAYS = {
    "plain": ["arms=[baseline, dispersed, {name: dispersed_1, dispersion: {weight: 1.0}}]"],
    "aware": ["arms=[baseline, dispersed]", "train.quantization_aware=int4"],
}
"""Ways of training: settings of the recipe."""
NAMES = {"plain": "plain", "aware": "trained under int4 rounding"}
COLORS = {"dispersed": "#d9771f", "dispersed_1": "#8a63a8", BASELINE: "#2f8f83"}


def built(way: str, options: argparse.Namespace) -> Run:
    """The results of one way of training, built or continued in its folder."""
    settings = [
        f"name=study-{way}", f"train.tokens={options.tokens}", f"seeds={options.seeds}", "targets=[]",
        f"evaluate.limit={options.limit}", f"precisions=[{','.join(PRECISIONS)}]", *WAYS[way],
    ]  # fmt: skip
    recipe = load(data_folder("recipes") / "quickstart.yaml", settings)
    recipe = smoke(recipe) if options.smoke else recipe
    folder = options.out / way
    with Screen(f"{recipe.name} -> {folder}") as screen:
        return publish(recipe, build(recipe, folder, threads_for(recipe), screen), folder)


def rows_of(way: str, run: Run, compared: Run) -> list[dict[str, Any]]:
    """A row for each arm and precision: its scores, its difference in loss, what of it survived.

    compared: the run that holds the differences of this one's arms under the same names.
    """
    differences = {(one.arm, one.precision): one for one in comparisons(compared) if one.task == LOSS}
    rows = []
    for arm in run.arms:
        for precision in PRECISIONS:
            measured = run.measured(arm, precision)
            row: dict[str, Any] = {"way": way, "arm": arm, "precision": precision, "seeds": run.seeds}
            row["size_bytes"] = run.bundles[arm][precision].size_bytes
            row |= {task: score.main.estimate.value for task, score in measured.scores.items()}
            if (one := differences.get((arm, precision))) is not None:
                row["difference"] = difference_of(one)
            survival = run.loss_survival.get(arm, {}).get(precision, {}).get(LOSS)
            rows.append({**row, "survived": survival.verdict if survival else ""})
    return rows


def difference_of(one: Comparison) -> dict[str, Any]:
    estimate = one.estimate
    by_seed = list(estimate.seeds.values) if estimate.seeds else []
    ends = {"difference": estimate.value, "low": estimate.low, "high": estimate.high, "p": one.p}
    return {**ends, "detectable": one.detectable, "by_seed": by_seed, "outcome": one.outcome}


def aware_baseline(runs: dict[str, Run], folders: dict[str, Path]) -> list[dict[str, Any]]:
    """The baseline trained under rounding against the plain one: what dispersion has to stand beside."""
    joined = join_runs([folders["plain"], folders["aware"]])
    name = next(arm for arm in joined.arms if arm.startswith(f"{BASELINE} of"))
    found = {one.precision: one for one in comparisons(joined) if one.arm == name and one.task == LOSS}
    rows = rows_of("aware", runs["aware"], runs["aware"])
    return [
        {**row, "difference": difference_of(found[row["precision"]])}
        for row in rows
        if row["arm"] == BASELINE and row["precision"] in found
    ]


def markdown(rows: list[dict[str, Any]], sentences: dict[str, str]) -> str:
    texts = []
    for row in rows:
        one = row.get("difference")
        shown = ("", "", "")
        if one is not None:
            interval = f"{signed(one['low'], 4)}, {signed(one['high'], 4)}"
            shown = (signed(one["difference"], 4), interval, fixed(one["detectable"], 4))
        scores = [significant(value) for key, value in row.items() if key.startswith("heldout_")]
        size = megabytes(row["size_bytes"])
        texts.append((row["way"], row["arm"], row["precision"], size, *scores, *shown, row["survived"]))
    tasks = [key for key in rows[0] if key.startswith("heldout_")]
    head = ("training", "arm", "precision", "MB", *tasks)
    head += ("loss difference, nats", "95 % interval", "sees", "survived")
    said = [f"**{NAMES[way][0].upper()}{NAMES[way][1:]}.** {text}" for way, text in sentences.items()]
    note = (
        "Differences: arm - baseline of the same training, paired by item; of the baseline under rounding, "
        "against the plain one. Sees: the difference that would be found 4 times out of 5. Survived: what "
        "quantization left of the difference in full precision."
    )
    title = "# Before and after: what dispersion does to SmolLM2-135M, and what is left of it"
    picture = "![differences in held-out loss](before_after.svg)"
    return "\n\n".join([title, *said, picture, grid_markdown(Grid(head, tuple(texts))), note]) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Differences in held-out loss with their intervals, a panel for each precision."""
    shown = [row for row in rows if row.get("difference")]
    labels = list(dict.fromkeys((row["way"], row["arm"]) for row in shown))
    figure = Figure(figsize=(10, 1.2 + 0.5 * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, precision in zip(figure.subplots(1, len(PRECISIONS), sharey=True), PRECISIONS):
        for row in (row for row in shown if row["precision"] == precision):
            place = len(labels) - 1 - labels.index((row["way"], row["arm"]))
            one, color = row["difference"], COLORS[row["arm"]]
            ax.plot([one["low"], one["high"]], [place, place], color=color, linewidth=2)
            ax.plot([one["difference"]], [place], "o", color=color)
            ax.plot(one["by_seed"], [place - 0.18] * len(one["by_seed"]), ".", color=color, markersize=4)
        ax.axvline(0, color="#66727f", linewidth=1)
        ax.set_title(precision, loc="left", fontsize=11)
        ax.set_xlabel("nats per token (left: better)")
        ax.set_yticks(range(len(labels)), [f"{arm}, {NAMES[way]}" for way, arm in reversed(labels)])
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="80k")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--smoke", action="store_true", help="a tiny twin of the model; nothing is recorded")
    parser.add_argument("--out", type=Path, default=Path("study"))
    options = parser.parse_args()
    runs = {way: built(way, options) for way in WAYS}
    rows = [row for way, run in runs.items() for row in rows_of(way, run, run)]
    rows += aware_baseline(runs, {way: options.out / way for way in WAYS})
    sentences = {way: verdict(run).sentence for way, run in runs.items()}
    folder = options.out if options.smoke else RESULTS
    (folder / "before_after.md").write_text(markdown(rows, sentences), encoding="utf-8")
    draw(rows, folder / "before_after.svg")
    if not options.smoke:
        figures = {
            f"{row['way']}_{row['arm']}_{row['precision']}_loss_{key}": row["difference"][key]
            for row in rows
            if "difference" in row
            for key in ("difference", "low", "high", "detectable")
        }
        write("before_after", figures, rows)


if __name__ == "__main__":
    main()
