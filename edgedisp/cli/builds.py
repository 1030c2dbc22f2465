"""The commands over recipes and runs: build, plan, pilot, recipes, compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgedisp.cli.app import (
    JsonOption,
    OutOption,
    RecipeArgument,
    SetOption,
    SmokeOption,
    app,
    load_recipe,
    width,
)
from edgedisp.core import distributed as processes
from edgedisp.core.errors import BadInput, BuildFailed
from edgedisp.core.files import data_folder
from edgedisp.core.run import Run

if TYPE_CHECKING:
    from edgedisp.commands.compare import CompareOptions


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
    from edgedisp.core.progress import Screen
    from edgedisp.pipeline.build_plan import build as build_run
    from edgedisp.pipeline.build_plan import run_folder

    loaded = load_recipe(recipe, set_, smoke)
    run = run_folder(loaded, out)
    here = processes.place()
    check_processes(loaded, here.count)
    if not here.leads:
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
    _fail_if_missing(results)


def _show(results: Run, run: Path, as_json: bool) -> None:
    from edgedisp import report
    from edgedisp.core.files import to_json

    verdict = report.verdict(results)
    if as_json:
        page = str(run / "report.html")
        shown = {
            "run": str(run),
            "report": page,
            "verdict": {**to_json(verdict), "sentence": verdict.sentence},
        }
        typer.echo(json.dumps(shown, ensure_ascii=False))
        return
    blocks = [report.table_text(report.table(results), width()), report.search_text(results)]
    blocks += [report.arms_text(results, width()), verdict.sentence, f"report: {run / 'report.html'}"]
    typer.echo("\n\n".join(block for block in blocks if block))


@app.command()
def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    smoke: SmokeOption = False,
    out: OutOption = None,
    probe: Annotated[bool, typer.Option(help="Open the base model and time a few training steps.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Say what a build would do: stages, which are done, steps, time, memory and disk."""
    from edgedisp.commands.plan import make_plan, render
    from edgedisp.core.progress import Screen
    from edgedisp.pipeline.build_plan import run_folder

    loaded = load_recipe(recipe, set_, smoke)
    with Screen("plan") as screen:
        planned = make_plan(loaded, run_folder(loaded, out), probe=probe, observer=screen)
    typer.echo(json.dumps(planned) if as_json else render(planned))


