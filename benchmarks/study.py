"""The tables and the picture of the before/after study, from its cells (cells.py).

Arms are compared with the baseline of their own way of training, over the seeds that both have; and the
baseline trained under rounding with the plain one, which is the measure that dispersion has to stand beside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cells import ARMS, AWARE, PLAIN, PRECISIONS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from edgedisp.core.results import Difference, TaskDifference, TaskScore
from edgedisp.evaluate.quantization_survival import loss_survival
from edgedisp.evaluate.seeds_and_means import average_task, compare_tasks, mean_difference
from edgedisp.evaluate.statistics import Metric, Resampling
from edgedisp.evaluate.task_result import TaskResult, task_result
from edgedisp.report import verdict
from edgedisp.report.comparisons import detectable
from edgedisp.summary import differences_record, mean_record, scores_record, survival_record

LOSS = "heldout_perplexity"
BASELINE = "baseline"
NAMES = {PLAIN: "plain", AWARE: "trained under int4 rounding"}
COLORS = {"dispersed": "#d9771f", "dispersed_1": "#8a63a8", BASELINE: "#2f8f83"}
By = dict[tuple[str, str, int], dict[str, dict[str, TaskResult]]]
"""(way, arm, seed) -> precision -> task -> result."""


def results(made: dict[str, Any]) -> By:
    """The stored scores as the results that the statistics take."""
    found: By = {}
    for name, cell in made["cells"].items():
        way, arm, seed = name.split("/")
        found[way, arm, int(seed)] = {
            precision: {task: _result(task, made["items"][task], scores) for task, scores in by_task.items()}
            for precision, by_task in cell["scores"].items()
        }
    return found


def _result(task: str, fixed: dict[str, Any], scores: dict[str, list[float]]) -> TaskResult:
    items = [
        {**item, **{key: values[place] for key, values in scores.items()}, "asked": str(item["id"])}
        for place, item in enumerate(fixed["items"])
    ]
    metrics = [Metric(**definition) for definition in fixed["definitions"].values()]
    return task_result(TaskScore(task, {}, fixed["chance"]), items, metrics, Resampling(200))


def pairs_of(found: By, first: tuple[str, str], second: tuple[str, str]) -> list[int]:
    """The seeds that both arms have, in order."""
    seeds = [{seed for way, arm, seed in found if (way, arm) == one} for one in (first, second)]
    return sorted(seeds[0] & seeds[1])


def compared(
    found: By, first: tuple[str, str], second: tuple[str, str]
) -> dict[str, dict[str, TaskDifference]]:
    """precision -> task -> second - first, over the seeds that both have."""
    seeds = pairs_of(found, first, second)
    return {
        precision: {
            task: compare_tasks(
                [
                    (found[(*first, seed)][precision][task], found[(*second, seed)][precision][task])
                    for seed in seeds
                ]
            )
            for task in found[(*first, seeds[0])][precision]
        }
        for precision in PRECISIONS
    }


def summary_of(found: By, made: dict[str, Any], way: str) -> dict[str, Any]:
    """One way of training as the summary that the report's verdict reads."""
    arms = list(dict.fromkeys(arm for own, arm, _ in found if own == way))
    seeds = sorted({seed for own, arm, seed in found if own == way and arm == BASELINE})
    seeds = [seed for seed in seeds if all((way, arm, seed) in found for arm in arms)]
    comparison, means = {}, {}
    accuracy = {
        arm: {
            precision: {
                task: average_task([found[way, arm, seed][precision][task] for seed in seeds])
                for task in found[way, arm, seeds[0]][precision]
            }
            for precision in PRECISIONS
        }
        for arm in arms
    }
    for arm in arms[1:]:
        by_precision = compared(found, (way, BASELINE), (way, arm))
        comparison[arm] = {
            precision: differences_record(by_task) for precision, by_task in by_precision.items()
        }
        means[arm] = {
            precision: mean_record(mean)
            for precision, by_task in by_precision.items()
            if (mean := mean_difference(accuracy[BASELINE][precision], accuracy[arm][precision], by_task))
        }
    return {
        "name": f"study, {NAMES[way]}",
        "arms": arms,
        "seeds": seeds,
        "precisions": [*PRECISIONS],
        "accuracy": {
            arm: {precision: scores_record(scores) for precision, scores in by_precision.items()}
            for arm, by_precision in accuracy.items()
        },
        "comparison": comparison,
        "means": means,
        "noise": made["noise"],
        "techniques": {arm: {"dispersion": {"weight": 1.0}} for arm in arms if arm != BASELINE},
    }


