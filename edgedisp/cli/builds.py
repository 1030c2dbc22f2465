"""The commands over recipes and runs: build, plan, pilot, recipes, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from edgedisp.cli.app import (
    HtmlOption,
    JsonOption,
    OutOption,
    RecipeArgument,
    SetOption,
    SmokeOption,
    TasksPathOption,
    TextOption,
    app,
    load_recipe,
    width,
)
from edgedisp.core.distributed import get_world_size, is_main_process
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import data_folder
from edgedisp.core.progress import Screen
from edgedisp.core.run import Run

WeightsOption = Annotated[str, Option(metavar="W,...", help="Weights to try, with all layers and variants.")]
SubjectsArgument = Annotated[
    list[Path],
    Argument(metavar="RUN...", help="Run folders or report.json files; or two models or bundles."),
]


@app.command()
def build(
    recipe: RecipeArgument,
    set_: SetOption = None,
    smoke: SmokeOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train, export, quantize, check, score and time a recipe's model; end with a report.

    Several processes train together: torchrun --nproc_per_node 2 -m edgedisp build RECIPE
    """
    from edgedisp.commands.plan import check_before_start, check_processes, slow_products, threads_for
    from edgedisp.pipeline.build_plan import build as build_run
    from edgedisp.pipeline.build_plan import run_folder

    loaded = load_recipe(recipe, set_, smoke)
    run = run_folder(loaded, out)
    check_processes(loaded, get_world_size())
    if not is_main_process():
        from edgedisp.pipeline.build_plan import stages
        from edgedisp.pipeline.stage import follow

        follow(stages(loaded, threads_for(loaded)), run)
        return
    check_before_start(loaded)
    if warning := slow_products(loaded):
        typer.echo(f"warning: {warning}", err=True)
    with Screen(f"{loaded.name} -> {run}") as screen:
        passed = build_run(loaded, run, threads_for(loaded), screen)
        from edgedisp.commands.run_report import publish

        results = publish(loaded, passed, run)
    _show(results, run, as_json)