@app.command()
def pilot(
    recipe: RecipeArgument,
    weights: Annotated[
        str, typer.Option(metavar="W,W,...", help="Weights to try, each with all layers and variants.")
    ] = "0.03,0.1,0.3,1,3",
    tokens: Annotated[str, typer.Option(metavar="COUNT", help="Training tokens of each candidate.")] = "20k",
    layers: Annotated[
        str | None, typer.Option(metavar="L,L,...", help="Such as all,last_half; default: the recipe's.")
    ] = None,
    variants: Annotated[
        str | None, typer.Option(metavar="V,V,...", help="Such as angular,cosine; default: the recipe's.")
    ] = None,
    set_: SetOption = None,
    smoke: SmokeOption = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Its folder; default runs/<recipe>-pilot-<hash>.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find out which dispersion settings do anything, on few tokens, before a build spends hours."""
    from edgedisp.commands import pilot as command
    from edgedisp.core.progress import Screen

    loaded = load_recipe(recipe, set_, smoke)
    trials = command.plan(loaded, weights=weights, tokens=tokens, layers=layers, variants=variants)
    folder = command.run_folder(trials, out)
    with Screen(f"{loaded.name} -> {folder}") as screen:
        trials = command.run(trials, folder, screen)
    if as_json:
        typer.echo(json.dumps({"run": str(folder), **command.summary(trials)}, ensure_ascii=False))
    else:
        typer.echo(command.render(trials, width()))
        typer.echo(f"\npicture: {folder / 'pilot.png'}")


@app.command()
def recipes() -> None:
    """List the packaged recipes."""
    for path in sorted(data_folder("recipes").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").strip()
        typer.echo(f"{path.stem:24} {first}")


@app.command()
def compare(
    subjects: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders or report.json files; or two models or bundles."),
    ],
    tasks: Annotated[
        str | None, typer.Option(metavar="T,T,...", help="For two models: tasks or sets, such as small.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For two models: documents for the held-out tasks.")
    ] = None,
    tasks_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="For two models: your own lm-eval tasks.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="For two models: items of each task; default 200.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=8, help="For two models: tokens of a held-out window; default 256.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="For two models: the folder of the report."),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the comparison as a page.")] = None,
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
) -> None:
    """Print the before/after table of runs, joined item by item, or of two models scored here."""
    from edgedisp import report
    from edgedisp.pipeline.run_results import is_run

    _check_page(html)
    runs = [path for path in subjects if is_run(path)]
    if not runs and len(subjects) == 2:
        from edgedisp.commands.compare import CompareOptions

        names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
        options = CompareOptions(names, text, tasks_path, limit or 200, context or 256)
        folder, results = _compare_models(subjects, options, out)
        if html is not None:
            _write_page(results, html)
        if markdown:
            typer.echo(report.table_markdown(report.table(results)))
            typer.echo(report.verdict(results).sentence)
        else:
            _show(results, folder, as_json)
        _fail_if_missing(results)
        return
    if len(runs) < len(subjects):
        other = next(path for path in subjects if not is_run(path))
        raise BadInput(
            f"{other}: holds no report.json, so it is no finished run; compare takes runs, or exactly two "
            "model folders or bundles"
        )
    of_models = {
        "--tasks": tasks, "--text": text, "--tasks-path": tasks_path, "--limit": limit, "--context": context,
        "--out": out,
    }  # fmt: skip
    if given := [name for name, value in of_models.items() if value]:
        raise BadInput(f"{given[0]}: is for two models; runs were scored when they were built")
    _compare_runs(runs, html, as_json, markdown)


def _compare_runs(paths: list[Path], html: Path | None, as_json: bool, markdown: bool) -> None:
    from edgedisp import report
    from edgedisp.core.files import to_json
    from edgedisp.pipeline.run_results import load

    runs = [load(path) for path in paths]
    table = report.compare(runs)
    joined = None
    if len(paths) > 1:
        from edgedisp.commands.compare import join_runs

        joined = join_runs(paths)
    if html is not None:
        _write_page(joined or runs[0], html)
    if as_json:
        verdicts = [{**to_json(one), "sentence": one.sentence} for one in map(report.verdict, runs)]
        shown = {"table": to_json(table), "verdicts": verdicts, "joined": to_json(joined)}
        typer.echo(json.dumps(shown, ensure_ascii=False))
        return
    blocks = [report.table_markdown(table) if markdown else report.table_text(table, width())]
    for run in runs:
        blocks += [
            f"{run.name}: {report.verdict(run).sentence}",
            "" if joined else report.arms_text(run, width()),
        ]
    if joined is not None:
        blocks += [
            report.arms_text(joined, width()),
            *(f"not paired: {reason}" for reason in joined.unpaired),
        ]
    typer.echo("\n\n".join(block for block in blocks if block))


def _compare_models(subjects: list[Path], options: CompareOptions, out: Path | None) -> tuple[Path, Run]:
    from edgedisp.commands.compare import compare_models, default_folder
    from edgedisp.core.progress import Screen

    first, second = subjects
    folder = out or default_folder(first, second, options)
    with Screen(f"{first} and {second} -> {folder}") as screen:
        return folder, compare_models(first, second, options, folder, screen.progress)


def _write_page(results: Run, path: Path) -> None:
    """The report as one page, with nothing beside it."""
    from edgedisp.report.render import single_page

    path.write_text(single_page(results), encoding="utf-8")
    typer.echo(f"page: {path}", err=True)


def _check_page(path: Path | None) -> None:
    """Before anything is scored: whether a page can be written there."""
    if path is not None and not path.parent.is_dir():
        raise BadInput(f"--html {path}: there is no folder {path.parent}")
    if path is not None and path.is_dir():
        raise BadInput(f"--html {path}: is a folder; name a file, such as {path / 'compared.html'}")


def _fail_if_missing(results: Run) -> None:
    """Exit code 1 where a task could not be scored: all else is done, and shown."""
    if missing := results.missing_tasks:
        raise BuildFailed(
            f"the report is written, but {', '.join(missing)} could not be scored: "
            f"{'; '.join(missing.values())}. The same command tries again and keeps the rest"
        )
