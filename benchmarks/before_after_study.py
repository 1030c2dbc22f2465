"""Before and after: what dispersion does to SmolLM2-135M, and what quantization leaves of it.

Builds the recipe wikipedia's model and text with several arms and seeds, twice: plain, and trained under int4
rounding. Both are ordinary builds (`edgedisp build`), so an interrupted study continues; the baselines of the
two are compared by `edgedisp compare`. Figures, table and picture go to results/before_after.*.

    python benchmarks/before_after_study.py --tokens 80k --seeds 3 --out study
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _results_file import RESULTS, wikipedia, write
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from edgedisp.commands.compare import join_runs
from edgedisp.commands.plan import threads_for
from edgedisp.core.progress import Screen
from edgedisp.core.results import BASELINE, LOSS_TASK
from edgedisp.core.run import Run
from edgedisp.pipeline.build_plan import build
from edgedisp.pipeline.run_results import publish
from edgedisp.recipe.recipe import smoke
from edgedisp.report.comparisons import comparisons
from edgedisp.report.figure import arm_color
from edgedisp.report.formatting import fixed, megabytes, significant
from edgedisp.report.layout import Grid, grid_markdown
from edgedisp.report.verdict import verdict

PRECISIONS = ("fp32", "int8", "int4")
TRAININGS = {  # name: (title, settings of the recipe)
    "plain": ("Plain", ["arms=[baseline, dispersed, {name: dispersed_1, dispersion: {weight: 1.0}}]"]),
    "aware": ("Trained under int4 rounding", ["arms=[baseline, dispersed]", "train.quantization_aware=int4"]),
}
NOTE = """\
Differences: arm - baseline of the same training, paired by item; of the baseline under rounding, against the
plain one. Sees: the difference that would be found 4 times out of 5. Survived: what quantization left of the
difference in full precision."""
Rows = list[dict[str, Any]]


def build_run(training: str, options: argparse.Namespace) -> Run:
    """The results of one training, built or continued in its folder."""
    settings = [
        f"name=study-{training}", f"train.tokens={options.tokens}", f"seeds={options.seeds}", "targets=[]",
        f"evaluate.limit={options.limit}", f"precisions=[{','.join(PRECISIONS)}]", *TRAININGS[training][1],
    ]  # fmt: skip
    recipe = smoke(wikipedia(settings)) if options.smoke else wikipedia(settings)
    folder = options.out / training
    with Screen(f"{recipe.name} -> {folder}") as screen:
        return publish(recipe, build(recipe, folder, threads_for(recipe), screen), folder)


def rows_of(training: str, run: Run, joined: Run) -> Rows:
    """A row for each arm and precision: its scores, its difference in loss, what of it survived.

    The baseline under rounding is compared with the plain one, in `joined`: what dispersion competes with.
    """
    compared = {(row.arm, row.precision): row for row in comparisons(run) if row.task == LOSS_TASK}
    if training == "aware":
        for row in comparisons(joined):
            if row.arm.startswith(f"{BASELINE} of") and row.task == LOSS_TASK:
                compared[BASELINE, row.precision] = row
    rows = []
    for arm in run.arms:
        for precision in PRECISIONS:
            row = {"training": training, "arm": arm, "precision": precision, "seeds": run.seeds}
            row["size_bytes"] = run.bundles[arm][precision].size_bytes
            scores = run.measured(arm, precision).scores
            row |= {task: score.main.estimate.value for task, score in scores.items()}
            if comparison := compared.get((arm, precision)):
                estimate = comparison.estimate
                row["difference"] = {
                    "difference": estimate.value, "low": estimate.low, "high": estimate.high,
                    "p": comparison.p, "detectable": comparison.detectable, "outcome": comparison.outcome,
                    "by_seed": list(estimate.seeds.values) if estimate.seeds else [],
                }  # fmt: skip
            survival = run.loss_survival.get(arm, {}).get(precision, {}).get(LOSS_TASK)
            rows.append({**row, "survived": survival.verdict if survival else ""})
    return rows


def markdown(rows: Rows, verdicts: dict[str, str]) -> str:
    tasks = [key for key in rows[0] if key.startswith("heldout_")]
    lines = []
    for row in rows:
        texts = ["", "", ""]
        if change := row.get("difference"):
            difference, low, high = (fixed(change[key], 4, "+") for key in ("difference", "low", "high"))
            texts = [difference, f"{low}, {high}", fixed(change["detectable"], 4)]
        names = (row["training"], row["arm"], row["precision"], megabytes(row["size_bytes"]))
        lines.append((*names, *(significant(row[task]) for task in tasks), *texts, row["survived"]))
    head = ("training", "arm", "precision", "MB", *tasks)
    head += ("loss difference, nats", "95 % interval", "sees", "survived")
    title = "# Before and after: what dispersion does to SmolLM2-135M, and what is left of it"
    paragraphs = [f"**{TRAININGS[training][0]}.** {text}" for training, text in verdicts.items()]
    picture = "![differences in held-out loss](before_after.svg)"
    return "\n\n".join([title, *paragraphs, picture, grid_markdown(Grid(head, tuple(lines))), NOTE]) + "\n"


def draw(rows: Rows, path: Path) -> None:
    """Differences in held-out loss with their intervals, a panel for each precision."""
    rows = [row for row in rows if "difference" in row]
    labels = list(dict.fromkeys((row["training"], row["arm"]) for row in reversed(rows)))
    figure = Figure(figsize=(10, 1.2 + 0.5 * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, precision in zip(figure.subplots(1, len(PRECISIONS), sharey=True), PRECISIONS):
        for row in (row for row in rows if row["precision"] == precision):
            y, change = labels.index((row["training"], row["arm"])), row["difference"]
            color = arm_color(row["arm"], [arm for _, arm in labels])
            ax.plot([change["low"], change["difference"], change["high"]], [y] * 3, color=color, linewidth=2)
            ax.plot([change["difference"]], [y], "o", color=color)
            ax.plot(change["by_seed"], [y - 0.18] * len(change["by_seed"]), ".", color=color, markersize=4)
        ax.axvline(0, color="#66727f", linewidth=1)
        ax.set_title(precision, loc="left", fontsize=11)
        ax.set_xlabel("nats per token (left: better)")
        ax.set_yticks(range(len(labels)), [f"{arm}, {TRAININGS[name][0].lower()}" for name, arm in labels])
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", default="80k")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--smoke", action="store_true", help="a tiny twin of the model; nothing is recorded")
    parser.add_argument("--out", type=Path, default=Path("study"))
    options = parser.parse_args()
    runs = {training: build_run(training, options) for training in TRAININGS}
    joined = join_runs([options.out / training for training in TRAININGS])
    rows = [row for training, run in runs.items() for row in rows_of(training, run, joined)]
    folder = options.out if options.smoke else RESULTS
    verdicts = {training: verdict(run).sentence for training, run in runs.items()}
    (folder / "before_after.md").write_text(markdown(rows, verdicts), encoding="utf-8")
    draw(rows, folder / "before_after.svg")
    if not options.smoke:
        figures = {
            f"{row['training']}_{row['arm']}_{row['precision']}_loss_{key}": row["difference"][key]
            for row in rows
            if "difference" in row
            for key in ("difference", "low", "high", "detectable")
        }
        write("before_after", figures, rows)


if __name__ == "__main__":
    main()