def _show(results: Run, folder: Path, as_json: bool, markdown: bool = False) -> None:
    """Print a run. BuildFailed where a task could not be scored: all else is done, and shown."""
    from edgedisp import report
    from edgedisp.core.files import to_json

    verdict, table, page = report.verdict(results), report.table(results), folder / "report.html"
    if as_json:
        verdict_json = {**to_json(verdict), "sentence": verdict.sentence}
        document = {"run": str(folder), "report": str(page), "verdict": verdict_json}
        typer.echo(json.dumps(document, ensure_ascii=False))
    elif markdown:
        typer.echo(f"{report.table_markdown(table)}\n{verdict.sentence}")
    else:
        blocks = [report.table_text(table, width()), report.search_text(results)]
        blocks += [report.arms_text(results, width()), verdict.sentence, f"report: {page}"]
        typer.echo("\n\n".join(block for block in blocks if block))
    if missing := results.missing_tasks:
        raise BuildFailed(
            f"the report is written, but {', '.join(missing)} could not be scored: "
            f"{'; '.join(missing.values())}. The same command tries again and keeps the rest"
        )


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    smoke: SmokeOption = False,
    out: OutOption = None,
    probe: Annotated[bool, Option(help="Open the base and time a few training steps.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Say what a build would do: stages, which are done, steps, time, memory and disk."""
    from edgedisp.commands.plan import make_plan, render
    from edgedisp.pipeline.build_plan import run_folder

    loaded = load_recipe(recipe, set_, smoke)
    with Screen("plan") as screen:
        document = make_plan(loaded, run_folder(loaded, out), probe=probe, screen=screen)
    typer.echo(json.dumps(document) if as_json else render(document))


@app.command()
def pilot(
    recipe: RecipeArgument,
    weights: WeightsOption = "0.03,0.1,0.3,1,3",
    tokens: Annotated[str, Option(metavar="COUNT", help="Training tokens of each candidate.")] = "20k",
    layers: Annotated[str | None, Option(metavar="L,...", help="Such as all,last_half.")] = None,
    variants: Annotated[str | None, Option(metavar="V,...", help="Such as angular,cosine.")] = None,
    set_: SetOption = None,
    smoke: SmokeOption = False,
    out: Annotated[Path | None, Option("--out", help="Default: runs/<recipe>-pilot-<hash>.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Find out which dispersion settings do anything, on few tokens, before a build spends hours."""
    from edgedisp.commands import pilot as command
    from edgedisp.pipeline.build_plan import run_folder

    loaded = load_recipe(recipe, set_, smoke)
    trials = command.plan(loaded, weights=weights, tokens=tokens, layers=layers, variants=variants)
    folder = run_folder(trials.recipe, out)
    with Screen(f"{loaded.name} -> {folder}") as screen:
        trials = command.run(trials, folder, screen)
    if as_json:
        typer.echo(json.dumps({"run": str(folder), **command.summary(trials)}, ensure_ascii=False))
    else:
        typer.echo(f"{command.render(trials, width())}\n\npicture: {folder / 'pilot.png'}")


@app.command()
def recipes() -> None:
    """List the packaged recipes."""
    for path in sorted(data_folder("recipes").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").strip()
        typer.echo(f"{path.stem:24} {first}")


@app.command()
def compare(
    subjects: SubjectsArgument,
    tasks: Annotated[str | None, Option(metavar="T,...", help="Of two models: tasks, such as small.")] = None,
    text: TextOption = None,
    tasks_path: TasksPathOption = None,
    limit: Annotated[int | None, Option(min=1, help="Of two models: items a task; default 200.")] = None,
    context: Annotated[int | None, Option(min=8, help="Of two models: tokens of a window.")] = None,
    out: Annotated[Path | None, Option("--out", help="Of two models: the report's folder.")] = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
    markdown: Annotated[bool, Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Print the before/after table of runs, joined item by item, or of two models scored here."""
    from edgedisp.pipeline.run_results import is_run

    models = [path for path in subjects if not is_run(path)]
    if models and len(models) == len(subjects) == 2:
        from edgedisp.commands.compare import CompareOptions, compare_models

        names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
        options = CompareOptions(names, text, tasks_path, limit or 200, context or 256, out)
        with Screen("compare") as screen:
            results, folder = compare_models(models, options, screen.progress)
        _write_page(results, html)
        _show(results, folder, as_json, markdown)
        return
    if models:
        raise BadInput(
            f"{models[0]}: holds no report.json, so it is no finished run; compare takes runs, or exactly "
            "two model folders or bundles"
        )
    of_models = {"tasks": tasks, "text": text, "tasks-path": tasks_path, "limit": limit, "context": context}
    for name, value in {**of_models, "out": out}.items():
        if value is not None:
            raise BadInput(f"--{name}: is for two models; runs were scored when they were built")
    _compare_runs(subjects, html, as_json, markdown)


def _compare_runs(paths: list[Path], html: Path | None, as_json: bool, markdown: bool) -> None:
    from edgedisp import report
    from edgedisp.commands.compare import join_runs
    from edgedisp.core.files import to_json
    from edgedisp.pipeline.run_results import load

    runs = [load(path) for path in paths]
    table, verdicts = report.compare(runs), [report.verdict(run) for run in runs]
    joined = join_runs(paths) if len(runs) > 1 else runs[0]
    _write_page(joined, html)
    if as_json:
        document = {
            "table": to_json(table),
            "verdicts": [{**to_json(verdict), "sentence": verdict.sentence} for verdict in verdicts],
            "joined": to_json(joined) if len(runs) > 1 else None,
        }
        typer.echo(json.dumps(document, ensure_ascii=False))
        return
    blocks = [report.table_markdown(table) if markdown else report.table_text(table, width())]
    blocks += [f"{run.name}: {verdict.sentence}" for run, verdict in zip(runs, verdicts)]
    blocks += [report.arms_text(joined, width()), *(f"not paired: {reason}" for reason in joined.unpaired)]
    typer.echo("\n\n".join(block for block in blocks if block))


def _write_page(results: Run, path: Path | None) -> None:
    """The report as one page, with nothing beside it."""
    if path is not None:
        from edgedisp.report.render import single_page

        path.write_text(single_page(results), encoding="utf-8")
        typer.echo(f"page: {path}", err=True)