def rows_of(found: By, made: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each arm and precision: its scores, its differences, what of them survived."""
    rows = []
    for way in ARMS:
        arms = list(dict.fromkeys(arm for own, arm, _ in found if own == way))
        for arm in arms:
            against = (way, BASELINE) if arm != BASELINE else (PLAIN, BASELINE)
            seeds = pairs_of(found, against, (way, arm))
            if not seeds:
                continue
            differences = None if (way, arm) == (PLAIN, BASELINE) else compared(found, against, (way, arm))
            for precision in PRECISIONS:
                own = [found[way, arm, seed][precision] for seed in seeds]
                cells = [made["cells"][f"{way}/{arm}/{seed}"] for seed in seeds]
                row = {
                    "way": way,
                    "arm": arm,
                    "precision": precision,
                    "seeds": seeds,
                    "size_bytes": cells[0]["size_bytes"][precision],
                    "noise_floor": made["noise"].get(precision, {}).get("floor"),
                    "mean_cosine": sum(cell["condensation"]["mean_cosine"] for cell in cells) / len(cells),
                    **{task: average_task([one[task] for one in own]).main.estimate.value for task in own[0]},
                }
                if differences is not None:
                    row["against"] = "/".join(against)
                    row["difference"] = {
                        task: _short(one.main) for task, one in differences[precision].items()
                    }
                if arm != BASELINE and precision != "fp32":
                    fours = [
                        tuple(
                            found[way, one, seed][at][LOSS]
                            for at in ("fp32", precision)
                            for one in (BASELINE, arm)
                        )
                        for seed in seeds
                    ]
                    kept = survival_record(loss_survival(fours))  # type: ignore[arg-type]
                    row["survival"] = {key: kept[key] for key in ("full", "quantized", "change", "verdict")}
                rows.append(row)
    return rows


def _short(one: Difference) -> dict[str, Any]:
    """The difference in nats per token for losses, else in the metric's unit."""
    part = one.nats or one.estimate
    row: dict[str, Any] = {
        "difference": part.value,
        "low": part.low,
        "high": part.high,
        "p_value": one.estimate.p,
        "documents": part.documents,
        "detectable": detectable(part.half_width or 0.0),
    }
    if part.seeds is not None:
        row |= {"by_seed": part.seeds.values, "sd_of_seeds": part.seeds.sd}
    if one.only_first is not None and one.only_second is not None and one.estimate.n:
        row["differing"] = (one.only_first + one.only_second) / one.estimate.n
    return row


def figures_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The differences in held-out loss, by way, arm and precision, with their ends."""
    figures: dict[str, float] = {}
    for row in rows:
        name = f"{row['way']}_{row['arm']}_{row['precision']}"
        figures[f"{name}_perplexity"] = row[LOSS]
        if (one := row.get("difference", {}).get(LOSS)) is not None:
            figures |= {f"{name}_loss_{key}": one[key] for key in ("difference", "low", "high", "detectable")}
    return figures


def markdown(rows: list[dict[str, Any]], said: dict[str, str], about: str) -> str:
    lines = [
        "# Before and after: what dispersion does to SmolLM2-135M, and what is left of it",
        "",
        about,
        "",
    ]
    for way, sentence in said.items():
        lines += [f"**{NAMES[way][0].upper()}{NAMES[way][1:]}.** {sentence}", ""]
    if not rows:
        return "\n".join(lines)
    lines += ["![differences in held-out loss](before_after.svg)", ""]
    tasks = [key for key in rows[0] if key.startswith("heldout_")]
    head = ["training", "arm", "precision", "MB", "perplexity", "cloze %", "continuation %"]
    head += ["loss difference, nats", "95 % interval", "sees", "survived"]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        one = row.get("difference", {}).get(LOSS)
        values = [f"{row[tasks[0]]:.2f}", *(f"{100 * row[task]:.1f}" for task in tasks[1:])]
        shown = ["", "", ""]
        if one is not None:
            ends = f"{one['low']:+.4f}, {one['high']:+.4f}"
            shown = [f"{one['difference']:+.4f}", ends, f"{one['detectable']:.4f}"]
        kept = row.get("survival", {}).get("verdict", "")
        texts = [
            row["way"],
            row["arm"],
            row["precision"],
            f"{row['size_bytes'] / 1e6:.0f}",
            *values,
            *shown,
            kept,
        ]
        lines.append("| " + " | ".join(texts) + " |")
    lines += [
        "",
        "Differences: arm - baseline of the same training, paired by item; of the baseline under rounding, "
        "against the plain one. Intervals hold the choice of documents and, from two seeds on, the luck of "
        "training. Sees: the difference that would be found 4 times out of 5. Survived: what quantization "
        "left of the difference in fp32 (nothing: there was none to survive). " + _noise_told(rows),
        "",
    ]
    return "\n".join(lines)


def _noise_told(rows: list[dict[str, Any]]) -> str:
    floors = {row["precision"]: row["noise_floor"] for row in rows if row["noise_floor"] is not None}
    if not floors:
        return "The noise floor was not measured."
    told = ", ".join(f"{floor:.1g} at {precision}" for precision, floor in floors.items())
    return f"Two scorings of one model differ by {told} (nats per token); no claim is made of less."


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Differences in held-out loss with their intervals, a panel for each precision. What lies far off, as a
    model that was trained under rounding and is not rounded, stands at the edge as a number."""
    shown = [row for row in rows if row.get("difference")]
    if not shown:
        return  # a baseline alone
    labels = list(dict.fromkeys((row["way"], row["arm"]) for row in shown))
    figure = Figure(figsize=(10, 1.2 + 0.5 * len(labels)))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(PRECISIONS), sharey=True)
    for ax, precision in zip(axes, PRECISIONS):
        here = [row for row in shown if row["precision"] == precision]
        near = [row["difference"][LOSS] for row in here if row["arm"] != BASELINE]
        reach = 1.3 * max(abs(one[end]) for one in near for end in ("low", "high"))
        ax.set_xlim(-reach, reach)
        for row in here:
            place = len(labels) - 1 - labels.index((row["way"], row["arm"]))
            one, color = row["difference"][LOSS], COLORS[row["arm"]]
            if abs(one["difference"]) > reach:
                side = "right" if one["difference"] > 0 else "left"
                at = reach if side == "right" else -reach
                arrow = "{} →" if side == "right" else "← {}"
                ax.text(
                    at, place, arrow.format(f"{one['difference']:+.3f}"), color=color, ha=side, va="center"
                )
                continue
            ax.plot([one["low"], one["high"]], [place, place], color=color, linewidth=2)
            ax.plot([one["difference"]], [place], "o", color=color)
            for value in one.get("by_seed", []):
                ax.plot([value], [place - 0.18], ".", color=color, markersize=4)
        ax.axvline(0, color="#66727f", linewidth=1)
        ax.set_title(precision, loc="left", fontsize=11)
        ax.set_xlabel("nats per token (left: better)")
        ax.grid(axis="x", color="#d5dbe1", linewidth=0.6)
        ax.locator_params(axis="x", nbins=4)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
        ax.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(labels)), [f"{arm}, {NAMES[way]}" for way, arm in reversed(labels)])
    axes[0].set_ylim(-0.6, len(labels) - 0.4)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def said_of(found: By, made: dict[str, Any]) -> dict[str, str]:
    """The verdict of each way of training, by the rules of every report."""
    return {
        way: str(verdict(summary_of(found, made, way))["sentence"])
        for way in ARMS
        if any(own == way and arm != BASELINE for own, arm, _ in found)
    }
